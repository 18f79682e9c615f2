"""How numbers are multiplied: float32 by TF32 where speed is wanted, in full where digits count; 16 bits on a CPU.

A CUDA device multiplies float32 several times as fast when it reads ten bits of each mantissa (TF32). That is enough
for passes of a model; second moments, solves and updates of weights are sums whose small differences matter.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PROBED = 128  # width of the matrices that tell how fast a dtype is
EMULATED = 4.0  # times as long as float32, from which on a CPU is taken to have no instructions for a dtype


def slowdown(dtype: torch.dtype) -> float:
    """How many times as long as float32 this CPU takes for a product in `dtype`, by a few milliseconds of it.

    Processors differ in what they have instructions for, and libraries in which of them they use, so it is tried.
    """
    taken = {}
    for kind in (torch.float32, dtype):
        matrix, times = torch.ones(PROBED, PROBED, dtype=kind), []
        for _ in range(3):
            began = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - began)
        taken[kind] = min(times)
    return taken[dtype] / taken[torch.float32]


@contextmanager
def passes_in_tf32(wanted: bool) -> Iterator[None]:
    """Products on CUDA devices by TF32 inside the block if `wanted`, in full float32 otherwise."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "tf32" if wanted else "ieee"
        yield
    finally:
        backend.fp32_precision = before


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Float32 products in float32: TF32 and bfloat16 shortcuts are off inside the block."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
