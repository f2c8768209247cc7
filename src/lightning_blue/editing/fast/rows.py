"""Token rows aligned at the lookup: what stands before it never changes while a delta is found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_blue.language_model.tokens import Encoded


class AlignedRows(NamedTuple):
    """Token rows aligned at one column; what is before it never changes.

    Attributes:
        input_ids: ``(n_rows, n_tokens)``, padded on both sides.
        starts: the column of each row's first token, ``(n_rows,)``.
        ends: the column after each row's last token, ``(n_rows,)``.
        column: where the rows are aligned.
    """

    input_ids: Tensor
    starts: Tensor
    ends: Tensor
    column: int

    def sequences(self) -> list[list[int]]:
        """Return the rows without padding."""
        bounds = zip(self.input_ids.tolist(), self.starts.tolist(), self.ends.tolist(), strict=True)
        return [ids[start:end] for ids, start, end in bounds]

    def arguments(self, first: int) -> dict[str, Tensor]:
        """Return the model's arguments for the columns from ``first`` on."""
        columns = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        shifted = columns - self.starts[:, None]
        return {
            "input_ids": self.input_ids[:, first:],
            "attention_mask": (shifted >= 0).long(),
            "position_ids": shifted.clamp(min=0)[:, first:],
        }


def align(rows: Sequence[Encoded], device: torch.device) -> AlignedRows:
    """Put the rows' lookups into one column; token 0 pads them on both sides."""
    column = max(row.lookup for row in rows)
    starts = [column - row.lookup for row in rows]
    ends = [start + len(row.ids) for start, row in zip(starts, rows, strict=True)]
    ids = torch.zeros(len(rows), max(ends), dtype=torch.long)
    for row, start, end, padded in zip(rows, starts, ends, ids, strict=True):
        padded[start:end] = torch.tensor(row.ids)
    first, after = torch.tensor([starts, ends], device=device)
    return AlignedRows(ids.to(device), first, after, column)
