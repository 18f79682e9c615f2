"""CIFAR-10 (Krizhevsky, 2009), in the form that is published for C programs: `cifar-10-batches-bin`. The one for
Python holds pickles, which can run code, and is not read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from edit_cli.datasets.images import Images
from edit_cli.datasets.records.files import File
from edit_cli.datasets.records.reading import Content
from edit_cli.datasets.records.rows import Dropped, Row
from edit_cli.errors import MissingError, UsageError
from edit_cli.files.paths import expanded
from edit_cli.lm.pictures import packed
from edit_cli.monitor import Monitor

SPLITS = {f"data_batch_{number}.bin": "train" for number in range(1, 5)} | {
    "data_batch_5.bin": "validation",
    "test_batch.bin": "test",
}
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE, CHANNELS = 32, 3
RECORD = 1 + CHANNELS * SIDE * SIDE  # bytes: the label, then red, green and blue, each row by row
REMEDY = "give the folder cifar-10-batches-bin of the binary version (cifar-10-binary.tar.gz, unpacked)"


@dataclass(frozen=True)
class Cifar10(Images):
    """The published test batch, the fifth training batch as validation split, and the others to train on."""

    def locate(self, monitor: Monitor) -> File:
        if self.path is None:
            raise UsageError(f"dataset=cifar10 needs dataset.path: {REMEDY}")
        folder = expanded(self.path)
        if not folder.is_dir():
            raise MissingError(f"dataset.path={self.path} is no folder: {REMEDY}")
        if not any((folder / name).is_file() for name in SPLITS):
            pickles = " but pickles, which are not read" if (folder / "data_batch_1").is_file() else ""
            raise MissingError(f"dataset.path={self.path} holds no CIFAR-10 batches{pickles}: {REMEDY}")
        return File(folder, self.path, split="test")

    def read(self, file: File) -> Content:
        """The records of those batches that are there."""
        rows: list[Row | Dropped] = []
        digest = hashlib.sha256()
        for name, split in SPLITS.items():
            path = file.path / name
            if not path.is_file():
                continue
            data = path.read_bytes()
            digest.update(data)
            if not data or len(data) % RECORD:
                raise MissingError(
                    f"{file.label}/{name} is damaged: {len(data):,} bytes are no whole records of {RECORD:,}; {REMEDY}"
                )
            for number, record in enumerate(np.frombuffer(data, np.uint8).reshape(-1, RECORD)):
                values = {"image": record[1:], "label": int(record[0]), "split": split, "id": f"{path.stem}-{number}"}
                rows.append(_named(Row(f"{name}, record {number}", len(rows), values)))
        return Content(rows, digest.hexdigest())

    def file(self, row: Row) -> bytes:
        return packed(row.get("image").reshape(CHANNELS, SIDE, SIDE).transpose(1, 2, 0))


def _named(row: Row) -> Row | Dropped:
    """The record with its label's name."""
    number = row.values["label"]
    if number >= len(LABELS):
        return Dropped(row.where, "label", f"is above {len(LABELS) - 1}", row.values["id"])
    return Row(row.where, row.index, row.values | {"label": LABELS[number]})
