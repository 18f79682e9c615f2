"""`ask`: put prompts to a model with an edit, and to the same model without it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edit_cli.console import ConsoleMonitor, Screen
from edit_cli.edits import store as edit_store
from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.experiment.saved_edits import Base, edits_of
from edit_cli.files.json_files import to_json
from edit_cli.lm.chat import ALL_PLAIN, ChatOptions, Forms, forms_on
from edit_cli.lm.model import LM
from edit_cli.terminal import one_line
from edit_cli.writing import spoken

SIDES = ("base", "edited")


@dataclass(frozen=True)
class Asking:
    """How answers are written.

    max_new_tokens: their length. sample: draw from so many of the likeliest tokens, with `seed`; None: always the
    likeliest. edited_only: the unedited model is not asked. forms: prompts are put to it in the one that is edited.
    """

    max_new_tokens: int = 20
    sample: int | None = None
    seed: int = 0
    edited_only: bool = False
    forms: Forms = ALL_PLAIN

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
        text = self.forms.text(lm.head.asked(prompt))
        if self.sample is None:
            return spoken(lm.generate([text], self.max_new_tokens)[0])
        length = len(lm.head.encode([(text, None)])[0].ids)
        (written,) = lm.sample([text], [self.seed], length + self.max_new_tokens, self.sample)
        (read,) = lm.head.sample([text], [self.seed], length, self.sample)  # the prompt, as it is written out
        return spoken(written.removeprefix(text).removeprefix(read))


@dataclass(frozen=True)
class Chat:
    """How prompts are put to the model, as the command line says; None: as the edit was made."""

    chat: str | None = None
    system: str | None = None

    def forms(self, edits: Sequence[Path], lm: LM) -> Forms:
        """Raises UsageError: the model has no chat template."""
        options, manifest = ChatOptions(), edit_store.read_manifest(edits[-1])
        if self.chat is None and "chat" in manifest["method"]:
            made = manifest["method"]["chat"]
            options = ChatOptions(
                chat="template", statements=made["statements"], system=made["system"], thinking=made["thinking"]
            )
        elif self.chat is not None:
            options = ChatOptions(**dict[str, Any](chat=self.chat))
        if self.system is not None and options.chat == "none":
            raise UsageError("--system: a system prompt is read in chats only; give --chat template, too")
        if self.system is not None:
            options = replace(options, system=self.system)
        return forms_on(lm, options, "--chat")


def run(
    directory: Path, prompts: Sequence[str], base: Base, asking: Asking, as_json: bool, chat: Chat | None = None
) -> int:
    """Answer the prompts, or those that standard input has, a line each."""
    screen = Screen()
    monitor = ConsoleMonitor(screen)
    paths = edits_of(directory)
    with monitor.working():
        lm = base.load(paths[-1], monitor)
        for path in paths:
            lm.attach(edit_store.load(path, lm))
        asking = replace(asking, forms=(chat or Chat()).forms(paths, lm))
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
