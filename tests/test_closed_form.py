"""The dual closed form against the dense formula and against the objective it minimises."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

from blue_callbacks import KeyMemory, SingularCovarianceError, least_squares, null_space
from blue_callbacks.closed_form import price_undetermined
from blue_callbacks.solvers import unused_note

D_IN, D_OUT, WEIGHT = 40, 12, 7.0


def covariance(generator: torch.Generator) -> torch.Tensor:
    keys = torch.randn(D_IN, 500, generator=generator, dtype=torch.float64)
    return keys @ keys.T / 500


def delta_of(memory: KeyMemory, residual: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    left, right = memory.update(residual, keys)
    return left @ right


def dense(c0, past, keys, residual):
    """Eq. 8 as it is printed."""
    return residual @ keys.T @ torch.linalg.inv(c0 + past @ past.T + keys @ keys.T)


@pytest.mark.parametrize(
    "moves", [(0.1,), (0.0,), (0.0, 0.1)]
)  # of keys by their own edit, in turn
@pytest.mark.parametrize("sizes", [(5,), (5, 3, 7), (1, 1), (30, 30), (3,) * 14])
def test_dual_form_equals_dense_form_over_sequential_batches(sizes, moves):
    generator = torch.Generator().manual_seed(0)
    c = covariance(generator)
    memory = KeyMemory(least_squares(c, WEIGHT))
    past = torch.empty(D_IN, 0, dtype=torch.float64)
    for n, move in zip(sizes, cycle(moves), strict=False):
        keys = torch.randn(D_IN, n, generator=generator, dtype=torch.float64)
        residual = torch.randn(D_OUT, n, generator=generator, dtype=torch.float64)
        reference = dense(WEIGHT * c, past, keys, residual)
        torch.testing.assert_close(delta_of(memory, residual, keys), reference, rtol=0, atol=1e-12)
        remembered = keys + move * torch.randn(D_IN, n, generator=generator, dtype=torch.float64)
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
    delta = delta_of(memory, residual, keys).requires_grad_()
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
    without = delta_of(KeyMemory(least_squares(c, WEIGHT)), residual, keys) @ past
    memory = KeyMemory(least_squares(c, WEIGHT))
    memory.remember(past)
    assert (delta_of(memory, residual, keys) @ past).norm() < 0.2 * without.norm()


def test_singular_covariance_is_refused_with_the_remedy():
    keys = torch.randn(D_IN, 3)
    with pytest.raises(SingularCovarianceError, match="more tokens"):
        least_squares(keys @ keys.T, 1.0)


DEAD = [3, 17, 18]


def dead_covariance(generator: torch.Generator) -> torch.Tensor:
    """Of keys that never have a component in three dimensions, as units that never fire."""
    keys = torch.randn(D_IN, 500, generator=generator, dtype=torch.float64)
    keys[DEAD] = 0
    return keys @ keys.T / 500


def test_dead_dimensions_are_as_if_they_were_not_there():
    generator = torch.Generator().manual_seed(4)
    c = dead_covariance(generator)
    alive = [i for i in range(D_IN) if i not in DEAD]
    memory = KeyMemory(least_squares(c, WEIGHT))
    past = torch.zeros(D_IN, 0, dtype=torch.float64)
    for n in (5, 3, 20):
        keys = torch.randn(D_IN, n, generator=generator, dtype=torch.float64)
        keys[DEAD] = 0
        residual = torch.randn(D_OUT, n, generator=generator, dtype=torch.float64)
        delta = delta_of(memory, residual, keys)
        reference = dense(WEIGHT * c[alive][:, alive], past[alive], keys[alive], residual)
        torch.testing.assert_close(delta[:, alive], reference, rtol=0, atol=1e-12)
        assert not delta[:, DEAD].any()
        memory.remember(keys)
        past = torch.cat((past, keys), dim=1)


def test_an_edit_that_needs_a_dead_dimension_pays_the_average_price():
    generator = torch.Generator().manual_seed(5)
    c = dead_covariance(generator)
    whitening = least_squares(c, WEIGHT)
    assert whitening.unused == DEAD
    said = unused_note(whitening)
    assert said is not None
    assert said.startswith("ordinary text never used 3 key dimensions (3, 17, 18); in the update")
    keys = torch.randn(D_IN, 4, generator=generator, dtype=torch.float64)
    residual = torch.randn(D_OUT, 4, generator=generator, dtype=torch.float64)
    c[DEAD, DEAD] = c.diagonal().sum() / (D_IN - len(DEAD))
    reference = dense(WEIGHT * c, torch.zeros(D_IN, 0).double(), keys, residual)
    delta = delta_of(KeyMemory(whitening), residual, keys)
    torch.testing.assert_close(delta, reference, rtol=0, atol=1e-12)


def rare_covariance(generator: torch.Generator) -> torch.Tensor:
    """Of keys where units 3, 17 and 18 fire at one and the same token, and 5 is a copy of 4."""
    keys = torch.randn(D_IN, 500, generator=generator, dtype=torch.float64)
    keys[DEAD, 1:] = 0
    keys[5] = keys[4]
    return keys @ keys.T / 500


def test_directions_that_no_token_takes_are_priced_and_named():
    """Units that fire at the same few tokens leave the covariance singular, from any text."""
    generator = torch.Generator().manual_seed(6)
    c = rare_covariance(generator)
    values, vectors = torch.linalg.eigh(c)
    assert int((values < 1e-12).sum()) == 3  # two of the three units' plane, and 4 against 5
    whitening = least_squares(c, WEIGHT)
    assert whitening.unused == []
    assert whitening.undetermined == (3, sorted([*DEAD, 4, 5]))
    said = unused_note(whitening)
    assert said is not None
    assert "leaves 3 directions of the key space open" in said
    assert "dimensions 3, 4, 5, 17, 18; in the update each counts as an average one" in said
    keys = torch.randn(D_IN, 4, generator=generator, dtype=torch.float64)
    residual = torch.randn(D_OUT, 4, generator=generator, dtype=torch.float64)
    null = vectors[:, :3]
    priced = WEIGHT * (c + c.diagonal().mean() * null @ null.T)
    reference = dense(priced, torch.zeros(D_IN, 0).double(), keys, residual)
    delta = delta_of(KeyMemory(whitening), residual, keys)
    torch.testing.assert_close(delta, reference, rtol=0, atol=1e-9)


def test_an_eigenvalue_below_zero_shows_how_far_rounding_goes():
    """As in a covariance that was kept in float32: by far more than float64 rounds."""
    generator = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=generator).double()).Q
    values = torch.linspace(0.5, 1, D_IN, dtype=torch.float64)
    values[:4] = torch.tensor([-1e-9, 0.5e-9, 1.5e-9, 1e-6])
    whitening = least_squares((basis * values) @ basis.T, WEIGHT)
    assert whitening.undetermined is not None
    assert whitening.undetermined.directions == 3


def test_what_float64_cannot_tell_from_zero_is_told_by_the_largest_eigenvalue():
    values = torch.tensor([1e12, 1.0, 1e-5], dtype=torch.float64)  # 3 eps 1e12 are 7e-4
    assert price_undetermined(torch.diag(values)) == (1, [2])


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_a_covariance_of_nothing_or_of_no_numbers_is_refused(value):
    with pytest.raises(SingularCovarianceError, match="not positive definite"):
        least_squares(torch.full((D_IN, D_IN), value), 1.0)


def low_rank_covariance(generator: torch.Generator) -> torch.Tensor:
    """Ordinary keys that hardly use 15 of the 40 dimensions."""
    mixing = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=generator, dtype=torch.float64)).Q
    spread = torch.cat((torch.ones(25), torch.full((15,), 1e-3))).double()
    keys = mixing @ (spread[:, None] * torch.randn(D_IN, 900, generator=generator).double())
    return keys @ keys.T / 900


@pytest.mark.parametrize("sizes", [(4, 3, 2), (9, 9)])
def test_null_space_equals_alphaedit_as_it_is_printed(sizes):
    """(P (K K^T + Kp Kp^T) + a I)^-1 P K R^T, and ordinary keys keep their values."""
    generator = torch.Generator().manual_seed(3)
    c = low_rank_covariance(generator)
    values, vectors = torch.linalg.eigh(c)
    kept = vectors[:, values < 1e-2]
    assert kept.shape[1] == 15
    projector, ridge = kept @ kept.T, 0.7
    memory = KeyMemory(null_space(c, ridge, threshold=1e-2))
    past = torch.zeros(D_IN, D_IN, dtype=torch.float64)
    for n in sizes:
        keys = torch.randn(D_IN, n, generator=generator, dtype=torch.float64)
        residual = torch.randn(D_OUT, n, generator=generator, dtype=torch.float64)
        system = projector @ (keys @ keys.T + past) + ridge * torch.eye(D_IN, dtype=torch.float64)
        reference = torch.linalg.solve(system, projector @ keys @ residual.T).T
        delta = delta_of(memory, residual, keys)
        torch.testing.assert_close(delta, reference, rtol=0, atol=1e-10)
        ordinary = vectors[:, values >= 1e-2]
        assert (delta @ ordinary).norm() < 1e-8 * delta.norm()
        memory.remember(keys)
        past = past + keys @ keys.T


def test_energy_keeps_the_least_used_directions():
    values = torch.tensor([6.0, 2.0, 1.0, 0.6, 0.4], dtype=torch.float64)
    whitening = null_space(torch.diag(values), 4.0, threshold=99.0, energy=0.21)
    assert whitening.basis is not None
    used = whitening.basis.abs().sum(1).nonzero().flatten().tolist()
    assert used == [2, 3, 4]  # 1 + 0.6 + 0.4 of 10 are 20%
    with pytest.raises(SingularCovarianceError, match="null space is empty"):
        null_space(torch.diag(values), 1.0, threshold=0.1)
    with pytest.raises(SingularCovarianceError, match=r"is 0\.4, 0\.04 of their sum"):
        null_space(torch.diag(values), 1.0, threshold=0.1, energy=0.03)
