"""`undo`: a saved edit without some of its facts, made again from what was stored, or from the facts that are left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edit_cli.commands.edit import attach_base
from edit_cli.config import catalog
from edit_cli.config.as_made import method_node
from edit_cli.config.build import plain_containers
from edit_cli.config.overrides import regroup
from edit_cli.console import ConsoleMonitor, Screen
from edit_cli.editors.base import SOLVED, VALUES_KEPT, Context, Editor, Method, Remade
from edit_cli.edits import store as edit_store
from edit_cli.errors import MissingError, UsageError
from edit_cli.experiment.attempt import attempt
from edit_cli.experiment.saved_edits import Base, one_edit, require_new
from edit_cli.experiment.setup import method_of
from edit_cli.lm.loading import ModelOptions
from edit_cli.report.tables.facts import arrow, asked
from edit_cli.requests import Case, EditRequest
from edit_cli.wording import many

AGAIN = "edited again"
TOLD = {
    SOLVED: "solved again from stored keys and values, without a pass of the model",
    VALUES_KEPT: "made again with the stored values; keys were read again",
    AGAIN: "the other facts were edited again from the beginning",
}


def run(directory: Path, facts: Sequence[str], out: Path, base: Base, given: Sequence[str]) -> int:
    """Write the edit without `facts` to `out`, as an edit of its own.

    facts: numbers as `edits` counts them, subjects, or whole statements. given: settings of the method as KEY=VALUE.

    Raises:
        UsageError: no such fact, or none would be left. MissingError: the edit is damaged, or what its method needs is
            not there.
    """
    path, screen = one_edit(directory), Screen()
    chain = edit_store.chain(path)
    level, revoked = _found(chain, facts)
    at, below, above = chain[level], chain[:level], chain[level + 1 :]
    manifest = edit_store.read_manifest(at)
    requests = list(map(edit_store.request_of, manifest["requests"]))
    left = [request for number, request in enumerate(requests) if number not in revoked]
    if not left:
        instead = f"what it stands on is there as {below[-1]}" if below else "the model without it is the model"
        raise UsageError(f"{at} has no other fact, so nothing would be left of it: {instead}")
    require_new(out)
    options = base.options(at)
    method, about = _method(at, manifest["method"], options, regroup(given))
    method.require(options.name, Context())
    monitor = ConsoleMonitor(screen)
    with monitor.working():
        lm = base.load(at, monitor)
        editor = method.begin(lm, Context())
        editor.warm_up()
        if below:
            attach_base(below[-1], editor, about["type"])
        edit = edit_store.load(at, lm)
        with monitor.phase("edit"):
            remade = editor.without(requests, revoked, edit, edit_store.by_fact(at))
        remade = remade or Remade(_again(editor, left), AGAIN)
        if not remade.edit.is_finite:
            raise UsageError(f"{at}: without these facts the edit came out as NaN or infinite, and is not kept")
        taken = [manifest["requests"][number] for number in sorted(revoked)]
        undone = {"of": manifest["id"], "revoked": taken, "way": remade.way}
        edit_store.save(remade.edit, out, lm, left, about, below[-1] if below else None, undone=undone)
    screen.note(f"revoked: {'; '.join(map(arrow, taken))}")
    screen.note(f"{many(len(left), 'fact')} of {len(requests):,} left: {TOLD[remade.way]}")
    for upper in above:
        count = many(len(edit_store.read_manifest(upper)["requests"]), "fact")
        screen.note(f"{upper} ({count}) lies on top of it and is not in {out}: edit it again with base_edit={out}")
    screen.line(str(out))
    return 0


def _found(chain: Sequence[Path], facts: Sequence[str]) -> tuple[int, set[int]]:
    """(which edit of the chain, numbers of its facts); numbers are looked for in the last one, words in all.

    Raises:
        UsageError: no fact, several where one is meant, or facts of several edits.
    """
    found: dict[int, set[int]] = {}
    every = [edit_store.read_manifest(path)["requests"] for path in chain]
    for fact in facts:
        places = [
            (level, number)
            for level, requests in enumerate(every)
            for number, request in enumerate(requests)
            if fact in (request["subject"], asked(request), arrow(request))
        ]
        if not places and fact.isdecimal() and 1 <= int(fact) <= len(every[-1]):
            places = [(len(chain) - 1, int(fact) - 1)]
        if len(places) != 1:
            raise UsageError(_unclear(fact, places, chain, every))
        ((level, number),) = places
        found.setdefault(level, set()).add(number)
    if len(found) > 1:
        raise UsageError(
            f"these facts are of {' and '.join(str(chain[level]) for level in found)}: revoke those of one"
        )
    return found.popitem()


def _unclear(
    fact: str, places: Sequence[tuple[int, int]], chain: Sequence[Path], every: Sequence[Sequence[Mapping[str, Any]]]
) -> str:
    if not places:
        what = f"is none of the {many(len(every[-1]), 'fact')} of {chain[-1]}"
        return f"--fact {fact} {what}: give a number or a subject, as `edit-cli edits {chain[-1]} --all` lists them"
    told = "; ".join(f"{number + 1}: {arrow(every[level][number])}" for level, number in places[:5])
    return f"--fact {fact} is {len(places):,} facts ({told}): give a number, or the whole statement"


def _method(
    at: Path, told: Mapping[str, Any], options: ModelOptions, given: Sequence[str]
) -> tuple[Method, dict[str, Any]]:
    """The method as the edit was made with it, and what the new edit says of it."""
    packaged = options.name in catalog.names("model")
    values = {} if packaged else {"model.id": options.id, "model.name": options.name}
    model = {"model": options.name if packaged else "hf"}
    node = method_node(told, model, values, given, at / edit_store.MANIFEST)
    kept = {key: told[key] for key in ("name", "chat") if key in told}
    chosen = [text.partition("=")[2] for text in given if text.startswith("method=")]
    return method_of(node), {**plain_containers(node), **kept, **({"name": chosen[-1]} if chosen else {})}


def _again(editor: Editor[Any], requests: Sequence[EditRequest]) -> Any:
    done = attempt(editor, [Case(str(number), (request,), ()) for number, request in enumerate(requests, 1)])
    if done.edit is None or done.rejected:
        raise MissingError("; ".join(f"fact {number}: {why}" for number, why in done.rejected.items()))
    return done.edit
