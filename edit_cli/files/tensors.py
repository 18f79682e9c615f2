"""Tensors on disk: safetensors, which hold numbers and nothing that could be run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edit_cli.errors import MissingError
from edit_cli.files.disk import flush

NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Size:
    """What a tensor must be like.

    dims: numbers, or a name for one that may be anything but the same wherever it stands; None: any dimensions.
    index: whole numbers from 0 up instead of numbers with a point; None: either.
    """

    dims: tuple[int | str, ...] | None
    index: bool | None = False


def size(*dims: int | str) -> Size:
    """Of a tensor of numbers."""
    return Size(dims)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None) -> None:
    """A safetensors file of copies in host memory, flushed to the disk. about: its metadata.

    Raises:
        OSError, SafetensorError: the disk does not take it (see `disk.telling`).
    """
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(copies, path, about)
    path.chmod(0o644)  # it writes files that nobody else may read
    flush(path)


def read_tensors(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(copies of the tensors in host memory, metadata). A tensor of the library's own is the mapped file, and one that
    is cut short later would end the process.

    Raises:
        MissingError: there is no such file, or none of safetensors; ends in `remedy`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise MissingError(f"{path} cannot be read: {error}; {remedy}") from None


def are_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all are numbers of a kind that we write, and finite."""
    known = (torch.int64, *NUMBERS)
    return all(tensor.dtype in known and bool(tensor.isfinite().all()) for tensor in tensors.values())


def fitted(tensors: Mapping[str, Tensor], sizes: Mapping[str, Size], source: object, remedy: str) -> None:
    """Hold tensors of a file against the sizes that they must have.

    Raises:
        MissingError: one is missing, too many, of another size or of another kind; names it.
    """
    known: dict[str, int] = {}
    for name in sorted(tensors.keys() | sizes.keys()):
        if name not in tensors or name not in sizes:
            told = "is missing" if name in sizes else "is none of its tensors"
            raise MissingError(f"{source} is damaged: {name} {told}; {remedy}")
        wrong = _wrong(tensors[name], sizes[name], known)
        if wrong is not None:
            raise MissingError(f"{source} is damaged: {name} {wrong}; {remedy}")


def _wrong(tensor: Tensor, wanted: Size, known: dict[str, int]) -> str | None:
    """What is wrong with a tensor. known: the sizes that have a name, as far as they have been met."""
    kinds = {True: (torch.int64,), False: NUMBERS, None: (torch.int64, *NUMBERS)}[wanted.index]
    if tensor.dtype not in kinds:
        return f"is {_told(tensor)}, not {' or '.join(str(kind).removeprefix('torch.') for kind in kinds)}"
    if wanted.index and tensor.numel() and int(tensor.min()) < 0:
        return "has numbers below 0"
    if wanted.dims is None:
        return None
    dims = tuple(
        dim if isinstance(dim, int) else known.setdefault(dim, length)
        for dim, length in zip(wanted.dims, tensor.shape, strict=False)
    )
    if len(wanted.dims) != tensor.dim() or dims != tuple(tensor.shape):
        return f"has the size {_by(tensor.shape)}, not {_by(known.get(str(dim), dim) for dim in wanted.dims)}"
    return None


def _told(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _by(dims: Iterable[object]) -> str:
    return "×".join(map(str, dims)) or "of a single number"
