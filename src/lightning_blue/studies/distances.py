"""How far two sets of hidden states are apart, without a projection."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_shift(before: Tensor, after: Tensor) -> Tensor:
    """Return ``|after - before| / |before|`` of each state: two times ``(n, d)`` to ``(n,)``."""
    before, after = before.double(), after.double()
    return (after - before).norm(dim=1) / before.norm(dim=1)


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019).

    1 for states that are alike up to a rotation and a factor, 0 for unrelated ones.

    Args:
        one: ``(n, d)``.
        other: states of the same n texts, ``(n, d')``.
    """
    x, y = (states.double() - states.double().mean(0) for states in (one, other))
    shared = (x.T @ y).square().sum()
    return float(shared / ((x.T @ x).norm() * (y.T @ y).norm()))


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Squared Frechet distance between the normal distributions fitted to two sets of states.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)``, in squared units of the states (Heusel
    et al. 2017 use it for images).

    Args:
        one: ``(n, d)``.
        other: ``(n', d)``.
    """
    one, other = one.double(), other.double()
    means = (one.mean(0) - other.mean(0)).square().sum()
    first, second = (torch.atleast_2d(states.T.cov()) for states in (one, other))
    root = _root(first)
    shared = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float((means + first.trace() + second.trace() - 2 * shared).clamp(min=0))


def _root(matrix: Tensor) -> Tensor:
    """Return the square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
