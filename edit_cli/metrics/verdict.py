"""Whether an edited fact took, told of one prompt or one case. Pure functions of what was observed; no model is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edit_cli.metrics.scores import accuracy, generated_contains, is_scored, success


@dataclass(frozen=True)
class Verdict:
    """likely: the new answer is likelier than the old one; where no old one is known, it is the top choice, token by
    token. written: the model's own reply holds it; None where no reply was asked for.
    """

    likely: bool
    written: bool | None

    @property
    def took(self) -> bool:
        return self.likely and self.written is not False

    def __str__(self) -> str:
        if self.took:
            return "took" if self.written else "took, by likelihood (no reply was asked for)"
        if self.likely:
            return "did not take: likely now, but it writes something else"
        return "did not take: it writes it, but rates another answer higher" if self.written else "did not take"


def of_probe(probe: Mapping[str, Any]) -> Verdict:
    """The verdict on one edited prompt, asked after the edit."""
    compared, written = success(probe), generated_contains(probe)
    likely = accuracy(probe) if compared is None else compared
    return Verdict(bool(likely), None if written is None else bool(written))


def took(line: Mapping[str, Any]) -> bool:
    """Whether every edited prompt of the case took; a case that failed did not."""
    return is_scored(line) and all(of_probe(probe).took for probe in edited(line))


def edited(line: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The edited prompts of a case, asked after the edit."""
    return [probe for probe in (line.get("after") or {}).get("probes", []) if probe["kind"] == "rewrite"]


def verdicts(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"n", "took", "failed": ids of the facts that did not take}: what summary.json says of an edit."""
    failed = [line["case_id"] for line in lines if not took(line)]
    return {"n": len(lines), "took": len(lines) - len(failed), "failed": failed}
