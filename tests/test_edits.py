"""Edits are attached and detached exactly, last in first out, in every dtype and orientation; small updates of
16-bit weights add up.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from families import tiny, tiny_lm
from torch import Tensor, nn

from edit_cli.edits.edit import Edit, Factors, ModulePatch, Route, WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.heads.answers import Likelihood
from edit_cli.lm.hooks import Wrapper
from edit_cli.lm.model import LM
from edit_cli.lm.routing import Destination

PAIRS = [("The capital of France is", "Paris"), ("Ada Lund lives in", "Oslo")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAMILIES = ["gpt2", "llama", "gpt_neox"]  # Conv1D, Linear, Linear with a bias
stored = pytest.mark.parametrize("dtype", DTYPES, ids=str)
families = pytest.mark.parametrize("family", FAMILIES)


def language_model(family: str, dtype: torch.dtype = torch.float32) -> LM:
    model, words = tiny(family)
    return LM(model.to(dtype), words, name=f"tiny-{family}")


def bits(lm: LM) -> dict[str, Tensor]:
    """A copy of everything the model holds."""
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def same(lm: LM, before: dict[str, Tensor]) -> bool:
    now = lm.model.state_dict()
    return now.keys() == before.keys() and all(
        torch.equal(now[name].view(torch.uint8), before[name].view(torch.uint8)) for name in now
    )


def logits(lm: LM) -> Tensor:
    with torch.no_grad():
        return lm.model(input_ids=torch.arange(5, 25).reshape(2, 10), use_cache=False).logits


def delta(lm: LM, seed: int, scale: float = 0.1, layers: tuple[int, ...] = (0, 2), rank: int = 2) -> WeightDelta:
    """Low-rank updates of two projections, and a dense one of a vector."""
    draw = torch.Generator().manual_seed(seed)
    updates: dict[str, Factors | Tensor] = {}
    for layer in layers:
        name = lm.layout.mlp_out(layer)
        rows, columns = lm.weight(name).shape
        updates[f"{name}.weight"] = Factors(
            torch.randn(rows, rank, generator=draw) * scale, torch.randn(rank, columns, generator=draw)
        )
    norm = f"{lm.layout.final_norm}.weight"
    updates[norm] = torch.randn(lm.parameter(norm).shape, generator=draw) * scale
    return WeightDelta(updates, {"seed": seed})


@dataclass
class Scaled(ModulePatch):
    """Multiplies what leaves a module."""

    module: str
    by: float | Tensor

    def wrap(self, original: nn.Module) -> nn.Module:
        return ScaledModule(original, self.by)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"module": self.module, "by": self.by}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> Scaled:
        return cls(**rest)


class ScaledModule(Wrapper):
    def __init__(self, original: nn.Module, by: float | Tensor) -> None:
        super().__init__(original)
        self.by = by

    def forward(self, *args, **kwargs):
        return self.original(*args, **kwargs) * self.by


@dataclass
class Redirect(Route):
    """Puts another prompt in place of those that begin with `start`."""

    start: str
    instead: str
    asked: list[str] = field(default_factory=list)

    def destinations(self, below, prompts):
        self.asked += prompts
        return [Destination(below, self.instead) if prompt.startswith(self.start) else None for prompt in prompts]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"start": self.start, "instead": self.instead}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> Redirect:
        return cls(**rest)


def mlp(lm: LM, layer: int) -> str:
    return lm.layout.mlp_out(layer).rpartition(".")[0]


@families
@stored
def test_attach_adds_the_update_in_math_orientation(family, dtype):
    lm = language_model(family, dtype)
    edit = delta(lm, seed=1)
    name = lm.layout.mlp_out(2)
    before, update = lm.weight(name).clone(), edit.updates[f"{name}.weight"]
    lm.attach(edit)
    assert isinstance(update, Factors)
    assert torch.equal(lm.weight(name), (before.float() + update.left @ update.right).to(dtype))
    assert lm.attached == [edit]


@families
@stored
def test_a_stack_of_all_three_kinds_comes_off_bit_for_bit(family, dtype):
    lm = language_model(family, dtype)
    whole, out = bits(lm), logits(lm)
    edits: list[Edit] = [
        delta(lm, seed=1),
        Scaled(mlp(lm, 1), 1.5),
        Redirect("Ada", "The capital of Italy is"),
        delta(lm, seed=2, scale=1e-3),
        Scaled(mlp(lm, 1), 0.5),  # the same module again
        delta(lm, seed=3, scale=30.0),
    ]
    states = []
    for edit in edits:
        states.append((bits(lm), logits(lm), lm.loglikelihood(PAIRS)))
        lm.attach(edit)
    assert lm.attached == edits
    for edit, (state, scores, answers) in zip(reversed(edits), reversed(states), strict=True):
        assert lm.detach() is edit
        assert same(lm, state)
        assert torch.equal(logits(lm), scores)
        assert lm.loglikelihood(PAIRS) == answers
    assert same(lm, whole)
    assert torch.equal(logits(lm), out)
    assert lm.masters == {}
    assert lm.attached == []


@families
def test_each_attached_edit_changes_the_answers(family):
    lm = language_model(family)
    seen = [lm.loglikelihood(PAIRS)]
    for edit in (delta(lm, seed=1), Scaled(mlp(lm, 1), 1.5), Redirect("Ada", "The capital of Italy is")):
        lm.attach(edit)
        seen.append(lm.loglikelihood(PAIRS))
    assert all(abs(a[1].nll - b[1].nll) > 1e-2 for a, b in itertools.pairwise(seen))
    assert seen[3][0].nll == pytest.approx(seen[2][0].nll, abs=1e-5)  # the route claims the second prompt only


def test_detaching_is_exact_where_subtracting_is_not():
    lm = language_model("llama", torch.bfloat16)
    whole = bits(lm)
    edit = delta(lm, seed=1, scale=3.0)
    lm.attach(edit)
    for name in edit.updates:
        lm.parameter(name).data.sub_(edit.stored(lm, name).to(torch.bfloat16))
    assert not same(lm, whole)
    lm.detach()
    assert same(lm, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@families
def test_a_hundred_tiny_updates_add_up_in_16_bits(family, dtype):
    lm = language_model(family, dtype)
    whole = bits(lm)
    name = lm.layout.mlp_out(1)
    start = lm.weight(name).float()
    step = Factors(torch.full((start.shape[0], 1), 2.0**-8), torch.full((1, start.shape[1]), 2.0**-8))
    rounded = start.to(dtype) + step.dense().to(dtype)
    assert (rounded == start.to(dtype)).float().mean() > 0.7  # by itself, one is lost in most weights
    for _ in range(100):
        lm.attach(WeightDelta({f"{name}.weight": step}))
    total = 100 * 2.0**-16
    assert torch.equal(lm.weight(name), (start + total).to(dtype))
    assert (lm.weight(name).float() - start).mean() == pytest.approx(total, rel=0.15)
    assert lm.masters[f"{name}.weight"].dtype == torch.float32
    for _ in range(100):
        lm.detach()
    assert same(lm, whole)
    assert lm.masters == {}


def test_float32_weights_need_no_masters():
    lm = language_model("gpt2")
    lm.attach(delta(lm, seed=1))
    assert lm.masters == {}


@stored
def test_pristine_takes_everything_off_and_puts_it_back(dtype):
    lm = language_model("gpt2", dtype)
    whole, answers = bits(lm), lm.loglikelihood(PAIRS)
    edits = [delta(lm, seed=1), Scaled(mlp(lm, 1), 1.5), Redirect("Ada", "Rome is"), delta(lm, seed=2, scale=1e-3)]
    for edit in edits:
        lm.attach(edit)
    state, edited = bits(lm), lm.loglikelihood(PAIRS)
    with pytest.raises(KeyError), lm.pristine() as plain:
        assert plain is lm
        assert same(lm, whole)
        assert lm.loglikelihood(PAIRS) == answers
        with lm.pristine():
            assert same(lm, whole)
        raise KeyError
    assert lm.attached == edits
    assert same(lm, state)
    assert lm.loglikelihood(PAIRS) == edited


@families
@stored
def test_weights_inside_a_wrapped_module_keep_their_names_and_orientation(family, dtype):
    lm = language_model(family, dtype)
    for wrapped in (mlp(lm, 1), lm.layout.mlp_out(1)):
        whole, edit = bits(lm), delta(lm, seed=1, layers=(1,))
        name = lm.layout.mlp_out(1)
        with lm.edited(edit):
            alone = lm.weight(name).clone()
        with lm.edited(Scaled(wrapped, 2.0)):
            before, key_width = logits(lm), lm.key_width(1)
            lm.attach(edit)
            assert torch.equal(lm.weight(name), alone)
            assert lm.key_width(1) == key_width == alone.shape[1]
            assert not torch.equal(logits(lm), before)
            lm.detach()
            assert torch.equal(logits(lm), before)
            assert lm.fingerprint([f"{name}.weight"]) == language_model(family, dtype).fingerprint([f"{name}.weight"])
        assert same(lm, whole)


def test_edited_restores_after_an_exception_and_takes_off_what_was_added_inside():
    lm = language_model("llama")
    below = delta(lm, seed=1)
    lm.attach(below)
    state = bits(lm)
    with pytest.raises(ZeroDivisionError), lm.edited(delta(lm, seed=2)):
        lm.attach(Scaled(mlp(lm, 0), 2.0))
        lm.attach(delta(lm, seed=3))
        raise ZeroDivisionError
    assert lm.attached == [below]
    assert same(lm, state)


@families
def test_an_edit_that_fails_half_way_leaves_nothing(family):
    lm = language_model(family)
    whole = bits(lm)
    good = delta(lm, seed=1).updates
    names = [f"{lm.layout.mlp_out(layer)}.weight" for layer in (0, 2)]
    wrong = Factors(torch.ones(3, 1), torch.ones(1, 4))
    with pytest.raises(
        UsageError, match=rf"{names[1]} is \(\d+, \d+\), the parameter .* another model than tiny-{family}"
    ):
        lm.attach(WeightDelta({names[0]: good[names[0]], names[1]: wrong}))
    assert same(lm, whole)
    assert lm.attached == []
    with pytest.raises(AttributeError):
        lm.attach(WeightDelta({names[0]: good[names[0]], "no.such.weight": torch.ones(1)}))
    assert same(lm, whole)


def test_an_update_is_never_broadcast():
    lm = language_model("llama")
    name = f"{lm.layout.mlp_out(0)}.weight"
    columns = lm.parameter(name).shape[1]
    for update in (torch.ones(1), torch.ones(columns), Factors(torch.ones(1, 1), torch.ones(1, columns))):
        with pytest.raises(UsageError, match="made for another model"):
            lm.attach(WeightDelta({name: update}))


def test_detaching_nothing_is_a_mistake():
    with pytest.raises(UsageError, match="no edit is attached"):
        tiny_lm("gpt2").detach()


def test_attaching_keeps_parameters_frozen_and_in_place():
    lm = language_model("gpt2", torch.bfloat16)
    parameters = dict(lm.model.named_parameters())
    with lm.edited(delta(lm, seed=1)):
        assert all(lm.parameter(name) is parameter for name, parameter in parameters.items())
        assert not any(parameter.requires_grad for parameter in parameters.values())
        assert {parameter.dtype for parameter in parameters.values()} == {torch.bfloat16}


@families
def test_compact_keeps_factors_only_while_they_are_smaller(family):
    lm = language_model(family)
    small, large = delta(lm, seed=1, rank=2), delta(lm, seed=1, rank=40)
    names = [name for name in small.updates if name.endswith("weight") and "norm" not in name and "ln_f" not in name]
    assert all(isinstance(small.compact(lm).updates[name], Factors) for name in names)
    assert all(isinstance(large.compact(lm).updates[name], Tensor) for name in names)
    assert large.compact(lm).info == large.info
    lm.attach(large)
    expected = bits(lm)
    lm.detach()
    lm.attach(large.compact(lm))
    for name, tensor in lm.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5)


def test_norms_are_of_the_dense_update():
    lm = language_model("gpt2")
    edit = delta(lm, seed=1)
    norms = edit.norms()
    assert norms == {name: pytest.approx(float(edit.stored(lm, name).norm())) for name in edit.updates}


def test_touches_are_the_parameters_that_an_edit_was_made_for():
    lm = language_model("gpt2")
    edit = delta(lm, seed=1)
    assert edit.touches(lm) == sorted(edit.updates)
    assert set(Scaled(mlp(lm, 1), 2.0).touches(lm)) == {
        f"{mlp(lm, 1)}.{p}.{w}" for p in ("c_fc", "c_proj") for w in ("weight", "bias")
    }
    assert Redirect("a", "b").touches(lm) == []
    assert [type(e).kind for e in (edit, Scaled("x", 1.0), Redirect("a", "b"))] == ["weights", "module", "route"]


@families
def test_state_and_back_is_the_same_edit(family):
    lm = language_model(family)
    edit = delta(lm, seed=1)
    tensors, rest = edit.state()
    again = WeightDelta.from_state(tensors, rest)
    assert again.info == {"seed": 1}
    lm.attach(edit)
    expected = bits(lm)
    lm.detach()
    lm.attach(again)
    assert same(lm, expected)


# --- fingerprints
# ---------------------------------------------------------------------------------------------------------


@stored
def test_fingerprints_tell_every_bit_and_the_dtype(dtype):
    lm = language_model("gpt2", dtype)
    name = f"{lm.layout.mlp_out(1)}.weight"
    before = lm.fingerprint([name])
    assert lm.fingerprint([name]) == before
    assert language_model("gpt2", dtype).fingerprint([name]) == before
    weight = lm.parameter(name).data
    kept = weight[0, 0].clone()
    weight[0, 0] = (
        torch.nextafter(kept.float(), torch.tensor(9.0))
        if dtype == torch.float32
        else kept * (1 + torch.finfo(dtype).eps)
    )
    assert lm.fingerprint([name]) != before
    weight[0, 0] = kept
    assert lm.fingerprint([name]) == before
    assert language_model("gpt2", torch.float64).fingerprint([name]) != before


def test_fingerprints_tell_shapes_and_signs_of_zero_and_take_scalars():
    lm = tiny_lm("gpt2")
    lm.model.scalar = nn.Parameter(torch.tensor(0.0))
    lm.model.nothing = nn.Parameter(torch.zeros(0, 3))
    plain = lm.fingerprint(["scalar"])
    lm.model.scalar = nn.Parameter(torch.tensor([0.0]))
    assert lm.fingerprint(["scalar"]) != plain
    lm.model.scalar = nn.Parameter(torch.tensor(-0.0))
    assert lm.fingerprint(["scalar"]) != plain
    assert len(lm.fingerprint(["nothing"])) == 64


def test_the_models_own_fingerprint_is_that_of_the_unedited_model():
    lm, other = language_model("gpt2"), language_model("gpt2")
    with lm.edited(delta(lm, seed=1)):
        edited = lm.fingerprint()
        assert lm.attached
    assert edited == other.fingerprint() == lm.fingerprint()
    assert tiny_lm("gpt2", seed=1).fingerprint() != edited


# --- routes
# -----------------------------------------------------------------------------------------------------------------


def test_the_latest_route_is_asked_first_and_what_it_passes_on_reaches_the_next():
    lm = tiny_lm("gpt2")
    first, second = Redirect("Ada", "The capital of Italy is"), Redirect("Rome", "Ada Lund lives in")
    plain = dict(
        zip("ABC", lm.loglikelihood([("The capital of Italy is", "x"), ("Rome is", "x"), ("Zoë", "x")]), strict=True)
    )
    lm.attach(first)
    lm.attach(second)
    answers = lm.loglikelihood([("Rome is", "x"), ("Ada is", "x"), ("Zoë", "x")])
    for answer, key in zip(answers, "AAC", strict=True):
        assert (answer.nll, answer.predicted) == (pytest.approx(plain[key].nll, abs=1e-5), plain[key].predicted)
    assert second.asked == ["Rome is", "Ada is", "Zoë"]
    assert first.asked == ["Ada Lund lives in", "Ada is", "Zoë"]


def test_routes_apply_to_generation_and_sampling_with_each_rows_own_seed():
    lm = tiny_lm("gpt2")
    prompts, seeds = ["The capital", "Ada is", "C"], [4, 5, 6]
    expected = lm.sample(["The capital", "Rome", "C"], seeds, 20, 5)
    continued = lm.generate(["The capital", "Rome", "C"], 5)
    with lm.edited(Redirect("Ada", "Rome")):
        assert lm.sample(prompts, seeds, 20, 5) == expected
        assert lm.generate(prompts, 5) == continued
        assert lm.token_nlls(prompts, 16) == lm.head.token_nlls(prompts, 16)
    assert lm.sample(prompts, seeds, 20, 5) != expected


def test_another_answerer_answers_only_what_is_sent_to_it():
    lm = tiny_lm("gpt2")

    class Stored:
        def loglikelihood(self, pairs):
            assert [prompt for prompt, _ in pairs] == ["Ada is"]
            return [Likelihood(0.0, (True,), (1,))]

    class ToStored(Redirect):
        def destinations(self, below, prompts):
            return [Destination(elsewhere, p) if p.startswith("Ada") else None for p in prompts]

    elsewhere: Any = Stored()  # is asked nothing else
    plain = lm.loglikelihood([("Rome is", "x")])
    with lm.edited(ToStored("", "")):
        assert lm.loglikelihood([("Ada is", "x"), ("Rome is", "x")]) == [Likelihood(0.0, (True,), (1,)), *plain]


@stored
def test_settled_edits_come_off_together_and_go_on_again(dtype):
    """A long sequence keeps one original of each weight, and the unedited model can still be asked in between."""
    lm = language_model("gpt2", dtype)
    before = bits(lm)
    for seed in range(4):
        lm.attach(delta(lm, seed, layers=(seed % 3,)))
        lm.merge_top_edits()
    assert len(lm.attached) == 1
    edited, masters = bits(lm), {name: master.clone() for name, master in lm.masters.items()}
    assert bool(masters) == (dtype != torch.float32)
    with lm.pristine():
        assert same(lm, before)
        assert not lm.masters
    assert same(lm, edited)
    assert all(torch.equal(lm.masters[name], master) for name, master in masters.items())
    lm.detach()
    assert same(lm, before)
    assert not lm.masters


@stored
def test_settled_edits_add_up_to_the_same_bits(dtype):
    alone, settled = language_model("gpt2", dtype), language_model("gpt2", dtype)
    for seed in range(3):
        alone.attach(delta(alone, seed))
        settled.attach(delta(settled, seed))
        settled.merge_top_edits()
    assert same(settled, bits(alone))


def test_only_weight_edits_that_follow_each_other_are_settled():
    lm = language_model("gpt2")
    change, patch = delta(lm, 0), Scaled(lm.layout.mlp_out(1), torch.ones(lm.layout.width))
    lm.merge_top_edits()  # nothing to join
    for edit in (change, patch, delta(lm, 1)):
        lm.attach(edit)
        lm.merge_top_edits()
    assert lm.attached[:2] == [change, patch]
    assert len(lm.attached) == 3
