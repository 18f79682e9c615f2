"""The family's closed forms in float64, against direct formulas (locate-then-edit, sections 9 to 16)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from embedded import embedded_lm, linear_twin, prepared, requests
from torch import Tensor

from edit_cli.editors.locate import memit, rome
from edit_cli.editors.locate.alphaedit import AlphaEdit, AlphaEditConfig
from edit_cli.editors.locate.base import Subjects
from edit_cli.editors.locate.blue import BLUE
from edit_cli.editors.locate.context_prefixes import BARE, ContextConfig
from edit_cli.editors.locate.emmet import EMMET
from edit_cli.editors.locate.memit import MEMIT, MEMITConfig
from edit_cli.editors.locate.memit_merge import MEMITMerge
from edit_cli.editors.locate.pmet import PMET
from edit_cli.editors.locate.regularizers import damped_factors, largest_relative, prune, rect, spectral_norm
from edit_cli.editors.locate.rome import ROME
from edit_cli.editors.locate.solver import AUTO_SHARE, Covariance, Relative, solve
from edit_cli.editors.locate.ultraedit import RunningMoments
from edit_cli.editors.locate.value_optimization import Values
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.errors import UsageError
from edit_cli.statistics.moments import MomentStore

D, M = 12, 40


class Given(MomentStore):
    """Second moments that are simply there."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def collect(self, lm, layers):
        pass

    def second_moment(self, lm, layer):
        return self


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def lm():
    return embedded_lm()


@pytest.fixture
def moment() -> Tensor:
    basis, _ = torch.linalg.qr(randn(M, M))
    return basis @ torch.diag(torch.logspace(-4, 1, M, dtype=torch.float64)) @ basis.T


RESIDUAL, KEYS, PAST = randn(D, 7, seed=1), randn(M, 7, seed=2), randn(M, 9, seed=3)
EYE = torch.eye(M, dtype=torch.float64)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", ["dual", "primal"])
@pytest.mark.parametrize("weight", [3.0, 1e-3])
def test_past_keys_join_the_system(form, weight, moment):
    direct = RESIDUAL @ KEYS.T @ torch.linalg.inv(weight * moment + PAST @ PAST.T + KEYS @ KEYS.T)
    assert relative(solve(RESIDUAL, KEYS, Covariance(moment), weight, form, PAST).dense(), direct) < 1e-8


def test_exact_solution_with_past_keys_leaves_their_values_alone(moment):
    delta = solve(RESIDUAL, KEYS, Covariance(moment), 0.0, past=PAST).dense()
    assert relative(delta @ KEYS, RESIDUAL) < 1e-8
    assert float((delta @ PAST).norm() / delta.norm()) < 1e-8


def test_encore_adds_norm_and_past_keys_to_memit(lm, moment):
    editor = prepared(
        MEMIT, layers=[0], covariance_weight=5.0, norm_weight=2.0, past_keys="write", moments=Given(moment)
    )
    direct = RESIDUAL @ KEYS.T @ torch.linalg.inv(5.0 * moment + 2.0 * EYE + PAST @ PAST.T + KEYS @ KEYS.T)
    assert relative(editor.on(lm).solve(0, RESIDUAL, KEYS, PAST).dense(), direct) < 1e-10


def test_emmet_under_the_norm_constraint(lm, moment):
    soft = prepared(EMMET, layers=[0], covariance_weight=50.0, epsilon=0.1, norm_weight=2.0, moments=Given(moment))
    direct = RESIDUAL @ KEYS.T @ torch.linalg.inv(5.0 * moment + 2.0 * EYE + KEYS @ KEYS.T)
    assert relative(soft.on(lm).solve(0, RESIDUAL, KEYS, None).dense(), direct) < 1e-10
    exact = prepared(EMMET, layers=[0], epsilon=0.0, norm_weight=2.0, moments=Given(moment))
    inverse = torch.linalg.inv(moment + 2.0 * EYE)
    direct = RESIDUAL @ torch.linalg.inv(KEYS.T @ inverse @ KEYS) @ KEYS.T @ inverse
    assert relative(exact.on(lm).solve(0, RESIDUAL, KEYS, None).dense(), direct) < 1e-8


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_relative_weight_writes_the_same_share_whatever_the_scale_of_activations(scale, lm, moment):
    """A single fact to 1 / (1 + share), be keys large or small; several as under the number that it comes to."""
    half = prepared(MEMIT, layers=[0], covariance_weight="relative:1.0", moments=Given(scale**2 * moment)).on(lm)
    keys, one = scale * KEYS, scale * KEYS[:, :1]
    assert relative(half.solve(0, RESIDUAL[:, :1], one, None).dense() @ one, RESIDUAL[:, :1] / 2) < 1e-9
    weight = float((KEYS * torch.linalg.solve(moment, KEYS)).sum(dim=0).mean())
    number = prepared(MEMIT, layers=[0], covariance_weight=weight, moments=Given(moment)).on(lm)
    expected = number.solve(0, RESIDUAL, KEYS, None).dense() @ KEYS
    assert relative(half.solve(0, RESIDUAL, keys, None).dense() @ keys, expected) < 1e-9


def test_alphaedits_weight_may_be_relative_in_its_null_space(lm, moment):
    editor = prepared(AlphaEdit, layers=[0], l2="relative:0.25", threshold=1.0, moments=Given(moment)).on(lm)
    one, free = KEYS[:, :1], editor.nullspace(0)
    written = editor.solve(0, RESIDUAL[:, :1], one, None).dense() @ one
    assert 0 < free.shape[1] < M and relative(written, 0.8 * RESIDUAL[:, :1]) < 1e-9


def test_without_tuned_settings_weights_are_relative(lm):
    assert prepared(MEMIT, layers=[0]).on(lm).weight(3) == Relative(AUTO_SHARE)
    assert prepared(AlphaEdit, layers=[0]).on(lm).weight(3) == Relative(AUTO_SHARE)
    assert AlphaEditConfig(layers=[0]).relative


@pytest.mark.parametrize("setting", ["relative:0", "relative:-1", "relative:", "relative:inf", "0.5x", "much"])
@pytest.mark.parametrize(("config", "name"), [(MEMITConfig, "covariance_weight"), (AlphaEditConfig, "l2")])
def test_a_weight_that_is_none_is_refused_by_name(config, name, setting):
    with pytest.raises(UsageError, match=rf"method\.{name}={setting}: give a number from 0 up, auto, or relative:X"):
        config(layers=[0], **{name: setting})


def test_a_norms_weight_counts_beside_a_number_only():
    with pytest.raises(UsageError, match=r"method\.norm_weight=2 .* method\.covariance_weight is auto: give both"):
        MEMITConfig(layers=[0], norm_weight=2.0)


def test_emmet_solves_a_single_fact_exactly_and_several_softly(lm):
    editor = prepared(EMMET, layers=[0], covariance_weight=4.0, epsilon=0.5)
    assert (editor.on(lm).weight(1), editor.on(lm).weight(2)) == (0.0, 2.0)


@pytest.mark.parametrize("past", [None, PAST])
def test_alphaedit_equals_the_released_form(past, lm, moment):
    """[P (K Kᵀ + M) + L2 I]⁻¹ P K Rᵀ, which is not symmetric and m × m."""
    editor = prepared(AlphaEdit, layers=[0], l2=10.0, threshold=0.02, relative=False, moments=Given(moment))
    values, vectors = torch.linalg.eigh(moment)
    projector = vectors[:, values < 0.02] @ vectors[:, values < 0.02].T
    memory = torch.zeros_like(moment) if past is None else past @ past.T
    released = torch.linalg.solve(projector @ (KEYS @ KEYS.T + memory) + 10.0 * EYE, projector @ KEYS @ RESIDUAL.T).T
    reduced = None if past is None else editor.on(lm).coordinates(0, past)
    found = editor.on(lm).solve(0, RESIDUAL, KEYS, reduced).dense()
    assert relative(found, released) < 1e-11
    assert float((found @ vectors[:, values >= 0.02]).norm() / found.norm()) < 1e-12  # old keys keep their values


def test_alphaedit_threshold_may_be_relative_and_says_how_much_is_free(lm, moment):
    for scale in (1.0, 10.0):
        free = (
            prepared(AlphaEdit, layers=[0], threshold=0.1, relative=True, moments=Given(scale * moment))
            .on(lm)
            .nullspace(0)
        )
        assert free.shape == (M, int((torch.linalg.eigvalsh(moment) < 0.1 * moment.diagonal().mean()).sum()))
    absolute = prepared(AlphaEdit, layers=[0], threshold=0.02, relative=False, moments=Given(moment))
    assert absolute.on(lm).prepare([0], 1) == {
        "nullspace": {"0": [int((torch.linalg.eigvalsh(moment) < 0.02).sum()), M]}
    }


@pytest.mark.parametrize(("threshold", "message"), [(1e-9, "no direction is free"), (1e9, "every direction is free")])
def test_alphaedit_refuses_a_threshold_that_frees_nothing_or_all(threshold, message, lm, moment):
    editor = prepared(AlphaEdit, layers=[0], threshold=threshold, relative=False, moments=Given(moment))
    with pytest.raises(UsageError, match=f"method.threshold.*{message}.*method.relative=true"):
        editor.on(lm).prepare([0], 1)


def test_alphaedit_wants_statistics_and_a_positive_ridge(lm, moment):
    with pytest.raises(UsageError, match="method.use_covariance=false"):
        prepared(AlphaEdit, layers=[0], use_covariance=False, moments=Given(moment)).on(lm).prepare([0], 1)
    with pytest.raises(UsageError, match="method.l2=0"):
        prepared(AlphaEdit, layers=[0], l2=0.0, moments=Given(moment)).on(lm).prepare([0], 1)


def members() -> dict[str, Any]:
    """The family without statistics of text, on two layers; half of AlphaEdit's directions are free."""
    plain: dict[str, Any] = {"layers": [1, 2], "context": ContextConfig(prefixes=["The city"])}
    soft = plain | {"use_covariance": False, "covariance_weight": 1e-3}
    half: Any = Given(torch.linspace(0, 1, 512, dtype=torch.float64).diag())
    return {
        "memit": prepared(MEMIT, **soft),
        "memit-merge": prepared(MEMITMerge, **soft),
        "emmet": prepared(EMMET, **soft, epsilon=0.0),
        "pmet": prepared(PMET, **soft),
        "blue": prepared(BLUE, **soft),
        "alphaedit": prepared(AlphaEdit, **plain, l2=1e-3, threshold=0.5, relative=False, moments=half),
        "rome": prepared(ROME, layers=[2], context=plain["context"], use_covariance=False),
    }


@pytest.mark.parametrize("name", members())
def test_what_is_written_carries_states_to_their_targets(name, lm, monkeypatch):
    """Targets that are simply there, a random step away from the states: they are met, not mirrored."""
    editor, wanted = members()[name], requests(1 if name == "rome" else 3)
    site: Any = "mlp_out" if name == "rome" else editor.method.editor.site
    aimed: list[tuple[Tensor, Tensor]] = []

    def states() -> Tensor:
        return Subjects(lm, wanted, BARE).states(2, 2, site).double()

    def optimize(model, facts, layer, site, options, contexts, groups=None):
        present = Subjects(model, facts, BARE).states(layer, layer, site).double()
        step = randn(*present.shape, seed=layer) * present.std()
        aimed.append((present + step, step))
        return Values(present + step, present, [0.0] * len(facts), [1] * len(facts), [True] * len(facts))

    monkeypatch.setattr(memit, "optimize_values", optimize)
    monkeypatch.setattr(rome, "optimize_values", optimize)
    edit = editor.edit(lm, wanted)
    target, step = aimed[-1]
    with lm.edited(edit):
        assert float((states() - target).norm()) < 0.2 * float(step.norm())


def test_pmet_shares_by_the_square_root(lm):
    editor = prepared(PMET, layers=[0, 1, 2], covariance_weight=1.0)
    torch.testing.assert_close(editor.on(lm).share(RESIDUAL, 3), RESIDUAL / 3**0.5)
    torch.testing.assert_close(
        prepared(MEMIT, layers=[0], covariance_weight=1.0).on(lm).share(RESIDUAL, 3), RESIDUAL / 3
    )


def test_thousands_of_facts_on_a_narrow_projection():
    """More facts than dimensions: the soft constraint stays well-posed, the exact one is refused by name."""
    keys, residual = randn(512, 2000, seed=4), randn(D, 2000, seed=5)
    moment = randn(512, 4000, seed=6)
    covariance = Covariance(moment @ moment.T / 4000)
    for weight in (0.1, 200.0):
        delta = solve(residual, keys, covariance, weight).dense()
        assert relative(delta @ (weight * covariance.matrix + keys @ keys.T), residual @ keys.T) < 1e-10
    with pytest.raises(
        UsageError, match=r"2,000 facts cannot all be met exactly where keys have 512 dimensions.*protocol.batch_size"
    ):
        solve(residual, keys, covariance, 0.0)


# --- what is done to finished updates
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.4, 0.2, 1.0])
def test_rect_keeps_the_largest_relative_changes(keep):
    update, weight = randn(30, 50, seed=7), randn(30, 50, seed=8)
    weight[0, 0] = 0.0
    found = largest_relative(update, weight, keep)
    ratio = (update / (weight.abs() + 1e-8)).abs().numpy()
    expected = np.where(ratio >= np.percentile(ratio, 100 * (1 - keep)), update.numpy(), 0.0)
    np.testing.assert_array_equal(found.numpy(), expected)
    assert int((found != 0).sum()) == math.ceil(keep * update.numel())


def direct_prune(update: Tensor, weight: Tensor, base: float) -> Tensor:
    u, sigma, v = torch.linalg.svd(update, full_matrices=False)
    largest = torch.linalg.svdvals(weight)[0]
    over = torch.log(sigma) / math.log(base) - torch.log(largest) / math.log(base) + largest
    return u @ torch.diag(torch.where(sigma > largest, over, sigma)) @ v


@pytest.mark.parametrize("rank", [3, 12, 60])
@pytest.mark.parametrize("base", [1.2, 2.0, math.e])
def test_prune_damps_singular_values_above_the_weights_own(rank, base):
    weight, factors = randn(D, M, seed=9), Factors(randn(D, rank, seed=10), randn(rank, M, seed=11))
    largest = spectral_norm(weight)
    assert largest == pytest.approx(float(torch.linalg.svdvals(weight)[0]), rel=1e-6)
    assert float(torch.linalg.svdvals(factors.dense())[0]) > largest
    assert relative(damped_factors(factors, largest, base).dense(), direct_prune(factors.dense(), weight, base)) < 1e-6
    small = Factors(1e-3 * factors.left, factors.right)
    assert relative(damped_factors(small, largest, base).dense(), small.dense()) < 1e-12


@pytest.mark.parametrize("make", [embedded_lm, linear_twin])
@pytest.mark.parametrize("dense", [False, True])
def test_both_find_the_weight_in_its_orientation(make, dense):
    lm = make()
    module = lm.layout.mlp_out(1)
    name = f"{module}.weight"
    factors = Factors(randn(128, 5, seed=12).float(), randn(5, 512, seed=13).float())
    delta = WeightDelta({name: factors}, {"kept": True})
    if dense:
        delta = WeightDelta({name: delta.stored(lm, name).contiguous()}, {"kept": True})
    weight = lm.weight(module).double()
    damped = prune(lm, delta, 1.5)
    expected = direct_prune(factors.dense().double(), weight, 1.5)
    stored = damped.stored(lm, name).double()
    assert relative(stored if stored.shape == expected.shape else stored.T, expected) < 1e-5
    sparse = rect(lm, delta, 0.3).stored(lm, name)
    ratio = factors.dense().abs() / (weight.float().abs() + 1e-8)
    kept = ratio >= ratio.flatten().sort().values[-math.ceil(0.3 * ratio.numel())]
    found = (sparse if sparse.shape == kept.shape else sparse.T) != 0
    assert float((found == kept).float().mean()) > 0.9999
    assert damped.info == delta.info


@pytest.mark.parametrize(
    ("field", "value"), [("norm_weight", -1.0), ("rect", 0.0), ("rect", 40.0), ("prune", 1.0), ("past_keys", "all")]
)
def test_options_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(UsageError, match=f"method.{field}={value}"):
        prepared(MEMIT, layers=[0], covariance_weight=1.0, **{field: value})


# --- UltraEdit
# -----------------------------------------------------------------------------------------------------------


def test_running_moments_merge_chunk_by_chunk():
    chunks = [randn(c, 6, seed=20 + c) + c for c in (4, 1, 9)]
    moments = RunningMoments.nothing(6, torch.device("cpu"))
    count, mean, squares = 0, torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for chunk in chunks:
        moments.update(chunk)
        c, gap = len(chunk), chunk.mean(0) - mean
        sample = chunk.var(0) if c > 1 else 0.0
        mean = mean + c * gap / (count + c)
        squares = squares + c * sample + count * c * gap**2 / (count + c)
        count += c
    torch.testing.assert_close(moments.mean, torch.cat(chunks).mean(0))
    torch.testing.assert_close(moments.squares, squares)
    rows = randn(3, 6, seed=30)
    torch.testing.assert_close(
        moments.normalized(rows), (rows - mean) / (squares / (count - 1)).sqrt(), rtol=1e-6, atol=1e-6
    )
