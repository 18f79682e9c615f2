"""Metrics of trained editors against numbers worked out by hand (float64)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from edit_cli.metrics import published
from edit_cli.metrics.locality_distribution import ENOUGH, ROUNDING, divergence, likeliest, watch
from edit_cli.metrics.observe import BeforeCache, ObserveOptions, observe
from edit_cli.metrics.published import squeezed
from edit_cli.metrics.registry import METRICS, PARTS, PUBLISHED
from edit_cli.metrics.scores import probe_values
from edit_cli.metrics.summarize import case_values, summarize
from edit_cli.requests import PROBE_GROUPS, Case, Probe


def probe(kind: str, hits=(True,), predicted=None, nll: float | None = 1.0, said: str | None = None, **rest) -> dict:
    predicted = list(hits) if predicted is None else predicted
    seen = {
        "kind": kind,
        "prompt": "p",
        "target": "t",
        "foil": None,
        "target_nll": nll,
        "foil_nll": None,
        "target_hits": list(hits),
    }
    return seen | {"target_predicted": predicted, "generated": said} | rest


def line(before: list[dict], after: list[dict], name: str = "1") -> dict:
    return {
        "case_id": name,
        "step": 0,
        "error": None,
        "before": {"probes": before, "texts": [], "perplexity": None},
        "after": {"probes": after, "texts": [], "perplexity": None},
    }


def after(before: list[dict], now: list[dict]) -> dict[str, float]:
    return case_values([line(before, now)])[0]["after"]


# drawdown


def test_drawdown_is_lost_accuracy_whatever_was_wrong_before():
    """Right before and wrong now: +1. Wrong before and right now: −1.

    So three probes give (1 + 0 − 1) / 3, four with another loss 1/4.
    """
    lost = probe("locality"), probe("locality", hits=(False,))
    won = lost[::-1]
    kept = probe("locality"), probe("locality")
    pairs = [lost, kept, won]
    assert after([a for a, _ in pairs], [b for _, b in pairs])["locality_drawdown"] == 0.0
    pairs.append(lost)
    assert after([a for a, _ in pairs], [b for _, b in pairs])["locality_drawdown"] == 25.0


def test_disagreement_asks_no_right_answer_and_every_position():
    then = [probe("locality", hits=(False, False), predicted=[4, 5]), probe("locality", predicted=[7])]
    now = [probe("locality", hits=(False, False), predicted=[4, 6]), probe("locality", predicted=[7])]
    values = after(then, now)
    assert (
        values["locality_disagreement"] == 50.0
        and values["locality_unchanged"] == 75.0
        and values["locality_drawdown"] == 0.0
    )


def test_without_an_answer_replies_are_compared():
    unknown: dict[str, Any] = {
        "target": None,
        "target_nll": None,
        "target_hits": None,
        "target_predicted": None,
        "group": "hard",
    }
    then = [probe("locality", said=" SUPPORTS", **unknown), probe("locality", said=" REFUTES", **unknown)]
    now = [probe("locality", said=" SUPPORTS", **unknown), probe("locality", said=" SUPPORTS", **unknown)]
    values = after(then, now)
    assert values["locality_hard_disagreement"] == 50.0 and values["locality_hard_generated_unchanged"] == 50.0
    assert "locality_hard_drawdown" not in values


def test_groups_are_told_apart_and_together():
    groups = PROBE_GROUPS["locality"]
    then = [probe("locality", group=group) for group in groups]
    now = [probe("locality", hits=(group != "same_relation",), group=group) for group in groups]
    values = after(then, now)
    assert values["locality_same_relation_drawdown"] == 100.0 and values["locality_random_drawdown"] == 0.0
    assert values["locality_drawdown"] == pytest.approx(100.0 / len(groups))
    seen, unseen = probe("paraphrase", group="seen"), probe("paraphrase", hits=(False,), group="unseen")
    values = after([seen, unseen], [seen, unseen])
    assert (
        values["paraphrase_seen_accuracy"],
        values["paraphrase_unseen_accuracy"],
        values["paraphrase_accuracy"],
    ) == (100.0, 0.0, 50.0)


def test_every_group_of_probes_has_its_metrics():
    parts = {(kind.split("_")[0], own) for _, (kind, own, _) in PARTS.items()}
    assert parts == {(kind, group) for kind, groups in PROBE_GROUPS.items() for group in groups if kind != "opinion"}
    with pytest.raises(ValueError, match="no group seen"):
        Probe("locality", "p", "t", group="seen")
    moved = ("drawdown", "disagreement", "kl")
    located = [part for part in PARTS if part.startswith("locality")]
    assert all(METRICS[f"{part}_{measure}"].better == "lower" for part in located for measure in moved)


def test_runs_from_before_there_were_groups_are_scored():
    old = {
        "kind": "locality",
        "prompt": "p",
        "target": "t",
        "foil": None,
        "target_nll": 1.0,
        "target_hits": [True],
        "target_predicted": [1],
    }
    values = after([old], [old])
    assert (
        values["locality_accuracy"] == 100.0
        and "locality_kl" not in values
        and "locality_random_accuracy" not in values
    )


# KL


def test_kl_of_distributions_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): ½ ln 2 + 0 − ¼ ln 2."""
    p, q = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.25, 0.5]])
    then, now = (watch(torch.tensor(side), 20) for side in (p, q))
    assert divergence(then, now) == pytest.approx(0.25 * math.log(2), abs=1e-4)
    values = after([probe("locality", top=then)], [probe("locality", top=now)])
    assert values["locality_kl"] == pytest.approx(0.25 * math.log(2), abs=1e-4)  # nats: not times 100


def test_kl_is_the_mean_over_positions_and_of_its_own_direction():
    p, q = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log(), torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    first = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert divergence(watch(p, 9), watch(q, 9)) == pytest.approx(first / 2, abs=1e-4)
    assert divergence(watch(q, 9), watch(p, 9)) == pytest.approx(
        (0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)) / 2, abs=1e-4
    )


def kl(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    found = divergence(before, after)
    assert found is not None
    return found


def test_kl_over_the_likeliest_tokens_is_a_lower_bound_close_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(4, 500, generator=generator)).double().log_softmax(-1)
    q = (p + 0.7 * torch.randn(4, 500, generator=generator)).log_softmax(-1)
    true = float((p.exp() * (p - q)).sum(-1).mean())
    found = {}
    for most in (1, 5, 20, 500):
        then = watch(p, most)
        found[most] = kl(then, watch(q, most, then["ids"]))
    assert found[1] <= found[5] <= found[20] <= found[500] + 1e-9 <= true + 1e-3
    assert found[500] == pytest.approx(true, rel=0.02) and found[20] > 0.5 * true


def test_no_more_tokens_are_kept_than_needed_and_the_edited_model_is_asked_about_the_same():
    p = torch.tensor([[0.9995, 0.0003, 0.0002], [0.4, 0.35, 0.25]]).log()
    assert ENOUGH == 0.999 and likeliest(p, 20) == [[0], [0, 1, 2]] and likeliest(p, 2) == [[0], [0, 1]]
    q = torch.tensor([[0.1, 0.1, 0.8], [0.4, 0.35, 0.25]]).log()
    assert watch(q, 20, likeliest(p, 2))["ids"] == [[0], [0, 1]]


def test_kl_of_models_that_answer_nothing_finite():
    p, wrecked = torch.tensor([[0.5, 0.5]]).log(), torch.full((1, 2), math.nan)
    then = watch(p, 2)
    now = watch(wrecked, 2, then["ids"])
    assert now["logprobs"] == [[None, None]] and divergence(then, now) == math.inf
    summary = summarize([line([probe("locality", top=then)], [probe("locality", top=now)]) for _ in range(3)])
    assert summary["locality_kl"]["after"] == {"mean": None, "ci95": None, "n": 3}
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert kl(then, then) <= ROUNDING


class Watched:
    """A model whose distribution at every answer is given; edited or not."""

    def __init__(self) -> None:
        self.logprobs = torch.tensor([0.6, 0.3, 0.1]).log()
        self.asked: list[tuple[str, str]] = []

    def loglikelihood(self, pairs):
        class Answer:
            nll, hits, predicted = 1.0, (True,), (0,)

        return [Answer() for _ in pairs]

    def target_logprobs(self, pairs):
        self.asked += pairs
        return [None if "route" in prompt else self.logprobs[None] for prompt, _ in pairs]


def test_distributions_are_asked_at_locality_answers_only_and_stored_with_the_observation():
    lm: Any = Watched()  # is asked nothing else
    options = ObserveOptions(generate=False, perplexity=False, top_tokens=2)
    probes = (
        Probe("rewrite", "a", "x"), Probe("locality", "b", "y", group="random"), Probe("locality", "route", "y"),
        Probe("locality", "c"),
    )  # fmt: skip
    cases = [Case("1", (), probes)]
    cache = BeforeCache(options)
    (before,) = cache.observe(lm, cases)
    assert lm.asked == [("b", "y"), ("route", "y")]
    assert before["probes"][1]["top"]["ids"] == [[0, 1]] and before["probes"][1]["group"] == "random"
    assert all("top" not in before["probes"][i] for i in (0, 2, 3)) and "group" not in before["probes"][0]
    lm.logprobs = torch.tensor([0.1, 0.1, 0.8]).log()
    (now,) = observe(lm, cases, options, before=cache.seen)
    assert now["probes"][1]["top"]["ids"] == [[0, 1]]  # not its own likeliest, which are others
    expected = 0.6 * math.log(6) + 0.3 * math.log(3) + 0.1 * math.log(0.1 / 0.8)
    assert probe_values({"before": before, "after": now}, "after")["locality_random_kl"] == pytest.approx(
        expected, abs=1e-3
    )
    assert not observe(lm, cases, ObserveOptions(generate=False, perplexity=False, top_tokens=0))[0]["probes"][1].get(
        "top"
    )


# perplexity drawdown


def test_bleu_that_is_lost_is_its_drawdown(monkeypatch):
    """Also where sacrebleu is not installed."""
    monkeypatch.setattr(published, "bleu", lambda probes: {"well": 40.0, "worse": 30.0}[probes[0]["generated"]])
    pair: Any = ({"generated": "worse"}, {"generated": "well"})
    assert published._bleu([pair], "after") == {"bleu": 30.0, "bleu_drawdown": 10.0}
    assert published._bleu([pair], "before") == {"bleu": 30.0}


def test_perplexity_drawdown_weighs_tokens_over_all_cases():
    """Two prompts of 1 and 3 tokens, in two cases: the same as one text of four tokens, not the mean of two
    perplexities.
    """
    short, long = [probe("locality", nll=2.0)], [probe("locality", hits=(True,) * 3, nll=1.0)]
    short_now, long_now = [probe("locality", nll=4.0)], [probe("locality", hits=(True,) * 3, nll=1.2)]
    entry = summarize([line(short, short_now, "1"), line(long, long_now, "2")])["perplexity_drawdown"]["after"]
    assert entry["mean"] == pytest.approx(math.exp((4.0 + 3 * 1.2) / 4) - math.exp((2.0 + 3.0) / 4)) and entry["n"] == 2
    per_case = (math.exp(4.0) - math.exp(2.0) + math.exp(1.2) - math.exp(1.0)) / 2
    assert abs(entry["mean"] - per_case) > 1.0
    wrecked = summarize([line(short, [probe("locality", nll=None)]), line(long, long_now)])["perplexity_drawdown"][
        "after"
    ]
    assert wrecked["mean"] is None and wrecked["ci95"] is None


# published names


def test_es_of_mend_is_that_of_the_edit_of_the_rephrasing_and_their_mean():
    local = probe("locality", hits=(True, False))
    now = [probe("rewrite"), probe("paraphrase"), probe("paraphrase", hits=(True, False)), local]
    values = after(now, now)
    assert (values["es_edit"], values["es_outer"], values["es"]) == (100.0, 50.0, 75.0)
    assert (values["malmen_es"], values["malmen_gs"], values["malmen_ls"]) == (100.0, 75.0, 50.0)
    assert "es" not in after(now[:3], now[:3])  # no locality prompts: not the data of a trained editor


def test_ke_compares_texts_without_case_space_and_punctuation():
    assert squeezed(" St. Peter's-Burg ") == "stpetersburg"
    then = [
        probe("rewrite", said=" Rome", target="New York"),
        probe("paraphrase", said=" Rome"),
        probe("paraphrase", said=" Bern"),
        probe("locality", said=" Oslo", target="Oslo"),
        probe("locality", said=" Lima", target="Lima", aliases=["Peru"]),
        probe("locality", said=" Kiel", target="Bonn"),
    ]
    now = [
        probe("rewrite", said=" new-york. And", target="New York"),
        probe("paraphrase", said=" newyork"),
        probe("paraphrase", said=" Rome"),
        probe("locality", said=" OSLO!", target="Oslo"),
        probe("locality", said=" Peru", target="Lima", aliases=["Peru"]),
        probe("locality", said=" Rome", target="Bonn"),
    ]
    values = after(then, now)
    assert values["ke_success"] == 100.0 and values["ke_equivalence"] == 50.0
    assert values["ke_retain"] == pytest.approx(100 / 3)
    assert case_values([line(then, now)])[0]["before"]["ke_success"] == 0.0
    silent = [probe("rewrite"), probe("locality")]
    assert not any(name.startswith("ke_") for name in after(silent, silent))


def test_ke_deterioration_is_a_ratio_of_accuracies_over_all_cases():
    """3 of 4 right before, 1 of 4 after: 1 − 1/3.

    The mean of the cases' own ratios would be 1/2 and, for a case with none, nothing.
    """
    right, wrong = probe("locality", said=" t"), probe("locality", said=" x")
    lines = [line([right, right], [right, wrong], "1"), line([right, wrong], [wrong, wrong], "2")]
    assert summarize(lines)["ke_deterioration"]["after"]["mean"] == pytest.approx(100 * (1 - 1 / 3))
    assert "ke_deterioration" not in summarize([line([wrong], [wrong])])


def opinions(wanted: list[float | None], unwanted: list[float | None]) -> list[dict]:
    sides = (("wanted", wanted), ("unwanted", unwanted))
    return [probe("opinion", nll=nll, group=group) for group, values in sides for nll in values]


def test_convsent_by_hand():
    """m(wanted) = −1.5 after and −1 before, m(unwanted) = −2.5: σ(1) · e^−0.5."""
    values = after(opinions([0.5, 1.5], [1.0, 1.0]), opinions([1.0, 2.0], [2.0, 3.0]))
    sentiment, topic = 1 / (1 + math.exp(-1.0)), math.exp(-0.5)
    assert values["convsent_sentiment"] == pytest.approx(100 * sentiment)
    assert values["convsent_topic"] == pytest.approx(100 * topic)
    assert values["convsent_es"] == pytest.approx(100 * sentiment * topic)


def test_convsent_weighs_tokens_not_replies():
    """Replies of 1 and 3 tokens at 4 and 2 nats a token: m = −(4 + 6) / 4 = −2.5, where the mean of the replies
    would be −3.
    """
    wanted = [probe("opinion", nll=4.0, group="wanted"), probe("opinion", hits=(True,) * 3, nll=2.0, group="wanted")]
    unwanted = [probe("opinion", nll=2.5, group="unwanted")]
    assert after(wanted + unwanted, wanted + unwanted)["convsent_sentiment"] == pytest.approx(50.0)


def test_a_topic_that_became_likelier_counts_as_kept_and_a_wrecked_model_scores_nothing():
    assert after(opinions([5.0], [5.0]), opinions([1.0], [900.0]))["convsent_es"] == pytest.approx(100.0)
    assert after(opinions([1.0], [1.0]), opinions([None], [None]))["convsent_es"] == 0.0
    before = case_values([line(opinions([1.0], [1.0]), opinions([9.0], [1.0]))])[0]["before"]
    assert before["convsent_es"] == 50.0 and before["convsent_topic"] == 100.0
    assert "convsent_es" not in after(opinions([1.0], []), opinions([1.0], []))


def test_published_names_are_in_the_registry_with_a_direction():
    for names in PUBLISHED.values():
        assert all(METRICS[name].better in ("higher", "lower") and METRICS[name].definition for name in names)
