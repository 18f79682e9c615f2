"""`ask`: put prompts to a model with an edit, and to the same model without it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edit_cli.console import ConsoleMonitor, Screen
from edit_cli.edits import store as edit_store
from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.experiment.saved_edits import Base, edits_of
from edit_cli.files.json_files import to_json
from edit_cli.lm.model import LM
from edit_cli.terminal import one_line

SIDES = ("base", "edited")


@dataclass(frozen=True)
class Asking:
    """How answers are written.

    max_new_tokens: their length. sample: draw from so many of the likeliest tokens, with `seed`; None: always the
    likeliest. edited_only: the unedited model is not asked.
    """

    max_new_tokens: int = 20
    sample: int | None = None
    seed: int = 0
    edited_only: bool = False

    def answers(self, lm: LM, prompt: str) -> dict[str, str]:
        """{"base", "edited"}: how either goes on.

        Raises:
            UsageError: this model cannot be asked so; says why.
        """
        if not prompt.strip():
            raise UsageError("this prompt cannot be asked: it is empty")
        try:
            found = {} if self.edited_only else {SIDES[0]: self._unedited(lm, prompt)}
            return {**found, SIDES[1]: self._answer(lm, prompt)}
        except RejectedRequest as error:
            raise UsageError(f"this prompt cannot be asked: {error}") from None

    def _unedited(self, lm: LM, prompt: str) -> str:
        with lm.pristine():
            return self._answer(lm, prompt)

    def _answer(self, lm: LM, prompt: str) -> str:
        """One prompt at a time, so that an answer does not hang on what else is asked."""
        if self.sample is None:
            return lm.generate([prompt], self.max_new_tokens)[0]
        length = len(lm.head.encode([(prompt, None)])[0].ids) + self.max_new_tokens
        return lm.sample([prompt], [self.seed], length, self.sample)[0].removeprefix(prompt)


def run(directory: Path, prompts: Sequence[str], base: Base, asking: Asking, as_json: bool) -> int:
    """Answer the prompts, or those that standard input has, a line each."""
    screen = Screen()
    monitor = ConsoleMonitor(screen)
    paths = edits_of(directory)
    with monitor.working():
        lm = base.load(paths[-1], monitor)
        for path in paths:
            lm.attach(edit_store.load(path, lm))
    for prompt in prompts or _lines(screen):
        try:
            found = asking.answers(lm, prompt)
        except UsageError as error:
            if prompts:
                raise
            screen.error(str(error))
            continue
        if as_json:
            screen.line(to_json({"prompt": prompt, **found}))
            continue
        if prompts or not _is_typed():
            screen.line(prompt)
        for side, answer in found.items():
            screen.line(f"  {side:<{max(map(len, SIDES))}}  {one_line(answer.strip())}")
    return 0


def _is_typed() -> bool:
    """Whether prompts are written in a terminal, which shows them by itself."""
    return sys.stdin is not None and sys.stdin.isatty()


def _lines(screen: Screen) -> Iterator[str]:
    """Lines of standard input that are not blank."""
    if sys.stdin is None:
        return
    if _is_typed():
        screen.note("one prompt a line; Ctrl-D ends")
    while True:
        if _is_typed():
            screen.err.print("> ", end="")
        line = sys.stdin.buffer.readline()
        if not line:
            return
        # what is no UTF-8 is asked with signs in its place, rather than not at all
        if (prompt := line.decode("utf-8", errors="replace").rstrip("\r\n")).strip():
            yield prompt
