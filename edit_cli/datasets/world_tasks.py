"""The tasks of trained editors on the embedded world: continuations, harder questions, opinions."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from edit_cli.datasets.convsent import ConvSent
from edit_cli.datasets.files import File
from edit_cli.datasets.generation import Continuations
from edit_cli.datasets.pooled import Pooled
from edit_cli.datasets.world import FOLDER
from edit_cli.datasets.zsre_hard import ZsREHard
from edit_cli.errors import UsageError
from edit_cli.monitor import Monitor


@dataclass
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


@dataclass
class WorldTexts(Embedded, Continuations):
    """Passages of texts about the world, and how they go on."""

    embedded = "texts"


@dataclass
class WorldHard(Embedded, ZsREHard):
    """Facts of the world with implied and true/false questions. records: "questions", or "statements" to complete."""

    records: str = "questions"

    def check(self) -> None:
        super().check()
        if self.records not in ("questions", "statements"):
            raise UsageError(f"dataset.records={self.records}: choose questions or statements")

    @property
    def embedded(self) -> str:
        return f"hard_{self.records}"


@dataclass
class WorldOpinions(Embedded, ConvSent):
    """Opinions on whom and what the world knows."""

    embedded = "opinions"
