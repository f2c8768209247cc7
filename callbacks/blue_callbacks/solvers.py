"""Which keys an update must respect, and how: the choice between the methods' solvers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from blue_callbacks.closed_form import Whitening, least_squares, null_space
from blue_callbacks.ranges import FRACTION, POSITIVE, check_ranges

NEARLY_ALL, NEARLY_NONE = 0.98, 0.02  # fractions of key dimensions worth a warning

NAMED = 5  # dimensions that a note lists


Kind = Literal["least_squares", "null_space", "fine_tuning", "in_context"]
CLOSED_FORMS = ("least_squares", "null_space")


@dataclass(frozen=True)
class Solver:
    """Settings that turn a covariance into a whitening map.

    Args:
        kind: ``least_squares`` (MEMIT) or ``null_space`` (AlphaEdit); of the baselines that solve
            nothing, ``fine_tuning`` or ``in_context``.
        covariance_weight: least squares: lambda of Eq. 5 and 8; None: as many as the weight has
            key dimensions, d_in.
        threshold: null space: eigenvalue below which a direction is kept.
        energy: null space: instead of it, the fraction of the trace that may be kept.
        ridge: null space: AlphaEdit's L2.
    """

    kind: Kind = "least_squares"
    covariance_weight: float | None = None
    threshold: float = 0.02
    energy: float | None = None
    ridge: float = 10.0

    def __post_init__(self) -> None:
        check_ranges(
            "update",
            vars(self),
            covariance_weight=POSITIVE,
            threshold=POSITIVE,
            energy=FRACTION,
            ridge=POSITIVE,
        )

    @property
    def closed_form(self) -> bool:
        """Whether updates are solved for in closed form, from a covariance of keys."""
        return self.kind in CLOSED_FORMS

    def whitening(self, covariance: Tensor) -> Whitening:
        """Return the whitening map for a covariance, ``(d_in, d_in)``.

        Raises:
            SingularCovarianceError: see `least_squares` and `null_space`.
        """
        if self.kind == "least_squares":
            return least_squares(covariance, self.covariance_weight or len(covariance))
        return null_space(covariance, self.ridge, self.threshold, self.energy)


def unused_note(whitening: Whitening) -> str | None:
    """Say what of the key space ordinary text never used, and what becomes of it; None: nothing."""
    said = []
    if whitening.unused:
        said.append(
            f"ordinary text never used {len(whitening.unused)} key dimensions "
            f"({_first(whitening.unused)})"
        )
    if whitening.undetermined is not None:
        count, dimensions = whitening.undetermined
        said.append(
            f"ordinary text leaves {count} directions of the key space open, mostly in the "
            f"dimensions {_first(dimensions)}"
        )
    return f"{'; '.join(said)}; in the update each counts as an average one" if said else None


def _first(dimensions: Sequence[int]) -> str:
    more = ", ..." if len(dimensions) > NAMED else ""
    return ", ".join(map(str, dimensions[:NAMED])) + more


def kept_dimensions(whitening: Whitening) -> tuple[int, int] | None:
    """Return how many key dimensions a null space keeps, and of how many; None without one."""
    return None if whitening.basis is None else (whitening.basis.shape[1], whitening.basis.shape[0])


def worth_a_warning(kept: int, total: int) -> bool:
    """Say whether a null space keeps so much or so little that its threshold looks wrong."""
    return not NEARLY_NONE < kept / total < NEARLY_ALL
