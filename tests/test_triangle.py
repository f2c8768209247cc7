"""Solves by products against the library's triangular solve."""

from __future__ import annotations

import pytest
import torch

from blue_callbacks import triangle
from blue_callbacks.triangle import Triangle


@pytest.mark.parametrize("size", [1, 7, 8, 9, 40])  # around multiples of the blocks' size
@pytest.mark.parametrize("n", [0, 1, 5])
def test_solves_equal_the_librarys(monkeypatch, size, n):
    monkeypatch.setattr(triangle, "BLOCK", 8)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64).tril()
    matrix.diagonal().add_(5)
    columns = torch.randn(size, n, generator=generator, dtype=torch.float64)
    solve = torch.linalg.solve_triangular
    one = Triangle(matrix)
    torch.testing.assert_close(one.solve(columns.T).T, solve(matrix, columns, upper=False))
    back = solve(matrix.T, columns, upper=True)
    torch.testing.assert_close(one.solve_transposed(columns.T).T, back)


def test_a_badly_conditioned_factor_loses_nothing(monkeypatch):
    """Rows of a covariance with condition number 1e10, in blocks and by the library."""
    monkeypatch.setattr(triangle, "BLOCK", 16)
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(96, 96, generator=generator, dtype=torch.float64)).Q
    covariance = basis * torch.logspace(0, -10, 96, dtype=torch.float64) @ basis.T
    factor = torch.linalg.cholesky(covariance)
    columns = torch.randn(96, 3, generator=generator, dtype=torch.float64)
    reference = torch.linalg.solve_triangular(factor, columns, upper=False)

    def residual(solved: torch.Tensor) -> float:
        return float((factor @ solved - columns).norm() / columns.norm())

    ours = Triangle(factor).solve(columns.T).T
    assert residual(ours) < 10 * residual(reference) + 1e-13
    assert (ours - reference).norm() < 1e-9 * reference.norm()


def test_what_is_solved_is_not_changed():
    rows = torch.ones(2, 3, dtype=torch.float64)
    one = Triangle(torch.eye(3, dtype=torch.float64) * 2)
    assert one.solve(rows).sum() == one.solve_transposed(rows).sum() == 3
    assert rows.sum() == 6
