"""Edit directories: `edit.safetensors` + `edit.json`, and in `base/` the edit that this one stands on.

No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from edit_cli import __version__
from edit_cli.edits import MEMORY, Edit, WeightDelta
from edit_cli.errors import MissingError, UsageError
from edit_cli.jsonfiles import read_json, to_json, write_json
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest

FORMAT = 1
TENSORS, REMAINS, MANIFEST, BASE = "edit.safetensors", "remains.safetensors", "edit.json", "base"
MEANING = ("format", "kind", "class", "touched", "state", "parent")  # what the id covers beside the tensors


def save(
    edit: Edit,
    directory: Path | str,
    lm: LM,
    requests: Sequence[EditRequest],
    method: dict[str, Any],
    parent: Path | str | None = None,
    touched: Mapping[str, str] | None = None,
) -> str:
    """Write `edit` to `directory` and return its id (sha256 over tensors and their meaning).

    `lm` must be in the state that the edit will be attached to: the hashes of the touched tensors are taken from it,
    unless `touched` gives them. `parent`: directory of the edit that is attached there; a copy is nested, so that the
    new directory is complete.

    Raises:
        UsageError: the directory holds something else than an edit. MissingError: it cannot be written.
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
        "class": f"{type(edit).__module__}.{type(edit).__qualname__}",
        "method": method,
        "base_model": {"name": lm.name, "id": lm.id, "revision": lm.revision},
        "touched": dict(touched) if touched else {name: lm.fingerprint([name]) for name in edit.touches(lm)},
        "requests": [asdict(request) for request in requests],
        "state": rest,
        "norms": edit.norms() if isinstance(edit, WeightDelta) else {},
        "parent": read_manifest(parent)["id"] if parent else None,
        "versions": {"edit-cli": __version__, "torch": torch.__version__},
    }
    manifest = json.loads(to_json(manifest))  # as it will be read back
    with replacing(directory) as temporary:
        save_file(
            {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()},
            temporary / TENSORS,
        )
        manifest["id"] = _identity(temporary / TENSORS, manifest)
        write_json(temporary / MANIFEST, manifest)
        if parent:
            shutil.copytree(parent, temporary / BASE)
    return manifest["id"]


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """An empty directory that takes the place of `directory` once it has been filled.

    Raises:
        MissingError: the disk does not take it.
    """
    whole = directory.absolute()
    temporary = whole.with_name(f".{whole.name}.{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(temporary, directory)
    except (OSError, SafetensorError) as error:
        raise MissingError(f"{directory} cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_manifest(directory: Path | str) -> dict[str, Any]:
    """edit.json of an edit directory.

    Raises:
        MissingError: no edit there, or one that cannot be read; names the file.
    """
    path = Path(directory) / MANIFEST
    if not path.exists():
        raise MissingError(f"{directory} is no edit directory: {MANIFEST} is missing")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise MissingError(f"{path}: format {FORMAT} is what this version reads; make the edit again")
    if lacking := sorted({"id", "base_model", *MEANING} - manifest.keys()):
        raise MissingError(f"{path} is damaged: {', '.join(lacking)} missing; make the edit again")
    return manifest


def chain(directory: Path | str) -> list[Path]:
    """The edit directories that `directory` stands on, base first, itself last.

    Raises:
        MissingError: one of them is missing, damaged, or not the one that was there when the next was saved.
    """
    directory = Path(directory)
    parent = read_manifest(directory)["parent"]
    if parent is None:
        return [directory]
    if read_manifest(directory / BASE)["id"] != parent:
        raise MissingError(f"{directory / BASE} is not the edit that {directory} was made on; make the edit again")
    return [*chain(directory / BASE), directory]


def verify(directory: Path | str) -> None:
    """Read an edit and all it stands on, without the model that it is for.

    Raises:
        MissingError: a part is missing, damaged, or was changed after it was saved.
    """
    for path in chain(directory):
        _read(path, read_manifest(path))


def sequence(directory: Path | str) -> list[Path]:
    """The edit directories of a sequence (RUN/edits), in order: where a sum stands for the earlier steps, it and the
    steps after it.

    Raises:
        MissingError: there are none, or one of them is damaged.
    """
    directory = Path(directory)
    steps = sorted(path for path in directory.glob("[0-9]*") if path.name.isdigit())
    if not steps:
        raise MissingError(f"{directory} holds neither an edit nor the edits of a sequence")
    for last in reversed(range(len(steps))):
        if state := read_manifest(steps[last]).get("state_after"):
            return [directory / state, *steps[last + 1 :]]
    return steps


def attach(directory: Path | str, lm: LM) -> list[Edit]:
    """Load an edit and all it stands on, or the edits of a sequence (RUN/edits), and attach them in order.

    All of them or none.

    Raises:
        MissingError: as `load`.
    """
    directory, edits = Path(directory), []
    paths = sequence(directory) if directory.is_dir() and not (directory / MANIFEST).exists() else chain(directory)
    try:
        for path in paths:
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
    return _edit_class(manifest["class"]).from_state(
        {n: t.to(lm.device) for n, t in tensors.items()}, manifest["state"]
    )


def let_go(directory: Path, state_after: str) -> None:
    """Delete the weights of a saved edit that the edit directory `state_after` beside it holds in sum.

    What is left of it: `remains`.

    May be repeated, and killed at any moment.
    """
    manifest = read_manifest(directory)
    if not manifest.get("state_after"):
        left = _remembered(directory / TENSORS)
        if left:
            save_file(left, directory / REMAINS)
        write_json(directory / MANIFEST, {**manifest, "state_after": state_after})
    (directory / TENSORS).unlink(missing_ok=True)


def remains(directory: Path, lm: LM) -> Edit:
    """A saved edit without its weights: what an editor recalls of it (`Editor.recall`)."""
    manifest = read_manifest(directory)
    file = directory / (REMAINS if manifest.get("state_after") else TENSORS)
    tensors = _remembered(file) if file.exists() else {}
    return _edit_class(manifest["class"]).from_state(
        {n: t.to(lm.device) for n, t in tensors.items()}, manifest["state"]
    )


def _read(directory: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an edit, as they were saved."""
    try:
        tensors = load_file(directory / TENSORS)
    except (OSError, SafetensorError) as error:
        raise MissingError(f"{directory / TENSORS} cannot be read: {error}") from None
    if _identity(directory / TENSORS, manifest) != manifest.get("id"):
        raise MissingError(f"{directory} was changed after it was saved: its id does not match; make the edit again")
    return tensors


def _remembered(file: Path) -> dict[str, Tensor]:
    """The tensors of a saved edit that are added to nothing (`WeightDelta.memory`)."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys() if name.endswith(MEMORY)}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise MissingError(f"{file} cannot be read: {error}") from None


def _identity(tensors: Path, manifest: Mapping[str, Any]) -> str:
    with open(tensors, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps({key: manifest[key] for key in MEANING}, sort_keys=True).encode())
    return digest.hexdigest()


def _edit_class(path: str) -> type[Edit]:
    """Only Edit classes inside this package are ever looked up: a directory from elsewhere cannot name other code."""
    module, _, name = path.rpartition(".")
    if module == "edit_cli.edits" or module.startswith("edit_cli.editors."):
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            found = None
        if isinstance(found, type) and issubclass(found, Edit) and not inspect.isabstract(found):
            return found
    raise MissingError(f"edit class {path} is not one that this version of edit-cli knows")
