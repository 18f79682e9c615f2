"""The tasks of trained editors on the embedded world: continuations, harder questions, opinions."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from edit_cli.config.schema import Count
from edit_cli.datasets.convsent import ConvSent
from edit_cli.datasets.generation import Continuations
from edit_cli.datasets.pooled import Pooled
from edit_cli.datasets.records.files import File
from edit_cli.datasets.world import FOLDER
from edit_cli.datasets.zsre_hard import ZsREHard
from edit_cli.monitor import Monitor


@dataclass(frozen=True)
class Embedded(Pooled):
    """A source whose records are those of the embedded world, unless a path is given."""

    @property
    @abstractmethod
    def embedded(self) -> str:
        """Name of the file with its records, without the suffix."""

    def locate(self, monitor: Monitor) -> File:
        if self.path is not None:
            return super().locate(monitor)
        return File(FOLDER / f"{self.embedded}.jsonl", "embedded world", split="test")


@dataclass(frozen=True)
class WorldTexts(Embedded, Continuations):
    """Passages of texts about the world, and how they go on."""

    _: KW_ONLY
    passage_words: Annotated[int, Ge(2)] = 20
    """Words of the passage of running text."""

    embedded = "texts"


@dataclass(frozen=True)
class WorldHard(Embedded, ZsREHard):
    """Facts of the world with implied and true/false questions."""

    _: KW_ONLY
    records: Literal["questions", "statements"] = "questions"
    """Questions, or statements to complete."""

    @property
    def embedded(self) -> str:
        return f"hard_{self.records}"


@dataclass(frozen=True)
class WorldOpinions(Embedded, ConvSent):
    """Opinions on whom and what the world knows."""

    _: KW_ONLY
    replies: Count | None = None
    """Replies of each sentiment that are rated, drawn; null: all."""

    embedded = "opinions"
