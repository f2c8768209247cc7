"""Triangular solves for few right-hand sides at the rate of matrix products."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import solve_triangular

BLOCK = 512


class Triangle:
    """A lower triangular matrix L that many vectors are solved with.

    The diagonal blocks are inverted once, so that a solve is nothing but products. LAPACK's and
    cuBLAS's solves reach the rate of products for hundreds of vectors, not for a batch of edits.

    Args:
        matrix: L, ``(r, r)``, with a diagonal without zeros.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        starts = range(0, matrix.shape[0], BLOCK)
        self._blocks = [slice(at, min(at + BLOCK, matrix.shape[0])) for at in starts]
        self._inverses = [_inverse(matrix[block, block]) for block in self._blocks]

    def solve(self, rows: Tensor) -> Tensor:
        """Return ``rows L^-T``: ``L^-1`` applied to each row of ``(n, r)``."""
        rows = rows.clone(memory_format=torch.contiguous_format)
        for block, inverse in zip(self._blocks, self._inverses, strict=True):
            done = rows[:, block] @ inverse.T
            rows[:, block] = done
            rows[:, block.stop :].addmm_(done, self.matrix[block.stop :, block].T, alpha=-1)
        return rows

    def solve_transposed(self, rows: Tensor) -> Tensor:
        """Return ``rows L^-1``: ``L^-T`` applied to each row of ``(n, r)``."""
        rows = rows.clone(memory_format=torch.contiguous_format)
        for block, inverse in zip(reversed(self._blocks), reversed(self._inverses), strict=True):
            done = rows[:, block] @ inverse
            rows[:, block] = done
            rows[:, : block.start].addmm_(done, self.matrix[block, : block.start], alpha=-1)
        return rows


def _inverse(block: Tensor) -> Tensor:
    identity = torch.eye(block.shape[0], dtype=block.dtype, device=block.device)
    return solve_triangular(block, identity, upper=False)
