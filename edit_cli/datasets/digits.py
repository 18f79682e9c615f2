"""Handwritten digits that come with scikit-learn (1,797 gray images of 8 × 8 pixels, UCI Optical Recognition of
Handwritten Digits): images to edit without a download.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edit_cli.datasets.images import Images
from edit_cli.datasets.records.files import File
from edit_cli.datasets.records.reading import Content
from edit_cli.datasets.records.rows import Dropped, Row
from edit_cli.errors import UsageError
from edit_cli.lm.pictures import Pixels, packed
from edit_cli.monitor import Monitor

LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEN = 10
BRIGHTEST = 16  # of the pixels, as they are published
SPLITS = (
    "train",
    "train",
    "train",
    "validation",
    "test",
)  # of every fifty images, ten one after another: one of each digit


def digits() -> list[tuple[Pixels, str, str]]:
    """(pixels, label, split) of all images."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.rint(found.images * (255 / BRIGHTEST)).astype(np.uint8)[..., None]
    return [
        (image, LABELS[number], SPLITS[index // TEN % len(SPLITS)])
        for index, (image, number) in enumerate(zip(pixels, found.target, strict=True))
    ]


@dataclass(frozen=True)
class Digits(Images):
    """The digits in splits of three, one and one fifth."""

    def locate(self, monitor: Monitor) -> File:
        if self.path is not None:
            raise UsageError(
                f"dataset.path={self.path}: dataset=digits comes with scikit-learn and takes none; images of yours"
                " go to dataset=images"
            )
        return File(Path("digits"), "digits of scikit-learn", split="test")

    def read(self, file: File) -> Content:
        images = digits()
        rows: list[Row | Dropped] = [
            Row(f"record {index}", index, {"image": pixels, "label": label, "split": split, "id": f"digit-{index}"})
            for index, (pixels, label, split) in enumerate(images)
        ]
        return Content(rows, hashlib.sha256(b"".join(pixels.tobytes() for pixels, *_ in images)).hexdigest())

    def file(self, row: Row) -> bytes:
        return packed(row.get("image"))
