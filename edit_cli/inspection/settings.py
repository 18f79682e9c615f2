"""Settings of `inspect`. Imports nothing heavy: help and completion read it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Len

from edit_cli.config.schema import Config, Count, Layers, Linked, Mark, Seed
from edit_cli.errors import UsageError
from edit_cli.statistics.corpora import Corpus, EmbeddedText

NAME = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Config):
    """Which memories are looked at, and on which text (Geva et al., 2021)."""

    place = "protocol"

    layers: Annotated[Layers, Len(1)] | None = None
    """Layers to look at; null: all."""
    keys: Count = 10
    """Keys of each layer whose triggers are kept, drawn at random; of all others only the strongest one is."""
    named: Annotated[list[str], Len(1), Mark.DISTINCT] | None = None
    """Keys to look at instead of drawn ones, as LAYER:KEY, such as [3:17, 5:2]."""
    examples: Annotated[int, Ge(2)] = 25
    """Triggers of a key: the prefixes of the text that fire it most."""
    ablated: Count = 10
    """Triggers of a key that a token is removed from: the first, the last, one at random."""
    measured: Count = 200
    """Prefixes, drawn at random, on which composition and refinement are measured."""
    shown: Count = 10
    """Tokens of a value, and keys and values of an edited layer, that are told."""
    facts: Count = 5
    """Edited facts whose subjects are looked at."""
    shortest: Count = 2
    """Tokens of a prefix at least: the first token of a text fires keys of many models whatever it is."""
    max_length: Count = 64
    """Tokens of a sentence, the rest is cut."""
    norm: bool = False
    """Take vectors through the model's last norm before its vocabulary (logit lens); published: not."""
    seed: Annotated[Seed, Linked("${seed}")] = 0
    """Of everything that is drawn, and of the order of the text."""
    batch_tokens: Count = 2048
    """Tokens in one forward pass; speed and memory only."""
    corpus: Annotated[Corpus, Linked("${oc.select:corpus,${corpus_config:${model.corpus}}}")] = field(
        default_factory=EmbeddedText
    )
    """The text: corpus=NAME, else the one that goes with the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.chosen

    @property
    def chosen(self) -> dict[int, list[int]]:
        """{layer: keys} of `named`.

        Raises:
            UsageError: a name that is none, or of a layer that is not looked at.
        """
        found: dict[int, list[int]] = {}
        for name in self.named or ():
            if not (parts := NAME.fullmatch(name)):
                raise UsageError(f"protocol.named=[{name}]: name a key as LAYER:KEY, such as 3:17")
            layer = int(parts[1])
            if self.layers is not None and layer not in self.layers:
                raise UsageError(f"protocol.named=[{name}]: layer {layer} is not among protocol.layers={self.layers}")
            found.setdefault(layer, []).append(int(parts[2]))
        return found
