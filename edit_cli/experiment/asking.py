"""What a model says with an edit in place, of many edits that know nothing of each other: those that can share a
batch are asked about together, each row meeting its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from edit_cli.experiment.attempt import Attempt
from edit_cli.lm.edit import Added, Edit
from edit_cli.lm.model import LM
from edit_cli.metrics.observe import BeforeCache, Observation, observe
from edit_cli.requests import Case

TOGETHER_BYTES = {"cpu": 2**28, "cuda": 2**31}  # of edits that are asked about together, by kind of device
TOLERANCE = 1e-3  # relative, of the likelihoods by which it is checked that edits can share a batch

Seen = dict[str, Observation]
"""By case id, what the model says with the edit of the case in place; empty where there is no edit."""

Beside = dict[str, Added]
"""By module, what an edit adds to what leaves it."""


@dataclass
class Asker:
    """Asks about edits while the model is otherwise unedited.

    before: what the unedited model says, and what is asked. read: after how many of the edits, the first ones,
    perplexity is measured; None: after all. one_by_one: among the present edits one was met that has to
    be attached, as then all of them are.
    """

    lm: LM
    before: BeforeCache
    read: int | None = None
    one_by_one: bool = False
    met: int = 0
    why: str | None = None  # they are asked about one by one; said once, where there are several
    told: bool = False

    def answers(self, attempts: Iterable[Attempt]) -> Iterator[tuple[Attempt, Seen]]:
        """What the model says with the edit of each attempt, in order; the attempts are drawn as they are needed."""
        self.one_by_one = False  # what was met before is no matter: a run that is gone on with has not met it
        held: list[tuple[Attempt, Beside]] = []
        size, most = 0, TOGETHER_BYTES.get(self.lm.device.type, TOGETHER_BYTES["cpu"])
        for done in attempts:
            self.met += 1
            added = {} if done.edit is None else self._added(done.edit)
            self._tell()
            if added is None:
                yield from self._together(held)
                yield done, self.attached(done)
                held, size = [], 0
                continue
            more = sum(term.bytes for term in added.values())
            if held and size + more > most:
                yield from self._together(held)
                held, size = [], 0
            held.append((done, added))
            size += more
        yield from self._together(held)

    def _added(self, edit: Edit) -> Beside | None:
        """What the edit adds beside the model; None if it has to be attached, which is said once."""
        routed = any(attached.kind == "route" for attached in self.lm.attached)
        added = None if self.one_by_one or routed else edit.added(self.lm)
        if added is None:
            self._say("edits are asked about one by one: on this model, this method's have to be attached")
        return added

    def _say(self, why: str) -> None:
        self.one_by_one, self.why = True, why
        self._tell()

    def _tell(self) -> None:
        if self.why is not None and self.met > 1 and not self.told:
            self.lm.monitor.note(self.why)
            self.told = True

    def _together(self, held: Sequence[tuple[Attempt, Beside]]) -> Iterator[tuple[Attempt, Seen]]:
        edited = [(done, added) for done, added in held if done.edit is not None]
        if len(edited) < 2 or not self._agree(edited[0], edited[-1]):
            for done, _ in held:
                yield done, self.attached(done)
            return
        asked = [(case, number) for number, (done, _) in enumerate(edited) for case in done.cases]
        with self.lm.monitor.phase("ask after"), self.lm.edited_by_row([added for _, added in edited]):
            found = iter(self._observed([case for case, _ in asked], [number for _, number in asked]))
        for done, _ in held:
            yield done, {} if done.edit is None else {case.id: next(found) for case in done.cases}

    def attached(self, done: Attempt) -> Seen:
        """What the model says with this edit alone attached."""
        if done.edit is None:
            return {}
        with self.lm.monitor.phase("ask after"), self.lm.edited(done.edit):
            found = self._observed(done.cases)
        return dict(zip((case.id for case in done.cases), found, strict=True))

    def _observed(self, cases: Sequence[Case], edits: Sequence[int] | None = None) -> list[Observation]:
        texts, unread = self.before.texts, list[int]()
        if self.read is not None:
            numbers = sorted(set(edits or [0]))
            unread = numbers[self.read :]
            texts = texts if self.read else ()
            self.read -= len(numbers) - len(unread)
        return observe(self.lm, cases, self.before.options, texts, self.before.seen, edits, unread if edits else ())

    def _agree(self, *edited: tuple[Attempt, Beside]) -> bool:
        """Whether the model says to two prompts what it says with each of two edits attached: some families run their
        projections on other rows than those of the batch.
        """
        lm, attached = self.lm, []
        with lm.monitor.phase("ask after"):
            pairs = [(request.text, request.target_new) for done, _ in edited for request in done.requests[:1]]
            for done, _ in edited:
                assert done.edit is not None
                with lm.edited(done.edit):
                    attached += lm.loglikelihood(pairs)
            with lm.edited_by_row([added for _, added in edited]):
                numbers = [number for number in range(len(edited)) for _ in pairs]
                beside = lm.loglikelihood(pairs * len(edited), numbers)
        agree = all(
            abs(a.nll - b.nll) <= TOLERANCE * max(1.0, abs(a.nll)) for a, b in zip(attached, beside, strict=True)
        )
        if not agree:
            self._say(f"edits are asked about one by one: beside {lm.name} they say something else than attached")
        return agree
