"""SERAC: what is kept of facts, which one a prompt falls to, and who answers."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from embedded import embedded_lm, random_llama, requests, same_bits, snapshot, world
from families import distributions, head_as
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from edit_cli import assets
from edit_cli.editors.retrieval.base import Fact, FactMemory
from edit_cli.editors.retrieval.lookup import CacheRoute
from edit_cli.editors.retrieval.scope_classifier import CrossScope, EmbeddingScope, ScopeConfig
from edit_cli.editors.retrieval.scope_examples import ScopeExampleSampler
from edit_cli.editors.retrieval.serac import SERAC, SERACConfig, SeracNet, SeracRoute
from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.auxiliary_model import AuxiliaryModelConfig
from edit_cli.lm.heads.causal import CausalHead
from edit_cli.lm.model import LM
from edit_cli.requests import Case, EditRequest, Probe

BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128}
IN = math.log(2)


@cache
def lm() -> LM:
    return embedded_lm()


@cache
def other_lm() -> LM:
    """Another base."""
    return random_llama("other")


@cache
def config(kind: Any = "embedding", **settings: Any) -> SERACConfig:
    """Networks at random that tell every prompt apart: a small scale would put all in scope, a large one none but
    the facts themselves.
    """
    return SERACConfig(
        scope=ScopeConfig(
            kind=kind,
            model=AuxiliaryModelConfig(family="bert", sizes=BERT),
            pooling="mean",
            scale=settings.pop("scale", 1.0),
        ),
        counterfactual=AuxiliaryModelConfig(family="gpt2", sizes=GPT2),
        **settings,
    )


def serac(base: LM | None = None, **settings) -> SERAC:
    return SERAC(replace(config(), **settings), base or lm())


@cache
def net(kind: str = "embedding", scale: float = 1.0):
    torch.manual_seed(0)
    found = SERAC(config(kind, scale=scale), lm()).build().eval()
    for parameter in found.parameters():
        parameter.requires_grad_(False)
    return found


def route(requests: list[EditRequest], kind: str = "embedding", scale: float = 1.0, **settings) -> SeracRoute:
    made = SERAC(replace(config(kind, scale=scale), **settings), lm())
    made.context.kept["network"] = net(kind, scale)
    return made.edit(requests)


def pairs(wanted: list[EditRequest]) -> list[tuple[str, str]]:
    return [(request.text, request.target_new) for request in wanted]


def distances(wanted: list[EditRequest], prompts: list[str]) -> Tensor:
    """(prompts, facts) squared, plainly: one text at a time."""
    scope = net().scope
    with torch.no_grad():
        facts = torch.cat([scope.embed([scope.descriptor(Fact(r.text, r.target_new))]) for r in wanted]).double()
        asked = torch.cat([scope.embed([prompt]) for prompt in prompts]).double()
    return (asked[:, None] - facts).square().sum(-1)


def between(wanted: list[EditRequest], prompts: list[str]) -> float:
    """A scale at which about half of the prompts are in scope."""
    smallest = distances(wanted, prompts).min(1).values.sort().values
    return IN / float((smallest[len(prompts) // 2 - 1] + smallest[len(prompts) // 2]) / 2)


def read(request: EditRequest, prompt: str) -> str:
    return f"{request.text} {request.target_new} {prompt}"


def asked() -> tuple[list[EditRequest], list[str]]:
    """Facts, and prompts that lie at different distances from them."""
    wanted = requests(6)
    prompts = [
        probe.prompt
        for case in world("tune")[:6]
        for probe in case.probes
        if probe.kind in ("paraphrase", "neighborhood")
    ][:24]
    return wanted, [request.text for request in wanted] + prompts


def test_the_nearest_fact_answers_where_its_distance_is_below_ln_2():
    wanted, prompts = asked()
    scale = between(wanted, prompts)
    plain = distances(wanted, prompts) * scale
    targets = ["London"] * len(prompts)
    expected = []
    for prompt, row in zip(prompts, plain, strict=True):
        inside, best = bool(row.min() < IN), int(row.argmin())
        pair = (read(wanted[best], prompt), "London") if inside else (prompt, "London")
        expected.append((net().head if inside else lm().head).loglikelihood([pair])[0])
    assert 4 < sum(bool(row.min() < IN) for row in plain) < len(prompts) - 4
    with lm().edited(route(wanted, scale=scale)):
        found = lm().loglikelihood(list(zip(prompts, targets, strict=True)))
    for mine, plainly in zip(found, expected, strict=True):
        assert mine.nll == pytest.approx(plainly.nll, abs=1e-5) and mine.predicted == plainly.predicted


def test_texts_are_written_in_one_batch_a_route_and_are_those_of_one_at_a_time(monkeypatch):
    wanted, prompts = asked()
    edit = route(wanted, scale=between(wanted, prompts))
    with lm().edited(edit):
        alone = [lm().generate([prompt], 5)[0] for prompt in prompts]
        sampled = [lm().sample([prompt], [7], 30, 5)[0] for prompt in prompts[:8]]
        calls: list[int] = []
        head: Any = type(lm().head)
        whole = head.generate

        def counted(self, texts, n):
            calls.append(len(texts))
            return whole(self, texts, n)

        monkeypatch.setattr(head, "generate", counted)
        assert lm().generate(prompts, 5) == alone
        assert lm().sample(prompts[:8], [7] * 8, 30, 5) == sampled
    assert len(calls) == 2 and sum(calls) == len(prompts)
    assert all(
        text.startswith(prompt) and wanted[0].target_new + " " + prompt not in text
        for text, prompt in zip(sampled, prompts, strict=False)
    )


def test_soft_mixing_weighs_probabilities_by_g():
    wanted, prompts = asked()
    scale = between(wanted, prompts)
    nearest = (distances(wanted, prompts) * scale).min(1)
    pair = [(prompt, "London") for prompt in prompts]
    base = [tensor.exp() for tensor in distributions(lm(), pair)]
    other = distributions(
        net().head,
        [(read(wanted[best], prompt), "London") for best, prompt in zip(nearest.indices, prompts, strict=True)],
    )
    with lm().edited(route(wanted, scale=scale, mixing="soft")):
        mixed, scores = distributions(lm(), pair), lm().loglikelihood(pair)
    label = lm().head.encode(pair)[0].target[0]
    for g, a, b, found, score in zip((-nearest.values).exp(), base, other, mixed, scores, strict=True):
        torch.testing.assert_close(found.exp(), (1 - g).float() * a + g.float() * b.exp(), rtol=1e-4, atol=1e-6)
        assert score.nll == pytest.approx(-float(found[0, label]), abs=1e-5)


def test_soft_mixing_needs_a_distribution_of_both():
    """A stored text below it has none; prompts that are not answered so are mixed."""
    wanted, prompts = asked()
    cache = CacheRoute([Fact(prompts[0], "London")], torch.zeros(1, lm().layout.width), None, 20.0)
    with lm().edited(cache), lm().edited(route(wanted, mixing="soft")):
        assert lm().target_logprobs([(prompts[1], "London")])[0] is not None
        with pytest.raises(UsageError, match="stored text, which has none: give method.mixing=hard"):
            lm().loglikelihood([(prompts[0], "London")])


def test_without_facts_the_model_answers_bit_for_bit():
    _, prompts = asked()
    before = lm().loglikelihood([(prompt, "London") for prompt in prompts])
    with lm().edited(route([])):
        assert lm().loglikelihood([(prompt, "London") for prompt in prompts]) == before


def test_facts_and_prompts_are_compared_as_published_for_models_that_judge_and_for_those_that_write():
    model = AuxiliaryModelConfig(family="bert", sizes=BERT)
    for edited, scope in (("classifier", CrossScope), ("causal", EmbeddingScope), ("seq2seq", EmbeddingScope)):
        assert type(ScopeConfig(model=model).build(lm().tokenizer, 512, edited)) is scope
    assert type(ScopeConfig(model=model, kind="embedding").build(lm().tokenizer, 512, "classifier")) is EmbeddingScope


def test_g_is_1_for_the_same_text_and_class_0_of_the_cross_classifier_is_in_scope():
    scope = net().scope
    memory = FactMemory(32, torch.device("cpu"))
    memory.add([Fact("a", "b")], scope.embed(["Some prompt is"]))
    assert float(scope.best(memory, ["Some prompt is"])[0]) == pytest.approx(1.0, abs=1e-6)
    wanted, prompts = asked()
    cross = net("cross").scope
    facts = [Fact(request.text, request.target_new) for request in wanted]
    memory = FactMemory(0, torch.device("cpu"))
    memory.add(facts, cross.keys(facts))
    which = torch.tensor([[i, j] for j in range(3) for i in range(len(facts))])
    with torch.no_grad():
        inside, outside = cross.pairs(facts, prompts[:3], which)
    torch.testing.assert_close(inside.exp() + outside.exp(), torch.ones(len(which)))
    with torch.no_grad():
        text = cross._joined(facts[1], prompts[0])
        logits = cross.model(**cross.tokenizer([text], return_tensors="pt")).logits
    assert float(inside[1]) == pytest.approx(float(logits.log_softmax(-1)[0, 0]), abs=1e-5)
    g, best = cross.best(memory, prompts[:3])
    table = inside.exp().view(3, -1)
    torch.testing.assert_close(g, table.max(1).values)
    assert best.tolist() == table.argmax(1).tolist()


# --- the memory ------------------------------------------------------------------------------------------------------


def test_repetitions_are_one_fact_and_the_latest_answer_to_a_prompt_wins(monkeypatch):
    notes: list[str] = []
    monkeypatch.setattr(lm().monitor, "note", notes.append)
    first, second = requests(2)
    other = EditRequest(first.prompt, first.subject, "elsewhere")
    edit = route([first, second, first, other, second])
    assert [(fact.prompt, fact.answer) for fact in edit.facts] == [
        (first.text, "elsewhere"),
        (second.text, second.target_new),
    ]
    assert notes == [
        "5 edits are 2 facts: 2 say again what another says, and 1 is replaced by a later answer to the same prompt"
    ]
    lm().attach(earlier := route([first, second]))
    lm().attach(late := route([other]))
    to: list[Any] = late.answers(lm().head, [first.text, second.text])
    assert late.memory.current.tolist() == [False, True, True]
    assert to[0].answerer.told(first.text, 0) == read(other, first.text) or to[0] is None
    lm().detach()
    assert earlier.memory.current.tolist() == [True, True]
    lm().detach()


def test_edits_in_a_sequence_share_one_memory_and_come_off_in_reverse():
    wanted, prompts = asked()
    scale = between(wanted, prompts)
    pair = [(prompt, "London") for prompt in prompts]
    untouched, before = snapshot(lm()), lm().loglikelihood(pair)
    with lm().edited(route(wanted, scale=scale)):
        together = lm().loglikelihood(pair)
    states = []
    for request in wanted:
        states.append(lm().loglikelihood(pair))
        lm().attach(route([request], scale=scale))
    assert lm().loglikelihood(pair) == together
    for state in reversed(states):
        lm().detach()
        assert lm().loglikelihood(pair) == state
    assert lm().loglikelihood(pair) == before and same_bits(snapshot(lm()), untouched)


def test_ten_thousand_facts_are_looked_up_without_reading_them_again(monkeypatch):
    """The encoder runs once a batch of prompts, and never for stored facts; nor do a thousand attached edits cost a
    pass each.
    """
    passes: list[int] = []
    embed = EmbeddingScope.embed

    def counted(self, texts):
        passes.append(len(texts))
        return embed(self, texts)

    monkeypatch.setattr(EmbeddingScope, "embed", counted)
    _, prompts = asked()
    edit = route(requests(1))
    draw = torch.Generator().manual_seed(0)
    many = SeracRoute(
        [Fact(f"prompt {i}", "a") for i in range(10_000)],
        torch.randn(10_000, 32, generator=draw),
        edit.maker,
        edit.config,
        net=edit.net,
    )
    passes.clear()
    with lm().edited(many):
        lm().loglikelihood([(prompt, "London") for prompt in prompts * 3])
    assert passes == [len(prompts)]
    for start in range(0, 10_000, 10):
        lm().attach(
            SeracRoute(
                many.facts[start : start + 10], many.keys[start : start + 10], edit.maker, edit.config, net=edit.net
            )
        )
    passes.clear()
    lm().loglikelihood([(prompt, "London") for prompt in prompts])
    latest = lm().attached[-1]
    assert passes == [len(prompts)] and isinstance(latest, SeracRoute) and len(latest.memory) == 10_000
    for _ in range(1000):
        lm().detach()


# --- other edits, other models, other processes
# -----------------------------------------------------------------------------


def test_it_stands_before_an_edited_model_as_well():
    wanted, prompts = asked()
    pair = [(prompt, "London") for prompt in prompts]
    untouched = snapshot(lm())
    name = lm().layout.mlp_out(2)
    rows, columns = lm().weight(name).shape
    delta = WeightDelta({f"{name}.weight": Factors(torch.ones(rows, 1) * 0.05, torch.ones(1, columns))})
    edit = route(wanted, scale=between(wanted, prompts))
    with lm().edited(edit):
        plain, found = lm().loglikelihood(pair), edit.answers(lm().head, prompts)
    with lm().edited(delta):
        below = lm().loglikelihood(pair)
        with lm().edited(edit):
            both = lm().loglikelihood(pair)
    assert both == [alone if to else under for alone, under, to in zip(plain, below, found, strict=True)]
    assert any(found) and not all(found) and below != plain and same_bits(snapshot(lm()), untouched)


def test_networks_trained_beside_one_model_serve_another_with_the_same_words():
    wanted, prompts = asked()
    scale = between(wanted, prompts)
    edit = route(wanted, scale=scale)
    with lm().edited(edit):
        first, inside = lm().loglikelihood([(prompt, "London") for prompt in prompts]), edit.answers(lm().head, prompts)
    assert serac().base() == serac(other_lm()).base()
    bare = other_lm().loglikelihood([(prompt, "London") for prompt in prompts])
    made = SERAC(config(scale=scale), other_lm())
    made.context.kept["network"] = net(scale=scale)
    untouched = snapshot(other_lm())
    with other_lm().edited(made.edit(wanted)):
        second = other_lm().loglikelihood([(prompt, "London") for prompt in prompts])
    assert second == [mine if to else theirs for mine, theirs, to in zip(first, bare, inside, strict=True)]
    assert same_bits(snapshot(other_lm()), untouched)


def test_other_words_are_refused_for_the_counterfactual_model_and_welcome_for_the_classifier(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(assets.FOLDER / "tiny-gpt2")
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    companion = AuxiliaryModelConfig(family="gpt2", sizes=GPT2, tokenizer=str(tmp_path))
    with pytest.raises(UsageError, match="the counterfactual model writes other tokens than tiny-gpt2"):
        serac(counterfactual=companion).build()
    scope = ScopeConfig(model=AuxiliaryModelConfig(family="bert", sizes=BERT, tokenizer=str(tmp_path)), pooling="mean")
    assert serac(scope=scope).build().scope.tokenizer is not lm().tokenizer


@pytest.fixture
def checkpoint(tmp_path):
    """net() as `edit-cli train-editor` would leave it."""
    from edit_cli.editors.meta import checkpoints

    about = {"model": {"name": "tiny-gpt2"}, "dataset": {"name": "none"}}
    checkpoints.save(tmp_path / "networks", net(), {**serac().identity(), **about})
    return tmp_path / "networks"


def test_saved_it_answers_the_same_from_the_disk_alone(checkpoint, tmp_path):
    wanted, prompts = asked()
    scale = between(wanted, prompts)
    edit = SERAC(replace(config(scale=scale), checkpoint=str(checkpoint)), lm()).edit(wanted)
    edit_store.save(edit, tmp_path / "edit", lm(), wanted, {"name": "serac"})
    pair = [(prompt, "London") for prompt in prompts]
    with lm().edited(edit):
        here = lm().loglikelihood(pair)
    fresh = embedded_lm()
    (attached,) = edit_store.attach(tmp_path / "edit", fresh)
    assert fresh.loglikelihood(pair) == here
    assert isinstance(attached, SeracRoute) and attached.net is not edit.net


def test_an_edit_knows_the_networks_that_it_was_made_with(checkpoint, tmp_path):
    from edit_cli.editors.meta import checkpoints

    made = serac(checkpoint=str(checkpoint))
    edit_store.save(made.edit(requests(1)), tmp_path / "edit", lm(), requests(1), {"name": "serac"})
    torch.manual_seed(5)
    about = {"model": {"name": "tiny-gpt2"}, "dataset": {"name": "none"}}
    checkpoints.save(checkpoint, serac().build(), {**serac().identity(), **about})
    with pytest.raises(MissingError, match="holds other networks than this edit was made with"):
        edit_store.attach(tmp_path / "edit", lm())


def test_an_edit_takes_its_settings_along_and_wrong_ones_are_damage():
    edit = route(requests(1), threshold=0.3)
    tensors, rest = edit.state()
    rest = json.loads(json.dumps(rest))
    assert SeracRoute.from_state(tensors, rest).config == edit.config
    rest["editor"]["threshold"] = 2.0
    with pytest.raises(MissingError, match=r"this edit is damaged: method.threshold=2.0: give a number above 0"):
        SeracRoute.from_state(tensors, rest)


def test_networks_that_learnt_by_other_settings_are_not_found(tmp_path):
    """What tells where a prompt goes may differ: it is no part of what is learned."""
    from edit_cli.editors.meta import checkpoints

    made = serac(cache_dir=str(tmp_path), trained_on="none", threshold=0.2, mixing="soft")
    for weight, found in ((1.0, False), (0.0, True)):
        identity = serac(all_pairs=weight).identity()
        about = {**identity, "model": {"name": "tiny-gpt2"}, "dataset": {"name": "none"}}
        checkpoints.save(checkpoints.place(tmp_path, identity, "serac"), net(), about)
        if found:
            assert made.trained().digest(made.config) == net().digest(made.config)
        else:
            with pytest.raises(MissingError, match="this editor has not been trained for tiny-gpt2"):
                made.trained()


def test_a_vocabulary_without_an_end_token_is_told_so():
    tokenizer = AutoTokenizer.from_pretrained(assets.FOLDER / "tiny-gpt2")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), eos_token_id=None, n_embd=32, n_layer=1, n_head=2))
    head = CausalHead(model, tokenizer, torch.device("cpu"), 512, replies=True)
    tokenizer.eos_token = None
    rows = head.encode([("The sea is", "blue")])
    assert head.answers(rows).labels.tolist() == list(rows[0].target)
    with pytest.raises(UsageError, match="has no end token"):
        head.answers(rows, end=True)


# --- the encoder's share
# ---------------------------------------------------------------------------------------------------


def test_a_frozen_encoder_keeps_its_bits_and_the_head_learns():
    torch.manual_seed(0)
    sizes = {**BERT, "num_hidden_layers": 3}
    model = AuxiliaryModelConfig(family="bert", sizes=sizes)
    made = serac(scope=ScopeConfig(model=model, pooling="mean", trained_blocks=1, head=8, describes="prompt"))
    fresh = made.build()
    before = {name: value.clone() for name, value in fresh.scope.state_dict().items()}
    optimizer = torch.optim.AdamW([parameter for parameter in fresh.parameters() if parameter.requires_grad], lr=1e-3)
    made.loss(fresh, [example_case(number) for number in range(4)])[0].backward()
    optimizer.step()
    moved = {name for name, value in fresh.scope.state_dict().items() if not torch.equal(value, before[name])}
    assert "head.1.weight" in moved and any("layer.2." in name for name in moved)
    assert all("layer.2." in name or name.startswith("head.") for name in moved)


def test_of_an_encoder_decoder_the_encoder_reads():
    options = ScopeConfig(
        model=AuxiliaryModelConfig(checkpoint="embedded:tiny-t5"),
        pooling="mean",
        trained_blocks=1,
        head=8,
        describes="prompt",
    )
    scope = options.build(lm().tokenizer, 512, "seq2seq")
    assert isinstance(scope, EmbeddingScope)
    names = [name for name, _ in scope.model.named_parameters()]
    assert names and not any("decoder" in name or "lm_head" in name for name in names)
    learns = {name.split(".")[1] for name, parameter in scope.model.named_parameters() if parameter.requires_grad}
    assert learns == {str(scope.model.config.num_layers - 1)}
    prompts = ["What is the native language of Ada Osten?", "Where does Ada Osten live?"]
    with torch.no_grad():
        together, alone = scope.embed(prompts), torch.cat([scope.embed([prompt]) for prompt in prompts])
    torch.testing.assert_close(together, alone)
    assert together.shape == (2, 8) and (together[0] - together[1]).norm() > 1e-3


def test_a_fact_that_is_described_by_its_prompt_is_found_by_it_whatever_the_answer():
    torch.manual_seed(0)
    cases: tuple[tuple[Any, bool], ...] = (("prompt", True), ("fact", False))
    for describes, same in cases:
        options = ScopeConfig(
            model=AuxiliaryModelConfig(family="bert", sizes=BERT), pooling="mean", head=8, describes=describes
        )
        scope = options.build(lm().tokenizer, 4096, "causal")
        keys = scope.keys([Fact("Ada works as a", "pilot"), Fact("Ada works as a", "judge")])
        assert keys.shape == (2, 8) and torch.equal(keys[0], keys[1]) is same
        memory = FactMemory(8, torch.device("cpu"))
        memory.add([Fact("Ada works as a", "pilot")], keys[:1])
        assert (float(scope.best(memory, ["Ada works as a"])[0]) == pytest.approx(1.0, abs=1e-6)) is same


# --- training
# ----------------------------------------------------------------------------------------------------------------


def example_case(number: int) -> Case:
    request = EditRequest("{} works as a", f"First{number} Last{number}", "pilot", "baker")
    probes = (Probe("paraphrase", f"The job of First{number} Last{number} is", "pilot"),)
    return Case(
        str(number), (request,), (*probes, Probe("neighborhood", f"Neighbour{number} works as a", "judge", "pilot"))
    )


def own_logprobs(net: SeracNet, text: str, answer: str, end: str, sign: int = 1) -> Tensor:
    """Plainly: log p of the tokens that come after `text`, or log(1 - p) where `sign` is -1."""
    before, whole = (lm().tokenizer(string, return_tensors="pt")["input_ids"] for string in (text, text + answer + end))
    after = whole[:, before.shape[1] :]
    with torch.no_grad():
        logits = head_as(net.head, CausalHead).model(whole).logits[:, before.shape[1] - 1 : -1]
        p = logits.softmax(-1).gather(2, after[..., None])
    return (p if sign > 0 else 1 - p).log().flatten()


def test_the_loss_is_the_published_one():
    """c_edit · NLL of h, of an answer and its end + c_loc · (mean d² in scope + mean -log(1 - exp(-d²)) of the case's
    own out-of-scope prompts).
    """
    torch.manual_seed(0)
    made = serac(edit_weight=0.1, scope_weight=2.0)
    fresh = made.build()
    assert isinstance(fresh.scope, EmbeddingScope)
    cases = [example_case(number) for number in range(3)]
    untouched = snapshot(lm())
    loss, told = made.loss(fresh, cases)
    loss.backward()
    nlls, inside, outside = [], [], []
    with torch.no_grad():
        for case in cases:
            request, (paraphrase, neighbor) = case.requests[0], case.probes
            nlls.append(-float(own_logprobs(fresh, read(request, paraphrase.prompt), " pilot", "<|endoftext|>").mean()))
            fact, near, far = fresh.scope.embed([f"{request.text} pilot", paraphrase.prompt, neighbor.prompt])
            inside.append(float((fact - near).square().sum()))
            outside.append(-math.log(1 - math.exp(-float((fact - far).square().sum()))))
    expected = 0.1 * sum(nlls) / 3 + 2.0 * (sum(inside) / 3 + sum(outside) / 3)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-3)
    assert told["nll"] == pytest.approx(sum(nlls) / 3, rel=1e-4)
    part: Any
    for part in (fresh.scope.model, fresh.counterfactual):
        assert float(part.get_input_embeddings().weight.grad.abs().sum()) > 0
    assert same_bits(snapshot(lm()), untouched) and all(parameter.grad is None for parameter in lm().model.parameters())


def test_replies_that_a_fact_rules_out_are_made_unlikely():
    """ConvSent: -log p of a wanted reply and its end, and -log(1 - p) of an unwanted one's tokens, not of its end."""
    torch.manual_seed(0)
    made = serac(edit_weight=1.0, scope_weight=0.0)
    fresh, request = made.build(), EditRequest("Topic: {}", "London", "Sentiment: Positive")
    asked = "What do you think of London?"
    probes = (
        Probe("opinion", asked, "a great town", group="wanted"),
        Probe("opinion", asked, "a bad town", group="unwanted"),
    )
    loss, told = made.loss(fresh, [Case("0", (request,), probes)])
    expected = 0.0
    for probe, sign, end in zip(probes, (1, -1), ("<|endoftext|>", ""), strict=True):
        expected -= float(own_logprobs(fresh, read(request, asked), f" {probe.target}", end, sign).mean())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4) and told["nll"] == pytest.approx(
        expected, rel=1e-4
    )


def test_all_pairs_are_those_with_the_prompts_of_other_subjects():
    torch.manual_seed(0)
    fresh, cases = serac().build(), [example_case(number) for number in range(3)]
    cases.append(Case("again", cases[0].requests, cases[0].probes))
    without, whole = (
        float(serac(edit_weight=0.0, all_pairs=weight).loss(fresh, cases)[0].detach()) for weight in (0.0, 3.0)
    )
    terms = []
    with torch.no_grad():
        for _i, case in enumerate(cases):
            for _j, other in enumerate(cases):
                if case.requests != other.requests:
                    scope: Any = fresh.scope
                    fact, *far = scope.embed(
                        [f"{case.requests[0].text} pilot", *(probe.prompt for probe in other.probes)]
                    )
                    terms += [-math.log(1 - math.exp(-float((fact - x).square().sum()))) for x in far]
    assert whole - without == pytest.approx(3.0 * sum(terms) / len(terms), rel=1e-3)


@pytest.mark.parametrize("kind", ["embedding", "cross"])
def test_a_few_steps_tell_prompts_apart(kind):
    torch.manual_seed(0)
    made = serac(scope=config(kind).scope, edit_weight=1.0, all_pairs=1.0)
    fresh, cases = made.build(), [example_case(number) for number in range(6)]
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=3e-3)
    for _ in range(90):
        loss, told = made.loss(fresh, cases)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert told["in_scope"] == told["out_of_scope"] == 1.0 and told["nll"] < 0.1


def test_varied_examples_are_about_invented_subjects_and_near_namesakes():
    cases = list(world("tune")[:40])
    names = {subject for case in cases if (subject := case.requests[0].subject)}
    for example in ScopeExampleSampler(1.0, random.Random(0)).examples(cases):
        subject = example.subject
        assert subject is not None
        assert subject in example.fact.prompt and all(subject in prompt for prompt, _ in example.within)
        assert subject not in example.beyond[-1]
        assert not any(name in example.fact.prompt for name in names - {subject})
    plain = ScopeExampleSampler(0.0, random.Random(0)).examples(cases)
    assert [example.fact for example in plain] == [
        Fact(case.requests[0].text, case.requests[0].target_new) for case in cases
    ]
    first, second = (ScopeExampleSampler(1.0, random.Random(3)).examples(cases) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixing": "x"}, "method.mixing=x: choose hard or soft"),
        ({"threshold": 1.0}, "method.threshold=1.0"),
        ({"join": "{prompt}"}, "method.join={prompt}: it must hold"),
        ({"scope": {"kind": "x"}}, "method.scope.kind=x: choose"),
        ({"scope": {"pooling": "x"}}, "method.scope.pooling=x: choose"),
        ({"scope": {"describes": "x"}}, "method.scope.describes=x: choose fact or prompt"),
        ({"scope": {"head": 0}}, "method.scope.head=0: give a whole number from 1 up or null"),
        ({"scope": {"trained_blocks": -1}}, "method.scope.trained_blocks=-1: give a whole number from 0 up or null"),
        (
            {"scope": {"trained_blocks": 0}},
            "method.scope.trained_blocks=0 leaves nothing of the classifier to train",
        ),
        (
            {"scope": {"model": AuxiliaryModelConfig(family="bert", sizes=BERT), "trained_blocks": 2}},
            "method.scope.trained_blocks=2: the encoder has 1",
        ),
        ({"scope": {"model": AuxiliaryModelConfig()}}, "method.scope.model has neither checkpoint nor family"),
        (
            {
                "scope": {
                    "model": AuxiliaryModelConfig(checkpoint="embedded:tiny-bert", sizes={"intermediate_size": 64})
                }
            },
            "do not fit the weights of method.scope.model.checkpoint=embedded:tiny-bert",
        ),
        (
            {"counterfactual": AuxiliaryModelConfig(checkpoint="/nowhere")},
            "method.counterfactual.checkpoint=/nowhere: no such folder",
        ),
        ({"counterfactual": AuxiliaryModelConfig(family="nope")}, "method.counterfactual: "),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    with pytest.raises((UsageError, MissingError)) as caught:
        if "scope" in settings:
            settings = {"scope": ScopeConfig(**settings["scope"])}
        serac(**settings).build()
    assert message in str(caught.value)
