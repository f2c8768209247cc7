"""The standard error of any aggregate of records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any


def jackknife_error(aggregate: Callable[[Sequence[Any]], float], items: Sequence[Any]) -> float:
    """Return the standard error of an aggregate, by leaving out one item after the other.

    Tukey (1958); for a mean it is the sample's standard deviation over the root of n.

    Args:
        aggregate: of a sequence of items, a number that changes smoothly with them.
        items: n of them, at least two.

    Returns:
        In the unit of the aggregate; NaN for fewer than two items.

    >>> from statistics import fmean
    >>> round(jackknife_error(fmean, [0, 1, 1, 1, 0]), 6)  # sqrt(0.3 / 5)
    0.244949
    """
    n = len(items)
    if n < 2:
        return math.nan
    without = [aggregate([*items[:i], *items[i + 1 :]]) for i in range(n)]
    mean = sum(without) / n
    return math.sqrt((n - 1) / n * sum((value - mean) ** 2 for value in without))
