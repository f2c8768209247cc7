"""What an edit batch did to the weights: a record that undoes, replays and exports it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blue_callbacks.weights import WeightId


@dataclass(frozen=True)
class WeightChange:
    """What a batch of n edits added to one weight.

    The change is ``left @ right``; where a transform has cut it (RECT), the entries that stayed are
    kept as one bit each, ``d_out * d_in / 8`` bytes, since the rest follows from the factors. Where
    it is no sum over edits (fine-tuning), it is kept ``whole``, and left, right, keys and residual
    are of no edit. A post-edit transform (PRUNE) belongs to no batch: it is a function of the
    unedited and the edited weight, and so needs nothing but its name.

    Attributes:
        weight: which.
        target_layer: where the residual was measured.
        share: of the residual that this weight was asked to add.
        left: ``(d_out, n)``, the weight's precision, on the CPU.
        right: ``(n, d_in)``, likewise.
        keys: K1 that the update was solved for, ``(d_in, n)``.
        residual: R that it was solved for, ``share * (target - output)``, divided by the module's
            ``output_multiple`` where it has one, ``(d_out, n)``.
        past_keys: what later batches respect, ``(d_in, n)``, if it is not ``keys`` (RECT); None
            also where past keys are not respected.
        kept: the entries of the product that a transform has left, as packed bits, uint8
            ``(ceil(d_out * d_in / 8),)``; None: all.
        change_norm: Frobenius norm of what was added.
        residual_norm: mean over edits of the norm of ``share * (target - output)``.
        whole: the change itself, ``(d_out, d_in)``, the weight's precision, on the CPU; None: it is
            ``left @ right``.
    """

    weight: WeightId
    target_layer: int
    share: float
    left: Tensor
    right: Tensor
    keys: Tensor
    residual: Tensor
    past_keys: Tensor | None
    kept: Tensor | None
    change_norm: float
    residual_norm: float
    whole: Tensor | None = None

    def apply(self, before: Tensor) -> Tensor:
        """Return the weight after the batch, given the one before it, ``(d_out, d_in)``.

        The arithmetic is that of the run: on the same processor the same bits.
        """
        if self.whole is not None:
            return before + self.whole.to(before)
        return apply_factors(before, self.left, self.right, self.kept)


@dataclass(frozen=True)
class EditRecord:
    """One committed edit batch.

    Attributes:
        batch: its number, from 0.
        request_ids: of the n edits, in the order of the columns.
        changes: of each weight, in the order in which they were written.
    """

    batch: int
    request_ids: tuple[str, ...]
    changes: tuple[WeightChange, ...]


def apply_factors(before: Tensor, left: Tensor, right: Tensor, kept: Tensor | None) -> Tensor:
    """Return ``before + left @ right``, of the product only the kept entries.

    Args:
        before: ``(d_out, d_in)``.
        left: ``(d_out, n)``, from any device and in any precision.
        right: ``(n, d_in)``, likewise.
        kept: packed bits, see :func:`pack_bits`; None: all entries.
    """
    after = before.addmm(left.to(before), right.to(before))
    if kept is None:
        return after
    flags = unpack_bits(kept, before.numel()).view(before.shape).to(before.device)
    return before + torch.where(flags, after - before, 0)


_BITS = 2 ** torch.arange(8, dtype=torch.uint8)


def pack_bits(flags: Tensor) -> Tensor:
    """Pack n flags into ``ceil(n / 8)`` bytes, the first flag in the lowest bit.

    >>> pack_bits(torch.tensor([True, False, True])).tolist()
    [5]
    """
    flat = flags.flatten().to("cpu", torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8))
    return (padded.view(-1, 8) * _BITS).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """Return the n flags that `pack_bits` has packed.

    >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), 3).tolist()
    [True, False, True]
    """
    return ((packed.cpu()[:, None] & _BITS) != 0).flatten()[:n]
