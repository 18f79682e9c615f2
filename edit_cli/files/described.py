"""A file of tensors with what is said of it: one of safetensors with JSON metadata, there as a whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from edit_cli.files.disk import replacing_file
from edit_cli.files.json_files import parse
from edit_cli.files.tensors import read_tensors, write_tensors

KEY = "edit-cli"


class Damaged(Exception):
    """A file whose contents cannot be used; the text says why."""


def write_described(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], version: int, what: object
) -> None:
    """Write it so that readers see the whole of it or none. version: of its format. what: the setting that names it.

    Raises:
        MissingError: the disk does not take it.
    """
    with replacing_file(path, what) as temporary:
        write_tensors(temporary, tensors, {KEY: json.dumps({"format": version, **about})})


def read_described(path: Path, version: int, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, what was said of them).

    Raises:
        FileNotFoundError: no such file. Damaged: it is no file of this format; does not name it.
        MissingError: it cannot be read; names it, and ends in `remedy`.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    tensors, metadata = read_tensors(path, remedy)
    try:
        about = parse(metadata[KEY])
    except (KeyError, ValueError):
        raise Damaged("not a file of edit-cli") from None
    if not isinstance(about, dict) or about.get("format") != version:
        raise Damaged(f"not of format {version}, which this version reads")
    return tensors, about
