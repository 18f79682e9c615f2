"""What a frozen model says of a prompt does not change while an editor is trained on it, so it is computed once and
kept.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from edit_cli.editors.meta.factored_gradients import Gradient, gradients, sparing
from edit_cli.errors import MissingError
from edit_cli.files.disk import replacing
from edit_cli.files.json_files import parse
from edit_cli.files.tensors import read_tensors, write_tensors
from edit_cli.lm.answers import Answers
from edit_cli.lm.hooks import on_output
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row

FILE = "kept.safetensors"


@dataclass
class Memory:
    """Of one unedited model. budget: bytes; once they are full, nothing more is kept.

    Rows of one stack of blocks only (a decoder or an encoder): there the states below the lowest edited layer make up a
    pass.

    A float32 result hangs, in its last digit, on the rows that were asked with it. So a training that goes on reads
    what it had in mind, and does not ask again in other batches.
    """

    budget: int
    used: int = 0
    beyond: int = 0  # tokens that a pass runs more than a row has (−1 where the last answer token is never fed)
    _seen: dict[Any, tuple[Tensor, ...]] = field(default_factory=dict)
    _rows: dict[tuple[str, str], Any] = field(default_factory=dict)
    _unwritten: list[Any] = field(default_factory=list)

    def works(self, lm: LM) -> bool:
        return self.budget > 0 and len(lm.layout.stacks) == 1 and not lm.attached

    def rows(self, lm: LM, pairs: Sequence[tuple[str, str]]) -> list[Any]:
        """As `encode` of the model's head; tokenising takes a twentieth of a training otherwise."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._rows]
        if new:
            self._rows.update(zip(new, lm.head.encode(new), strict=True))
        return [self._rows[pair] for pair in pairs]

    def recall(
        self, keys: Sequence[Any], make: Callable[[list[int]], Sequence[tuple[Tensor, ...]]]
    ) -> list[tuple[Tensor, ...]]:
        """What belongs to each key. make: finds what is not there yet, given the places of its keys."""
        new = [place for place, key in enumerate(keys) if key not in self._seen]
        fresh = dict(zip((keys[place] for place in new), make(new), strict=True)) if new else {}
        every = [self._seen.get(key) or fresh[key] for key in keys]
        self._keep(fresh)
        return every

    def answers(self, lm: LM, rows: Sequence[Row], lowest: int) -> tuple[Tensor | None, Answers]:
        """(states (rows, tokens, width) that leave block lowest − 1, None for the first block; answers with their
        ends).
        """

        def ask(new: list[int]) -> list[tuple[Tensor, ...]]:
            states, found = base_answers(lm, [rows[i] for i in new], lowest)
            if states is not None:
                self.beyond = states.shape[1] - max(len(rows[i].ids) for i in new)
            counts = torch.bincount(found.rows, minlength=len(new)).tolist()
            parts = zip(found.logits.split(counts), found.labels.split(counts), strict=True)
            return [(*part, *(() if states is None else (states[place],))) for place, part in enumerate(parts)]

        every = self.recall([("answer", lowest, row.ids, row.target) for row in rows], ask)
        logits, labels = (torch.cat([parts[n] for parts in every]) for n in (0, 1))
        number = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(parts[1]) for parts in every])).to(
            logits.device
        )
        if not lowest:
            return None, Answers(logits, labels, number)
        longest = max(len(row.ids) for row in rows) + self.beyond
        return _stacked([parts[2][:longest] for parts in every]), Answers(logits, labels, number)

    def gradients(self, lm: LM, rows: Sequence[Row], modules: Sequence[str]) -> dict[str, Gradient]:
        """As `gradients.gradients`."""

        def find(new: list[int]) -> list[tuple[Tensor, ...]]:
            found = gradients(lm, [rows[i] for i in new], modules)
            parts = [
                *(part for name in modules for part in (found[name].inputs, found[name].outputs)),
                found[modules[0]].losses,
            ]
            return [tuple(part[place] for part in parts) for place in range(len(new))]

        every = self.recall([("gradient", tuple(modules), row.ids, row.target) for row in rows], find)
        wide = [_stacked([parts[n] for parts in every]) for n in range(2 * len(modules))]
        losses = torch.stack([parts[-1] for parts in every])
        return {name: Gradient(wide[2 * n], wide[2 * n + 1], losses) for n, name in enumerate(modules)}

    def _keep(self, fresh: dict[Any, tuple[Tensor, ...]]) -> None:
        for key, parts in fresh.items():
            size = sum(part.numel() * part.element_size() for part in parts)
            if self.used + size <= self.budget:
                self.used += size
                self._seen[key] = tuple(part.detach().clone() for part in parts)  # not views of a whole batch
                self._unwritten.append(key)

    def write(self, folder: Path) -> None:
        """What is in no folder yet; none is made where there is nothing."""
        if not self._unwritten:
            return
        tensors = {
            f"{number}.{n}": part
            for number, key in enumerate(self._unwritten)
            for n, part in enumerate(self._seen[key])
        }
        with replacing(folder) as temporary:
            write_tensors(temporary / FILE, tensors, {"keys": json.dumps(self._unwritten), "beyond": str(self.beyond)})
        self._unwritten = []

    def read(self, folder: Path, device: torch.device) -> None:
        """Take up what `write` wrote.

        Raises:
            MissingError: it is damaged; says what to delete.
        """
        remedy = f"delete {folder.parent}, and the training starts over"
        tensors, about = read_tensors(folder / FILE, remedy)
        try:
            keys, beyond = parse(about["keys"]), int(about["beyond"])
            counts = Counter(name.partition(".")[0] for name in tensors)
            fresh = {
                _as_key(key): tuple(tensors[f"{number}.{n}"].to(device) for n in range(counts[str(number)]))
                for number, key in enumerate(keys)
            }
        except (KeyError, TypeError, ValueError):
            raise MissingError(f"{folder / FILE} is damaged: its parts do not belong together; {remedy}") from None
        self._keep(fresh)
        self.beyond, self._unwritten = beyond, []


def _as_key(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_as_key, value)) if isinstance(value, list) else value


def base_answers(lm: LM, rows: Sequence[Row], lowest: int) -> tuple[Tensor | None, Answers]:
    """What the model says, and the states that leave block lowest − 1 (None for the first one, and for models of two
    stacks).
    """
    seen: list[Tensor] = []
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(sparing(lm, rows, range(lm.layout.depth)))
        if lowest and len(lm.layout.stacks) == 1:
            stack.enter_context(
                on_output(lm.module(lm.layout.block(lowest - 1)), lambda states: seen.append(states.clone()), len(rows))
            )
        found = lm.head.answers(rows, end=True)
    return (seen[0] if seen else None), found


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """(rows, tokens, width), shorter ones with zeros behind them: nothing attends to what is there."""
    longest = max(len(part) for part in parts)
    return torch.stack([pad(part, (0, 0, 0, longest - len(part))) for part in parts])
