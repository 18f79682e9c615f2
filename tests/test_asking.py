"""Edits that are asked about together, each row meeting its own, say what each says when it is attached."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from embedded import embedded_lm, same_bits, snapshot, world
from families import tiny_lm
from stats_helpers import Recorder

from edit_cli.editors.base import Context
from edit_cli.edits.edit import Factors, Route, WeightDelta
from edit_cli.experiment.asking import Asker
from edit_cli.experiment.attempt import Attempt, attempt, attempt_each
from edit_cli.lm.edit import Added
from edit_cli.lm.fast import edits_by_row, repeated_pass
from edit_cli.lm.fast.edits_by_row import EditsByRow
from edit_cli.lm.fast.repeated_pass import recorded
from edit_cli.lm.layout import widths
from edit_cli.lm.model import LM
from edit_cli.metrics.observe import BeforeCache, ObserveOptions
from edit_cli.requests import Case, EditRequest, Probe
from edit_cli.testing.parts import packaged_method

pytestmark = pytest.mark.thin(2)

OPTIONS = ObserveOptions(max_new_tokens=6, sample_tokens=24)
TEXTS = ["The old lighthouse of Marlow stands on the northern shore.", "Ada Lund lives in Oslo."]
PROMPTS = ["Ada Lund was born in", "The mother tongue of Ada Lund is", "In the old town, where the river bends,", "Zoë"]
TARGETS = ["Paris", "Oslo", "Rome", "Tokyo"]


def edits(lm: Any, ranks: tuple[int, ...], size: float = 0.3) -> list[WeightDelta]:
    """Random ones of the MLP's output projections of two layers, of unequal rank; every third is dense, every fourth
    leaves the second layer alone.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, rank in enumerate(ranks):
        delta = WeightDelta()
        for layer in (0, 1)[: 1 + (number % 4 != 3)]:
            name = lm.layout.mlp_out(layer)
            d_out, d_in = widths(lm.module(name))
            left = torch.randn(d_out, rank, generator=generator)
            right = torch.randn(rank, d_in, generator=generator) * size / (rank * d_in) ** 0.5
            delta.updates[f"{name}.weight"] = Factors(left, right)
        if number % 3 == 2:
            delta = WeightDelta({name: delta.stored(lm, name).contiguous() for name in delta.updates})
        found.append(delta)
    return found


def cases(lm: Any, count: int) -> list[Case]:
    """All edits are asked about partly the same prompts; the words are those of the model's kind."""
    classes = getattr(lm.head, "labels", None) or TARGETS
    found = []
    for number in range(count):
        prompts = [PROMPTS[number % 4], *PROMPTS[: 1 + number % 3]]
        target, foil = classes[number % len(classes)], classes[(number + 1) % len(classes)]
        probes = [Probe("rewrite" if i == 0 else "locality", prompt, target, foil) for i, prompt in enumerate(prompts)]
        if lm.head.kind == "causal":
            probes += [Probe("generation", PROMPTS[number % 2]), Probe("generation", PROMPTS[0])]
        found.append(Case(str(number), (EditRequest(prompts[0], None, target),), tuple(probes)))
    return found


def said(
    lm: Any, made: list[WeightDelta], options: ObserveOptions = OPTIONS, read: int | None = None
) -> list[dict[str, Any]]:
    asked = cases(lm, len(made))
    if lm.head.kind != "causal":
        options = replace(options, sample=False, perplexity=False)
    before = BeforeCache(options, TEXTS)
    before.observe(lm, asked)
    attempts = [Attempt(edit, [case], {}, 0.0) for edit, case in zip(made, asked, strict=True)]
    return [seen[done.cases[0].id] for done, seen in Asker(lm, before, read).answers(attempts)]


def assert_same(found: Any, expected: Any) -> None:
    """Texts, tokens and flags to the letter, numbers but for their last digits."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    else:
        assert found == expected


def test_reading_a_text_with_each_edit_shows_progress(monkeypatch):
    """It is a pass over the whole text for each of them, which takes minutes on a real model."""
    lm, monitor = embedded_lm(), Recorder()
    monkeypatch.setattr(lm, "monitor", monitor)
    said(lm, edits(lm, (1, 2, 1)))
    assert ("reading plain text", 3) in monitor.tasks


@pytest.mark.parametrize("together", [True, False])
def test_perplexity_may_be_measured_after_the_first_edits_alone(monkeypatch, together):
    """Whether they are asked about together or one by one; all else is what it was."""
    lm = embedded_lm()
    if not together:
        monkeypatch.setattr(WeightDelta, "added", lambda *_: None)
    made = edits(lm, (1, 2, 1, 2))
    whole, part = said(lm, made), said(lm, made, read=2)
    assert [seen["perplexity"] is None for seen in part] == [False, False, True, True]
    assert_same(part[:2], whole[:2])
    assert_same(part[2:], [seen | {"perplexity": None} for seen in whole[2:]])


def read_with_each(lm: Any, made: list[dict[str, Added]]) -> list[tuple[float, int]]:
    with lm.edited_by_row(made):
        return [lm.token_nlls(TEXTS, 64, number) for number in range(len(made))]


def beside(lm: Any, *layers: int) -> list[dict[str, Added]]:
    """What random edits of some layers add."""
    found = [edit.added(lm) or {} for edit in edits(lm, (1, 2, 1))]
    return [{name: added[name] for layer in layers if (name := lm.layout.mlp_out(layer)) in added} for added in found]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "gpt_neox"])
def test_what_lies_below_all_edits_is_run_once_for_a_text_that_is_read_with_each(family, monkeypatch):
    """And on a few tokens, to see that the bits are the same."""
    lm = tiny_lm(family)
    made = beside(lm, 1)
    runs = [count_runs(lm.module(lm.layout.block(layer))) for layer in (0, 1)]
    found = read_with_each(lm, made)
    assert [len(calls) for calls in runs] == [1 + 2, 3 + 3]
    monkeypatch.setattr(repeated_pass, "KEPT", 0)
    assert found == read_with_each(lm, made) and len(set(found)) == 3
    assert [len(calls) for calls in runs] == [3 + 3, 6 + 3]


def test_edits_that_add_nothing_leave_a_text_as_it_is():
    lm = tiny_lm("llama")
    assert read_with_each(lm, [{}, {}]) == [lm.token_nlls(TEXTS, 64)] * 2


def test_other_rows_are_other_rows():
    lm = tiny_lm("llama")
    with lm.edited_by_row(beside(lm, 1)):
        one, other = lm.token_nlls(TEXTS[:1], 64, 0), lm.token_nlls(TEXTS[1:], 64, 0)
        assert (one, other) == (lm.token_nlls(TEXTS[:1], 64, 0), lm.token_nlls(TEXTS[1:], 64, 0)) and one != other


def test_a_pass_that_hangs_on_more_is_run_as_a_whole(monkeypatch):
    """Here because the module that is taken for the lowest is not."""
    lm = embedded_lm()
    made, last = beside(lm, 0, 1), lm.module(lm.layout.mlp_out(4))
    for module in (edits_by_row, repeated_pass):
        monkeypatch.setattr(module, "recorded", lambda model, _: recorded(model, last))
    found = read_with_each(lm, made)
    monkeypatch.setattr(repeated_pass, "KEPT", 0)
    assert found == read_with_each(lm, made)


def count_runs(module: Any) -> list[None]:
    """Grows with every call of its own forward."""
    calls: list[None] = []
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return own(*args, **kwargs)

    module.forward = forward
    return calls


class Nowhere(Route):
    """Lets every prompt pass."""

    def destinations(self, below, prompts):
        return [None] * len(prompts)

    def state(self):
        return {}, {}

    @classmethod
    def from_state(cls, tensors, rest):
        return cls()


class Counted(LM):
    """Counts how often an edit is attached."""

    times = 0

    def attach(self, edit: Any) -> None:
        self.times += 1
        super().attach(edit)


@pytest.fixture
def plainly(monkeypatch):
    """What is said when every edit is attached."""

    def ask(lm: Any, made: list[WeightDelta], **options: Any) -> list[dict[str, Any]]:
        with monkeypatch.context() as patch:
            patch.setattr(WeightDelta, "added", lambda self, lm: None)
            return said(lm, made, **options)

    return ask


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bloom", "t5", "bart", "bert"])
def test_every_row_meets_its_own_edit(family, plainly):
    lm: Any = tiny_lm(family)
    lm.__class__ = Counted
    made, weights = edits(lm, (1, 1, 2, 5, 3)), snapshot(lm)
    expected = plainly(lm, made)
    assert len({str(seen) for seen in expected}) == len(made)
    lm.times = 0
    assert_same(said(lm, made), expected)
    assert lm.times == 2  # as a check, of the first and the last
    assert same_bits(snapshot(lm), weights)
    assert not any(module._forward_hooks for module in lm.model.modules())


@pytest.mark.parametrize("rows", [1, 2, 0])
def test_edits_stay_with_rows_that_leave_and_join(rows, plainly):
    """rows: that are written at once; 0: by the model's own `generate`."""
    lm: Any = tiny_lm("gpt2")
    made = edits(lm, (1, 2, 1, 4, 1, 2))
    assert lm.head.decodes_together
    expected = plainly(lm, made)
    if rows:
        token = 2 * 4 * lm.layout.depth * lm.layout.width
        lm.head.__dict__["_decoder"] = replace(lm.head._decoder, cache_bytes=rows * token * 40, prompt_tokens=8)
    else:
        lm.head.__dict__["decodes_together"] = False
    assert_same(said(lm, made), expected)


def test_groups_of_edits_are_bounded_by_their_size(plainly, monkeypatch):
    lm: Any = tiny_lm("llama")
    made, beside = edits(lm, (1, 1, 1, 1, 1)), LM.edited_by_row
    sizes: list[int] = []
    expected = plainly(lm, made)
    largest = max(sum(term.bytes for term in (delta.added(lm) or {}).values()) for delta in made)
    monkeypatch.setattr("edit_cli.experiment.asking.TOGETHER_BYTES", {"cpu": largest})

    def counted(self, added):
        sizes.append(len(added))
        return beside(self, added)

    monkeypatch.setattr(LM, "edited_by_row", counted)
    assert_same(said(lm, made), expected)
    assert max(sizes) < len(made)


@pytest.mark.parametrize("why", ["bfloat16", "embedding", "bias", "route"])
def test_edits_that_have_to_be_attached_are_asked_about_one_by_one(why, plainly):
    lm: Any = tiny_lm("gpt2")
    notes: list[str] = []
    made = edits(lm, (1, 1, 1))
    if why == "bfloat16":  # attached, an update is rounded to what the weight can hold
        lm = LM(lm.model.to(torch.bfloat16), lm.tokenizer)
    elif why == "route":
        lm.attach(Nowhere())
    else:
        name = {"embedding": "transformer.wte.weight", "bias": f"{lm.layout.mlp_out(0)}.bias"}[why]
        for delta in made:
            delta.updates[name] = torch.full(lm.access(name).shape, 0.01)
    lm.monitor.note = notes.append
    expected = plainly(lm, made)
    notes.clear()
    assert said(lm, made) == expected
    assert len(notes) == 1 and "one by one" in notes[0]


def test_a_model_whose_modules_see_other_rows_is_noticed(plainly, monkeypatch):
    """Where a projection runs on something else than the batch's rows, edits beside it say something else than
    attached.
    """
    lm: Any = tiny_lm("gpt2")
    notes: list[str] = []
    made, add = edits(lm, (1, 1, 1)), EditsByRow._add
    expected = plainly(lm, made)
    monkeypatch.setattr(
        EditsByRow, "_add", lambda self, beside, module, args, y: add(self, beside, module, (args[0].flip(1),), y)
    )
    lm.monitor.note = notes.append
    assert said(lm, made) == expected
    assert len(notes) == 1 and "attached" in notes[0]


def test_a_fact_without_an_edit_is_left_out():
    lm = embedded_lm()
    asked = list(world("tune")[:3])
    before = BeforeCache(replace(OPTIONS, sample=False), TEXTS)
    made: list[WeightDelta | None] = [*edits(lm, (1, 1))]
    made.insert(1, None)
    attempts = [Attempt(edit, [case], {}, 0.0) for edit, case in zip(made, asked, strict=True)]
    found = [seen for _, seen in Asker(lm, before).answers(attempts)]
    assert [list(seen) for seen in found] == [[asked[0].id], [], [asked[2].id]]


@pytest.mark.parametrize("variant", ["original", "r"])
def test_rome_makes_single_edits_at_once_as_one_by_one(variant):
    lm = embedded_lm()
    asked = [[case] for case in world("tune")[:5]]
    subject = asked[2][0].requests[0]
    absent = EditRequest(subject.prompt, None, subject.target_new)  # ROME needs a subject
    asked[2] = [replace(asked[2][0], requests=(absent,))]
    method = packaged_method("rome", f"method.variant={variant}", "method.use_covariance=false", "method.value.steps=6")
    begin = partial(method.begin, lm, Context())
    alone = [attempt(begin(), batch) for batch in asked]
    together = list(attempt_each(begin, asked))
    assert [done.edit is None for done in together] == [False, False, True, False, False]
    for one, other in zip(together, alone, strict=True):
        assert (one.cases, one.rejected) == (other.cases, other.rejected)
        if one.edit is not None:
            assert isinstance(one.edit, WeightDelta) and isinstance(other.edit, WeightDelta)
            for name in one.edit.updates:
                mine, its = (edit.stored(lm, name) for edit in (one.edit, other.edit))
                assert (mine - its).norm() < 1e-5 * its.norm()
            assert_same(one.diagnosis, other.diagnosis)
            assert one.edit.info["steps"] == other.edit.info["steps"]


def test_several_facts_or_layers_are_written_one_after_another():
    lm = embedded_lm()
    facts = [case.requests[0] for case in world("tune")[:4]]
    settings = ("method.use_covariance=false",)
    assert packaged_method("rome", *settings).begin(lm).edit_each([facts[:2], facts[2:]]) is None
    assert packaged_method("rome", *settings, "method.layers=[0,1]").begin(lm).edit_each([[facts[0]]]) is None
