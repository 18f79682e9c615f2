"""What is asked of a model, how often, and what is kept."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.metrics.observe import BeforeCache, ObserveOptions, observe, row_seed
from edit_cli.metrics.scores import probe_values
from edit_cli.requests import Case, Probe


class Answer:
    def __init__(self, nll: float) -> None:
        self.nll, self.hits, self.predicted = nll, (True, False), (3, 4)


class FakeLM:
    """Answers by rule and remembers what it was asked.

    Prompts with "too long" in them are rejected, like a full context.
    """

    def __init__(self, nll: float | None = None) -> None:
        self.nll = nll
        self.asked: dict[str, list] = {"loglikelihood": [], "generate": [], "sample": [], "token_nlls": []}

    def _remember(self, what: str, rows: Sequence, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if "too long" in prompt:
                raise RejectedRequest("2000 tokens are more than the model's 1024")
        self.asked[what].append(list(rows))

    def loglikelihood(self, pairs):
        self._remember("loglikelihood", pairs, [prompt for prompt, _ in pairs])
        return [Answer(len(prompt) + len(target) / 100 if self.nll is None else self.nll) for prompt, target in pairs]

    def generate(self, prompts, max_new_tokens):
        self._remember("generate", prompts, prompts)
        return [f" {prompt[::-1]}" for prompt in prompts]

    def sample(self, prompts, seeds, max_tokens, top_k):
        self._remember("sample", list(zip(prompts, seeds, strict=True)), prompts)
        return [f"{prompt} {seed % 1000} {max_tokens} {top_k}" for prompt, seed in zip(prompts, seeds, strict=True)]

    def token_nlls(self, texts, window):
        self.asked["token_nlls"].append((list(texts), window))
        return 12.5, 5


def case(name: str = "1", *extra: Probe) -> Case:
    return Case(
        name,
        (),
        (
            Probe("rewrite", f"Where is {name}", "Rome", "Paris", aliases=("Roma",)),
            Probe("paraphrase", f"Place of {name}", "Rome", "Paris"),
            Probe("neighborhood", "Where is the Louvre", "Paris", "Rome"),
            Probe("attribute", "Where is the Forum", "Rome", "Paris"),
            Probe("locality", "Who wrote Emma", "Austen"),
            Probe("portability", f"{name} is in the country", "Italy"),
            Probe("generation", f"About {name}"),
            Probe("generation", f"About {name}"),
            *extra,
        ),
    )


def test_rows_of_all_cases_go_in_one_call_and_equal_ones_once():
    lm = FakeLM()
    observe(lm, [case("1"), case("2")], ObserveOptions())
    (rows,) = lm.asked["loglikelihood"]
    # own: rewrite, paraphrase, portability; shared: neighbor, locality
    assert len(rows) == len(set(rows)) == 2 * (2 + 2 + 1) + 2 + 1
    assert ("Where is 1", "Rome") in rows and ("Where is 1", "Paris") in rows
    assert not any(prompt == "Where is the Forum" for prompt, _ in rows)
    (prompts,) = lm.asked["generate"]
    assert sorted(prompts) == sorted({"Where is 1", "Place of 1", "1 is in the country", "Where is 2", "Place of 2",
    "2 is in the country"}
                                     | {"Where is the Louvre", "Who wrote Emma"})  # fmt: skip


def test_targets_are_passed_as_they_are_so_that_the_models_one_rule_adds_the_space():
    lm = FakeLM()
    observe(lm, [case()], ObserveOptions())
    assert {target for _, target in lm.asked["loglikelihood"][0]} == {"Rome", "Paris", "Austen", "Italy"}


def test_observation_holds_what_the_model_said():
    (seen,) = observe(FakeLM(), [case()], ObserveOptions(), texts=["some text"])
    assert [probe["kind"] for probe in seen["probes"]] == [
        "rewrite",
        "paraphrase",
        "neighborhood",
        "locality",
        "portability",
    ]
    rewrite, locality = seen["probes"][0], seen["probes"][3]
    assert rewrite == {
        "kind": "rewrite", "prompt": "Where is 1", "target": "Rome", "foil": "Paris", "aliases": ["Roma"],
        "target_nll": 10.04, "target_hits": [True, False], "target_predicted": [3, 4],
        "foil_nll": 10.05, "foil_hits": [True, False], "generated": " 1 si erehW",
    }  # fmt: skip
    assert locality["foil"] is None and locality["foil_nll"] is None and locality["foil_hits"] is None
    assert seen["perplexity"] == {"nll": 12.5, "tokens": 5}
    assert len(seen["texts"]) == 2
    assert json.loads(json.dumps(seen, allow_nan=False)) == seen
    assert probe_values({"after": seen}, "after")["efficacy_success"] == 100.0


def test_perplexity_is_measured_once_a_call():
    lm = FakeLM()
    first, second = observe(lm, [case("1"), case("2")], ObserveOptions(perplexity_window=64), texts=["a", "b"])
    assert lm.asked["token_nlls"] == [(["a", "b"], 64)]
    assert first["perplexity"] == second["perplexity"]
    assert observe(lm, [case("1")], ObserveOptions(perplexity=False), texts=["a"])[0]["perplexity"] is None


def test_switches_leave_out_what_they_name():
    lm = FakeLM()
    (seen,) = observe(lm, [case()], ObserveOptions(generate=False, sample=False, attribute=True))
    assert not lm.asked["generate"] and not lm.asked["sample"] and not lm.asked["token_nlls"]
    assert seen["texts"] == [] and all(probe["generated"] is None for probe in seen["probes"])
    assert any(probe["kind"] == "attribute" and probe["target_nll"] is not None for probe in seen["probes"])


def test_every_sampled_text_has_its_own_seed_that_depends_on_nothing_else():
    together, alone, reseeded = FakeLM(), FakeLM(), FakeLM()
    both = observe(together, [case("1"), case("2")], ObserveOptions())
    assert observe(alone, [case("2")], ObserveOptions()) == both[1:]
    seeds = [seed for _, seed in together.asked["sample"][0]]
    assert len(set(seeds)) == 4  # equal prompts of one case are different draws
    observe(reseeded, [case("2")], ObserveOptions(seed=1))
    assert not set(seeds) & {seed for _, seed in reseeded.asked["sample"][0]}


def test_seeds_are_the_same_on_every_machine():
    assert row_seed(0, "17", 2, "About") == 193638337575185972
    assert 0 <= row_seed(5, "x", 0, "é") < 2**63


def test_a_probe_that_cannot_be_asked_fails_its_case_only():
    bad = case("2", Probe("paraphrase", "too long", "Rome", "Paris"))
    lm = FakeLM()
    one, two, three = observe(lm, [case("1"), bad, case("3")], ObserveOptions())
    assert (
        two["error"] == "paraphrase probe 'too long': 2000 tokens are more than the model's 1024"
        and two["probes"] == []
    )
    assert "error" not in one and [one, three] == observe(FakeLM(), [case("1"), case("3")], ObserveOptions())
    answered = [row for rows in lm.asked["loglikelihood"] for row in rows]
    assert len(answered) == len(set(answered))  # isolating the bad row asks no other twice


def test_a_generation_prompt_that_cannot_be_asked_fails_its_case():
    (seen,) = observe(FakeLM(), [case("1", Probe("generation", "too long"))], ObserveOptions())
    assert seen["error"].startswith("generation probe")


def test_numbers_that_are_not_finite_are_kept_as_null():
    (seen,) = observe(FakeLM(nll=float("nan")), [case()], ObserveOptions())
    assert seen["probes"][0]["target_nll"] is None
    assert probe_values({"after": seen}, "after")["efficacy_success"] == 0.0


def test_no_cases_and_no_probes():
    lm = FakeLM()
    assert observe(lm, [], ObserveOptions()) == []
    assert observe(lm, [Case("1", (), ())], ObserveOptions()) == [{"probes": [], "texts": [], "perplexity": None}]
    assert not any(lm.asked.values())


def test_before_cache_asks_once_a_case():
    lm, cache = FakeLM(), BeforeCache(ObserveOptions(), texts=["t"])
    first = cache.observe(lm, [case("1"), case("2")])
    again = cache.observe(lm, [case("2"), case("3")])
    assert again[0] == first[1] == observe(FakeLM(), [case("2")], ObserveOptions(), ["t"])[0]
    assert again[1]["perplexity"] == first[0]["perplexity"] and len(lm.asked["token_nlls"]) == 1
    assert len(lm.asked["sample"]) == 2 and all("3" in prompt for prompt, _ in lm.asked["sample"][1])
    cache.observe(lm, [case("1"), case("3")])
    assert len(lm.asked["loglikelihood"]) == 2


@pytest.mark.parametrize("name", ["max_new_tokens", "sample_tokens", "sample_top_k", "perplexity_window"])
def test_bad_options_are_named(name):
    with pytest.raises(UsageError, match=f"protocol.observe.{name}=0"):
        ObserveOptions(**{name: 0})  # type: ignore[arg-type]
