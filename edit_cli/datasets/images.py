"""Images with labels (Sinitsin et al., 2020): an edit gives one image another label, and others must keep theirs.

`Images` is what all such sources share; `ImageFiles` reads files of the user's.
"""

from __future__ import annotations

import hashlib
import random
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

from edit_cli.config.schema import Natural, Seed
from edit_cli.datasets.base import Chosen, Source
from edit_cli.datasets.others import beside
from edit_cli.datasets.records.files import File
from edit_cli.datasets.records.reading import Content, read
from edit_cli.datasets.records.rows import Dropped, Fault, Row
from edit_cli.errors import MissingError, UsageError
from edit_cli.files.paths import expanded
from edit_cli.lm.pictures import framed, name_of, unpacked
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, EditRequest, Probe

SPLITS = ("train", "validation", "test")
SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Images(Source):
    """One image a record. Probes: rewrite; locality (other images of the split, with their own labels)."""

    has_splits: ClassVar[bool] = True
    prompts: ClassVar[str] = "images"
    expects: ClassVar[str] = "image, label, optional target_new, split, id"
    fields: ClassVar[frozenset[str]] = frozenset(("image", "label", "target_new", "split", "id"))

    _: KW_ONLY
    new_label: Literal["other", "any"] = "other"
    """Which label an edit writes where records do not say: another one than the image has, or any, its own too, as
    published; drawn at random."""
    others: Natural = 100
    """Other images of the split that must keep their labels, drawn for each edit, if possible of those that are not
    edited themselves; 0: all of the split, as published."""
    seed: Seed = 0
    """Of everything that is drawn."""

    @abstractmethod
    def file(self, row: Row) -> bytes:
        """The record's image, as a PNG or JPEG file. Raises `Fault` where it has none."""

    def case(self, row: Row) -> Case:
        """The image with its own label; `usable` draws the one that is written."""
        label, name = row.phrase("label"), name_of(row.id("id"))
        new = row.phrase("target_new") if row.has("target_new") else None
        if new is not None and new.casefold() == label.casefold():
            raise Fault("target_new", "is the label already")
        request = EditRequest(name, None, new or label, label, frame=framed(self.file(row)))
        return Case(row.id("id"), (request,), (), right=(label,))

    def usable(self, records: Sequence[Chosen]) -> list[Chosen]:
        labels = _labels(case for _, case in records)
        if len(labels) < 2:
            raise MissingError(f"{self.name}: all images have the same label, so there is no other one to write")
        return [(row, self._relabeled(row, case, labels)) for row, case in records]

    def _relabeled(self, row: Row, case: Case, labels: Sequence[str]) -> Case:
        (request,), (label,) = case.requests, case.right
        if not row.has("target_new"):
            drawn = random.Random(f"{self.seed} label {row.index}")
            new = drawn.choice([one for one in labels if self.new_label == "any" or one != label])
            request = replace(request, target_new=new, target_true=None if new == label else label)
        probe = Probe("rewrite", request.prompt, request.target_new, request.target_true, frame=request.frame)
        return replace(case, requests=(request,), probes=(probe,))

    def complete(self, chosen: Sequence[Chosen], pool: Sequence[Chosen], file: File, monitor: Monitor) -> list[Case]:
        kept = {case.id: _keeping(case) for _, case in pool}
        return beside([case for _, case in chosen], kept, self.others, self.seed)

    def answer_labels(self, cases: Sequence[Case]) -> tuple[str, ...] | None:
        return tuple(_labels(cases))


def _keeping(case: Case) -> Probe:
    """The image as one that must keep its label."""
    (request,), (label,) = case.requests, case.right
    return Probe("locality", request.prompt, label, group="random", frame=request.frame)


def _labels(cases: Iterable[Case]) -> list[str]:
    """All labels, in the order of their names; those of other case are the same."""
    found = {label.casefold(): label for case in cases for label in (*case.right, case.requests[0].target_new)}
    return [found[name] for name in sorted(found)]


@dataclass(frozen=True)
class ImageFiles(Images):
    """A folder SPLIT/LABEL/NAME.png (or LABEL/NAME.png), or a list of image files beside it: JSON lines, JSON or CSV
    with the fields image (a file in the list's folder) and label.
    """

    def locate(self, monitor: Monitor) -> File:
        if self.path is not None and (folder := expanded(self.path)).is_dir():
            return File(folder, self.path)
        return super().locate(monitor)

    def read(self, file: File) -> Content:
        return _folder(file) if file.path.is_dir() else read(file.path, file.label, self.fields, self.expects)

    def file(self, row: Row) -> bytes:
        path = row.get("image")
        if not isinstance(path, Path):  # of a list, which names files below itself and no others
            name = PurePosixPath(row.phrase("image"))
            if name.is_absolute() or ".." in name.parts:
                raise Fault("image", "is no file inside the list's folder")
            path = self._folder / name
        try:
            found = path.read_bytes()
            unpacked(found)
        except OSError:
            raise Fault("image", "cannot be read, or is no file") from None
        except ValueError as error:
            raise Fault("image", str(error)) from None
        return found

    @property
    def _folder(self) -> Path:
        if self.path is None or not expanded(self.path).is_file():
            raise UsageError("dataset.path: a list of images is a file beside them on this machine")
        return expanded(self.path).parent


def _folder(file: File) -> Content:
    """A row a PNG or JPEG file, in the order of their paths.

    Raises:
        MissingError: there are none, or folders of another form.
    """
    rows: list[Row | Dropped] = []
    digest = hashlib.sha256()
    for path in sorted(file.path.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        *split, label, name = path.relative_to(file.path).parts if path.parent != file.path else ("", "", path.name)
        where = "/".join((*split, label, name))
        if not label or len(split) > 1 or (split and split[0] not in SPLITS):
            raise MissingError(
                f"{file.label} has {where.strip('/')}: images lie in {file.label}/LABEL/ or, by splits, in"
                f" {file.label}/train/LABEL/, validation/LABEL/ and test/LABEL/"
            )
        values: dict[str, Any] = {"image": path, "label": label, "id": where}
        rows.append(Row(where, len(rows), values | ({"split": split[0]} if split else {})))
        digest.update(f"{where} {path.stat().st_size}".encode() + path.read_bytes())
    if not rows:
        raise MissingError(f"{file.label} is a folder without images: {', '.join(SUFFIXES)} in folders of their labels")
    return Content(rows, digest.hexdigest())
