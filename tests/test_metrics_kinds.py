"""What is watched at locality answers, of models of every kind: tiny random ones, against their own logits."""

from __future__ import annotations

import math

import pytest
import torch
from families import LABELS, distributions, tiny_lm
from torch.nn.functional import kl_div

from edit_cli.lm.model import LM
from edit_cli.metrics.observe import ObserveOptions, observe
from edit_cli.metrics.scores import probe_values
from edit_cli.requests import Case, Probe

PLAIN = ObserveOptions(generate=False, sample=False, perplexity=False, top_tokens=500)


def case(target: str) -> Case:
    return Case(
        "1",
        (),
        (
            Probe("locality", "Ada Lund lives in the town", target, group="same_relation"),
            Probe("rewrite", "It is", target),
        ),
    )


@pytest.fixture(params=["gpt2", "t5", "bart", "bert"])
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny_lm(request.param)


def answer(lm: LM) -> str:
    return LABELS[1] if lm.head.kind == "classifier" else "of Oslo"


@torch.no_grad()
def moved(lm: LM, seed: int) -> None:
    """Stands for an edit: other weights in the last matrices."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in list(lm.model.parameters())[-6:]:
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_distributions_agree_with_the_likelihoods_of_the_same_model(lm: LM) -> None:
    pair = ("Ada Lund lives in the town", answer(lm))
    (logprobs,), (likelihood,) = distributions(lm, [pair]), lm.loglikelihood([pair])
    assert len(logprobs) == len(likelihood.hits) and tuple(logprobs.argmax(-1).tolist()) == likelihood.predicted
    assert logprobs.exp().sum(-1).tolist() == pytest.approx([1.0] * len(logprobs), abs=1e-5)
    labels = lm.head.encode([pair])[0].target
    mean = -logprobs[torch.arange(len(labels)), torch.tensor(labels)].mean()
    assert float(mean) == pytest.approx(likelihood.nll, abs=1e-5)


def test_kl_of_an_edit_is_that_of_the_whole_distributions(lm: LM) -> None:
    cases = [case(answer(lm))]
    before = observe(lm, cases, PLAIN)
    (then,) = distributions(lm, [(cases[0].probes[0].prompt, answer(lm))])
    moved(lm, 1)
    after = observe(lm, cases, PLAIN, before={"1": before[0]})
    (now,) = distributions(lm, [(cases[0].probes[0].prompt, answer(lm))])
    true = float(kl_div(now.double(), then.double(), log_target=True, reduction="sum")) / len(then)
    values = probe_values({"before": before[0], "after": after[0]}, "after")
    assert true > 1e-4 and values["locality_same_relation_kl"] == pytest.approx(true, rel=0.05, abs=2e-4)
    assert values["locality_same_relation_kl"] == values["locality_kl"]
    again = observe(lm, cases, PLAIN, before={"1": after[0]})
    assert probe_values({"before": after[0], "after": again[0]}, "after")["locality_kl"] == pytest.approx(0.0, abs=1e-4)


def test_the_batch_does_not_change_what_is_watched(lm: LM) -> None:
    pairs = [(f"{'Ada Lund ' * n}lives in", answer(lm)) for n in range(1, 5)]
    for alone, together in zip((distributions(lm, [pair])[0] for pair in pairs), distributions(lm, pairs), strict=True):
        assert torch.allclose(alone, together, atol=1e-4)


def test_claims_are_scored_by_labels_and_replies_on_a_classifier() -> None:
    lm = tiny_lm("bert")
    probes = (
        Probe("rewrite", "Ada lives in Oslo.", LABELS[1], LABELS[0]),
        Probe("locality", "Bo sings.", LABELS[0], group="random"),
        Probe("locality", "Cy is old.", group="hard"),
    )
    options = ObserveOptions(sample=False, perplexity=False)
    (before,) = observe(lm, [Case("1", (), probes)], options)
    with torch.no_grad():
        lm.model.classifier.bias[0] += 100.0  # from now on everything is the first label
    (after,) = observe(lm, [Case("1", (), probes)], options, before={"1": before})
    assert {probe["generated"].strip() for probe in after["probes"]} == {LABELS[0]}
    values = probe_values({"before": before, "after": after}, "after")
    assert values["locality_random_accuracy"] == 100.0
    assert values["locality_hard_disagreement"] == 100.0 * (before["probes"][2]["generated"].strip() != LABELS[0])
    others = 1 - math.exp(-before["probes"][1]["target_nll"])  # what the other labels had; each lost close to 100 nats
    assert values["locality_random_kl"] == pytest.approx(100 * others, rel=0.1)
