"""How float32 is multiplied: by TF32 where speed is wanted, in full where digits count.

A CUDA device multiplies float32 several times as fast when it reads ten bits of each mantissa (TF32). That is enough
for passes of a model; second moments, solves and updates of weights are sums whose small differences matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
