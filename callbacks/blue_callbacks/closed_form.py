"""The closed-form update in its dual form: one factorisation a run, then small systems.

The update of Eq. 8, ``Delta = R K^T (C0 + K_p K_p^T + K K^T)^-1``, is the same for every method up
to ``C0``: the covariance times its weight, or infinity outside the null space that AlphaEdit keeps.
A whitening map B with ``B^T B = C0^-1`` is all that is needed. With ``W_p = B K_p`` (past keys) and
``W = B K`` (this batch),

    Delta = R S^-1 V^T B,   V = W - W_p (I + W_p^T W_p)^-1 W_p^T W,   S = I + W^T V

Only ``n x n`` systems are left, and their Cholesky factor grows by blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from blue_callbacks.precision import in_float64
from blue_callbacks.triangle import Triangle

MOST_UNDETERMINED = 0.1  # of all directions; more of them are no accident of a few units
LEAST_SHARE = 0.1  # of a key dimension in undetermined directions, to be named with them


class SingularCovarianceError(ValueError):
    """A covariance has no factor: it was collected from too few inputs, or keys never vary."""


class Undetermined(NamedTuple):
    """Directions of the key space that ordinary keys never take.

    Attributes:
        directions: how many there are.
        dimensions: the key dimensions in which they mostly lie, ascending.
    """

    directions: int
    dimensions: list[int]


class Whitening:
    """The map ``B = L^-1 U^T`` from keys to r coordinates.

    Coordinates are rows, ``(n, r)``.

    Args:
        factor: L, lower triangular, ``(r, r)``, float64; a number stands for its multiple of the
            identity.
        basis: U, orthonormal columns, ``(d_in, r)``, float64; None for the identity.
        unused: key dimensions that the covariance knows nothing of; see :func:`least_squares`.
        undetermined: directions that it leaves open beside these, and where they lie.
    """

    def __init__(
        self,
        factor: Tensor | float,
        basis: Tensor | None = None,
        unused: Sequence[int] = (),
        undetermined: Undetermined | None = None,
    ) -> None:
        self.factor = Triangle(factor) if isinstance(factor, Tensor) else factor
        self.basis = basis
        self.unused = unused
        self.undetermined = undetermined

    @property
    def device(self) -> torch.device | None:
        """Where keys are whitened; None where the map is a number times the identity."""
        if isinstance(self.factor, Triangle):
            return self.factor.matrix.device
        return None if self.basis is None else self.basis.device

    def apply(self, keys: Tensor) -> Tensor:
        """Return ``(B keys)^T``: ``(d_in, n)`` to ``(n, r)``, float64."""
        rows = in_float64(keys, self.device).T
        if self.basis is not None:
            rows = rows @ self.basis
        return self.factor.solve(rows) if isinstance(self.factor, Triangle) else rows / self.factor

    def apply_transposed(self, rows: Tensor) -> Tensor:
        """Return ``rows B``: ``(n, r)`` to ``(n, d_in)``."""
        if isinstance(self.factor, Triangle):
            keys = self.factor.solve_transposed(rows)
        else:
            keys = rows / self.factor
        return keys if self.basis is None else keys @ self.basis.T

    def folded(self, rows: Tensor) -> Whitening:
        """Return the map that also whitens keys whose coordinates these rows are."""
        grown = torch.linalg.cholesky(_identity_plus(rows.T @ rows))
        if isinstance(self.factor, Triangle):
            factor = self.factor.matrix @ grown
        else:
            factor = self.factor * grown
        return Whitening(factor, self.basis, self.unused, self.undetermined)


def least_squares(covariance: Tensor, weight: float) -> Whitening:
    """Whiten with the covariance: old keys may change, at a price (MEMIT, Eq. 5 and 8).

    Dimensions in which ordinary keys have no component at all (units that never fire) would leave
    the covariance singular, however many tokens it is from. They get the price of an average
    dimension: an update that needs them may use them, and one that does not is as without them.
    So do single directions that ordinary keys never take, as where units fire on the same few
    tokens only, or are copies of each other. Many of them say that the tokens were too few.

    Args:
        covariance: second moment of keys over ordinary text, K0 K0^T per token, ``(d_in, d_in)``.
        weight: weight lambda of the covariance.

    Raises:
        SingularCovarianceError: if the covariance is not positive definite in more than a tenth of
            its directions, as happens when it was collected from fewer tokens than there are key
            dimensions.
        torch.linalg.LinAlgError: if its eigenvalues, looked for where it is not, do not converge.
    """
    priced = in_float64(covariance) * weight
    unused, undetermined = price_unused(priced), None
    factor, info = torch.linalg.cholesky_ex(priced)
    if int(info) != 0 and bool(torch.isfinite(priced).all()):
        undetermined = price_undetermined(priced)
        if undetermined.directions <= MOST_UNDETERMINED * len(priced):
            factor, info = torch.linalg.cholesky_ex(priced)
    if int(info) != 0 or not bool(torch.isfinite(factor).all()):
        found = "" if undetermined is None else f" in {undetermined.directions} directions"
        raise SingularCovarianceError(
            f"the covariance ({covariance.shape[0]} key dimensions, weight {weight:g}) is not "
            f"positive definite{found}; collect it from more tokens, at least ten for each key "
            "dimension, or from more varied text"
        )
    return Whitening(factor, unused=unused, undetermined=undetermined)


def price_undetermined(covariance: Tensor) -> Undetermined:
    """Put the mean eigenvalue where an eigenvalue is zero as far as float64 can tell, in place.

    Below zero an eigenvalue shows how far rounding, of the covariance too, moves all of them.

    Args:
        covariance: symmetric, ``(d_in, d_in)``, float64.

    >>> covariance = torch.ones(2, 2, dtype=torch.float64)  # two units that always fire together
    >>> price_undetermined(covariance)
    Undetermined(directions=1, dimensions=[0, 1])
    >>> [round(value, 6) for value in torch.linalg.eigvalsh(covariance).tolist()]
    [1.0, 2.0]
    """
    values, vectors = torch.linalg.eigh(covariance)
    resolution = len(values) * torch.finfo(values.dtype).eps * float(values[-1])
    noise = max(resolution, -2 * float(values[0]))
    mean = covariance.diagonal().mean()
    found = values <= noise
    directions = vectors[:, found]
    covariance += (directions * (mean - values[found])) @ directions.T
    affected = directions.square().sum(1) > LEAST_SHARE
    return Undetermined(directions.shape[1], affected.nonzero().flatten().tolist())


def price_unused(covariance: Tensor) -> list[int]:
    """Put the mean of the diagonal where it is zero, in place; return where that is.

    >>> covariance = torch.diag(torch.tensor([2.0, 0.0, 4.0]))
    >>> price_unused(covariance), covariance.diagonal().tolist()
    ([1], [2.0, 3.0, 4.0])
    """
    diagonal = covariance.diagonal()
    unused = diagonal == 0
    if bool(unused.any()) and not bool(unused.all()):
        diagonal[unused] = diagonal[~unused].mean()
    return unused.nonzero().flatten().tolist()


def null_space(
    covariance: Tensor, ridge: float, threshold: float, energy: float | None = None
) -> Whitening:
    """Keep only directions that ordinary keys hardly use (AlphaEdit, Fang et al. 2025).

    Args:
        covariance: second moment of keys over ordinary text, ``(d_in, d_in)``.
        ridge: of the least squares inside the null space, AlphaEdit's L2.
        threshold: directions whose eigenvalue is below it are kept.
        energy: instead of a threshold: keep as many of the least used directions as hold at most
            this fraction of the covariance's trace.

    Raises:
        SingularCovarianceError: if no direction is left.
    """
    values, vectors = torch.linalg.eigh(in_float64(covariance))
    if energy is None:
        kept = int((values < threshold).sum())
    else:
        kept = int((values.clamp(min=0).cumsum(0) <= energy * values.sum()).sum())
    if kept == 0:
        raise SingularCovarianceError(
            f"the null space is empty: {_why_empty(values, threshold, energy)}"
        )
    return Whitening(ridge**0.5, vectors[:, :kept].contiguous())


def _why_empty(values: Tensor, threshold: float, energy: float | None) -> str:
    """Say which key of the configuration keeps no direction, and what value would keep one."""
    least = f"the least of {len(values)} eigenvalues of the covariance is {values[0]:.3g}"
    if energy is None:
        return (
            f"{least}, and update.threshold keeps what is below {threshold:g}; raise it, or give "
            "update.energy, the fraction of the trace that is kept"
        )
    share = float(values[0] / values.sum())
    return f"{least}, {share:.3g} of their sum, and update.energy keeps {energy:g}; raise it"


class _Solved(NamedTuple):
    """Keys of a batch, whitened, and their blocks of the grown Cholesky factor."""

    keys: Tensor
    whitened: Tensor
    half: Tensor
    corner: Tensor


class KeyMemory:
    """The keys one layer must respect: of ordinary text and of earlier edit batches.

    Args:
        whitening: from :func:`least_squares` or :func:`null_space`.

    Two batches of one edit each, on keys that overlap. The first moves the output at its key by
    nearly all of its residual, the second leaves the first nearly where it is:

    >>> memory = KeyMemory(least_squares(torch.eye(2), weight=0.01))
    >>> first, second = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.6], [0.8]])
    >>> left, right = memory.update(torch.tensor([[1.0]]), first)
    >>> weight = left @ right
    >>> memory.remember(first)
    >>> left, right = memory.update(torch.tensor([[1.0]]), second)
    >>> weight += left @ right
    >>> [round(float(weight @ key.double()), 2) for key in (first, second)]
    [1.0, 1.58]
    """

    def __init__(self, whitening: Whitening) -> None:
        self.whitening = whitening
        self.past: list[Tensor] = []  # whitened past keys, in order: (n, r) each
        self.cholesky = torch.empty(0, 0, dtype=torch.float64)  # of I + past^T past: (n, n), lower
        self._waiting: list[Tensor] = []  # keys to remember, whitened with the next batch's
        self._newest: _Solved | None = None  # the last batch, until it is remembered

    def update(self, residual: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Solve Eq. 8 (Eq. 5 while nothing was remembered) for one edit batch.

        Args:
            residual: what the layer must add at each key, R, ``(d_out, n_edits)``.
            keys: keys of this batch, K1, ``(d_in, n_edits)``.

        Returns:
            Factors of Delta in float64, ``(d_out, n_edits)`` and ``(n_edits, d_in)``.
        """
        _, whitened, half, corner = self.observe(keys)
        coefficients = torch.cholesky_solve(in_float64(residual, corner.device).T, corner).T
        projections = solve_triangular(self.cholesky.to(half).T, half, upper=True)
        for block, part in zip(self.past, projections.split(self._sizes), strict=True):
            whitened = torch.addmm(whitened, part.T, block, alpha=-1)
        return coefficients, self.whitening.apply_transposed(whitened)

    def observe(self, keys: Tensor) -> _Solved:
        """Whiten the keys of a batch, ``(d_in, n_edits)``, and hold them ready to be remembered."""
        waiting = sum(block.shape[1] for block in self._waiting)
        whitened = self.whitening.apply(
            torch.cat([*(old.to(keys) for old in self._waiting), keys], 1)
        )
        half, corner = self._grow(whitened)
        if waiting:
            self._waiting = []
            old, whitened = whitened[:waiting].clone(), whitened[waiting:]
            if self._append(old, half[:, :waiting], corner[:waiting, :waiting]):
                whitened = self.whitening.apply(keys)
                half, corner = self._grow(whitened)
            else:
                half = torch.cat((half[:, waiting:], corner[waiting:, :waiting].T))
                corner = corner[waiting:, waiting:]
        self._newest = _Solved(keys, whitened, half, corner)
        return self._newest

    def remember(self, keys: Tensor) -> None:
        """Add the keys of a committed batch, ``(d_in, n_edits)``, to those to be respected.

        If they are the keys that the update was solved for, all that is to be computed is known;
        they are others where layers below were changed after it, as RECT does.
        """
        newest, self._newest = self._newest, None
        if newest is not None and torch.equal(keys.to(newest.keys), newest.keys):
            self._append(newest.whitened, newest.half, newest.corner)
        else:
            self._waiting.append(keys)

    def _append(self, new: Tensor, half: Tensor, corner: Tensor) -> bool:
        """Take in whitened keys and their blocks of the factor; say whether the whitening changed.

        Once they number half of the whitened dimensions they are folded into the whitening, so
        that a batch costs the same however many came before.
        """
        if 2 * (sum(self._sizes) + new.shape[0]) > new.shape[1]:
            self.whitening = self.whitening.folded(torch.cat([*self.past, new]))
            self.past, self.cholesky = [], self.cholesky[:0, :0]
            return True
        above = torch.cat((self.cholesky.to(half), torch.zeros_like(half)), dim=1)
        self.cholesky = torch.cat((above, torch.cat((half.T, corner), dim=1)))
        self.past.append(new)
        while len(self.past) > 1 and self._sizes[-2] <= self._sizes[-1]:  # few blocks, few copies
            self.past[-2:] = [torch.cat(self.past[-2:])]
        return False

    def _grow(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """Return the blocks that whitened keys, ``(n, r)``, add to the Cholesky factor.

        Between past and new keys, transposed, ``(n_past, n)``, and among the new, ``(n, n)``.
        """
        half = new.new_empty(0, new.shape[0])
        if self.past:
            products = torch.cat([block @ new.T for block in self.past])
            half = solve_triangular(self.cholesky, products, upper=False)
        return half, torch.linalg.cholesky(_identity_plus(new @ new.T - half.T @ half))

    @property
    def _sizes(self) -> list[int]:
        return [block.shape[0] for block in self.past]


def _identity_plus(matrix: Tensor) -> Tensor:
    """Add one to the diagonal of a matrix that nothing else aliases, in place."""
    matrix.diagonal().add_(1)
    return matrix
