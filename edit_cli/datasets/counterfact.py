"""CounterFact and MultiCounterFact (Meng et al., 2022 and 2023), their flat variant, and the embedded world in the
same schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from edit_cli import assets
from edit_cli.config.schema import FilePath, Linked
from edit_cli.datasets.base import Chosen, Source
from edit_cli.datasets.records.files import File, Remote, download, locate
from edit_cli.datasets.records.rows import Fault, Row
from edit_cli.datasets.records.snippets import Key, texts_of
from edit_cli.errors import MissingError, UsageError
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, EditRequest, Probe
from edit_cli.wording import many

PROMPTS = ("paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts")
FULL = ("case_id", "pararel_idx", "requested_rewrite", *PROMPTS)
FLAT = (
    "case_id",
    "prompt",
    "subject",
    "target_new",
    "ground_truth",
    "rephrase_prompt",
    "locality_prompt",
    "locality_ground_truth",
)


@dataclass(frozen=True)
class CounterFact(Source):
    """Counterfactual rewrites with paraphrases, neighbors (same true object, other subject) and free-text prompts."""

    _: KW_ONLY
    records: Annotated[str | None, Linked("${model.records}")] = None
    """Embedded records that go with the model (world); a path comes before them, the published file after them."""
    snippets: FilePath | None = None
    """Reference texts: FILE, https://…, hub:…, published (0.9 GB); null: the embedded world's, else none."""
    published_snippets: Remote | None = None
    """The published reference texts, fetched once into cache_dir, on first use."""

    expects: ClassVar[str] = (
        "requested_rewrite, paraphrase_prompts, neighborhood_prompts (full) or " + ", ".join(FLAT[1:]) + " (flat)"
    )
    fields: ClassVar[frozenset[str]] = frozenset((*FULL, *FLAT, "split"))

    @property
    def embedded(self) -> bool:
        return self.path is None and self.records is not None

    def locate(self, monitor: Monitor) -> File:
        if not self.embedded:
            return super().locate(monitor)
        return File(self._asset("records.json"), f"embedded {self.records}", split="test")

    def _asset(self, name: str) -> Path:
        records = self.records or ""
        if not records.isidentifier():
            raise UsageError(
                f"dataset.records={self.records}: give world or null; a file of your own goes to dataset.path"
            )
        file = assets.FOLDER / records / name
        if not file.is_file():
            raise MissingError(f"dataset.records={self.records}: this installation holds no {name} of that name")
        return file

    def case(self, row: Row) -> Case:
        return _full(row) if row.has("requested_rewrite") or not row.has("prompt") else _flat(row)

    def complete(self, chosen: Sequence[Chosen], pool: Sequence[Chosen], file: File, monitor: Monitor) -> list[Case]:
        snippets = self._locate_snippets(monitor)
        if snippets is None:
            return super().complete(chosen, pool, file, monitor)
        keys = [_property(row) for row, _ in chosen]
        texts = texts_of({key for key in keys if key}, snippets, self.cache_dir, monitor)
        cases = [
            replace(case, references=texts.get(key or ("", ""), ()))
            for key, (_, case) in zip(keys, chosen, strict=True)
        ]
        if without := sum(not case.references for case in cases):
            monitor.note(
                f"{self.name}: no reference texts for {without:,} of {many(len(cases), 'record')} in {snippets.label}"
            )
        return cases

    def _locate_snippets(self, monitor: Monitor) -> File | None:
        if self.snippets is None:
            return File(self._asset("snippets.json"), f"embedded {self.records} snippets") if self.embedded else None
        if self.snippets != "published":
            return locate(self.snippets, self.cache_dir, monitor, "dataset.snippets")
        if self.published_snippets is None:
            raise UsageError(
                "dataset.snippets=published, but dataset.published_snippets is null; give dataset.snippets=FILE"
            )
        return download(self.published_snippets, self.cache_dir, monitor, "dataset.snippets")


def _full(row: Row) -> Case:
    subject = row.phrase("requested_rewrite.subject")
    new, true = row.phrase("requested_rewrite.target_new.str"), row.phrase("requested_rewrite.target_true.str")
    _differ(new, true, "requested_rewrite.target_new.str")
    request = EditRequest(row.template("requested_rewrite.prompt", subject), subject, new, true)
    probes = [Probe("rewrite", request.text, new, true)]
    probes += [Probe("paraphrase", prompt, new, true) for prompt in row.prompts("paraphrase_prompts")]
    probes += [Probe("neighborhood", prompt, true, new) for prompt in row.prompts("neighborhood_prompts")]
    probes += [Probe("attribute", prompt, new, true) for prompt in row.prompts("attribute_prompts", required=False)]
    probes += [Probe("generation", prompt) for prompt in row.prompts("generation_prompts", required=False)]
    return Case(row.id("case_id"), (request,), tuple(probes))


def _flat(row: Row) -> Case:
    subject, new, true = row.phrase("subject"), row.phrase("target_new"), row.phrase("ground_truth")
    _differ(new, true, "target_new")
    request = EditRequest(row.template("prompt", subject), subject, new, true)
    probes = (
        Probe("rewrite", request.text, new, true),
        Probe("paraphrase", row.prompt("rephrase_prompt"), new, true),
        Probe("neighborhood", row.prompt("locality_prompt"), row.phrase("locality_ground_truth"), new),
    )
    return Case(row.id("case_id"), (request,), probes)


def _differ(new: str, true: str, path: str) -> None:
    if new == true:  # nothing would beat its foil, edited or not
        raise Fault(path, "equals the true target")


def _property(row: Row) -> Key | None:
    """What the record claims of its subject: the key of its reference texts."""
    relation, target = "requested_rewrite.relation_id", "requested_rewrite.target_new.id"
    return (str(row.get(relation)), str(row.get(target))) if row.has(relation) and row.has(target) else None
