"""How far an estimate of the covariance still moves the update, so that enough text is enough.

With twice the tokens the estimate's variance halves. Between n / 2 and n tokens the update moves
about as far as it still is, at n, from the update under unlimited text: what the last doubling
changed tells what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from blue_callbacks.closed_form import price_unused
from blue_callbacks.precision import in_float64


class Change(NamedTuple):
    """By what fraction the update moved when the tokens grew to ``tokens`` from about half."""

    tokens: int
    fraction: float


def solved_keys(covariance: Tensor, keys: Tensor, weight: float | None) -> Tensor:
    """Return (weight C + K K^T)^-1 K, whose transpose Eq. 5 multiplies by the residuals.

    Args:
        covariance: C; (d_in, d_in).
        keys: K; (d_in, n).
        weight: lambda of Eq. 5; None: d_in.

    Returns:
        ``(d_in, n)`` in float64; not a number where so few tokens leave C singular.
    """
    priced = (weight or len(covariance)) * in_float64(covariance)
    keys = in_float64(keys, priced.device)
    price_unused(priced)
    factor, failed = torch.linalg.cholesky_ex(priced)
    if failed:
        return torch.full_like(keys, torch.nan)
    whitened = torch.cholesky_solve(keys, factor)
    inner = torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device) + keys.T @ whitened
    solved, failed = torch.linalg.solve_ex(inner, whitened, left=False)
    return torch.full_like(keys, torch.nan) if failed else solved


def relative_change(before: Tensor, after: Tensor) -> float:
    """Return ||after - before|| / ||after||, infinite where ``before`` is not a number.

    For `solved_keys` this is the expected change of the update under residuals of any direction.
    """
    change = float((after - before).norm() / after.norm())
    return change if change == change else float("inf")


class UpdateChange:
    """The change of the update on probe keys, each time the tokens have doubled.

    Args:
        keys: layer -> keys that the covariance is not computed from; (d_in, n).
        weight: lambda of Eq. 5; None: d_in.
    """

    def __init__(self, keys: Mapping[int, Tensor], weight: float | None) -> None:
        self.keys = keys
        self.weight = weight
        self.changes: dict[int, list[Change]] = {layer: [] for layer in keys}
        self._solved: dict[int, Tensor] = {}

    def __call__(self, tokens: int, covariances: Mapping[int, Tensor]) -> None:
        """Compare the update under these covariances with the one before."""
        for layer, covariance in covariances.items():
            solved = solved_keys(covariance, self.keys[layer], self.weight)
            if layer in self._solved:
                fraction = relative_change(self._solved[layer], solved)
                self.changes[layer].append(Change(tokens, fraction))
            self._solved[layer] = solved
