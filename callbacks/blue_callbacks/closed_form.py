"""The closed-form update in its dual form: one factorisation a run, then small systems.

With ``C0 = weight * covariance = L L^T``, ``W_p = L^-1 K_p`` (past keys) and ``W = L^-1 K``
(this batch), the update of Eq. 8

    Delta = R K^T (C0 + K_p K_p^T + K K^T)^-1

equals ``R S^-1 V^T L^-1`` with ``V = W - W_p (I + W_p^T W_p)^-1 W_p^T W`` and the Schur complement
``S = I + W^T V``. Only ``n x n`` systems are left, and their Cholesky factor grows by blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SingularCovarianceError(ValueError):
    """A covariance has no factor: it was collected from too few inputs, or keys never vary."""


def whitening_factor(covariance: Tensor, weight: float) -> Tensor:
    """Factor ``weight * covariance`` once for the whole run.

    Args:
        covariance: second moment of keys over ordinary text, K0 K0^T per token, ``(d_in, d_in)``.
        weight: how much old knowledge counts against new keys (the paper's lambda).

    Returns:
        Lower triangular L in float64, ``(d_in, d_in)``, with ``L L^T = weight * covariance``.

    Raises:
        SingularCovarianceError: if the covariance is not positive definite, as happens when it
            was collected from fewer tokens than there are key dimensions.
    """
    factor, info = torch.linalg.cholesky_ex(covariance.to(torch.float64) * weight)
    if int(info) != 0 or not bool(torch.isfinite(factor).all()):
        raise SingularCovarianceError(
            f"the covariance ({covariance.shape[0]} key dimensions, weight {weight:g}) is not "
            "positive definite; collect it from more tokens, at least ten for each key dimension"
        )
    return factor


class KeyMemory:
    """The keys one layer must respect: ordinary text's and those of earlier edit batches.

    Args:
        factor: from :func:`whitening_factor`, ``(d_in, d_in)``, float64.
    """

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor
        self.past = factor.new_empty(factor.shape[0], 0)  # whitened past keys: (d_in, n)
        self.cholesky = factor.new_empty(0, 0)  # of I + past^T past: (n, n), lower

    def update(self, residual: Tensor, keys: Tensor) -> Tensor:
        """Solve Eq. 8 (Eq. 5 while nothing was remembered) for one edit batch.

        Args:
            residual: what the layer must add at each key, R, ``(d_out, n_edits)``.
            keys: keys of this batch, K1, ``(d_in, n_edits)``.

        Returns:
            Delta, ``(d_out, d_in)``, float64.
        """
        whitened = self._whiten(keys)
        half = self._against_past(whitened)
        corrected = whitened - self.past @ torch.linalg.solve_triangular(
            self.cholesky.T, half, upper=True
        )
        schur = torch.linalg.cholesky(_identity_plus(whitened.T @ whitened - half.T @ half))
        coefficients = torch.cholesky_solve(residual.to(schur).T, schur).T  # (d_out, n_edits)
        return coefficients @ torch.linalg.solve_triangular(self.factor.T, corrected, upper=True).T

    def remember(self, keys: Tensor) -> None:
        """Add the keys of a committed batch, ``(d_in, n_edits)``, to those to be respected."""
        whitened = self._whiten(keys)
        half = self._against_past(whitened)
        corner = torch.linalg.cholesky(_identity_plus(whitened.T @ whitened - half.T @ half))
        n_past, n_new = half.shape
        grown = corner.new_zeros(n_past + n_new, n_past + n_new)
        grown[:n_past, :n_past] = self.cholesky
        grown[n_past:, :n_past] = half.T
        grown[n_past:, n_past:] = corner
        self.cholesky = grown
        self.past = torch.cat((self.past, whitened), dim=1)

    def _whiten(self, keys: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, keys.to(self.factor), upper=False)

    def _against_past(self, whitened: Tensor) -> Tensor:
        """Block of the grown Cholesky factor between past and new keys, ``(n, n_edits)``."""
        return torch.linalg.solve_triangular(self.cholesky, self.past.T @ whitened, upper=False)


def _identity_plus(matrix: Tensor) -> Tensor:
    return matrix + torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
