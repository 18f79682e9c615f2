"""zsRE-hard (Mitchell et al., 2022, SERAC): what an edit implies, whether a statement is true, and near misses that
must stay.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np

from edit_cli.config.schema import FilePath
from edit_cli.datasets.base import Chosen
from edit_cli.datasets.pooled import Entry
from edit_cli.datasets.records.files import File, locate
from edit_cli.datasets.records.reading import Content, contents
from edit_cli.datasets.records.rows import Dropped, Fault, Row
from edit_cli.datasets.zsre_qa import FLAT, KILT, ZsREQuestions
from edit_cli.errors import MissingError, UsageError
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, Probe
from edit_cli.writing import replace_words

PREFIXES = ("True or False: ", "True/False: ", "T/F: ", "Answer True or False: ")
LEFT_OUT = ("sex", "gender")
# nearest questions looked at, those of them that may be about the edit, softmax
NEAREST, IN_SCOPE, TEMPERATURE = 100, 25, 0.1


@dataclass(frozen=True)
class ZsREHard(ZsREQuestions):
    """zsRE with harder questions on both sides of an edit's scope.

    Implied questions are those that hold the right answer, with the new answer in its place; a statement with the new
    answer in the right one's place is true, with another alternative (else the old answer) false. Near misses are
    other records' questions that are worded alike (cosine of TF-IDF vectors, where the publication takes a sentence
    encoder): of the nearest 100, or a tenth of the set if that is less, the nearest quarter is left out.
    """

    _: KW_ONLY
    unrelated: Literal["nq", "zsre"] = "zsre"
    """Where unrelated questions come from: Natural Questions (a record's own item, or nq_path), or other records."""
    implied_path: FilePath | None = None
    """JSON list with an item a record: [[question, answer], …]; null: the records' field implied."""
    true_false_path: FilePath | None = None
    """Text file with a statement a record; null: the records' field statement."""

    expects: ClassVar[str] = (
        f"{ZsREQuestions.expects}; with implied, statement, or dataset.implied_path, dataset.true_false_path"
    )
    fields: ClassVar[frozenset[str]] = frozenset((*KILT, *FLAT, "relation", "implied", "statement", "split"))

    def read(self, file: File) -> Content:
        """The records, with the lines of the other two files beside them."""
        content = super().read(file)
        extra: dict[str, list[Any]] = {}
        if self.implied_path is not None:
            extra["implied"] = self._aligned("implied_path", self.implied_path, content)
        if self.true_false_path is not None:
            extra["statement"] = self._aligned("true_false_path", self.true_false_path, content)

        def beside(row: Row | Dropped) -> Row | Dropped:
            if isinstance(row, Dropped):
                return row
            return Row(
                row.where, row.index, {**row.values, **{name: values[row.index] for name, values in extra.items()}}
            )

        return Content([beside(row) for row in content.rows], content.sha256)

    def _aligned(self, key: str, path: str, content: Content) -> list[Any]:
        file = locate(path, self.cache_dir, Monitor(), f"dataset.{key}")
        text, _ = contents(file.path, f"dataset.{key}={path}")
        try:
            values = json.loads(text) if key == "implied_path" else text.splitlines()
        except (ValueError, RecursionError) as error:
            raise MissingError(f"dataset.{key}={path} cannot be read: {error}") from None
        if not isinstance(values, list):
            raise MissingError(f"dataset.{key}={path} is not a JSON list")
        if len(values) != len(content.rows):
            raise UsageError(
                f"dataset.{key}={path} has {len(values):,} items for {len(content.rows):,} records: they must go line"
                " by line"
            )
        return values

    def case(self, row: Row) -> Case:
        case = super().case(row)
        if any(word in self.question(row).lower() for word in LEFT_OUT):
            raise Fault("src" if row.has("src") else "input", "asks for sex or gender, which is left out as published")
        harder = [*self._implied(row, case), *self._true_false(row, case)]
        if not harder:
            raise Fault("implied", "holds no question with the right answer in it, and there is no statement")
        return replace(case, probes=case.probes + tuple(harder))

    def _implied(self, row: Row, case: Case) -> list[Probe]:
        (request,) = case.requests
        if not row.has("implied") or request.target_true is None:
            return []
        items = row.get("implied")
        if not isinstance(items, list) or not all(isinstance(item, list | tuple) and len(item) >= 2 for item in items):
            raise Fault("implied", "is not a list of [question, answer]")
        swapped = partial(replace_words, words=request.target_true, other=request.target_new)
        return [
            Probe("portability", swapped(question), swapped(answer), group="implied")
            for question, answer, *_ in items
            if isinstance(question, str)
            and isinstance(answer, str)
            and answer.strip()
            and request.target_true in question
        ]

    def _true_false(self, row: Row, case: Case) -> list[Probe]:
        (request,) = case.requests
        if not row.has("statement") or request.target_true is None:
            return []
        statement = row.text("statement")
        if request.target_true not in statement:
            return []
        rng = self.drawn(row, "true or false")
        others = [answer for answer in self.alternatives(row) if answer != request.target_new] or [request.target_true]
        found = []
        for answer, verdict in ((request.target_new, "True"), (rng.choice(others), "False")):
            prefix = rng.choice(PREFIXES)
            prefix = prefix.lower() if rng.random() < 0.5 else prefix
            foil = "False" if verdict == "True" else "True"
            text = prefix + replace_words(statement, request.target_true, answer)
            found.append(Probe("portability", text, verdict, foil, group="true_false"))
        return found

    def complete(self, chosen: Sequence[Chosen], pool: Sequence[Chosen], file: File, monitor: Monitor) -> list[Case]:
        cases = super().complete(chosen, pool, file, monitor)
        if self.locality == 0 or len(pool) < 3:
            return cases
        near = NearMisses([self.entry(row, case) for row, case in pool])
        place = {case.id: number for number, (_, case) in enumerate(pool)}
        found = []
        for case in cases:
            rng = random.Random(f"{self.seed} near misses {case.id}")
            probes = tuple(one.probe("hard") for one in near.draw(place[case.id], self.locality, rng))
            found.append(replace(case, probes=case.probes + probes))
        return found


class NearMisses:
    """Questions of other subjects that are worded like one's own."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.entries, self.subjects = entries, [one.subject for one in entries]
        self.vectors = TfidfVectorizer(token_pattern=r"\w+").fit_transform([one.prompt for one in entries])
        self.looked_at = max(2, min(NEAREST, len(entries) // 10))
        self.left_out = self.looked_at * IN_SCOPE // NEAREST

    def draw(self, own: int, count: int, rng: random.Random) -> list[Entry]:
        """Up to `count` of them, likelier the nearer."""
        similar = np.asarray((self.vectors @ self.vectors[own].T).todense()).ravel()
        order = [i for i in np.argsort(-similar, kind="stable").tolist() if self.subjects[i] != self.subjects[own]]
        order = order[self.left_out : self.looked_at]
        weights = np.exp((similar[order] - similar[order].max(initial=0.0)) / TEMPERATURE)
        ranked = sorted(range(len(order)), key=lambda k: rng.random() ** (1.0 / max(weights[k], 1e-12)), reverse=True)
        return [self.entries[order[k]] for k in ranked[:count]]
