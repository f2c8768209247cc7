"""Which requests of which edit batches are scored again after later ones, and what came of it."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from blue_callbacks.ranges import WHOLE, check_ranges
from lightning_blue.data.checks import superseded
from lightning_blue.data.requests import EditRequest
from lightning_blue.support.errors import InputError

Values = Mapping[str, float]  # of one request, by metric: fractions or numbers in a unit


@dataclass(frozen=True)
class RetentionSettings:
    """How much a run spends on its retention matrix.

    Args:
        prompts: prompts scored for it in the whole run, beside those that are scored anyway. Where
            they do not suffice for all batches, batches at equal distances are followed. 0: there
            is no matrix.
    """

    prompts: int = 0

    def __post_init__(self) -> None:
        check_ranges("measure.retention", vars(self), prompts=WHOLE)


@dataclass
class Retention:
    """What was measured of the batches that are followed.

    Attributes:
        sample: of each followed batch, by its place in the data from 0, the places of its requests.
        after: by the batch after which it was measured, the values of each request.
    """

    sample: dict[int, list[int]] = field(default_factory=dict)
    after: dict[int, dict[int, Values]] = field(default_factory=dict)

    def earlier(self, batch: int) -> list[int]:
        """Return the places of requests to score again after a batch; none where it is left out."""
        if batch not in self.sample:
            return []
        return [place for other, places in self.sample.items() if other < batch for place in places]

    def take(self, batch: int, values: Mapping[int, Values]) -> None:
        """Keep what was measured after a batch, by place, of the requests that are followed."""
        if batch in self.sample:
            followed = [*self.earlier(batch), *self.sample[batch]]
            self.after[batch] = {place: values[place] for place in followed if place in values}

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {"sample": self.sample, "after": self.after}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the sample of a checkpoint, if it has one."""
        if state["sample"]:
            self.sample, self.after = state["sample"], state["after"]


def choose_sample(
    requests: Sequence[EditRequest], batch_size: int, prompts: int, seed: int
) -> dict[int, list[int]]:
    """Choose the batches to follow, and as many requests of each as the budget allows.

    The requests of m followed batches are scored after each later one of them, m (m - 1) / 2
    samples in all. (Each batch itself, the unedited model and the end are measured anyway.) A
    request that a later one of the data replaces is not followed: that it fails is no forgetting.

    Args:
        requests: all n of the run, in order.
        batch_size: requests of a batch.
        prompts: the budget: prompts that may be scored in the whole run; 0 chooses none.
        seed: of the order in which the requests of a batch are taken.

    Returns:
        Of each followed batch, by its place from 0, the places of its requests.

    Raises:
        InputError: if the budget does not suffice for one request of the first and the last batch.
    """
    if not prompts:
        return {}
    replaced, shuffle = set(superseded(requests)), random.Random(seed)
    batches: dict[int, list[int]] = {}
    for first in range(0, len(requests), batch_size):
        places = range(first, min(first + batch_size, len(requests)))
        kept = [place for place in places if place not in replaced]
        if kept:
            batches[first // batch_size] = shuffle.sample(kept, len(kept))
    cost = partial(_cost, [prompts_of(request) for request in requests], batches)
    n = len(batches)
    m = min(n, 1 + bisect_right(range(2, n + 1), prompts, key=lambda m: cost(m, 1)))
    if m < min(n, 2):
        raise InputError(
            f"{prompts} prompts do not suffice for one request of the first and the last batch",
            where="measure.retention.prompts",
            hint=f"give at least {cost(2, 1)}, or 0 for no retention matrix",
        )
    k = bisect_right(range(1, batch_size + 1), prompts, key=lambda k: cost(m, k))
    return {batch: sorted(batches[batch][:k]) for batch in _spaced(list(batches), m)}


def prompts_of(request: EditRequest) -> int:
    """Return how many prompts a request is scored on: its own, paraphrases, neighbours."""
    return 1 + len(request.paraphrases) + len(request.neighborhood)


def _cost(each: Sequence[int], batches: Mapping[int, Sequence[int]], m: int, k: int) -> int:
    """Return the prompts that m followed batches with up to k requests each cost in a run."""
    rows = [sum(each[place] for place in batches[b][:k]) for b in _spaced(list(batches), m)]
    return sum(row * later for row, later in zip(rows, range(m - 1, -1, -1), strict=True))


def _spaced(items: list[int], m: int) -> list[int]:
    """Return m of the items at equal distances, the first and the last among them.

    >>> _spaced([0, 1, 2, 3, 4, 5, 6], 3)
    [0, 3, 6]
    """
    if m < 2:
        return items[:m]
    return [items[round(i * (len(items) - 1) / (m - 1))] for i in range(m)]
