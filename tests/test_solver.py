"""Closed forms in float64 (locate-then-edit, section 5)."""

from __future__ import annotations

import pytest
import torch

from edit_cli.editors.locate.solver import Covariance, safe_cholesky, similar_keys, solve
from edit_cli.errors import UsageError

WIDTH, OUT = 40, 12


def problem(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(R, K, C): residuals (d, n), keys (m, n) and a second moment with a condition number of about 1e4."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
    spectrum = torch.logspace(-2, 2, WIDTH, dtype=torch.float64)
    return (
        torch.randn(OUT, count, generator=generator, dtype=torch.float64),
        torch.randn(WIDTH, count, generator=generator, dtype=torch.float64),
        basis @ torch.diag(spectrum) @ basis.T,
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("count", [1, 5, 39, 60])
def test_primal_dual_and_direct_form_agree(count):
    residual, keys, moment = problem(count)
    direct = residual @ keys.T @ torch.linalg.inv(3.0 * moment + keys @ keys.T)
    for form in ("primal", "dual", "auto"):
        assert relative(solve(residual, keys, Covariance(moment), 3.0, form).dense(), direct) < 1e-10


@pytest.mark.parametrize("form", ["primal", "dual", "auto"])
@pytest.mark.parametrize(("count", "earlier"), [(5, 3), (5, 60), (60, 5)])
def test_past_keys_keep_their_values_in_either_form(form, count, earlier):
    """Δ = R Kᵀ (λC + K_p K_pᵀ + K Kᵀ)⁻¹: as if they were written again with a residual of zero."""
    residual, keys, moment = problem(count)
    past = problem(earlier, seed=1)[1]
    direct = residual @ keys.T @ torch.linalg.inv(3.0 * moment + past @ past.T + keys @ keys.T)
    found = solve(residual, keys, Covariance(moment), 3.0, form, past).dense()
    assert relative(found, direct) < 1e-9
    nothing = torch.cat([residual, residual.new_zeros(OUT, earlier)], dim=1)
    again = solve(nothing, torch.cat([keys, past], dim=1), Covariance(moment), 3.0, form).dense()
    assert relative(found, again) < 1e-9
    alone = solve(residual, keys, Covariance(moment), 3.0, form).dense()
    assert float((found @ past).norm()) < 0.9 * float((alone @ past).norm())


def test_soft_update_satisfies_its_normal_equations():
    residual, keys, moment = problem(7)
    delta = solve(residual, keys, Covariance(moment), 3.0).dense()
    assert relative(delta @ (3.0 * moment + keys @ keys.T), residual @ keys.T) < 1e-10


def test_zero_weight_meets_every_fact_exactly():
    residual, keys, moment = problem(9)
    assert relative(solve(residual, keys, Covariance(moment), 0.0).dense() @ keys, residual) < 1e-9


def test_soft_constraint_tends_to_the_exact_one():
    residual, keys, moment = problem(9)
    exact = solve(residual, keys, Covariance(moment), 0.0).dense()
    gaps = [
        relative(solve(residual, keys, Covariance(moment), weight).dense(), exact) for weight in (1.0, 1e-3, 1e-6, 1e-9)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-8


def test_one_exact_fact_is_rome():
    residual, keys, moment = problem(1)
    direction = torch.linalg.solve(moment, keys)
    rome = residual @ direction.T / (keys.T @ direction)
    assert relative(solve(residual, keys, Covariance(moment), 0.0).dense(), rome) < 1e-12


def test_released_emmet_parameters_are_memit_with_their_product():
    residual, keys, moment = problem(6)
    scaled = torch.linalg.inv(1000.0 * moment)
    released = (
        residual @ torch.linalg.inv(keys.T @ scaled @ keys + 0.1 * torch.eye(6, dtype=torch.float64)) @ keys.T @ scaled
    )
    assert relative(solve(residual, keys, Covariance(moment), 1000.0 * 0.1).dense(), released) < 1e-9


def test_same_key_twice_cannot_be_met_exactly_and_is_reported():
    residual, keys, moment = problem(4)
    keys[:, 3] = keys[:, 1] * 2
    assert similar_keys(keys) == [(1, 3)]
    with pytest.raises(UsageError, match="dependent keys.*epsilon"):
        solve(residual, keys, Covariance(moment), 0.0)


def test_singular_statistics_get_a_ridge_and_indefinite_ones_are_refused():
    _, keys, _ = problem(5)
    factor = safe_cholesky(keys @ keys.T)  # rank 5 of 40
    assert relative(factor @ factor.T, keys @ keys.T) < 1e-3
    with pytest.raises(UsageError, match="stats.tokens"):
        safe_cholesky(-torch.eye(3, dtype=torch.float64))


def test_float32_statistics_are_the_limit_of_agreement():
    """Rounding C costs about 1e-9 of its condition number: comparisons with float32 files cannot be tighter."""
    residual, keys, moment = problem(5)
    exact = solve(residual, keys, Covariance(moment), 3.0).dense()
    rounded = solve(residual, keys, Covariance(moment.float().double()), 3.0).dense()
    assert 0 < relative(rounded, exact) < 1e-4
