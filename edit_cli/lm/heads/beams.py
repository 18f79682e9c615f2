"""Beam search, by transformers: the answers that a model would give next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from edit_cli.lm.heads.sampling import without_defaults


def beam_search(
    model: Any,
    count: int,
    max_new_tokens: int,
    pad: int,
    stops: Sequence[int] | None,
    start: int | None = None,
    **inputs: Tensor,
) -> Tensor:
    """(rows · count, tokens): the `count` likeliest sequences of each row, best first, by as many beams.

    start: the token that a decoder begins with. inputs: what `generate` reads.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=count,
        num_return_sequences=count,
        pad_token_id=pad,
        eos_token_id=stops,
        decoder_start_token_id=start,
        use_cache=True,
    )
    with without_defaults(model):
        return model.generate(generation_config=config, **inputs).cpu()


def distinct(texts: Iterable[str]) -> list[str]:
    """Those that say something, each once, in order."""
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))
