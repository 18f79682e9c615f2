"""The tasks of trained editors on the embedded world: continuations, harder questions, opinions.

Their records are made when they are read.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edit_cli.datasets.convsent import ConvSent
from edit_cli.datasets.files import File
from edit_cli.datasets.generation import Continuations
from edit_cli.datasets.pooled import Pooled
from edit_cli.datasets.reading import Content
from edit_cli.datasets.rows import Row
from edit_cli.datasets.zsre_hard import ZsREHard
from edit_cli.errors import UsageError
from edit_cli.monitor import Monitor

# tells the seed of the world that the models know
MANIFEST = Path(__file__).parent.parent / "assets" / "tiny-gpt2" / "manifest.json"


@dataclass
class Embedded(Pooled):
    """A source whose records come from the embedded world, unless a path is given."""

    @abstractmethod
    def records_of(self, world: Any) -> list[dict[str, Any]]:
        """Its records, with their splits."""

    def locate(self, monitor: Monitor) -> File:
        if self.path is not None:
            return super().locate(monitor)
        return File(MANIFEST, "embedded world", split="test")

    def read(self, file: File) -> Content:
        if self.path is not None:
            return super().read(file)
        from edit_cli.tiny.world import make_world

        records = self.records_of(make_world(json.loads(file.path.read_text(encoding="utf-8"))["seed"]))
        text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        rows = [Row(f"record {number}", number, record) for number, record in enumerate(records)]
        return Content(rows, hashlib.sha256(text.encode()).hexdigest())


@dataclass
class WorldTexts(Embedded, Continuations):
    """Passages of texts about the world, and how they go on."""

    def records_of(self, world: Any) -> list[dict[str, Any]]:
        from edit_cli.tiny.texts import text_records

        return text_records(world)


@dataclass
class WorldHard(Embedded, ZsREHard):
    """Facts of the world with implied and true/false questions. records: "questions", or "statements" to complete."""

    records: str = "questions"

    def check(self) -> None:
        super().check()
        if self.records not in ("questions", "statements"):
            raise UsageError(f"dataset.records={self.records}: choose questions or statements")

    def records_of(self, world: Any) -> list[dict[str, Any]]:
        from edit_cli.tiny.hard import hard_records

        return hard_records(world, self.records)


@dataclass
class WorldOpinions(Embedded, ConvSent):
    """Opinions on whom and what the world knows."""

    def records_of(self, world: Any) -> list[dict[str, Any]]:
        from edit_cli.tiny.opinions import opinion_records

        return opinion_records(world)
