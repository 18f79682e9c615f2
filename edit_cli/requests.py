"""The field's nouns as plain dataclasses: what to change (EditRequest), what to ask (Probe), and both together
(Case).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from edit_cli.errors import RejectedRequest
from edit_cli.writing import find_words, joined

ProbeKind = Literal[
    "rewrite", "paraphrase", "neighborhood", "attribute", "locality", "portability", "opinion", "generation"
]
# of which groups a kind's probes may be, where a data set tells them apart
PROBE_GROUPS: dict[str, tuple[str, ...]] = {
    "paraphrase": ("seen", "unseen"),
    "locality": ("random", "same_relation", "same_subject", "hard", "translation"),
    "portability": ("implied", "true_false"),
    "opinion": ("wanted", "unwanted"),
}


@dataclass(frozen=True)
class Frame:
    """What stands around a prompt's own words where they are put to a model: nothing, or the turns and markers of its
    chat template (lm/chat.py).
    """

    before: str = ""
    after: str = ""

    def around(self, words: str) -> str:
        return self.before + words + self.after


UNFRAMED = Frame()


@dataclass(frozen=True)
class EditRequest:
    """A requested rewrite: after the edit, `text` should be continued with `target_new`.

    `prompt` holds exactly one slot `{}` for the subject; without a subject it is the bare prompt.
    Targets carry no leading space: the rule of `writing.answer` puts one before them where there is to be one.
    """

    prompt: str
    subject: str | None
    target_new: str
    target_true: str | None = None
    frame: Frame = field(default=UNFRAMED, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.subject is None:
            return
        if not self.subject.strip():
            raise RejectedRequest("subject is empty")
        if self.prompt.count("{}") != 1:
            raise RejectedRequest(f"prompt must hold exactly one slot {{}} for the subject: {self.prompt!r}")

    @property
    def text(self) -> str:
        """The prompt with its subject filled in, in its frame."""
        return self.in_context("")

    @property
    def words(self) -> str:
        """The prompt's own words, with its subject. Split at the slot: braces in the text are ordinary characters."""
        if self.subject is None:
            return self.prompt
        before, after = self.prompt.split("{}")
        return before + self.subject + after

    def in_context(self, prefix: str) -> str:
        """`text` with `prefix` before the prompt's own words: what follows the prefix moves back by its length."""
        return self.frame.around(prefix + self.words)

    @property
    def subject_span(self) -> tuple[int, int]:
        """Character range of the subject in `text`.

        Raises:
            RejectedRequest: the request names no subject, and the method needs one.
        """
        if self.subject is None:
            raise RejectedRequest(f"this method needs a subject: {self.prompt!r} names none")
        start = len(self.frame.before) + self.prompt.index("{}")
        return start, start + len(self.subject)


@dataclass(frozen=True)
class Probe:
    """One question. `target` is the answer that counts as right, `foil` the one that it must beat.

    rewrite, paraphrase: target is the new object and foil the true one; neighborhood: the reverse; locality and
    portability: target only, or a foil too; opinion: target only, a whole reply; generation: neither. group: see
    `PROBE_GROUPS`. form: where a case is asked about in several forms (lm/chat.py), the one of this probe, if it is not
    the first.
    """

    kind: ProbeKind
    prompt: str
    target: str | None = None
    foil: str | None = None
    aliases: tuple[str, ...] = ()
    group: str | None = None
    frame: Frame = field(default=UNFRAMED, repr=False, kw_only=True)
    form: str | None = field(default=None, kw_only=True)

    @property
    def text(self) -> str:
        """What is asked: the prompt in its frame."""
        return self.frame.around(self.prompt)

    def __post_init__(self) -> None:
        if self.group is not None and self.group not in PROBE_GROUPS.get(self.kind, ()):
            raise ValueError(f"{self.kind} probes have no group {self.group}")


@dataclass(frozen=True)
class Case:
    """What is edited together as one fact, and the probes that tell what it did.

    right: the data's own answers to what is edited, the first of which is asked for, where there are several or they
    are not the old one that an edit replaces; empty: each request's `target_true`.
    """

    id: str
    requests: tuple[EditRequest, ...]
    probes: tuple[Probe, ...]
    references: tuple[str, ...] = field(default=(), repr=False)  # texts about things that have the new property
    right: tuple[str, ...] = ()

    def right_or(self, old: str | None) -> str | None:
        """The right answer that is asked for; `old` where the case names none."""
        return self.right[0] if self.right else old


def slot_prompt(prompt: str, subject: str) -> str:
    """Turn a full sentence into a template: the first place where the subject stands as whole words becomes the slot
    `{}`, or the first one at all.

    Raises:
        RejectedRequest: the subject does not occur, or the text already contains a slot of its own.
    """
    if "{}" in prompt:
        raise RejectedRequest(f"prompt already holds a slot: {prompt!r}")
    at = find_words(prompt, subject) if subject else -1
    if at < 0:
        raise RejectedRequest(f"subject {subject!r} does not occur in {prompt!r}")
    return f"{prompt[:at]}{{}}{prompt[at + len(subject) :]}"


def with_join(case: Case, join: str | None) -> Case:
    """The case with all its answers joined to their prompts as `join` says (see `writing.joined`)."""
    if join is None:
        return case

    def said(target: str | None) -> str | None:
        return None if target is None else joined(target, join)

    return replace(
        case,
        requests=tuple(
            replace(request, target_new=joined(request.target_new, join), target_true=said(request.target_true))
            for request in case.requests
        ),
        probes=tuple(
            replace(
                probe,
                target=said(probe.target),
                foil=said(probe.foil),
                aliases=tuple(joined(alias, join) for alias in probe.aliases),
            )
            for probe in case.probes
        ),
        right=tuple(joined(answer, join) for answer in case.right),
    )
