"""Tables and words: what a reader sees of the numbers."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from edit_cli.metrics.registry import GROUPS, METRICS, PARTS, PUBLISHED
from edit_cli.report import words
from edit_cli.report.comparison import Comparison, meaning, shown_metrics
from edit_cli.report.summary import total_seconds
from edit_cli.report.tables import facts
from edit_cli.report.tables.run import MetricsTable, evaluation


def rendered(what, width: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, width=width, highlight=False).print(what)
    return file.getvalue()


def entry(mean: float, low: float | None = None, high: float | None = None) -> dict:
    return {"mean": mean, "ci95": None if low is None else [low, high], "n": 100}


COUNTERFACT = {
    name: {"before": entry(-93.7, -98.2, -89.1), "after": entry(100.0, 96.4, 100.0)}
    for group in ("efficacy", "paraphrase", "neighborhood")
    for name in (f"{group}_success", f"{group}_magnitude", f"{group}_accuracy", f"{group}_token_accuracy")
} | {
    "score": {"before": entry(0.0, 0.0, 5.0), "after": entry(99.2, 98.0, 99.8)},
    "efficacy_generated_exact": {"before": entry(0.0), "after": entry(50.0)},
    "neighborhood_generated_unchanged": {"after": entry(62.4, 58.0, 66.1)},
    "generation_entropy": {"before": entry(439.2, 426.0, 451.0), "after": entry(440.0, 428.0, 452.0)},
    "perplexity": {"before": entry(4.7), "after": {"mean": None, "ci95": None, "n": 1}},
}
SUMMARY = {
    "method": "memit",
    "model": "tiny-gpt2",
    "dataset": {
        "name": "counterfact", "source": "embedded world, split test",
        "records_selected": 100, "records_total": 1400, "records_dropped": 0, "limit": 100,
    },
    "protocol": {"batch_size": 10, "batches": 10, "evaluated": "after each batch", "restored": True, "order_seed": 3,
    "observe": {"generate": True}},
    "n": 100,
    "failed": 2,
    "edits": 98,
    "metrics": COUNTERFACT,
    "seconds": {"value": 11.2, "ask after": 4.0},
    "seconds_per_edit": 0.1234,
}  # fmt: skip


def test_title_and_footer_tell_what_was_done():
    shown = " ".join(rendered(evaluation(SUMMARY), 200).split())
    for told in (
        "memit on tiny-gpt2: 98 facts edited, in batches of 10",
        "counterfact (embedded world, split test), 100 of 1,400 records (limit=100)",
        "then taken back",
        "Order of the facts: shuffled with seed 3. Answers: teacher-forced and free-running.",
        "2 of 100 cases FAILED",
        "Time per edit 0.12 s",
        "value 11.2, ask after 4.0",
        "95 % interval",
        "Success compares the likelihoods of two given answers",
    ):
        assert told in shown


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_has_every_metric_once_in_its_section(width):
    shown = rendered(MetricsTable(COUNTERFACT), width).splitlines()
    assert max(map(len, shown)) <= width
    titles = (words.TEACHER_FORCED, words.FREE_RUNNING, words.AS_A_WHOLE)
    starts = [next(at for at, line in enumerate(shown) if line.startswith(title)) for title in titles]
    assert starts == sorted(starts)
    rated, written, whole = (shown[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True))
    assert sum("success, % ↑" in line for line in rated) == 3
    assert sum("magnitude, points ↑" in line for line in rated) == 3
    assert not any("token accuracy" in line for line in shown)  # whole answers say more
    assert any("exact match, % ↑" in line and "50.0" in line for line in written)
    assert any("unchanged, % ↑" in line and "– " in line for line in written)
    assert any("perplexity ↓" in line and "not finite" in line for line in whole)
    assert any(
        "-93.7 [-98, -89]" in line and "100.0 [96, 100]" in line and "new answer likelier" in line for line in rated
    )


def test_every_mean_has_its_number_of_facts():
    metrics = {
        name: {side: {**entry(50.0), "n": n} for side in ("before", "after")}
        for name, n in (
            ("efficacy_success", 1),
            ("efficacy_accuracy", 2),
            ("efficacy_token_accuracy", 2),
            ("perplexity", 1),
        )
    }
    shown = rendered(MetricsTable(metrics)).splitlines()
    assert " Edited prompts (efficacy), n = 1" in shown or " Edited prompts (efficacy), n = 2" in shown
    assert sum("(n = " in line for line in shown) == 1  # the one of the two that differs from its heading
    assert "THE MODEL AS A WHOLE" in shown  # perplexity is no mean over facts


def test_data_sets_without_old_answers_show_token_accuracies():
    measured = ("efficacy_token_accuracy", "locality_unchanged", "token_score")
    metrics = {name: {"before": entry(20.0), "after": entry(90.0)} for name in measured}
    shown = rendered(MetricsTable(metrics))
    assert "token accuracy, % ↑" in shown
    assert "Unrelated prompts" in shown
    assert "score S" in shown


def test_every_metric_that_can_be_measured_can_be_shown():
    published = {name for names in PUBLISHED.values() for name in names}
    plain = {name for name, metric in METRICS.items() if metric.group is None} - published
    parted = {f"{place}_{metric.measure}" for place in PARTS for metric in METRICS.values()} & set(METRICS)
    told_by_others = {f"{place}_token_accuracy" for place in (*GROUPS, *PARTS) if f"{place}_success" in METRICS}
    told_by_others |= {
        f"{place}_{name}" for place in PARTS if place.startswith("locality") for name in ("token_accuracy", "unchanged")
    }
    # these have a table of their own
    told_by_others |= {"locality_disagreement"} | {name for name in METRICS if name.startswith("sme_")}
    for measured, expected in (
        (plain, plain),
        (parted | published, parted | published),
        (set(METRICS), parted | published),
    ):
        found = words.sections(measured)
        shown = [row.id for _, groups in found for _, rows in groups for row in rows]
        assert len(shown) == len(set(shown))
        assert set(shown) >= expected - told_by_others and not set(shown) & told_by_others
        assert all(row.tells for _, groups in found for _, rows in groups for row in rows)


def test_parts_stand_in_the_place_of_their_group_and_bring_the_published_names():
    metrics = {"efficacy_accuracy", "locality_accuracy", "locality_random_accuracy", "locality_random_kl", "es_edit"}
    titles = {title: [row.id for _, rows in groups for row in rows] for title, groups in words.sections(metrics)}
    assert titles[words.TEACHER_FORCED] == ["efficacy_accuracy", "locality_random_accuracy", "locality_random_kl"]
    assert titles[words.AS_PUBLISHED] == ["es_edit"]
    assert words.AS_PUBLISHED not in dict(words.sections({"efficacy_accuracy", "locality_accuracy", "es_edit"}))


def test_small_numbers_keep_their_decimals():
    assert (
        words.with_interval(entry(0.00321, 0.0011, 0.00502), METRICS["locality_kl"].decimals) == "0.003 [0.001, 0.005]"
    )
    assert words.with_interval(entry(98.46, 95.24, 100.0), METRICS["locality_drawdown"].decimals) == "98.5 [95, 100]"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (None, "–"),
        (entry(98.46), "98.5"),
        (entry(98.46, 95.24, 100.0), "98.5 [95, 100]"),
        (entry(93.12, 92.6, 93.6), "93.1 [92.6, 93.6]"),
        (entry(1234.5, 1000.0, 1500.0), "1,234.5 [1,000, 1,500]"),
        ({"mean": None, "ci95": None, "n": 1}, "not finite"),
    ],
)
def test_means_with_intervals(found, expected):
    assert words.with_interval(found) == expected


@pytest.mark.parametrize(
    ("used", "total", "dropped", "limit", "expected"),
    [
        (10, 10, 0, None, "all 10 records"),
        (1, 1, 0, None, "1 record"),
        (10, 1400, 0, 10, "10 of 1,400 records (limit=10)"),
        (9, 10, 1, 100, "9 of 10 records (1 unusable)"),
        (5, 10, 1, 5, "5 of 10 records (limit=5, 1 unusable)"),
    ],
)
def test_records_in_words(used, total, dropped, limit, expected):
    dataset = {"records_selected": used, "records_total": total, "records_dropped": dropped, "limit": limit}
    assert words.records(dataset) == expected


@pytest.mark.parametrize(
    ("size", "count", "expected"), [(100, 1, "all at once"), (1, 9, "one at a time"), (7, 2, "in batches of 7")]
)
def test_batches_in_words(size, count, expected):
    assert words.batches({"batch_size": size, "batches": count}) == expected


def test_a_single_fact_is_no_crowd():
    shown = rendered(evaluation(SUMMARY | {"edits": 1}))
    assert shown.splitlines()[0].rstrip() == "memit on tiny-gpt2: 1 fact edited"


def test_seconds_are_summed_over_lines():
    lines: list[dict[str, Any]] = [{"phases": {"a": 1.0, "b": 0.5}}, {"phases": {}}, {"phases": {"b": 3.0}}]
    assert total_seconds(lines, {"c": 0.25}) == {"b": 3.5, "a": 1.0, "c": 0.25}
    assert words.phases({"b": 3.5, "a": 1.0, "c": 0.01}, shown=1) == "b 3.5, rest 1.0"


def test_runs_side_by_side_fit_in_80_columns():
    shown = rendered(Comparison([("rome layers=[17]", SUMMARY), ("memit layers=[0,1]", None)]))
    assert max(map(len, shown.splitlines())) <= 80
    first, second = shown.splitlines()[3:5]
    assert first.startswith("rome layers=[17]")
    assert all(number in first for number in ("100.0", "99.2", "62.4", "not finite", "0.12", "98/100"))
    assert second.split() == ["memit", "layers=[0,1]", "failed"]


def test_where_names_and_numbers_do_not_fit_the_dispensable_columns_go():
    rows = [("a-long-name-of-a-method", SUMMARY), ("b", SUMMARY)]
    wide, narrow = (rendered(Comparison(rows), width) for width in (120, 70))
    assert " score " in wide.splitlines()[1] and " score " not in narrow.splitlines()[1]
    first, second = narrow.splitlines()[3:5]
    assert first.startswith("a-long-name-of-a-method") and second.startswith("b ")
    assert "98/100" in second and "score" not in narrow


def test_token_accuracies_are_compared_only_where_answers_are_not():
    assert shown_metrics(COUNTERFACT)[:3] == ["efficacy_success", "paraphrase_success", "neighborhood_success"]
    assert "efficacy_token_accuracy" not in shown_metrics(COUNTERFACT)
    assert shown_metrics({"efficacy_token_accuracy", "locality_token_accuracy"}) == [
        "efficacy_token_accuracy",
        "locality_token_accuracy",
    ]


def test_a_case_is_shown_with_markup_taken_literally():
    probe = {
        "kind": "rewrite",
        "prompt": "[bold]x[/bold] is",
        "target": "[red]",
        "foil": None,
        "target_nll": 0.0,
        "generated": " [/] a\nb",
    }
    line = {
        "case_id": "a", "requests": [{"prompt": "{} is", "subject": "[bold]x[/bold]", "target_new": "[red]",
        "target_true": None}],
        "before": {"probes": [probe | {"target_nll": None}], "texts": ["one"]},
        "after": {"probes": [probe], "texts": ["two"]}, "error": None,
    }  # fmt: skip
    shown = rendered(facts.case(line), 120)
    assert "edited: [bold]x[/bold] is → [red]" in shown
    assert "rewrite: [bold]x[/bold] is …" in shown
    assert "P([red])" in shown
    assert "not finite" in shown
    assert "100.0 %" in shown
    assert "text before" in shown
    assert "two" in shown


def test_a_failed_case_shows_its_reason():
    request = {"prompt": "p", "subject": None, "target_new": "t", "target_true": "o"}
    line = {"case_id": "a", "requests": [request], "before": None, "after": None, "error": "why"}
    shown = rendered(facts.case(line))
    assert "edited: p → t instead of o" in shown
    assert "failed: why" in shown


def test_a_legend_says_of_each_column_which_measure_it_has():
    told = meaning(["efficacy_success", "paraphrase_success", "locality_token_accuracy"])
    assert told.startswith("Success in % on: efficacy, the edited prompts; paraphrase, the same in other words.")
    assert "Token accuracy in % on: locality, unrelated prompts" in told
