"""T-REx as LAMA prepared it (Petroni et al., 2019), as constrained fine-tuning modifies it (Zhu et al., 2020): a fact
gets the object of another fact of its relation, and all other facts are to stay.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar

from edit_cli import assets
from edit_cli.config.schema import FilePath, Linked
from edit_cli.datasets.base import Chosen
from edit_cli.datasets.pooled import Pooled
from edit_cli.datasets.records.files import File, locate
from edit_cli.datasets.records.reading import Content, read
from edit_cli.datasets.records.rows import Dropped, Fault, Row
from edit_cli.errors import MissingError, UsageError
from edit_cli.files.paths import expanded
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, EditRequest, Probe

FIELDS = "sub_label, obj_label, predicate_id"
MASK = re.compile(
    r"\s*(?:\[MASK\]|\[Y\])\s*[.!]?\s*$"
)  # at the end of a statement: what stands before it is the prompt
RELATIONS = "relations.jsonl"  # LAMA's own name for the file of templates


@dataclass(frozen=True)
class TREx(Pooled):
    """One fact a record, a file a relation or one for all; locality prompts are facts of the set that are not modified.

    The prompt is the relation's template up to its object, or the first sentence of the record's evidences that ends
    with it: what models that write from left to right can complete.
    """

    _: KW_ONLY
    records: Annotated[str | None, Linked("${model.records}")] = None
    """Embedded records that go with the model (world); a path comes before them."""
    templates: FilePath | None = None
    """LAMA's relations.jsonl, one template each ("[X] was born in [Y] ."); null: sentences of the records."""

    expects: ClassVar[str] = f"{FIELDS}, and evidences or a template for the relation"
    fields: ClassVar[frozenset[str]] = frozenset(
        (*FIELDS.split(", "), "uuid", "sub_uri", "obj_uri", "evidences", "split")
    )
    id_fields: ClassVar[tuple[str, ...]] = ("uuid",)

    def locate(self, monitor: Monitor) -> File:
        if self.path is not None and (folder := expanded(self.path)).is_dir():
            return File(folder, self.path)
        if self.path is not None or self.records is None:
            return super().locate(monitor)
        file = assets.FOLDER / self.records / "trex.jsonl"
        if not self.records.isidentifier() or not file.is_file():
            raise UsageError(f"dataset.records={self.records}: give world or null; your own file goes to dataset.path")
        return File(file, f"embedded {self.records}", split="test")

    def read(self, file: File) -> Content:
        """The rows of a file, or of all files of a folder (P19.jsonl, …), in the order of their names."""
        if not file.path.is_dir():
            return super().read(file)
        paths = sorted(path for path in file.path.glob("*.jsonl") if path.name != RELATIONS)
        if not paths:
            raise MissingError(f"dataset.path={self.path} is a folder without files *.jsonl: name LAMA's TREx folder")
        contents = [read(path, f"{file.label}/{path.name}", self.fields, self.expects) for path in paths]
        rows: list[Row | Dropped] = []
        for path, content in zip(paths, contents, strict=True):
            for row in content.rows:
                where = f"{path.name}, {row.where}"
                rows.append(
                    replace(row, where=where, index=len(rows)) if isinstance(row, Row) else replace(row, where=where)
                )
        return Content(rows, hashlib.sha256("".join(content.sha256 for content in contents).encode()).hexdigest())

    def about(self, row: Row) -> str:
        return row.phrase("sub_label")

    def relation(self, row: Row, case: Case) -> str | None:
        return row.phrase("predicate_id")

    def case(self, row: Row) -> Case:
        """The fact as it is; `usable` draws what it becomes."""
        subject, true = row.phrase("sub_label"), row.phrase("obj_label")
        request = EditRequest(self.prompt(row, subject), subject, true, true)
        return Case(row.id("uuid"), (request,), ())

    def prompt(self, row: Row, subject: str) -> str:
        """The statement up to its object, with a slot for the subject. Raises `Fault` where none ends with it."""
        relation = row.phrase("predicate_id")
        if (template := self._templates.get(relation)) is not None:
            return template
        if self.templates is not None:
            raise Fault("predicate_id", "has no template whose object stands at the end")
        for sentence in self._sentences(row):
            if (start := MASK.search(sentence)) and sentence.count("[MASK]") == 1 and "{" not in sentence:
                text = sentence[: start.start()]
                if re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", text):
                    return re.sub(rf"(?<!\w){re.escape(subject)}(?!\w)", "{}", text, count=1)
        raise Fault("evidences", "has no sentence that names the subject and ends with the object")

    @staticmethod
    def _sentences(row: Row) -> list[str]:
        given: Any = row.get("evidences")
        if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
            raise Fault("evidences", "is not a list of objects")
        found = [one.get("masked_sentence") for one in given]
        return [sentence for sentence in found if isinstance(sentence, str)]

    @cached_property
    def _templates(self) -> dict[str, str]:
        """{relation: prompt with a slot} of those whose object stands at the end."""
        if self.templates is None:
            return {}
        file = locate(self.templates, self.cache_dir, Monitor(), "dataset.templates")
        found = {}
        for row in read(file.path, file.label, ("relation", "template"), "relation, template").rows:
            if not isinstance(row, Row) or not row.has("relation") or not row.has("template"):
                raise MissingError(f"dataset.templates: {file.label}, {row.where} has no relation and template")
            text = row.phrase("template")
            if (start := MASK.search(text)) and text[: start.start()].count("[X]") == 1 and "{" not in text:
                found[row.phrase("relation")] = text[: start.start()].replace("[X]", "{}")
        return found

    def usable(self, records: Sequence[Chosen]) -> list[Chosen]:
        """The facts with what they become: the object of another fact of the relation. Facts of relations with a single
        object stay out.
        """
        objects: dict[str, list[str]] = defaultdict(list)
        for row, case in records:
            objects[row.phrase("predicate_id")].append(case.requests[0].target_new)
        kinds = {relation: sorted(set(found)) for relation, found in objects.items()}
        modified = []
        for row, case in records:
            request = case.requests[0]
            others = [one for one in kinds[row.phrase("predicate_id")] if one != request.target_true]
            if others:
                request = replace(request, target_new=self.drawn(row, "object").choice(others))
                probe = Probe("rewrite", request.text, request.target_new, request.target_true)
                modified.append((row, replace(case, requests=(request,), probes=(probe,))))
        if not modified:
            raise MissingError(
                f"{self.name}: no relation has two objects, so there is nothing that a fact could become"
            )
        return modified
