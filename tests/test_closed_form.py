"""The dual closed form against the dense formula and against the objective it minimises."""

from __future__ import annotations

import pytest
import torch

from blue_callbacks import KeyMemory, SingularCovarianceError, least_squares

D_IN, D_OUT, WEIGHT = 40, 12, 7.0


def covariance(generator: torch.Generator) -> torch.Tensor:
    keys = torch.randn(D_IN, 500, generator=generator, dtype=torch.float64)
    return keys @ keys.T / 500


def dense(c0, past, keys, residual):
    """Eq. 8 as it is printed."""
    return residual @ keys.T @ torch.linalg.inv(c0 + past @ past.T + keys @ keys.T)


@pytest.mark.parametrize("sizes", [(5,), (5, 3, 7), (1, 1), (30, 30)])
def test_dual_form_equals_dense_form_over_sequential_batches(sizes):
    generator = torch.Generator().manual_seed(0)
    c = covariance(generator)
    memory = KeyMemory(least_squares(c, WEIGHT))
    past = torch.empty(D_IN, 0, dtype=torch.float64)
    for n in sizes:
        keys = torch.randn(D_IN, n, generator=generator, dtype=torch.float64)
        residual = torch.randn(D_OUT, n, generator=generator, dtype=torch.float64)
        reference = dense(WEIGHT * c, past, keys, residual)
        torch.testing.assert_close(memory.update(residual, keys), reference, rtol=0, atol=1e-12)
        remembered = keys + 0.1 * torch.randn(D_IN, n, generator=generator, dtype=torch.float64)
        memory.remember(remembered)
        past = torch.cat((past, remembered), dim=1)


def test_update_is_stationary_for_the_least_squares_objective():
    """Autograd of |Delta K1 - R|^2 + |Delta Kp|^2 + tr(Delta C0 Delta^T) vanishes there."""
    generator = torch.Generator().manual_seed(1)
    c = covariance(generator)
    past, keys = torch.randn(2, D_IN, 6, generator=generator, dtype=torch.float64)
    residual = torch.randn(D_OUT, 6, generator=generator, dtype=torch.float64)
    memory = KeyMemory(least_squares(c, WEIGHT))
    memory.remember(past)
    delta = memory.update(residual, keys).requires_grad_()
    loss = (delta @ keys - residual).square().sum() + (delta @ past).square().sum()
    loss = loss + WEIGHT * torch.einsum("oi,ij,oj->", delta, c, delta)
    (gradient,) = torch.autograd.grad(loss, delta)
    assert gradient.abs().max() < 1e-10
    assert delta.detach().abs().max() > 0.01


def test_past_keys_are_disturbed_less_when_they_are_remembered():
    generator = torch.Generator().manual_seed(2)
    c = covariance(generator) * 1e-3
    past, keys = torch.randn(2, D_IN, 6, generator=generator, dtype=torch.float64)
    residual = torch.randn(D_OUT, 6, generator=generator, dtype=torch.float64)
    without = KeyMemory(least_squares(c, WEIGHT)).update(residual, keys) @ past
    memory = KeyMemory(least_squares(c, WEIGHT))
    memory.remember(past)
    assert (memory.update(residual, keys) @ past).norm() < 0.2 * without.norm()


def test_singular_covariance_is_refused_with_the_remedy():
    keys = torch.randn(D_IN, 3)
    with pytest.raises(SingularCovarianceError, match="more tokens"):
        least_squares(keys @ keys.T, 1.0)
