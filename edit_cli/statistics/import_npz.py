"""Reading second moments from `.npz` files in the format in which those of ROME and MEMIT were published.

Arrays: `mom2.mom2` (m, m), the *sum* of k kᵀ; `mom2.count`, the number of tokens. File names:
`{module}_{dtype}_mom2_{documents}.npz`, for example `transformer.h.17.mlp.c_proj_float32_mom2_100000.npz`.
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edit_cli.errors import MissingError, UsageError
from edit_cli.files.described import Damaged
from edit_cli.files.paths import expanded
from edit_cli.statistics.files import check

SUM, COUNT = "mom2.mom2", "mom2.count"
PUBLISHED_NAME = re.compile(r"(?P<module>.+)_float\d+_mom2_\w+\.npz")


def find_npz(source: str, module: str, layer: int) -> Path:
    """The file for one layer.

    `source`: a folder of files with published names, or a path, in which `{layer}` stands for the number.

    Raises:
        MissingError: no such file. UsageError: several fit, or the file's name says that it belongs to another module.
    """
    field = f"stats.import_npz={source}"
    path = source_of(source, layer)
    if path.is_dir():
        fitting = sorted(
            p for p in path.glob("*.npz") if (m := PUBLISHED_NAME.fullmatch(p.name)) and m["module"] == module
        )
        if not fitting:
            raise MissingError(
                f"{field}: no file {module}_*_mom2_*.npz there; give the file itself, with {{layer}} for the layer's"
                " number"
            )
        if len(fitting) > 1:
            raise UsageError(
                f"{field}: several files fit {module}: {', '.join(p.name for p in fitting)}; give the file itself"
            )
        return fitting[0]
    named = PUBLISHED_NAME.fullmatch(path.name)
    if named and named["module"] != module:
        owner = named["module"]
        raise UsageError(
            f"{field}: {path.name} belongs to {owner}, not to {module} (layer {layer}); write {{layer}} for its number"
        )
    return path


def source_of(source: str, layer: int) -> Path:
    """The file or folder that `source` names for a layer.

    Raises:
        MissingError: there is none.
    """
    path = expanded(source.replace("{layer}", str(layer)))
    if not path.exists():
        raise MissingError(f"stats.import_npz={source}: {path} does not exist")
    return path


def read_npz(path: Path, width: int) -> tuple[Tensor, int]:
    """(mean (m, m) float64, tokens) from one file.

    Raises:
        MissingError: the file is not in the published format or does not fit a key width of `width`.
    """
    field = f"stats.import_npz: {path}"
    try:
        with zipfile.ZipFile(path) as archive:  # what the headers say first: an array may be larger than the memory
            shapes = {name: _header(archive, name) for name in (SUM, COUNT)}
        if shapes[SUM] != (width, width) or math.prod(shapes[COUNT]) != 1:
            found = "×".join(map(str, shapes[SUM]))
            raise MissingError(f"{field}: {SUM} has the shape {found or '()'}, but the layer's keys have width {width}")
        with np.load(path, allow_pickle=False) as arrays:
            total, tokens = np.asarray(arrays[SUM], dtype=np.float64), int(arrays[COUNT].item())
    except KeyError:
        raise MissingError(f"{field} lacks the arrays {SUM} (sum of k kᵀ) and {COUNT} (tokens)") from None
    except (OSError, ValueError, TypeError, OverflowError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise MissingError(f"{field} cannot be read: {error}") from None
    matrix = torch.from_numpy(total)
    try:
        check(matrix, tokens, width)
    except Damaged as error:
        raise MissingError(f"{field}: {error}") from None
    return matrix.div_(tokens), tokens


def _header(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    """The shape that an array has by its header.

    Raises:
        KeyError: there is no such array. ValueError: it is no array of numbers.
    """
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read(file)
    if kind.kind not in "fiu":
        raise ValueError(f"{name} holds {kind}, no numbers")
    return shape
