"""Files of second moments: how they are written, read, checked and named. safetensors with JSON metadata; no pickle."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edit_cli.errors import MissingError
from edit_cli.files.described import Damaged, read_described, write_described
from edit_cli.files.disk import replacing_file, require_folder

if TYPE_CHECKING:
    from edit_cli.lm.model import LM

FORMAT = 1
SYMMETRY = 1e-4  # of the largest diagonal entry: what float32 sums of other programs stay well below


def make_folder(folder: Path) -> None:
    """Make the folder, before hours of work go into what is to be written there.

    Raises:
        MissingError: it cannot be made or written to.
    """
    require_folder(folder, f"stats.cache_dir={folder}")


def write(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write atomically: readers see the whole file or none.

    Raises:
        MissingError: the folder cannot be written to, or the disk is full.
    """
    write_described(path, tensors, about, FORMAT, f"stats.cache_dir={path.parent}")


def copy(found: Path, path: Path) -> None:
    """Put a copy of a file where it belongs; readers see the whole of it or none. Raises as `write`."""
    with replacing_file(path, f"stats.cache_dir={path.parent}") as temporary:
        shutil.copyfile(found, temporary)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, what was written about them).

    Raises:
        FileNotFoundError: no such file. Damaged: it is no whole file of this format.
    """
    try:
        return read_described(path, FORMAT, "it is computed again")
    except MissingError as error:
        raise Damaged(str(error)) from None


def check(matrix: Tensor, tokens: int, width: int) -> None:
    """Whether this can be the second moment of keys of `width`, over `tokens` tokens.

    Raises:
        Damaged: says what is wrong.
    """
    if not matrix.is_floating_point():
        raise Damaged(f"whole numbers ({str(matrix.dtype).removeprefix('torch.')}), which no mean is")
    if tuple(matrix.shape) != (width, width):
        raise Damaged(f"shape {'×'.join(map(str, matrix.shape))}, but the layer's keys have width {width}")
    if not tokens > 0:
        raise Damaged(f"token count {tokens}")
    if not matrix.isfinite().all():
        raise Damaged("not all values are finite")
    scale = matrix.diagonal().max().item()
    if matrix.diagonal().min().item() < 0:
        raise Damaged("a mean square on the diagonal is negative")
    if any((a - b.T).abs().max().item() > SYMMETRY * scale for a, b in _mirrored(matrix)):
        raise Damaged("not symmetric")


def _mirrored(matrix: Tensor, step: int = 1024) -> Iterator[tuple[Tensor, Tensor]]:
    """Bands of rows and the columns that mirror them: a large matrix is compared without a copy of it."""
    for start in range(0, len(matrix), step):
        yield matrix[start : start + step], matrix[:, start : start + step]


def model_identity(lm: LM) -> dict[str, Any]:
    """What the keys of a text depend on: the unedited weights, the architecture's settings, the tokenizer, the
    dtype.
    """
    config = lm.model.config.to_diff_dict()  # without the library's defaults, to which a new version may add
    config = {
        key: value
        for key, value in config.items()
        if key not in ("_name_or_path", "transformers_version", "architectures")
    }
    return {
        "weights": lm.fingerprint(),
        "config": digest_of(config),
        "tokenizer": digest_of(_tokenizer_identity(lm.tokenizer)),
        "dtype": str(lm.dtype).removeprefix("torch."),
    }


def _tokenizer_identity(tokenizer: Any) -> Any:
    if not getattr(tokenizer, "is_fast", False):
        return [type(tokenizer).__name__, tokenizer.get_vocab()]
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # those two change with every call
    return {part: rule for part, rule in rules.items() if part not in ("truncation", "padding")}


def digest_of(value: Any) -> str:
    """sha256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def slug(name: str) -> str:
    """A name that is safe in a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "unnamed"


def condition_estimate(matrix: Tensor, steps: int = 30) -> float:
    """Condition number from power iterations on the matrix and its inverse: never too large, within some percent as a
    rule.

    Infinite if the matrix is not positive definite, as with fewer tokens than its width. m³/3 operations.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed.item():
        return float("inf")
    start = torch.randn(len(matrix), 1, dtype=matrix.dtype, generator=torch.Generator().manual_seed(0))

    def growth(apply: Callable[[Tensor], Tensor]) -> float:
        x = start
        for _ in range(steps):
            x = apply(x / x.norm())
        return x.norm().item()

    return growth(lambda x: matrix @ x) * growth(lambda x: torch.cholesky_solve(x, factor))
