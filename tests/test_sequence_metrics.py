"""What a sequence did: retention, forgetting, collapse; on lines made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from embedded import embedded_lm

from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.metrics.sequence import area, checkpoint_rows, first_collapse, forgetting, retention_matrix
from edit_cli.metrics.weight_drift import Health, largest_singular_value
from edit_cli.report.figures.curves import _running_median


def probe(kind: str, right: bool) -> dict:
    nlls = (0.1, 2.0) if right else (2.0, 0.1)
    return {
        "kind": kind,
        "prompt": "p",
        "target": "t",
        "foil": "f",
        "generated": None,
        "target_nll": nlls[0],
        "foil_nll": nlls[1],
        "target_hits": [right],
        "foil_hits": [not right],
        "target_predicted": [0],
    }


def seen(rewrite: bool, others: bool = True, nll: float | None = 100.0) -> dict:
    probes = [probe("rewrite", rewrite), probe("paraphrase", rewrite), probe("neighborhood", others)]
    return {"probes": probes, "texts": [], "perplexity": {"nll": nll, "tokens": 100}}


def line(case: int, when: str, edits: int, after: dict, step: int | None = None, **more) -> dict:
    before = seen(False)
    return {
        "case_id": str(case),
        "when": when,
        "edits": edits,
        "step": case // 2 if step is None else step,
        "requests": [{}],
        "before": before if when == "after_edit" else None,
        "after": after,
        "seconds": 0.5,
        "error": None,
        **more,
    }


def course(last: dict) -> list[dict]:
    """Four facts in steps of two, asked after two and after four; the first two are `last` in the end."""
    good = seen(True)
    return [
        *(line(case, "after_edit", 2, good) for case in (0, 1)),
        *(line(case, "checkpoint", 2, good) for case in (0, 1)),
        *(line(case, "after_edit", 4, good) for case in (2, 3)),
        *(line(case, "checkpoint", 4, last, step=1) for case in (0, 1)),
        *(line(case, "checkpoint", 4, good, step=1) for case in (2, 3)),
    ]


def test_forgetting_is_the_difference_to_right_after_the_edit():
    rows = checkpoint_rows(course(seen(False)), first=2)
    assert [row["edits"] for row in rows] == [2, 4]
    assert rows[0]["forgetting"]["efficacy_success"] == 0
    assert rows[1]["forgetting"]["efficacy_success"] == 50
    assert rows[1]["metrics"]["efficacy_success"]["mean"] == 50
    assert rows[1]["first"]["efficacy_success"]["mean"] == 0
    assert rows[1]["latest"]["efficacy_success"]["mean"] == 100


def test_the_first_facts_do_not_count_as_sampled():
    lines = course(seen(False))
    for number in (6, 7):
        lines[number]["sampled"] = False
    row = checkpoint_rows(lines, first=2)[-1]
    assert row["asked"] == 2
    assert row["metrics"]["efficacy_success"]["mean"] == 100
    assert row["first"]["efficacy_success"]["mean"] == 0


def test_facts_without_an_answer_of_their_own_are_not_counted_as_forgotten():
    lost = forgetting(
        [line(0, "after_edit", 1, seen(True))],
        [line(0, "checkpoint", 2, seen(False)), line(9, "checkpoint", 2, seen(False))],
    )
    assert lost["efficacy_success"] == 100


def test_matrix_says_when_edited_and_when_tested():
    found = retention_matrix(course(seen(False)))
    assert found["edited"] == [[1, 2], [3, 4]]
    assert found["tested"] == [2, 4]
    assert found["values"] == [[100, 0], [None, 100]]


def test_long_sequences_are_put_into_groups():
    lines = [line(case, "after_edit", case + 1, seen(True), step=case) for case in range(25)]
    lines += [line(case, "checkpoint", 25, seen(case >= 5), step=24) for case in range(25)]
    found = retention_matrix(lines)
    assert len(found["edited"]) == 10
    assert found["edited"][0] == [1, 3]
    assert found["edited"][-1] == [24, 25]
    assert [row[0] for row in found["values"]][:3] == [0, pytest.approx(100 / 3), 100]


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (seen(True), None),
        (seen(False, others=False), "below 60 %"),  # mean of 50, 50 and 50
        (seen(True, nll=100 * (1 + math.log(2.1))), "more than 2 times"),
        (seen(True, nll=None), "not finite"),
    ],
)
def test_collapse_is_found_with_its_reason(last, reason):
    lines = course(last)
    if last["perplexity"]["nll"] != 100:
        for other in lines[6:]:
            other["after"] = last
    found = first_collapse(checkpoint_rows(lines, 0), lines, 60.0, 2.0)
    assert (found is None) == (reason is None)
    if found is not None:
        assert found["edits"] == 4
        assert reason in found["reason"]


def test_area_of_data_without_neighbors_takes_what_must_stay_from_locality():
    names = ("efficacy_accuracy", "paraphrase_accuracy", "locality_same_relation_accuracy")
    rows: list[dict[str, Any]] = [
        {"edits": edits, "metrics": {name: {"mean": mean} for name in names}} for edits, mean in ((1, 90.0), (11, 30.0))
    ]
    assert area(rows) == pytest.approx(60)
    del rows[0]["metrics"]["locality_same_relation_accuracy"]
    assert area(rows) is None


def test_area_is_the_mean_over_the_course():
    rows = checkpoint_rows(course(seen(False)), 0)  # 100 after two; (50 + 50 + 100) / 3 after four
    assert area(rows) == pytest.approx((100 + 200 / 3) / 2)
    assert area(rows[:1]) == 100
    assert area([]) is None


def test_health_measures_what_was_written():
    lm = embedded_lm()
    health = Health(lm, ["The weather is", "One of them was"])
    name = lm.layout.mlp_out(2)
    before = lm.weight(name).float().clone()
    left, right = torch.randn(before.shape[0], 1) * 0.3, torch.randn(1, before.shape[1]) * 0.3
    edit = WeightDelta({f"{name}.weight": Factors(left, right)})
    assert health.measure(lm) == {"weights": {}, "drift": 0.0}
    health.watch(lm, edit)
    with lm.edited(edit):
        found = health.measure(lm)
    now = before + left @ right
    assert found["weights"][name]["change"] == pytest.approx(float((now - before).norm() / before.norm()), rel=1e-3)
    assert found["weights"][name]["norm"] == pytest.approx(float(now.norm() / before.norm()), rel=1e-3)
    exact = torch.linalg.matrix_norm(now, ord=2) / torch.linalg.matrix_norm(before, ord=2)
    assert found["weights"][name]["top_singular"] == pytest.approx(float(exact), rel=1e-2)
    assert found["drift"] > 0.01
    assert health.measure(lm)["drift"] == 0.0


def test_power_iteration_finds_the_largest_singular_value():
    matrix = (
        torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        @ torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))[0]
    )
    assert largest_singular_value(matrix) == pytest.approx(3.0, rel=1e-3)


def test_a_pause_of_the_machine_does_not_show_in_the_running_median():
    seconds = [0.02] * 30 + [5.0] + [0.02] * 30 + [0.04] * 60
    assert _running_median(seconds)[:50] == [0.02] * 50 and _running_median(seconds)[-50:] == [0.04] * 50
    assert _running_median([0.5]) == [0.5]
