"""A weight with all, some or none of a run's edits: functions of tensors and of changes.

Each weight of a run stands for itself: given the keys and residuals that were measured then, what
is written to one does not depend on another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from blue_callbacks import KeyMemory, UnsolvableError, WeightChange
from blue_callbacks.transforms import rect_kept
from lightning_blue.support.errors import first_line

Removed = Mapping[int, Sequence[int]]  # batch -> columns of the edits that are left out
Changes = Iterable[tuple[int, WeightChange]]  # batch number, change; in order


def with_changes(original: Tensor, changes: Changes, removed: Removed) -> Tensor:
    """Return a weight with the changes of a run, but for some of its edits.

    What is not removed is added as it was in the run: where later edits were solved with a removed
    one in place, they stay so.

    Args:
        original: the unedited weight, ``(d_out, d_in)``, float32 or better.
        changes: of each batch, in order.
        removed: what is left out; without anything the weight is the run's, to the bit on the
            same processor.

    Returns:
        The weight, ``(d_out, d_in)``.
    """
    current = original.clone()
    for batch, change in changes:
        columns = removed.get(batch, ())
        if change.whole is not None:  # all of its edits stay, or none does
            current = current if columns else change.apply(current)
        elif len(columns) < change.left.shape[1]:
            kept = leave_out(change, columns) if columns else change
            current = kept.apply(current)
    return current


def replayed(
    original: Tensor,
    changes: Changes,
    removed: Removed,
    memory: KeyMemory,
    *,
    past_keys: bool,
    rect_keep: float | None,
) -> Tensor:
    """Return a weight for which batches were solved again without the removed edits.

    Batches before the first removal are added as they were; each later one is solved (Eq. 8, or 5)
    from the keys and the residual that were measured in the run, and without the removed keys.

    Args:
        original: the unedited weight, ``(d_out, d_in)``.
        changes: of each batch, in order.
        removed: what is left out.
        memory: of the weight, with nothing remembered yet.
        past_keys: whether the run respects keys of earlier batches.
        rect_keep: RECT's fraction of entries; the entries are chosen anew.

    Returns:
        The weight, ``(d_out, d_in)``.
    """
    current, anew = original.clone(), False
    for batch, whole in changes:
        change = _columns(whole, removed.get(batch, ()))
        anew = anew or batch in removed
        if change.left.shape[1] == 0:
            continue
        if anew:
            current, change = _solved(current, change, memory, rect_keep)
        else:
            current = change.apply(current)
            if past_keys:
                memory.observe(change.keys)
        if past_keys:
            memory.remember(change.keys if change.past_keys is None else change.past_keys)
    return current


def leave_out(change: WeightChange, columns: Sequence[int]) -> WeightChange:
    """Return a batch's change without what it wrote for some of its edits.

    ``Delta = R S^-1 V^T B`` is a sum over edits of a residual times a row of ``S^-1 V^T B``, and
    ``S = I + (V^T B) K1`` follows from the record. Leaving an edit out is leaving its term out: the
    others' outputs stay, and its own key is still asked for no change. (A column of ``left`` is no
    edit: ``R S^-1`` mixes the residuals of the batch.)

    Args:
        change: of n edits.
        columns: those to leave out, fewer than n.
    """
    rows = written_operator(change).to(change.right)
    return _columns(replace(change, left=change.residual.to(change.left), right=rows), columns)


def written_operator(change: WeightChange) -> Tensor:
    """Return Q of an update ``R Q`` that was written, ``(n, d_in)`` in float64, from its record.

    The record holds ``V^T B`` and K1, and ``Q = S^-1 V^T B`` with ``S = I + V^T B K1``.
    """
    right = change.right.double()
    system = torch.eye(len(right), dtype=torch.float64) + right @ change.keys.double()
    return torch.linalg.solve(system, right)


@contextmanager
def solvable(what: str) -> Iterator[None]:
    """Say of which matrix a system has no solution, or a decomposition does not converge.

    Raises:
        UnsolvableError: in place of LinAlgError.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise UnsolvableError(f"{what} cannot be computed: {first_line(error)}") from error


def relative_distance(one: Tensor, other: Tensor, original: Tensor) -> float:
    """Return how far two edited weights are apart, as a fraction of how far one was moved."""
    moved = float((one - original).norm())
    return float((one - other).norm()) / moved if moved else 0.0


def _columns(change: WeightChange, removed: Sequence[int]) -> WeightChange:
    """Drop columns of all that a change holds by edit."""
    if not removed:
        return change
    n = change.left.shape[1]
    kept = [column for column in range(n) if column not in set(removed)]
    past = change.past_keys
    return replace(
        change,
        left=change.left[:, kept],
        right=change.right[kept],
        keys=change.keys[:, kept],
        residual=change.residual[:, kept],
        past_keys=None if past is None else past[:, kept],
    )


def _solved(
    current: Tensor, change: WeightChange, memory: KeyMemory, rect_keep: float | None
) -> tuple[Tensor, WeightChange]:
    """Solve a batch for its residual and add it, as `ClosedFormUpdate` does."""
    left, right = memory.update(change.residual, change.keys)
    change = replace(change, left=left.to(current), right=right.to(current), kept=None)
    after = change.apply(current)
    if rect_keep is not None:
        delta = after - current
        after = current + torch.where(rect_kept(current, delta, rect_keep), delta, 0)
    return after, change
