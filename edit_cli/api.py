"""The commands' work in Python: the same settings, checks and code, on a model that you hold in your hands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from edit_cli.commands.evaluate import result_line
from edit_cli.config import catalog
from edit_cli.config.build import did_you_mean, plain_containers
from edit_cli.config.composed import composed, model_called
from edit_cli.config.overrides import regroup
from edit_cli.datasets.facts import Facts
from edit_cli.datasets.records.rows import Fault, Row
from edit_cli.editors.base import Context
from edit_cli.edits import store
from edit_cli.edits.edit import Edit
from edit_cli.errors import UsageError
from edit_cli.experiment.attempt import attempt
from edit_cli.experiment.saved_edits import edit_here, edits_of, one_edit, require_new
from edit_cli.experiment.setup import method_of
from edit_cli.experiment.undoing import Undoing
from edit_cli.lm.chat import PLAIN, ChatOptions, Forms, forms_on
from edit_cli.lm.edit import Provenance
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.metrics.observe import ObserveOptions, observe
from edit_cli.metrics.scores import Side
from edit_cli.metrics.summarize import summarize
from edit_cli.requests import Case, EditRequest
from edit_cli.wording import many

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Options = TypeVar("Options", ChatOptions, ObserveOptions)
Chat = str | Mapping[str, Any]
"""How facts are put to the model: "none" (plain text), "template" (its chat template), "auto" (the template of instruct
models), or keys of the template's use, such as {"system": "Be brief."} (docs/chat.md)."""
Fact = Mapping[str, Any]
"""A fact as files of facts hold it: prompt, subject, target_new; optional target_true, paraphrases, neighbors, id."""


def load(model: str | PreTrainedModel, tokenizer: Any = None, **settings: Any) -> LM:
    """A model to be edited.

    Args:
        model: the name of a packaged model (`edit-cli ls models`), an id of the hub, a folder, or a model of
            transformers that you have already.
        tokenizer: goes with a model that you have already.
        settings: keys of `model`, such as dtype="bfloat16" or device="cuda".

    Raises:
        UsageError: a setting that there is not, or a model that cannot be edited.
        MissingError: its files are not there.
    """
    if isinstance(model, nn.Module):
        if tokenizer is None or settings:
            raise UsageError("a model that is loaded already comes with its tokenizer, and without settings")
        return LM(model, tokenizer, name=getattr(model, "name_or_path", "") or type(model).__name__)
    options: ModelOptions = model_called(model, settings)
    return options.load()


def edit(
    lm: LM,
    facts: Sequence[Fact],
    method: str = "memit",
    settings: Mapping[str, Any] | None = None,
    chat: Chat = "none",
) -> Edit:
    """The edit after which the model answers the facts; the model itself is left as it is.

    `with lm.edited(edit):` shows it, `lm.attach(edit)` and `lm.detach()` put it on and take it off, bit for bit. It
    knows facts and settings that it was made with (`provenance`), so `save` need not be told.

    Args:
        lm: the model.
        facts: see `Fact`; all are edited at once.
        method: one of `edit-cli ls methods`. What is published for the model, by its name, is taken up.
        settings: keys of the method, such as {"layers": [3, 4], "value.steps": 20} (`edit-cli show-config METHOD`).
        chat: see `Chat`.

    Raises:
        UsageError: a wrong setting, or a fact that cannot be used; names the key or field.
        RejectedRequest: the method cannot work on a fact.
        MissingError: text, statistics or a trained network that the method needs is not there.
    """
    known = lm.name if lm.name in catalog.names("model") else "hf"
    values = {f"method.{key}": value for key, value in (settings or {}).items()}
    if known == "hf":
        values |= {"model.id": lm.id or lm.name, "model.name": lm.name}
    node = composed("edit", {"method": method, "model": known}, values).node.method
    chosen, forms = method_of(node), _forms(lm, chat)
    context = Context()
    chosen.editor.refuse_kind(lm.head.kind, lm.name)
    chosen.require(lm.name, context)
    editor = chosen.begin(lm, context)
    editor.warm_up()
    done = attempt(editor, _cases(facts, forms))
    if done.edit is None or done.rejected:
        raise UsageError("; ".join(f"fact {case}: {why}" for case, why in done.rejected.items()))
    about = {"name": method, **plain_containers(node), **_about_chat(forms, chat)}
    done.edit.provenance = Provenance(done.requests, about)
    return done.edit


def evaluate(
    lm: LM, edit: Edit, facts: Sequence[Fact], chat: Chat = "none", **observe_options: Any
) -> dict[str, dict[Side, dict[str, Any]]]:
    """{metric: {"before": entry, "after": entry}}; an entry has mean, ci95 (an interval) and n (cases).

    Args:
        lm: the model, as it was before the edit.
        edit: an edit that was made for it.
        facts: those that were edited, or others; their paraphrases and neighbors are asked, too.
        chat: see `Chat`.
        observe_options: keys of `protocol.observe`, such as generate=False.

    Raises:
        UsageError: the edit is in place already, a key that there is not, or a fact that cannot be used.
    """
    _require_detached(lm, edit)
    options, cases = _made(ObserveOptions, observe_options), _cases(facts, _forms(lm, chat))
    before = observe(lm, cases, options)
    with lm.edited(edit):
        after = observe(lm, cases, options, before={case.id: seen for case, seen in zip(cases, before, strict=True)})
    lines = [
        result_line(case, 0, earlier, later, 0.0, None)
        for case, earlier, later in zip(cases, before, after, strict=True)
    ]
    return summarize(lines)


def in_chat(lm: LM, prompts: Sequence[str], chat: Chat = "template") -> list[str]:
    """The prompts as texts for `lm.generate` and its like, each a conversation that the model is to answer.

    Args:
        lm: the model.
        prompts: questions, and statements up to their ends.
        chat: see `Chat`.

    Raises:
        UsageError: the model has no chat template.
    """
    return list(map(_forms(lm, chat).text, prompts))


def save(
    edit: Edit,
    directory: str | Path,
    lm: LM,
    facts: Sequence[Fact] | None = None,
    method: str | None = None,
    chat: Chat = "none",
    base: str | Path | None = None,
) -> str:
    """Write an edit to a directory, as safetensors and JSON; its id.

    The model is in the state that the edit is to be attached to: with the edit `base` in place where it stands on one,
    which is kept with it, and without the edit itself. What `edit` made is kept with the facts and the
    settings of its method, as the `edit` command does, so that `undo` needs no more; `facts`, `method` and `chat` are
    for edits that came about in another way.

    Args:
        edit: what to keep.
        directory: a new one.
        lm: the model that it was made for.
        facts: what it was made for, if not what `edit` was given.
        method: the name of what made it, if not the method of `edit`.
        chat: of `facts`; see `Chat`.
        base: directory of the saved edit that is in place.

    Raises:
        UsageError: no facts are given for an edit that did not come from `edit`, the directory holds something, or the
            model has other edits in place than `base` says.
        MissingError: the directory cannot be made, or `base` is damaged.
    """
    require_new(Path(directory), "directory")
    _require_detached(lm, edit)
    below = None if base is None else one_edit(edit_here(base))
    if len(lm.attached) != (0 if below is None else len(store.chain(below))):
        told = "nothing" if below is None else f"{below} and what it stands on"
        raise UsageError(
            f"the model has {many(len(lm.attached), 'edit')} in place, and base tells of {told}: save each edit while"
            " the one that it stands on is in place, and give that one's directory as base"
        )
    made = edit.provenance
    if facts is None and made is None:
        raise UsageError("facts: say what the edit was made for, since it did not come from edit_cli.edit")
    known = made.method if made and method in (None, made.method["name"]) else {"name": method or "python"}
    about = dict(known)
    requests: Sequence[EditRequest] = made.requests if made else ()
    if facts is not None:
        forms = _forms(lm, chat)
        requests = [request for case in _cases(facts, forms) for request in case.requests]
        about = {key: value for key, value in known.items() if key != "chat"} | _about_chat(forms, chat)
    return store.save(edit, directory, lm, requests, about, below)


def attach(directory: str | Path, lm: LM) -> list[Edit]:
    """Put a saved edit on the model, with those that it stands on; `lm.detach()` takes the last one off.

    directory: of an edit, of a run with one, or of a sequential run or one of its steps; hub:owner/name[:folder] is one
        on the hub.

    Raises:
        MissingError: it is damaged, or was made for another model.
        UsageError: a run with several edits that were made apart from each other.
    """
    return store.attach_all(edits_of(edit_here(directory)), lm)


def undo(
    directory: str | Path, facts: str | int | Sequence[str | int], out: str | Path, lm: LM, settings: Sequence[str] = ()
) -> str:
    """Write a saved edit, or the edits of a sequential run, without some of their facts to another directory; the id of
    what is there then. `attach` puts it on.

    Args:
        directory: of an edit, of a run with one, or of a sequential run or one of its steps; hub:owner/name[:folder] is
            one on the hub.
        facts: subjects, statements ("Ada Lund lives in"), or numbers from 1 in the order of the edit.
        out: a new directory.
        lm: the model that it was made for, with nothing attached.
        settings: KEY=VALUE as the command line takes it, for what an edit cannot name: "cache_dir=DIR".

    Raises:
        UsageError: no such fact, or none would be left; a model with edits in place.
        MissingError: the edit is damaged, was made for another model, or what its method needs is not there.
    """
    if lm.attached:
        raise UsageError("the model has edits in place: detach them, since an edit is undone on the model without any")
    named = [facts] if isinstance(facts, str | int) else facts
    if not named:
        raise UsageError("facts: name at least one of the edit's")
    undoing = Undoing.of(edit_here(directory), [str(fact) for fact in named])
    require_new(Path(out), "out")
    method, about = undoing.method(lm.name, lm.id or lm.name, regroup(settings))
    return undoing.write(lm, method, about, Path(out))[0]


def _options(chat: Chat) -> ChatOptions:
    return _made(ChatOptions, {"chat": chat} if isinstance(chat, str) else {"chat": "template", **chat})


def _made(options: type[Options], values: Mapping[str, Any]) -> Options:
    """Raises UsageError: a key that there is not."""
    known = [field.name for field in fields(options)]
    for key in values:
        if key not in known:
            raise UsageError(f"unknown key {options.place}.{key}{did_you_mean(key, known)}")
    return options(**values)


def _require_detached(lm: LM, edit: Edit) -> None:
    if any(one is edit for one in lm.attached):
        raise UsageError("this edit is in place on the model: detach it first, since the model without it is needed")


def _about_chat(forms: Forms, chat: Chat) -> dict[str, Any]:
    """What a saved edit says of the chats that its facts stood in; nothing, where they stood in none."""
    return {} if forms.edited == PLAIN else {"chat": _options(chat).as_made}


def _forms(lm: LM, chat: Chat) -> Forms:
    return forms_on(lm, _options(chat))


def _cases(facts: Sequence[Fact], forms: Forms) -> list[Case]:
    source, found = Facts("facts"), []
    if isinstance(facts, str | Mapping) or not facts or not all(isinstance(fact, Mapping) for fact in facts):
        raise UsageError('facts: give a list of them, each such as {"prompt": …, "subject": …, "target_new": …}')
    for number, fact in enumerate(facts):
        row = Row(f"fact {number}", number, dict(fact))
        try:
            found.append(forms.case(source.case(row)))
        except Fault as fault:
            raise UsageError(f"fact {number}: {fault.field} {fault.reason}") from None
    return found
