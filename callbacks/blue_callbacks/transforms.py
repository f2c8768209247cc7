"""What methods do to an update beside solving for it: on each batch, or once at the end."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor


def rect(weight: Tensor, delta: Tensor, keep: float) -> Tensor:
    """Set the entries of an update that RECT does not keep to zero; see `rect_kept`."""
    return torch.where(rect_kept(weight, delta, keep), delta, 0)


def rect_kept(weight: Tensor, delta: Tensor, keep: float) -> Tensor:
    """Flag the entries that change most, relative to the weight (RECT, Gu et al. 2024).

    Args:
        weight: before the batch, ``(d_out, d_in)``.
        delta: the batch's whole update of it, same shape.
        keep: fraction of entries to keep, from 0 to 1; RECT's 40% is 0.4.

    Returns:
        Booleans, ``(d_out, d_in)``: those at or above the k-th smallest of ``|delta / weight|``,
        where k is ``1 - keep`` of their number n, rounded down, as in RECT's code (``int(n * 60 /
        100)``).
    """
    change = (delta / (weight + 1e-8)).abs()
    rank = max(
        1, int(change.numel() * (1 - Fraction(str(keep))))
    )  # of the decimal as it is written
    return change >= change.flatten().kthvalue(rank).values


def prune(original: Tensor, edited: Tensor) -> Tensor:
    """Compress the singular values of the whole update (PRUNE, Ma et al. 2025).

    Those above the largest singular value m of the original weight become ``ln(s / m) + m``.

    Args:
        original: the unedited weight W0, ``(d_out, d_in)``.
        edited: the weight after all batches, same shape.

    Returns:
        ``W0 + f(W - W0)``.
    """
    return original + _compressed(original, edited)


def prune_official(original: Tensor, edited: Tensor) -> Tensor:
    """PRUNE as BLUE's published code has it: ``W + f(W - W0)``, which counts the update twice.

    Only to reproduce its numbers.
    """
    return edited + _compressed(original, edited)


def _compressed(original: Tensor, edited: Tensor) -> Tensor:
    largest = torch.linalg.matrix_norm(original, ord=2)
    left, values, right = torch.linalg.svd(edited - original, full_matrices=False)
    log_part = torch.log(values / largest) + largest
    return (left * torch.where(values > largest, log_part, values)) @ right


PostEditTransform = Callable[[Tensor, Tensor], Tensor]

POST_EDIT_TRANSFORMS: dict[str, PostEditTransform] = {
    "prune": prune,
    "prune_official": prune_official,
}
