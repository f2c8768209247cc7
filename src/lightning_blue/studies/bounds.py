"""Theorem 4.1 and Lemma 4.2 of the paper, as functions of tensors.

Both bound how far the update that distributed residuals write is from the one that computed
residuals would: with ``Q = K1^T (C0 + Kp Kp^T + K1 K1^T)^-1`` both updates are a residual times Q,

    |Delta* - Delta| <= (|R^l* - R^L| + (L - l) |R^l|) |Q|,     R^l = R^L / (L - l + 1)

in spectral norms. The theorem has no Kp, the lemma has. The inequality is the triangle inequality
and holds for any tensors, as long as R^L is the residual that was distributed: the one that the
last layer had when layer l was written. The proof takes the one from before any write for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from blue_callbacks import KeyMemory


class Bound(NamedTuple):
    """A bound and what it bounds, in spectral norms.

    Attributes:
        error: ``|Delta* - Delta|``.
        bound: the paper's.
        q_norm: ``|Q|``.
    """

    error: float
    bound: float
    q_norm: float


def spectral_norm(matrix: Tensor) -> float:
    """Return the largest singular value; 0 for an empty matrix."""
    return float(torch.linalg.matrix_norm(matrix.double(), 2)) if matrix.numel() else 0.0


def update_operator(memory: KeyMemory, keys: Tensor) -> Tensor:
    """Return Q, ``(n, d_in)`` in float64: the update of one layer is the residual times Q.

    Args:
        memory: of the covariance and of past keys.
        keys: K1, ``(d_in, n)``.
    """
    identity = torch.eye(keys.shape[1], dtype=torch.float64, device=keys.device)
    left, right = memory.update(identity, keys)
    return left @ right


def weight_shift(
    computed: Tensor, distributed: Tensor, last: Tensor, layers_after: int, q: Tensor
) -> Bound:
    """Compare the shift of a weight's update with its bound.

    Args:
        computed: R^l*, the residual of the layer's own target, ``(d, n)``.
        distributed: R^l, what the layer is asked to add, ``(d, n)``.
        last: R^L, what the bound takes for the last layer's residual, ``(d, n)``.
        layers_after: L - l, critical layers after this one.
        q: Q, ``(n, d_in)``.
    """
    own, share, whole, q = (each.double() for each in (computed, distributed, last, q))
    q_norm = spectral_norm(q)
    apart = spectral_norm(own - whole) + layers_after * spectral_norm(share)
    return Bound(spectral_norm((own - share) @ q), apart * q_norm, q_norm)
