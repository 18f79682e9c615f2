"""Values of one case against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edit_cli.metrics.registry import GROUPS, METRICS, SCORES
from edit_cli.metrics.scores import MEASURES, harmonic_mean, is_scored, perplexity, probe_values


def probe(kind: str = "rewrite", target: float | None = 1.0, foil: float | None = 2.0, **rest) -> dict:
    return {"kind": kind, "prompt": "p", "target": "new", "foil": "old", "target_nll": target, "foil_nll": foil, **rest}


def line(after: list[dict], before: list[dict] | None = None, **rest) -> dict:
    sides = {
        "after": {"probes": after, "texts": []},
        "before": {"probes": before, "texts": []} if before is not None else None,
    }
    return {"case_id": "1", "step": 0, "error": None, **sides, **rest}


def after(*probes: dict) -> dict[str, float]:
    return probe_values(line(list(probes)), "after")


def test_success_and_magnitude_of_a_rewrite():
    values = after(probe(target=1.0, foil=2.0))
    assert values["efficacy_success"] == 100.0
    assert values["efficacy_magnitude"] == pytest.approx(100 * (math.exp(-1) - math.exp(-2)))


def test_a_tie_is_a_failure_on_every_kind():
    for group, (kind, _) in GROUPS.items():
        if f"{group}_success" in METRICS:
            assert after(probe(kind, target=1.5, foil=1.5))[f"{group}_success"] == 0.0


def test_neighborhood_counts_the_true_object_as_target():
    """In a neighborhood probe the target is the true object: success is t < n, magnitude e^-t - e^-n."""
    values = after(probe("neighborhood", target=0.5, foil=3.0), probe("neighborhood", target=3.0, foil=0.5))
    assert values["neighborhood_success"] == 50.0
    assert values["neighborhood_magnitude"] == pytest.approx(0.0)


@pytest.mark.parametrize(("was", "now", "lost"), [(True, False, 100.0), (False, True, -100.0), (True, True, 0.0)])
def test_drawdown_is_accuracy_that_is_lost(was, now, lost):
    """Above zero where a right answer has become wrong, below where a wrong one has become right."""
    told = line([probe("locality", target_hits=[now])], [probe("locality", target_hits=[was])])
    assert probe_values(told, "after")["locality_drawdown"] == lost


def test_paraphrases_are_averaged_within_the_case():
    values = after(probe("paraphrase", target=1.0), probe("paraphrase", target=3.0), probe("paraphrase", target=1.0))
    assert values["paraphrase_success"] == pytest.approx(100 * 2 / 3)


def test_accuracy_needs_every_token_and_token_accuracy_does_not():
    values = after(probe(target_hits=[True, True, False, True]))
    assert values["efficacy_accuracy"] == 0.0
    assert values["efficacy_token_accuracy"] == 75.0
    assert after(probe(target_hits=[True, True]))["efficacy_accuracy"] == 100.0


def test_without_a_foil_there_is_no_success_but_there_is_accuracy():
    values = after(probe(target=0.1, foil=None, target_hits=[True]) | {"foil": None})
    assert "efficacy_success" not in values and "efficacy_magnitude" not in values
    assert values["efficacy_token_accuracy"] == 100.0


def test_a_likelihood_that_is_not_finite_is_a_probability_of_zero():
    values = after(probe(target=None, foil=2.0))
    assert values["efficacy_success"] == 0.0
    assert values["efficacy_magnitude"] == pytest.approx(-100 * math.exp(-2))
    both = after(probe(target=None, foil=None))
    assert both["efficacy_success"] == 0.0 and both["efficacy_magnitude"] == 0.0


def test_unchanged_compares_predicted_ids_with_those_before():
    now, then = probe("locality", target_predicted=[4, 5, 6, 7]), probe("locality", target_predicted=[4, 0, 6, 7])
    assert probe_values(line([now], [then]), "after")["locality_unchanged"] == 75.0
    assert "locality_unchanged" not in probe_values(line([now], [then]), "before")
    assert "locality_unchanged" not in probe_values(line([now]), "after")


def test_unchanged_is_not_correct():
    """A locality answer that was wrong before and is wrong in the same way now is unchanged, and not accurate."""
    wrong = probe("locality", target_predicted=[9], target_hits=[False])
    values = probe_values(line([wrong], [wrong]), "after")
    assert values["locality_unchanged"] == 100.0 and values["locality_token_accuracy"] == 0.0


def test_generated_unchanged_is_literal():
    now = [probe("neighborhood", generated=text) for text in (" Rome. It is", " rome", " Rome")]
    then = [probe("neighborhood", generated=text) for text in (" Rome. He was", " Rome", None)]
    assert probe_values(line(now, then), "after")["neighborhood_generated_unchanged"] == 50.0


def test_generated_answers_and_aliases():
    values = after(
        probe("paraphrase", generated=" the New. And more"),
        probe("paraphrase", generated=" it is new, they say"),
        probe("paraphrase", generated=" newish"),
        probe("paraphrase", generated=" Novel", aliases=["novel"]),
    )
    assert values["paraphrase_generated_exact"] == 50.0
    assert values["paraphrase_generated_contains"] == 75.0


def test_length_counts_words_of_the_reply_only():
    assert after(probe(generated=" in the north. Then on and on"))["efficacy_generated_length"] == 3.0


def test_perplexity_is_per_token():
    seen = {"after": {"perplexity": {"nll": 20.0, "tokens": 10}}, "before": {"perplexity": None}}
    assert perplexity(seen, "after") == pytest.approx(math.exp(2.0))
    assert perplexity(seen, "before") is None
    assert perplexity({"after": {"perplexity": {"nll": None, "tokens": 10}}}, "after") == math.inf
    assert perplexity({"after": {"perplexity": {"nll": 1e9, "tokens": 10}}}, "after") == math.inf


def test_harmonic_mean():
    assert harmonic_mean(100.0, 50.0, 25.0) == pytest.approx(3 / (1 / 100 + 1 / 50 + 1 / 25))
    assert harmonic_mean(100.0, 100.0, 0.0) == 0.0
    assert harmonic_mean(np.array([60.0, 0.0]), np.array([30.0, 30.0])) == pytest.approx([40.0, 0.0])


def test_failed_lines_are_not_scored():
    assert is_scored(line([probe()]))
    assert not is_scored(line([probe()], error="target is empty"))
    assert not is_scored({"case_id": "1", "before": None, "after": None, "error": None})
    assert not is_scored({"case_id": "1", "error": None, "after": {"probes": [], "error": "too long"}})


def test_registry_and_measures_name_each_other():
    used = {metric.measure for metric in METRICS.values() if metric.measure}
    assert used == set(MEASURES)
    assert all(part in METRICS for parts in SCORES.values() for part in parts)
    for name, metric in METRICS.items():
        assert name == metric.id and metric.definition and metric.label
        assert metric.unit in {"%", "points", "bits × 100", "nats", "words", ""}


@pytest.mark.parametrize(
    "name",
    [
        f"{group}_{measure}"
        for group in ("efficacy", "paraphrase", "neighborhood")
        for measure in ("success", "magnitude", "accuracy")
    ]
    + [
        "score",
        "efficacy_generated_exact",
        "efficacy_generated_contains",
        "paraphrase_generated_exact",
        "paraphrase_generated_contains",
    ]
    + ["neighborhood_generated_unchanged", "generation_entropy", "reference_score", "perplexity", "locality_unchanged"]
    + [f"{group}_token_accuracy" for group in ("efficacy", "paraphrase", "locality", "portability")],
)
def test_published_ids_stay(name):
    """Summaries on disk are read by these names."""
    assert METRICS[name].better in {"higher", "lower"}
