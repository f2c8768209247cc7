"""Ranges of numbers, checked where an argument is declared: by the constructor that takes it.

Restricted types of a command line (jsonargparse's) would check what a parser has read; the same
classes are built from Python too, and these callbacks need torch and Lightning only.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import cast

from blue_callbacks.errors import InputError


@dataclass(frozen=True)
class Range:
    """Numbers that an argument may be; never NaN, infinity or a truth value.

    Args:
        least: the least of them.
        most: the highest of them; infinity: there is none.
        above: whether ``least`` itself is left out.
        whole: whether only whole numbers are meant.

    >>> 0.5 in Range(0, 1, above=True), 0 in Range(0, 1, above=True), float("nan") in Range()
    (True, False, False)
    """

    least: float = 0
    most: float = math.inf
    above: bool = False
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number = cast(float, value)
        if number != number or abs(number) == math.inf:  # isfinite() overflows at large integers
            return False
        return self.least <= number <= self.most and not (self.above and number == self.least)

    def __str__(self) -> str:
        kind = "whole number" if self.whole else "finite number"
        if self.above:
            return f"a {kind} above {self.least:,}" + (
                "" if self.most == math.inf else f" and at most {self.most:,}"
            )
        end = "up" if self.most == math.inf else f"to {self.most:,}"
        return f"a {kind} from {self.least:,} {end}"


LARGE = 1e30  # float32 holds it, and some multiples
POSITIVE = Range(0, LARGE, above=True)
NOT_NEGATIVE = Range(0, LARGE)
FRACTION = Range(0, 1, above=True)
WHOLE = Range(whole=True)
COUNT = Range(1, whole=True)
SEED = Range(0, 2**32 - 1, whole=True)


def check_ranges(section: str, given: Mapping[str, object], **ranges: Range) -> None:
    """Check numbers that were given; None is no number and passes.

    Args:
        section: of the configuration that holds them, for the message; empty: the top.
        given: name -> value, others among them.
        **ranges: by the names of those to check.

    Raises:
        InputError: naming the first that is out of its range, and the range.

    >>> check_ranges("update", {"ridge": -1.0, "layers": [3]}, ridge=POSITIVE)
    Traceback (most recent call last):
    blue_callbacks.errors.InputError: ridge is -1.0
      where: update.ridge
      hint:  give a finite number above 0 and at most 1e+30
    """
    for name, allowed in ranges.items():
        value = given[name]
        if value is not None and value not in allowed:
            raise InputError(
                f"{name} is {reprlib.repr(value)}",
                where=f"{section}.{name}".lstrip("."),
                hint=f"give {allowed}",
            )
