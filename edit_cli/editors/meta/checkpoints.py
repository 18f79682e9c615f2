"""Directories of trained editors: `editor.safetensors` + `editor.json`, which names the model, the data and the
settings. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from torch import Tensor, nn

from edit_cli.errors import MissingError
from edit_cli.files import hub
from edit_cli.files.disk import replacing
from edit_cli.files.json_files import read_json, to_json, write_json
from edit_cli.files.shapes import Count, checked
from edit_cli.files.tensors import are_finite, read_tensors, write_tensors

FORMAT = 2
AGAIN = "train the editor again"
TENSORS, ABOUT = "editor.safetensors", "editor.json"
WHO = ("type", "base", "recipe")  # what a checkpoint is looked up by


class Model(TypedDict):
    name: str


class Data(TypedDict):
    name: str
    source: NotRequired[str]
    cases: NotRequired[Count]


class About(TypedDict):
    """type: the method's name (`config.registry`). base: what of the model it is bound to."""

    format: int
    type: str
    base: str
    recipe: dict[str, Any]
    model: Model
    dataset: Data
    sha256: str


def here(place: str) -> Path:
    """The folder of a trained editor; that of one on the hub, once it is fetched (`hub.here`)."""
    return hub.here(place, (ABOUT, TENSORS), "method.checkpoint=")


def save(directory: Path, net: nn.Module, about: dict[str, Any]) -> None:
    """Write a trained network and what is to be known about it: type, base, recipe, model, dataset, metrics.

    Raises:
        MissingError: it cannot be written.
    """
    with replacing(directory) as temporary:
        write_tensors(temporary / TENSORS, net.state_dict())
        digest = hashlib.sha256((temporary / TENSORS).read_bytes()).hexdigest()
        write_json(temporary / ABOUT, {"format": FORMAT, **about, "sha256": digest})


def load(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, what `save` was told).

    Raises:
        MissingError: no checkpoint there, or a damaged one; names the file.
    """
    about = read_about(directory)
    path = directory / TENSORS
    tensors, _ = read_tensors(path, AGAIN)
    if hashlib.sha256(path.read_bytes()).hexdigest() != about["sha256"]:
        raise MissingError(f"{path} is damaged: it was changed after it was saved; {AGAIN}")
    if not are_finite(tensors):
        raise MissingError(f"{path} is damaged: it has numbers that are not finite; {AGAIN}")
    return tensors, about


def read_about(directory: Path) -> dict[str, Any]:
    """editor.json of a checkpoint.

    Raises:
        MissingError: there is none, or one that cannot be read.
    """
    if not (directory / ABOUT).exists():
        raise MissingError(f"{directory} holds no trained editor: {ABOUT} is missing")
    about = read_json(directory / ABOUT)
    if about.get("format") != FORMAT:
        raise MissingError(f"{directory / ABOUT}: format {FORMAT} is what this version reads; {AGAIN}")
    return checked(about, About, directory / ABOUT, AGAIN)


def fill(net: nn.Module, tensors: dict[str, Tensor], directory: Path) -> None:
    """Let `net` have the tensors of a checkpoint.

    Raises:
        MissingError: they are those of another network.
    """
    refuse_others(net, tensors, directory)
    net.load_state_dict(tensors)


def refuse_others(net: nn.Module, tensors: dict[str, Tensor], directory: Path) -> None:
    """Raises:
    MissingError: the tensors are those of another network than `net`; names the first in which they differ.
    """
    own = net.state_dict()
    differing = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own
        or name not in tensors
        or own[name].shape != tensors[name].shape
        or own[name].dtype != tensors[name].dtype
    )
    if differing:
        raise MissingError(
            f"{directory} holds another network than these settings describe (it differs in {differing[0]})"
        )


def find(root: Path, identity: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    """Checkpoints below `root` that agree with all that `identity` tells of type, base and recipe, by path."""
    wanted = json.loads(to_json(identity))
    found = []
    for file in sorted(root.glob(f"*/{ABOUT}")):
        try:
            about = read_about(file.parent)
        except MissingError:
            continue
        if all(about[key] == wanted[key] for key in WHO if key in wanted):
            found.append((file.parent, about))
    return found


def place(root: Path, identity: dict[str, Any], *names: str) -> Path:
    """Where the checkpoint with this identity belongs.

    names: what its folder is called by; the rest of the name is a hash.
    """
    digest = hashlib.sha256(json.dumps(json.loads(to_json([identity, names])), sort_keys=True).encode()).hexdigest()
    return root / f"{'-'.join(re.sub(r'[^A-Za-z0-9._]+', '_', name) for name in names)}-{digest[:10]}"
