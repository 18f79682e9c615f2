"""What a frozen model says of a prompt does not change while an editor is trained on it, so it is computed once and
kept.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
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
from edit_cli.lm.heads.answers import Answers
from edit_cli.lm.hooks import on_output
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row

FILE = "kept.safetensors"


class BaseModelCache:
    """Answers and gradients of one unedited model.

    It keeps rows of one stack of blocks only (a decoder or an encoder): there the states below the lowest edited layer
    make up a pass. A float32 result depends, in its last digit, on the rows in the same batch. So a training that goes
    on reads back what was kept, and does not ask again in other batches.
    """

    def __init__(self, lm: LM, budget: int = 0) -> None:
        """budget: bytes; once they are full, nothing more is kept. 0: everything is computed each time."""
        self.lm, self.budget, self.used = lm, budget, 0
        self.beyond = 0  # tokens that a pass runs more than a row has (−1 where the last answer token is never fed)
        self._kept: dict[Any, tuple[Tensor, ...]] = {}
        self._rows: dict[tuple[str, str], Any] = {}
        self._unwritten: list[Any] = []

    @property
    def works(self) -> bool:
        return self.budget > 0 and len(self.lm.layout.stacks) == 1 and not self.lm.attached

    def rows(self, pairs: Sequence[tuple[str, str]]) -> list[Any]:
        """As `encode` of the model's head; tokenizing takes a twentieth of a training otherwise."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._rows]
        if new:
            self._rows.update(zip(new, self.lm.head.encode(new), strict=True))
        return [self._rows[pair] for pair in pairs]

    def recall(
        self, keys: Sequence[Any], make: Callable[[list[int]], Sequence[tuple[Tensor, ...]]]
    ) -> list[tuple[Tensor, ...]]:
        """What belongs to each key. make: computes what is not there yet, given the indices of its keys."""
        if not self.works:
            return list(make(list(range(len(keys)))))
        new = [index for index, key in enumerate(keys) if key not in self._kept]
        fresh = dict(zip((keys[index] for index in new), make(new), strict=True)) if new else {}
        every = [self._kept.get(key) or fresh[key] for key in keys]
        self._keep(fresh)
        return every

    def answers(self, rows: Sequence[Row], lowest: int) -> tuple[Tensor | None, Answers]:
        """(states (rows, tokens, width) that leave block lowest − 1, None for the first block; answers with their
        ends).
        """
        if not self.works:
            return base_answers(self.lm, rows, lowest)

        def ask(new: list[int]) -> list[tuple[Tensor, ...]]:
            states, answers = base_answers(self.lm, [rows[i] for i in new], lowest)
            if states is not None:
                self.beyond = states.shape[1] - max(len(rows[i].ids) for i in new)
            counts = torch.bincount(answers.rows, minlength=len(new)).tolist()
            parts = zip(answers.logits.split(counts), answers.labels.split(counts), strict=True)
            return [(*part, *(() if states is None else (states[i],))) for i, part in enumerate(parts)]

        every = self.recall([("answer", lowest, row.ids, row.target) for row in rows], ask)
        logits, labels = (torch.cat([parts[n] for parts in every]) for n in (0, 1))
        number = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(parts[1]) for parts in every])).to(
            logits.device
        )
        if not lowest:
            return None, Answers(logits, labels, number)
        longest = max(len(row.ids) for row in rows) + self.beyond
        return _stacked([parts[2][:longest] for parts in every]), Answers(logits, labels, number)

    def gradients(self, rows: Sequence[Row], modules: Sequence[str]) -> dict[str, Gradient]:
        """As `factored_gradients.gradients`."""
        if not self.works:
            return gradients(self.lm, rows, modules)

        def differentiate(new: list[int]) -> list[tuple[Tensor, ...]]:
            whole = gradients(self.lm, [rows[i] for i in new], modules)
            parts = [
                *(part for name in modules for part in (whole[name].inputs, whole[name].outputs)),
                whole[modules[0]].losses,
            ]
            return [tuple(part[i] for part in parts) for i in range(len(new))]

        every = self.recall([("gradient", tuple(modules), row.ids, row.target) for row in rows], differentiate)
        wide = [_stacked([parts[n] for parts in every]) for n in range(2 * len(modules))]
        losses = torch.stack([parts[-1] for parts in every])
        return {name: Gradient(wide[2 * n], wide[2 * n + 1], losses) for n, name in enumerate(modules)}

    def _keep(self, fresh: dict[Any, tuple[Tensor, ...]]) -> None:
        for key, parts in fresh.items():
            size = sum(part.numel() * part.element_size() for part in parts)
            if self.used + size <= self.budget:
                self.used += size
                self._kept[key] = tuple(part.detach().clone() for part in parts)  # not views of a whole batch
                self._unwritten.append(key)

    def write(self, folder: Path) -> None:
        """What is in no folder yet; none is made where there is nothing."""
        if not self._unwritten:
            return
        tensors = {
            f"{number}.{n}": part
            for number, key in enumerate(self._unwritten)
            for n, part in enumerate(self._kept[key])
        }
        with replacing(folder) as temporary:
            write_tensors(temporary / FILE, tensors, {"keys": json.dumps(self._unwritten), "beyond": str(self.beyond)})
        self._unwritten = []

    def read(self, folder: Path) -> None:
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
                _as_key(key): tuple(tensors[f"{number}.{n}"].to(self.lm.device) for n in range(counts[str(number)]))
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
        answers = lm.head.answers(rows, end=True)
    return (seen[0] if seen else None), answers


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """(rows, tokens, width), shorter ones with zeros behind them: nothing attends to what is there."""
    longest = max(len(part) for part in parts)
    return torch.stack([pad(part, (0, 0, 0, longest - len(part))) for part in parts])
