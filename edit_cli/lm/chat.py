"""Forms in which a model is asked: plain text, or turns of a conversation in the chat template of its tokenizer.

A template becomes a `Frame`, the text that stands around a prompt's own words. Cases are put into frames once, before
anything is edited or asked; methods and metrics see texts, and find the subject in them by its characters as ever.
Imports nothing heavy: help and completion read the settings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Len

from edit_cli.config.schema import Config, Mark, Sentence
from edit_cli.errors import UsageError
from edit_cli.requests import UNFRAMED, Case, EditRequest, Frame, Probe
from edit_cli.writing import JOINS, bare

if TYPE_CHECKING:
    from edit_cli.lm.model import LM

PLAIN, CHAT = "plain", "chat"
QUESTION_MARKS = ("?", "\uff1f", "\u061f", "\u037e")  # Latin, full-width, Arabic, Greek
STATEMENTS = {  # what the user says of a statement that is to be completed; {} stands for it
    "begin": "State a fact.",  # and the assistant begins with the statement
    "complete": "Complete this sentence: {}",
    "bare": "{}",
}
WORDS, REPLY = "QWORDSQ", "QREPLYQ"  # stand for a prompt and its answer while a template is read
TODAY = datetime(2025, 1, 1)  # for templates that tell the date: the same command gives the same text on any day
INSTRUCT = re.compile(r"(?:^|[^a-z])(?:instruct|chat|it)(?:$|[^a-z])", re.IGNORECASE)
OPEN_THOUGHT = re.compile(r"<think>\s*$")
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


@dataclass(frozen=True, kw_only=True)
class ChatOptions(Config):
    """In which forms facts are edited and asked."""

    place = "protocol"

    chat: Literal["none", "template", "auto"] = "none"
    """Put facts into the model's chat template; auto: if it is an instruct model with one; none: plain text
    (docs/chat.md)."""
    asked: Annotated[list[Literal["plain", "chat"]], Len(1), Mark.DISTINCT] | None = None
    """Forms in which facts are asked, side by side; null: the one in which they are edited."""
    statements: Literal["begin", "complete", "bare"] = "begin"
    """How a chat puts what is no question: the assistant begins with it, the user asks to complete it, or it is all
    that the user says."""
    system: Sentence | None = None
    """The system prompt of a chat; null: the template's own, if it has one."""
    thinking: bool = False
    """Let a reasoning model think before it answers; else its thought is empty, and the answer comes at once."""

    @property
    def as_made(self) -> dict[str, Any]:
        """What a saved edit says of the chats that its facts stood in."""
        return {"statements": self.statements, "system": self.system, "thinking": self.thinking}

    side_by_side: ClassVar[bool] = False  # whether the command can ask in several forms

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.asked or ()) > 1 and not self.side_by_side:
            raise UsageError("protocol.asked: evaluate and edit can ask in both forms; give one of them here")
        if self.system is not None and self.chat == "none" and "chat" not in (self.asked or ()):
            raise UsageError("protocol.system: a system prompt is read in chats only; give protocol.chat=template, too")


@dataclass(frozen=True)
class Turn:
    """How words become a turn. join: what stands between that and the answer, a key of `writing.JOINS`; None: what
    the characters that meet ask for.
    """

    frame: Frame
    join: str | None

    def target(self, text: str | None) -> str | None:
        """An answer as it follows the turn."""
        return text if text is None or self.join is None else JOINS[self.join] + bare(text)


AS_WRITTEN = Turn(UNFRAMED, None)


@dataclass(frozen=True)
class Template:
    """A chat template, read once: what stands around questions and around statements."""

    question: Turn
    statement: Turn

    def turn(self, words: str) -> Turn:
        return self.question if is_question(words) else self.statement


@dataclass(frozen=True)
class Forms:
    """The form in which a run's facts are edited, and those in which they are asked.

    template: None where all is plain.
    """

    edited: str = PLAIN
    asked: tuple[str, ...] = (PLAIN,)
    template: Template | None = None

    def case(self, case: Case) -> Case:
        """The case in these forms: its probes in each of those that are asked, the first of which is not named.

        Texts for fluency (generation probes) stay plain, and are asked for once: like perplexity, they tell of running
        text.
        """
        if self.template is None:
            return case
        probes = [
            self._asked(probe, form, form if number else None)
            for number, form in enumerate(self.asked)
            for probe in case.probes
            if not (number and probe.kind == "generation")
        ]
        turns = [self.turn(request.words, self.edited) for request in case.requests] or [AS_WRITTEN]
        return replace(
            case,
            requests=tuple(map(self._edited, case.requests)),
            probes=tuple(probes),
            right=tuple(str(turns[0].target(answer)) for answer in case.right),
        )

    def only_edited(self) -> Forms:
        """The same, asked in no other form than the one that is edited."""
        return replace(self, asked=(self.edited,))

    def turn(self, words: str, form: str) -> Turn:
        """How words are put in a form."""
        return AS_WRITTEN if form == PLAIN or self.template is None else self.template.turn(words)

    def text(self, words: str) -> str:
        """Words as they are asked in the form that is edited."""
        return self.turn(words, self.edited).frame.around(words)

    def told(self) -> dict[str, Any] | None:
        """What a run stores (JSON-able), to the letter; None where all is plain."""
        if self.template is None:
            return None
        frames = {name: getattr(self.template, name).frame for name in ("question", "statement")}
        return {
            "edited": self.edited,
            "asked": list(self.asked),
            "frames": {name: [frame.before, frame.after] for name, frame in frames.items()},
        }

    def _edited(self, request: EditRequest) -> EditRequest:
        turn = self.turn(request.words, self.edited)
        new = str(turn.target(request.target_new))
        return replace(request, target_new=new, target_true=turn.target(request.target_true), frame=turn.frame)

    def _asked(self, probe: Probe, form: str, name: str | None) -> Probe:
        if probe.kind == "generation":
            return probe
        turn = self.turn(probe.prompt, form)
        return replace(
            probe,
            target=turn.target(probe.target),
            foil=turn.target(probe.foil),
            aliases=tuple(str(turn.target(alias)) for alias in probe.aliases),
            frame=turn.frame,
            form=name,
        )


ALL_PLAIN = Forms()


def is_question(words: str) -> bool:
    """Whether the words end with a question mark; all else is a statement that waits for its end."""
    return words.rstrip().endswith(QUESTION_MARKS)


def forms_on(lm: LM, options: ChatOptions, setting: str = "chat") -> Forms:
    """As `forms`, on a model that is loaded. setting: what asks for the form, for messages. Raises as `forms`."""
    return forms(options, lm.tokenizer, (lm.name, lm.id), _stops(lm), setting)


def hint(lm: LM, options: ChatOptions) -> str | None:
    """What to tell the user of an instruct model whose facts are edited and asked as plain text."""
    if options.chat != "none" or options.asked is not None:
        return None
    with suppress(UsageError):  # whatever is wrong with a template that nobody wants
        if is_instruct(lm.tokenizer, (lm.name, lm.id), _stops(lm)):
            return (
                f"{lm.name} has a chat template and is edited and asked as plain text; protocol.chat=template edits and"
                " asks in chats (docs/chat.md)"
            )
    return None


def _stops(lm: LM) -> list[int]:
    config = getattr(lm.model, "generation_config", None)  # a classifier writes nothing
    stops = getattr(config, "eos_token_id", None)
    return [id for id in (stops if isinstance(stops, list) else [stops]) if id is not None]


def forms(
    options: ChatOptions, tokenizer: Any, names: Sequence[str], stops: Sequence[int], setting: str = "protocol.chat"
) -> Forms:
    """The forms that the settings mean on a model.

    Args:
        options: the settings.
        tokenizer: of the model.
        names: what the model is called, and where it is from.
        stops: ids of the tokens after which it stops writing.
        setting: what asks for the form, for messages.

    Raises:
        UsageError: the model has no chat template, or one that cannot be used so; names the setting.
    """
    auto = options.chat == "auto" and is_instruct(tokenizer, names, stops)
    edited = CHAT if auto or options.chat == "template" else PLAIN
    asked = tuple(options.asked or [edited])
    if CHAT not in (edited, *asked):
        return Forms(edited, asked)
    if not getattr(tokenizer, "chat_template", None):
        said = f"{setting}={options.chat}" if edited == CHAT else f"protocol.asked=[{', '.join(asked)}]"
        raise UsageError(
            f"{said}: {names[0]} has no chat template in its tokenizer's files; leave it out, or choose an instruct"
            " model"
        )
    return Forms(edited, asked, read(tokenizer, options))


def read(tokenizer: Any, options: ChatOptions) -> Template:
    """The frames that the tokenizer's chat template puts around what a user says. Raises as `forms`."""
    question = _frame(tokenizer, options, WORDS)
    join = _join(tokenizer, options)
    said = STATEMENTS[options.statements]
    if options.statements == "begin":
        opening = _frame(tokenizer, options, WORDS).around(said) + (JOINS["space"] if join == "space" else "")
        return Template(Turn(question, join), Turn(Frame(opening), None))
    return Template(Turn(question, join), Turn(_frame(tokenizer, options, said.format(WORDS)), join))


def marks_turns(tokenizer: Any, token: str) -> bool:
    """Whether a token is one that the chat template, if there is one, parts turns with: text that begins with it is no
    running text.
    """
    if not tokenizer.chat_template or not token:
        return False
    text = _rendered(tokenizer, ChatOptions(), WORDS)
    return token in text.removeprefix(token)


def _frame(tokenizer: Any, options: ChatOptions, said: str) -> Frame:
    text = _rendered(tokenizer, options, said)
    if text.count(WORDS) != 1:
        raise UsageError("protocol.chat: the model's chat template does not repeat what the user says once: use none")
    for token in tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"]):  # it puts them there by itself
        text = text.removeprefix(token)
    # a thought that the template begins is left to the model, or ended at once
    text = OPEN_THOUGHT.sub("" if options.thinking else EMPTY_THOUGHT, text)
    before, after = text.split(WORDS)
    return Frame(before, after)


def _join(tokenizer: Any, options: ChatOptions) -> str:
    """What the template puts before a reply: a space, or nothing."""
    begun, whole = _rendered(tokenizer, options, WORDS), _rendered(tokenizer, options, WORDS, REPLY)
    return "space" if whole.removeprefix(begun).startswith(f" {REPLY}") else "none"


def _rendered(tokenizer: Any, options: ChatOptions, said: str, reply: str | None = None) -> str:
    turns = [] if options.system is None else [{"role": "system", "content": options.system}]
    turns.append({"role": "user", "content": said})
    if reply is not None:
        turns.append({"role": "assistant", "content": reply})
    try:
        return str(
            tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=reply is None,
                enable_thinking=options.thinking,
                strftime_now=TODAY.strftime,
            )
        )
    except Exception as error:  # a template is a program: it may raise whatever it likes
        key = "chat" if options.system is None else "system"
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"protocol.{key}: the model's chat template cannot be used so: {why}") from None


def is_instruct(tokenizer: Any, names: Sequence[str], stops: Sequence[int]) -> bool:
    """Whether a model has a chat template and is made for it: its name says so, or it stops where the template ends a
    reply (base models often come with a template, too, but stop at the end of a text).
    """
    if not getattr(tokenizer, "chat_template", None):  # image processors have no such thing
        return False
    if any(INSTRUCT.search(name) for name in names):
        return True
    ending = _rendered(tokenizer, ChatOptions(), WORDS, REPLY).rpartition(REPLY)[2]
    ids = tokenizer(ending, add_special_tokens=False)["input_ids"]
    return bool(ids) and ids[0] in stops
