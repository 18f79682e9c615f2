"""Settings of causal tracing. Imports nothing heavy: help and completion read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Len

from edit_cli.config.schema import Config, Count, Mark, Positive, Seed

Kind = Literal["hidden", "mlp", "attn"]


@dataclass(frozen=True, kw_only=True)
class TraceOptions(Config):
    """What is restored in corrupted runs, and how they are corrupted (Meng et al., 2022, section 2)."""

    place = "protocol"

    kinds: Annotated[list[Kind], Len(1), Mark.DISTINCT] = field(default_factory=lambda: ["hidden", "mlp", "attn"])
    """What is restored: what leaves a block, its MLP, its attention."""
    window: Count = 10
    """Layers whose MLP or attention outputs are restored together: [ℓ − window/2, ℓ + window/2 − 1], clipped."""
    noise: Positive = 3.0
    """Standard deviation of the noise, in those of the embeddings of all subjects' tokens."""
    noise_std: Positive | None = None
    """Standard deviation of the noise outright, instead of `noise`."""
    noise_seed: Seed = 1
    """Of the noise."""
    copies: Count = 10
    """Corrupted runs that are averaged."""
    proposed_layers: Count = 5
    """Layers to propose at most."""
    batch_tokens: Count = 2048
    """Tokens in one forward pass; speed and memory only."""
