"""What goes to a hub of an edit, a checkpoint, an adapter, a trained editor or statistics: its files, without places of
this machine, and a card.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edit_cli.editors.meta import checkpoints
from edit_cli.edits import gguf_adapter
from edit_cli.edits import store as edit_store
from edit_cli.errors import MissingError, UsageError
from edit_cli.experiment.saved_edits import beneath, methods_of, one_edit, requests_of, run_of
from edit_cli.files import hub
from edit_cli.files.described import Damaged
from edit_cli.files.hub import Address, Content
from edit_cli.files.json_files import read_json, to_json
from edit_cli.report.model_card import Card, of_editor, of_statistics
from edit_cli.runs.record import EDITS
from edit_cli.statistics import files as statistics

CARD = "README.md"
CONFIG, ADAPTER = "config.json", "adapter_config.json"
# of a checkpoint or an adapter; whatever else lies there stays
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", gguf_adapter.FILE)
SETTINGS = (CONFIG, ADAPTER, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENS = ("tokenizer.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "*.model", "*.jinja")
PLACE = "cache_dir"  # key of a folder that any machine has its own of
SAID = ("facts", "requests", "prefixes")  # texts of the user's, of which every character counts
PATH = re.compile(r"(?<![\w./:~\\-])~?/[^\s'\",;\])}|]+")


@dataclass(frozen=True)
class Parcel:
    """kind: what it is, in words. files: {path: what it holds, or the file that does}. left_out: names of what lies
    beside them and stays. notes: what whoever sends it should know.
    """

    kind: str
    files: dict[str, Content]
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parcel(directory: Path, to: Address) -> Parcel:
    """What a folder holds, ready to be sent.

    Raises:
        UsageError: the folder holds several edits. MissingError: nothing that could be sent, or it is damaged.
    """
    if not directory.is_dir():
        raise MissingError(f"{directory} is no folder: give an edit, a run, a checkpoint, or a folder of statistics")
    if (directory / edit_store.MANIFEST).is_file() or (directory / EDITS).is_dir():
        return _edit(directory, to)
    if (directory / checkpoints.ABOUT).is_file():
        return _editor(directory, to)
    for name, kind in ((ADAPTER, "adapter"), (gguf_adapter.FILE, "adapter"), (CONFIG, "checkpoint")):
        if (directory / name).is_file():
            return _checkpoint(directory, kind)
    if found := sorted(directory.glob("layer-*.safetensors")):
        return _statistics(directory, found, to)
    raise MissingError(
        f"{directory} is nothing that could be sent: no edit ({edit_store.MANIFEST}), no run with one, no trained"
        f" editor ({checkpoints.ABOUT}), no checkpoint or adapter ({CONFIG}, {ADAPTER}), no statistics"
        " (layer-*.safetensors)"
    )


def _edit(directory: Path, to: Address) -> Parcel:
    path = one_edit(directory)
    edit_store.verify(path)
    files: dict[str, Content] = {}
    notes, parent = list[str](), None
    chain = edit_store.chain(path)
    for depth, part in zip(range(len(chain) - 1, -1, -1), chain, strict=True):
        manifest = edit_store.read_manifest(part)
        sent = {**manifest, "parent": parent}
        sent |= {key: portable(manifest[key]) for key in ("method", "base_model", "state")}
        parent = sent["id"] = edit_store.identity(part / edit_store.TENSORS, sent)
        inside = f"{edit_store.BASE}/" * depth
        files[f"{inside}{edit_store.MANIFEST}"] = _json(sent)
        for name in (edit_store.TENSORS, edit_store.BY_FACT):
            if (part / name).is_file():
                files[f"{inside}{name}"] = part / name
    model = edit_store.read_manifest(path)["base_model"]
    if (name := portable(model["id"])) != model["id"]:
        notes.append(f"made for a model that is a folder here: who attaches it names theirs (--model); called {name}")
    run = run_of(directory)
    facts, summary = requests_of(chain), (run and run.summary) or {}
    base, revision = hub.known_as(model["id"], model["revision"])
    under = len(requests_of(beneath(chain)))
    card = Card(model["name"], base, revision, methods_of(chain), facts, summary, None, str(to), beneath=under)
    return Parcel("edit", {CARD: str(card).encode(), **files}, _beside(path, files), notes)


def _editor(directory: Path, to: Address) -> Parcel:
    checkpoints.load(directory)  # refuses a damaged one
    about = checkpoints.read_about(directory)
    if portable(about["recipe"]) != about["recipe"]:
        raise UsageError(
            f"{directory / checkpoints.ABOUT}: its recipe, by which it is looked up, names a folder of this machine:"
            " train it with names of the hub"
        )
    sent = {key: value if key in checkpoints.WHO else portable(value) for key, value in about.items()}
    files: dict[str, Content] = {CARD: of_editor(sent, str(to)).encode(), checkpoints.ABOUT: _json(sent)}
    files[checkpoints.TENSORS] = directory / checkpoints.TENSORS
    return Parcel("trained editor", files, _beside(directory, files))


def _checkpoint(directory: Path, kind: str) -> Parcel:
    files: dict[str, Content] = {}
    for path in sorted({path for pattern in (*WEIGHTS, *SETTINGS, *TOKENS) for path in directory.glob(pattern)}):
        files[path.name] = path
        if path.name in SETTINGS:
            about = read_json(path)
            changed = {key: portable(value) for key, value in about.items() if key.endswith("name_or_path")}
            if changed != {key: about[key] for key in changed}:
                files[path.name] = _json({**about, **changed})
    if not any(name.endswith((".safetensors", ".gguf")) for name in files):
        raise MissingError(f"{directory} has no weights as safetensors, and nothing else is sent")
    if (directory / CARD).is_file():
        files[CARD] = str(portable((directory / CARD).read_text(encoding="utf-8"))).encode()
    return Parcel(kind, files, _beside(directory, files))


def _statistics(directory: Path, found: Sequence[Path], to: Address) -> Parcel:
    files: dict[str, Content] = {}
    told: list[dict[str, Any]] = []
    for path in found:
        try:
            _, about = statistics.read(path)
        except Damaged as error:
            raise MissingError(f"{path} is damaged ({error}): compute it again") from None
        if portable(about) != about:
            raise UsageError(f"{path} names a folder of this machine as its model or corpus: compute it by their names")
        told.append(about)
        files[path.name] = path
    return Parcel("statistics", {CARD: of_statistics(told, str(to)).encode(), **files}, _beside(directory, files))


def _beside(directory: Path, files: Mapping[str, Content]) -> list[str]:
    sent = {name.partition("/")[0] for name in files}
    return sorted(path.name for path in directory.iterdir() if path.name not in sent)


def portable(value: Any) -> Any:
    """The same without places of this machine: of paths that are here the last part is left."""
    if isinstance(value, Mapping):
        return {key: part if key in SAID else portable(part) for key, part in value.items() if key != PLACE}
    if isinstance(value, list | tuple):
        return [portable(part) for part in value]
    return PATH.sub(lambda found: _last(found[0]), value) if isinstance(value, str) else value


def _last(path: str) -> str:
    """`path`, or what it is called where it lies on this machine: of the hub's cache, its id there."""
    if cached := hub.CACHED.search(path):
        return f"{cached['owner']}/{cached['name']}"
    place = Path(os.path.expanduser(path))
    here = any(part.exists() for part in (place, *list(place.parents)[:-1]))  # the file itself may have gone
    return place.name if here else path


def _json(value: Any) -> bytes:
    return (to_json(value, indent=1) + "\n").encode()


def sizes(files: Mapping[str, Content]) -> Iterator[tuple[str, int]]:
    """(path, bytes) of each file."""
    for name, held in sorted(files.items()):
        yield name, held.stat().st_size if isinstance(held, Path) else len(held)
