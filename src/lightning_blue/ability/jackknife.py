"""The standard error of any aggregate of records."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

GROUPS = 50  # left out one after the other; an aggregate may cost a second (a package is loaded)


def jackknife_error(aggregate: Callable[[Sequence[Any]], float], items: Sequence[Any]) -> float:
    """Return the standard error of an aggregate, by leaving out one group after the other.

    Up to `GROUPS` items each is a group of its own (Tukey 1958); more are dealt out to so many
    groups, at random, because files are often sorted. The aggregate is computed once more than
    there are groups. Groups of m_j of n items, with h_j = n / m_j, are weighted as in Busing,
    Meijer and van der Leeden (1999, "Delete-m jackknife for unequal m", Statistics and Computing 9,
    3-8): with pseudo-values p_j = h_j t - (h_j - 1) t_j of the aggregate t and of t_j without the
    group, and with their estimate J = sum_j t - (1 - m_j / n) t_j, the variance is the mean of
    (p_j - J)^2 / (h_j - 1). For a mean it is without bias s^2 / n, whatever the groups; its own
    relative error is the root of 2 / (groups - 1), of the standard error half of that.

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
    order = list(range(n))
    random.Random(0).shuffle(order)
    groups = [frozenset(order[first::GROUPS]) for first in range(min(n, GROUPS))]
    whole = aggregate(items)
    without = [
        aggregate([item for place, item in enumerate(items) if place not in group])
        for group in groups
    ]
    shares = [len(group) / n for group in groups]
    estimate = sum(whole - (1 - m) * t for m, t in zip(shares, without, strict=True))
    pseudo = [(whole - (1 - m) * t) / m for m, t in zip(shares, without, strict=True)]
    parts = [m / (1 - m) * (p - estimate) ** 2 for m, p in zip(shares, pseudo, strict=True)]
    return math.sqrt(sum(parts) / len(groups))
