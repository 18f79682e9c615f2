"""Edit directories: `edit.safetensors` + `edit.json`, and in `base/` the edit that this one stands on.

What some methods made an edit of lies beside it, in `facts.safetensors`: only `undo` reads it.

No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor

from edit_cli import __version__
from edit_cli.config import registry
from edit_cli.edits.edit import MEMORY, Edit, WeightDelta
from edit_cli.errors import MissingError, RejectedRequest, UsageError
from edit_cli.files.disk import replacing, telling
from edit_cli.files.json_files import read_json, to_json, write_json
from edit_cli.files.paths import expanded
from edit_cli.files.shapes import Count, Rule, Seconds, checked
from edit_cli.files.tensors import are_finite, fitted, read_tensors, write_tensors
from edit_cli.lm.model import LM
from edit_cli.requests import UNFRAMED, EditRequest, Frame

FORMAT = 2
AGAIN = "make the edit again"
STATE = "state-"  # begins the names of sums of a sequence
TENSORS, REMAINS, MANIFEST, BASE = "edit.safetensors", "remains.safetensors", "edit.json", "base"
BY_FACT = "facts.safetensors"  # what the edit was made of, fact by fact
MEANING = ("format", "kind", "type", "touched", "state", "parent")  # what the id covers beside the tensors


class Request(TypedDict):
    prompt: str
    subject: str | None
    target_new: str
    target_true: str | None
    frame: NotRequired[tuple[str, str]]  # what stands before and after the prompt in the text that was edited


class BaseModel(TypedDict):
    """What an edit says of the model that it was made for: names, no settings and no code."""

    name: str
    id: Annotated[str, Rule(bool, "a folder or an id of the hub")]
    revision: str | None
    dtype: NotRequired[Literal["float32", "bfloat16", "float16", "float64"]]
    quantized: NotRequired[bool]
    quantize: NotRequired[Literal["4bit", "8bit"]]  # while it was loaded; not where its files are quantized already


class Made(TypedDict):
    """How a step of a sequence went."""

    seconds: Seconds
    step: NotRequired[Count]
    fold: NotRequired[Count]
    rejected: NotRequired[dict[str, str]]


class Chat(TypedDict):
    """How the facts were put into the model's chat template (lm/chat.py)."""

    statements: Literal["complete", "begin", "bare"]
    system: str | None
    thinking: bool


class Method(TypedDict):
    name: NotRequired[str]
    chat: NotRequired[Chat]
    made: NotRequired[Made]
    type: NotRequired[str]


class Undone(TypedDict):
    """What an edit was made from by taking facts out of another one. of: the other's id. way: see commands/undo.py."""

    of: str
    revoked: list[IsRequest]
    way: str


def _is_request(told: Mapping[str, Any]) -> bool:
    """Whether it can be edited again: one slot for its subject, and texts that have an encoding."""
    texts = [text for text in (*told.values(), *told.get("frame", ())) if isinstance(text, str)]
    try:
        "".join(texts).encode()
        request_of(told)
    except (UnicodeEncodeError, RejectedRequest):
        return False
    return True


IsRequest = Annotated[Request, Rule(_is_request, "a fact")]


def _is_state(name: str) -> bool:
    return name.startswith(STATE) and name.removeprefix(STATE).isdigit()


class Manifest(TypedDict):
    """type: the name of the edit's class (`config.registry`). by_fact: sha256 of the file of that name."""

    format: int
    id: str
    kind: str
    type: str
    method: Method
    base_model: BaseModel
    touched: dict[str, str]
    requests: list[IsRequest]
    state: dict[str, Any]
    parent: str | None
    by_fact: NotRequired[str]
    undone: NotRequired[Undone]
    state_after: NotRequired[Annotated[str, Rule(_is_state, "the name of a sum beside it")]]


def _told(request: EditRequest) -> dict[str, Any]:
    """A request as files hold it."""
    found = asdict(request)
    frame = found.pop("frame")
    return found if request.frame == UNFRAMED else {**found, "frame": [frame["before"], frame["after"]]}


def request_of(told: Mapping[str, Any]) -> EditRequest:
    """A request, as a manifest tells it. Raises RejectedRequest: it is none."""
    frame = Frame(*told["frame"]) if "frame" in told else UNFRAMED
    return EditRequest(told["prompt"], told["subject"], told["target_new"], told.get("target_true"), frame=frame)


def save(
    edit: Edit,
    directory: Path | str,
    lm: LM,
    requests: Sequence[EditRequest],
    method: dict[str, Any],
    parent: Path | str | None = None,
    touched: Mapping[str, str] | None = None,
    undone: Mapping[str, Any] | None = None,
) -> str:
    """Write `edit` to `directory` and return its id (sha256 over tensors and their meaning).

    `lm` must be in the state that the edit will be attached to: the hashes of the touched tensors are taken from it,
    unless `touched` gives them. `parent`: directory of the edit that is attached there; a copy is nested, so that the
    new directory is complete. `undone`: see `Undone`.

    Raises:
        UsageError: the directory holds something else than an edit, or edits of this class have no name.
        MissingError: it cannot be written.
    """
    directory = Path(directory)
    if (
        directory.exists()
        and not (directory / MANIFEST).is_file()
        and (not directory.is_dir() or any(directory.iterdir()))
    ):
        raise UsageError(f"{directory} exists and is no edit directory; give another one")
    tensors, rest = edit.state()
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "kind": edit.kind,
        "type": registry.edit_name(type(edit)),
        "method": method,
        "base_model": {
            "name": lm.name,
            "id": _place(lm.id),
            "revision": lm.revision,
            "dtype": str(lm.dtype).removeprefix("torch."),
            **({"quantized": True} if lm.is_quantized else {}),
            **({"quantize": lm.quantize} if lm.quantize else {}),
        },
        "touched": dict(touched) if touched else {name: lm.fingerprint([name]) for name in edit.touches(lm)},
        "requests": [_told(request) for request in requests],
        "state": rest,
        "norms": edit.norms() if isinstance(edit, WeightDelta) else {},
        "parent": read_manifest(parent)["id"] if parent else None,
        "versions": {"edit-cli": __version__, "torch": torch.__version__},
        **({"undone": undone} if undone else {}),
    }
    manifest = json.loads(to_json(manifest))  # as it will be read back
    with replacing(directory) as temporary:
        write_tensors(temporary / TENSORS, tensors)
        if isinstance(edit, WeightDelta) and edit.by_fact:
            write_tensors(temporary / BY_FACT, edit.by_fact)
            manifest["by_fact"] = _digest(temporary / BY_FACT)
        manifest["id"] = identity(temporary / TENSORS, manifest)
        write_json(temporary / MANIFEST, manifest)
        if parent:
            shutil.copytree(parent, temporary / BASE)
    return manifest["id"]


def _place(model_id: str) -> str:
    """Of a model in a folder, where that is, whatever folder one looks from."""
    folder = expanded(model_id)
    return str(folder.absolute()) if folder.is_dir() else model_id


def read_manifest(directory: Path | str) -> dict[str, Any]:
    """edit.json of an edit directory.

    Raises:
        MissingError: no edit there, or one that cannot be read; names file and field.
    """
    path = Path(directory) / MANIFEST
    if not path.exists():
        raise MissingError(f"{directory} is no edit directory: {MANIFEST} is missing")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise MissingError(f"{path}: format {FORMAT} is what this version reads; {AGAIN}")
    return checked(manifest, Manifest, path, AGAIN)


def made_of(directory: Path) -> dict[str, Any]:
    """How the edit of a step was made: {"seconds", …}.

    Raises:
        MissingError: as `read_manifest`, or it is no step.
    """
    method = read_manifest(directory)["method"]
    if "made" not in method:
        raise MissingError(f"{directory / MANIFEST} is damaged: method.made is missing; {AGAIN}")
    return method["made"]


def chain(directory: Path | str) -> list[Path]:
    """The edit directories that `directory` stands on, base first, itself last.

    Raises:
        MissingError: one of them is missing, damaged, or not the one that was there when the next was saved.
    """
    found = [Path(directory)]
    while (parent := read_manifest(found[0])["parent"]) is not None:
        base = found[0] / BASE
        if read_manifest(base)["id"] != parent:
            raise MissingError(f"{base} is not the edit that {found[0]} was made on; {AGAIN}")
        found.insert(0, base)
    return found


def verify(directory: Path | str) -> None:
    """Read an edit and all it stands on, without the model that it is for.

    Raises:
        MissingError: a part is missing, damaged, or was changed after it was saved.
    """
    for path in chain(directory):
        _read(path, read_manifest(path))


def sequence(directory: Path | str, last: Path | None = None) -> list[Path]:
    """The edit directories of a sequence (RUN/edits), in order: where a sum stands for the earlier steps, it and the
    steps after it.

    last: the step that it ends with; None: all of them.

    Raises:
        MissingError: there are none, or one of them is damaged.
    """
    directory = Path(directory)
    steps = sorted(path for path in directory.glob("[0-9]*") if path.name.isdigit())
    if not steps:
        raise MissingError(f"{directory} holds neither an edit nor the edits of a sequence")
    steps = [path for path in steps if last is None or int(path.name) <= int(last.name)]
    for number in reversed(range(len(steps))):
        state = read_manifest(steps[number]).get("state_after")
        if state and int(state.removeprefix(STATE)) <= int(steps[-1].name):
            return [directory / state, *steps[number + 1 :]]
    return steps


def attach(directory: Path | str, lm: LM) -> list[Edit]:
    """Load an edit and all it stands on, or the edits of a sequence (RUN/edits), and attach them in order.

    All of them or none.

    Raises:
        MissingError: as `load`.
    """
    directory = Path(directory)
    return attach_all(
        sequence(directory) if directory.is_dir() and not (directory / MANIFEST).exists() else chain(directory), lm
    )


def attach_all(directories: Sequence[Path], lm: LM) -> list[Edit]:
    """Load edits, each of which stands on those before it, and attach them in order; all of them or none.

    Raises:
        MissingError: as `load`.
    """
    edits: list[Edit] = []
    try:
        for path in directories:
            edit = load(path, lm)
            lm.attach(edit)
            edits.append(edit)
    except BaseException:
        for _ in edits:
            lm.detach()
        raise
    return edits


def load(directory: Path | str, lm: LM) -> Edit:
    """Read one edit for the model in its present state (what it stands on must be attached: see `attach`).

    Raises:
        MissingError: files are missing or damaged, or the model is not the one the edit was made for; names the tensor.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest.get("state_after"):
        raise MissingError(
            f"{directory} no longer has its own weights: {directory.parent / manifest['state_after']} holds what the"
            " model was after all edits up to there"
        )
    tensors = _read(directory, manifest)
    made_for = manifest["base_model"]["name"]
    for name, expected in manifest["touched"].items():
        try:
            present = lm.fingerprint([name])
        except AttributeError:
            raise MissingError(f"{directory} was made for {made_for}: this model ({lm.name}) has no {name}") from None
        if present != expected:
            raise MissingError(
                f"{directory} was made for other weights ({made_for}): {name} differs in this model ({lm.name}); "
                "load the same model, revision and model.dtype, and what the edit stands on"
            )
    edit = _edit(directory, manifest, tensors, lm)
    if set(edit.touches(lm)) != manifest["touched"].keys():
        raise MissingError(f"{directory / MANIFEST} is damaged: touched does not name what the edit changes; {AGAIN}")
    return edit


def _edit(directory: Path, manifest: dict[str, Any], tensors: dict[str, Tensor], lm: LM, whole: bool = True) -> Edit:
    """The edit that a manifest and tensors describe, once both are known to be what such an edit has on this model.

    whole: none of its tensors may be missing.
    """
    cls, path = _edit_class(manifest["type"], directory), directory / MANIFEST
    if cls.kind != manifest["kind"]:
        raise MissingError(f"{path} is damaged: kind is {manifest['kind']}, not {cls.kind}; {AGAIN}")
    state = checked(manifest["state"], cls.said, f"{path}, state,", AGAIN)
    try:
        sizes = cls.sizes(lm, tensors.keys(), state)
    except (AttributeError, UsageError) as error:
        raise MissingError(f"{directory} does not fit {lm.name}: {error}; {AGAIN}") from None
    wanted = sizes if whole else {name: sizes[name] for name in tensors.keys() & sizes.keys()}
    fitted(tensors, wanted, directory / TENSORS, AGAIN)
    if not are_finite(tensors):
        raise MissingError(f"{directory / TENSORS} is damaged: it has numbers that are not finite; {AGAIN}")
    return cls.from_state({name: tensor.to(lm.device) for name, tensor in tensors.items()}, state)


def let_go(directory: Path, state_after: str) -> None:
    """Delete the weights of a saved edit that the edit directory `state_after` beside it holds in sum.

    What is left of it: `remains`.

    May be repeated, and killed at any moment.
    """
    manifest = read_manifest(directory)
    if not manifest.get("state_after"):
        left = _remembered(directory / TENSORS)
        with telling(directory):
            if left:
                write_tensors(directory / REMAINS, left)
        write_json(directory / MANIFEST, {**manifest, "state_after": state_after})
    (directory / TENSORS).unlink(missing_ok=True)


def remains(directory: Path, lm: LM) -> Edit:
    """A saved edit without its weights: what an editor recalls of it (`Editor.recall`)."""
    manifest = read_manifest(directory)
    file = directory / (REMAINS if manifest.get("state_after") else TENSORS)
    return _edit(directory, manifest, _remembered(file) if file.exists() else {}, lm, whole=False)


def by_fact(directory: Path) -> dict[str, Tensor]:
    """What an edit was made of, fact by fact; nothing where its method keeps nothing, or it was not kept.

    Raises:
        MissingError: it is damaged; says how to do without.
    """
    file, without = directory / BY_FACT, f"delete {BY_FACT}, and the facts are edited again instead"
    if not file.exists():
        return {}
    if _digest(file) != read_manifest(directory).get("by_fact"):
        raise MissingError(f"{file} was changed after it was saved; {without}")
    tensors, _ = read_tensors(file, without)
    if not are_finite(tensors):
        raise MissingError(f"{file} is damaged: it has numbers that are not finite; {without}")
    return tensors


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _read(directory: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an edit, as they were saved."""
    tensors, _ = read_tensors(directory / TENSORS, AGAIN)
    if identity(directory / TENSORS, manifest) != manifest["id"]:
        raise MissingError(f"{directory} was changed after it was saved: its id does not match; {AGAIN}")
    return tensors


def _remembered(file: Path) -> dict[str, Tensor]:
    """The tensors of a saved edit that are added to nothing (`WeightDelta.memory`)."""
    tensors, _ = read_tensors(file, AGAIN)
    return {name: tensor for name, tensor in tensors.items() if name.endswith(MEMORY)}


def identity(tensors: Path, manifest: Mapping[str, Any]) -> str:
    """The id of an edit with this file of tensors and this manifest."""
    with open(tensors, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps({key: manifest[key] for key in MEANING}, sort_keys=True).encode())
    return digest.hexdigest()


def _edit_class(name: str, directory: Path) -> type[Edit]:
    """Only names are ever looked up, of this version's edits and of plug-ins: a directory from elsewhere cannot name
    code.
    """
    found = registry.edit_class(name, str(directory))
    if not (isinstance(found, type) and issubclass(found, Edit) and not inspect.isabstract(found)):
        raise MissingError(f"{directory}: what a plug-in calls {name} is no edit: mend {registry.EDITS} of its package")
    return found
