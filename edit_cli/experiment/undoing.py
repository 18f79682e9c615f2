"""Facts taken out of saved edits: what is left is made again, on the model that the edit was made for."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edit_cli.config import catalog
from edit_cli.config.as_made import method_node
from edit_cli.config.build import plain_containers
from edit_cli.editors.base import Context, Editor, Method, Remade
from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import Edit
from edit_cli.errors import MissingError, UsageError
from edit_cli.experiment.attempt import attempt
from edit_cli.experiment.saved_edits import attach_base, one_edit, sequence_of
from edit_cli.experiment.saved_steps import SavedSteps
from edit_cli.experiment.setup import method_of
from edit_cli.files.disk import replacing
from edit_cli.lm.model import LM
from edit_cli.report.tables.facts import arrow, asked
from edit_cli.requests import Case, EditRequest
from edit_cli.wording import many

AGAIN = "edited again"
ROOM = 8.0  # as protocol.edits_room
Request = Mapping[str, Any]


@dataclass(frozen=True)
class Undoing:
    """Facts to take out, found without a model.

    edits: directories of edits, each of which stands on those before it: the chain that ends in the given one, or the
    steps of a sequence. is_sequence: the latter, in which all steps from the first that loses a fact on are made
    again, and all that is left becomes one edit. revoked: {which of them: numbers of its facts}.
    """

    edits: tuple[Path, ...]
    is_sequence: bool
    revoked: Mapping[int, frozenset[int]]

    @classmethod
    def of(cls, directory: Path, facts: Sequence[str]) -> Undoing:
        """Numbers count in the edit, or the step, that is given; words are looked for in all.

        Raises:
            UsageError: no such fact, several where one is meant, facts of several edits of a chain, or none would be
                left.
            MissingError: an edit is damaged.
        """
        steps, given = sequence_of(directory)
        edits = tuple(steps or edit_store.chain(one_edit(directory)))
        revoked = _found(edits, facts, given if steps else len(edits) - 1)
        if len(revoked) > 1 and not steps:
            raise UsageError(
                f"these facts are of {' and '.join(str(edits[which]) for which in revoked)}: revoke those of one"
            )
        undoing = cls(edits, bool(steps), revoked)
        if not undoing.left:
            below = () if steps else edits[: undoing.first]
            instead = f"what it stands on is there as {below[-1]}" if below else "the model without it is the model"
            raise UsageError(f"{undoing.at} has no other fact, so nothing would be left of it: {instead}")
        return undoing

    @property
    def first(self) -> int:
        """Which of the edits is the first that loses a fact."""
        return min(self.revoked)

    @property
    def at(self) -> Path:
        return self.edits[self.first]

    @cached_property
    def manifests(self) -> tuple[dict[str, Any], ...]:
        return tuple(map(edit_store.read_manifest, self.edits))

    @property
    def above(self) -> tuple[Path, ...]:
        """Edits that stand on the one that is made again, and are not."""
        return () if self.is_sequence else self.edits[self.first + 1 :]

    @property
    def taken(self) -> list[Request]:
        return [
            self.manifests[which]["requests"][number]
            for which in self.revoked
            for number in sorted(self.revoked[which])
        ]

    def left_of(self, which: int) -> list[Request]:
        without = self.revoked.get(which, frozenset())
        return [one for number, one in enumerate(self.manifests[which]["requests"]) if number not in without]

    @property
    def left(self) -> list[Request]:
        """The facts of what is written."""
        every = range(len(self.edits)) if self.is_sequence else (self.first,)
        return [request for which in every for request in self.left_of(which)]

    @property
    def count(self) -> int:
        """Facts before any is taken out."""
        return len(self.left) + len(self.taken)

    def method(self, model: str, model_id: str, given: Sequence[str]) -> tuple[Method, dict[str, Any]]:
        """The method as the edit was made with it, and what the new edit says of it. given: KEY=VALUE of the user's.

        Raises:
            As `method_node` and `Editor.require`.
        """
        told = self.manifests[self.first]["method"]
        packaged = model in catalog.names("model")
        values = {} if packaged else {"model.id": model_id, "model.name": model}
        node = method_node(told, {"model": model if packaged else "hf"}, values, given, self.at / edit_store.MANIFEST)
        kept = {key: told[key] for key in ("name", "chat") if key in told}
        chosen = [text.partition("=")[2] for text in given if text.startswith("method=")]
        method = method_of(node)
        method.require(model, Context())
        return method, {**plain_containers(node), **kept, **({"name": chosen[-1]} if chosen else {})}

    def write(self, lm: LM, method: Method, about: dict[str, Any], out: Path) -> tuple[str, str]:
        """(id of the last edit that is written to `out`, in which way it was made). lm: with nothing attached, as it is
        again afterwards.

        Raises:
            MissingError: an edit is damaged or was made for another model, or a fact cannot be edited any more.
            UsageError: what comes out is no finite edit.
        """
        editor = method.begin(lm, Context())
        editor.warm_up()
        undone = {"of": self.manifests[self.first]["id"], "revoked": self.taken}
        attached = len(lm.attached)
        try:
            if self.is_sequence:
                self._write_steps(editor, about, out, {**undone, "way": AGAIN})
                return edit_store.read_manifest(sequence_of(out)[0][-1])["id"], AGAIN
            below = self.edits[self.first - 1] if self.first else None
            remade = self._one(editor, below, about["type"])
            self._refuse_infinite(remade.edit)
            requests = list(map(edit_store.request_of, self.left))
            undone = {**undone, "way": remade.way}
            return edit_store.save(remade.edit, out, lm, requests, about, below, undone=undone), remade.way
        finally:
            while len(lm.attached) > attached:
                lm.detach()

    def _refuse_infinite(self, edit: Edit) -> None:
        if not edit.is_finite:
            raise UsageError(f"{self.at}: without these facts the edit came out as NaN or infinite, and is not kept")

    def _one(self, editor: Editor[Any], below: Path | None, kind: str) -> Remade:
        requests = list(map(edit_store.request_of, self.manifests[self.first]["requests"]))
        if below is not None:
            attach_base(below, editor, kind)
        edit = edit_store.load(self.at, editor.lm)
        with editor.lm.monitor.phase("edit"):
            remade = editor.without(requests, self.revoked[self.first], edit, edit_store.by_fact(self.at))
        return remade or Remade(_again(editor, self.left), AGAIN)

    def _write_steps(self, editor: Editor[Any], about: dict[str, Any], out: Path, undone: Mapping[str, Any]) -> None:
        """The steps before the first that loses a fact, as they are, and the later ones made again on them."""
        lm, numbers = editor.lm, [int(path.name) for path in self.edits]
        with replacing(out, f"--out {out}") as folder, lm.monitor.task("steps", len(numbers)) as advance:
            kept = self._copied(folder, editor.looks_back)
            saved = SavedSteps(folder, lm, editor, ROOM)
            for number in numbers[:kept]:
                edit, _ = saved.read(number)
                if edit is not None:
                    lm.attach(edit)
                advance(1)
            for which, number in list(enumerate(numbers))[kept:]:
                if left := self.left_of(which):
                    began = time.perf_counter()
                    edit = _again(editor, left)
                    self._refuse_infinite(edit)
                    made = {"seconds": round(time.perf_counter() - began, 3), "step": number}
                    requests = list(map(edit_store.request_of, left))
                    saved.save(number, edit, requests, {**about, "made": made}, undone if which >= self.first else None)
                    lm.attach(edit)
                    saved.attached(number, about)
                advance(1)

    def _copied(self, folder: Path, looks_back: int) -> int:
        """Copy the steps before the first that loses a fact; how many these are. None, where only the sum of more than
        these is left of their weights.
        """
        steps = self.edits[: self.first]
        let_go = [path for path in steps if edit_store.read_manifest(path).get("state_after")]
        sums = [path for path in self.at.parent.glob(f"{edit_store.STATE}*") if (path / edit_store.MANIFEST).is_file()]
        usable = [path for path in sums if steps and _number(path) <= _number(steps[-1]) - looks_back]
        if let_go and (not usable or _number(let_go[-1]) > max(map(_number, usable))):
            return 0
        for path in (*steps, *usable):
            shutil.copytree(path, folder / path.name)
        return len(steps)


def _number(path: Path) -> int:
    """Of a step, or of the last one of a sum."""
    return int(path.name.removeprefix(edit_store.STATE))


def _again(editor: Editor[Any], left: Sequence[Request]) -> Edit:
    requests: list[EditRequest] = list(map(edit_store.request_of, left))
    done = attempt(editor, [Case(str(number), (request,), ()) for number, request in enumerate(requests, 1)])
    if done.edit is None or done.rejected:
        raise MissingError("; ".join(f"fact {number}: {why}" for number, why in done.rejected.items()))
    return done.edit


def _found(edits: Sequence[Path], facts: Sequence[str], numbered: int | None) -> dict[int, frozenset[int]]:
    """{which of the edits: numbers of its facts}. numbered: the one in which numbers count; None: there is none."""
    found: dict[int, frozenset[int]] = {}
    every = [edit_store.read_manifest(path)["requests"] for path in edits]
    for fact in facts:
        places = [
            (which, number)
            for which, requests in enumerate(every)
            for number, request in enumerate(requests)
            if fact in (request["subject"], asked(request), arrow(request))
        ]
        counted = len(every[numbered]) if numbered is not None else 0
        if not places and numbered is not None and fact.isdecimal() and 1 <= int(fact) <= counted:
            places = [(numbered, int(fact) - 1)]
        if len(places) != 1:
            raise UsageError(_unclear(fact, places, edits, every, numbered))
        ((which, number),) = places
        found[which] = found.get(which, frozenset()) | {number}
    return found


def _unclear(
    fact: str,
    places: Sequence[tuple[int, int]],
    edits: Sequence[Path],
    every: Sequence[Sequence[Request]],
    numbered: int | None,
) -> str:
    if not places and numbered is None:
        what = f"is none of the {many(sum(map(len, every)), 'fact')} of {edits[0].parent}"
        return f"--fact {fact} {what}: give a subject or a statement; numbers count in a step, such as {edits[0]}"
    if not places:
        at = edits[numbered or 0]
        what = f"is none of the {many(len(every[numbered or 0]), 'fact')} of {at}"
        return f"--fact {fact} {what}: give a number or a subject, as `edit-cli edits {at} --all` lists them"
    step = "" if numbered is not None else "/"
    told = "; ".join(
        f"{edits[which].name + step if step else ''}{number + 1}: {arrow(every[which][number])}"
        for which, number in places[:5]
    )
    return f"--fact {fact} is {len(places):,} facts ({told}): give a number, or the whole statement"
