"""What is tried: critical layers, and three numbers in units that belong to no model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

from blue_callbacks.plans import layer_updates
from lightning_blue.editing.depth import COUNT, layers_by_depth
from lightning_blue.editing.optimization import FIRST_STEP, TargetOptimization

FIRST_STEPS = (0.125, 0.25, FIRST_STEP, 1.0)  # of |h|
CLAMPS = (0.5, TargetOptimization.clamp, 1.5, 3.0)  # of |h|
WEIGHTS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of as many as there are key dimensions
SHIFTS = (0, -1, 1, 2)  # of the layers by depth, in half sevenths of the depth
SHORT = 3  # layers of the shorter windows
WEIGHTS_EACH = 3  # covariance weights that are tried with the same targets


class Choice(NamedTuple):
    """One combination of settings. None: what the run's configuration says.

    Attributes:
        layers: critical layers, ascending; of ``boundary`` those that are written.
        first_step: of the target optimisation, in ``|h|``.
        clamp: radius of the ball that delta stays in, in ``|h|``.
        weight: of the covariance, in key dimensions.
    """

    layers: tuple[int, ...]
    first_step: float | None
    clamp: float | None
    weight: float | None

    @property
    def targets(self) -> tuple[Any, ...]:
        """What the targets of its first target layer depend on."""
        return self.layers, self.first_step, self.clamp


class Space(NamedTuple):
    """The values of each setting that are tried, the one that is decided without tuning first.

    Attributes:
        layers: sets of critical layers.
        first_steps, clamps, weights: see `Choice`; one value: it is given, and is not tuned.
    """

    layers: tuple[tuple[int, ...], ...]
    first_steps: tuple[float | None, ...]
    clamps: tuple[float | None, ...]
    weights: tuple[float | None, ...]

    @property
    def untuned(self) -> Choice:
        """What is decided without tuning."""
        return Choice(self.layers[0], self.first_steps[0], self.clamps[0], self.weights[0])

    @property
    def size(self) -> int:
        """How many combinations there are."""
        return len(self.layers) * len(self.first_steps) * len(self.clamps) * len(self.weights)


def windows(n_layers: int, usable: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the sets of consecutive layers that are tried, that by depth first.

    The layers of `layers_by_depth`, as many from half a seventh of the depth before them, and from
    one and two half sevenths behind; of the first and the third of these the first three alone.

    Args:
        n_layers: of the model.
        usable: layers whose down projection can be written.

    >>> windows(32, range(32))
    [(4, 5, 6, 7, 8), (2, 3, 4, 5, 6), (6, 7, 8, 9, 10), (8, 9, 10, 11, 12), (4, 5, 6), (6, 7, 8)]
    >>> windows(4, range(4))
    [(0, 1, 2), (1, 2), (2,)]
    """
    by_depth = layers_by_depth(n_layers)
    step = max(1, n_layers // 14)
    last = max(by_depth[-1], n_layers - 2)
    wide = [_window(by_depth[0] + shift * step, COUNT, last) for shift in SHIFTS]
    wide[0] = by_depth
    short = [wide[place][:SHORT] for place in (0, 2)]
    kept = [tuple(layer for layer in each if layer in usable) for each in [*wide, *short]]
    return [each for each in dict.fromkeys(kept) if each]


def _window(first: int, count: int, last: int) -> list[int]:
    return list(range(first, min(first + count - 1, last) + 1)) if first >= 0 else []


def laid_out(plan: str, candidates: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return of each set the layers that a plan writes or takes targets at, each set once.

    >>> laid_out("boundary", [(4, 5, 6, 7, 8), (4, 5, 6)])
    [(4, 8), (4, 6)]
    >>> laid_out("even", [(4, 5, 6, 7, 8), (4, 5, 6)])
    [(4, 5, 6, 7, 8), (4, 5, 6)]
    """
    found = []
    for layers in candidates:
        updates = layer_updates(plan, list(layers))
        needed = {each.layer for each in updates} | {each.target_layer for each in updates}
        found.append(tuple(sorted(needed)))
    return list(dict.fromkeys(found))


def draw(space: Space, count: int, seed: int) -> list[Choice]:
    """Draw combinations, what is decided without tuning first; those of the same targets together.

    Layers, first steps and clamps are drawn so that each value comes about as often as the others,
    and with each draw up to three covariance weights are tried, for they can have the first target
    layer's targets in common. The draw depends on how many values there are and on the seed alone:
    plans with as many sets of layers are tried on the same combinations.

    Args:
        space: what there is to draw from.
        count: how many to draw; no more than there are.
        seed: of the draw.

    Returns:
        Distinct combinations.
    """
    chance = random.Random(seed)
    each = min(WEIGHTS_EACH, len(space.weights))
    groups = _combinations(space, chance)
    chosen: list[Choice] = []
    for place, group in enumerate(groups):
        own = space.weights[:1] if place == 0 else ()
        others = [weight for weight in space.weights if weight not in own]
        weights = [*own, *chance.sample(others, each - len(own))]
        weights.sort(key=space.weights.index)
        chosen += [group._replace(weight=weight) for weight in weights]
    if len(chosen) < count:  # a small space: the weights that were left out
        every = [group._replace(weight=weight) for group in groups for weight in space.weights]
        chosen += [choice for choice in every if choice not in set(chosen)]
        kinds = [group.targets for group in groups]
        return sorted(chosen[:count], key=lambda choice: kinds.index(choice.targets))
    return chosen[:count]


def _combinations(space: Space, chance: random.Random) -> list[Choice]:
    """Return all layers, first steps and clamps: the untuned ones, then others evenly spread.

    Their weight is open.
    """
    axes = (space.layers, space.first_steps, space.clamps)
    layers, steps, clamps = (_shuffled_over_and_over(axis, chance) for axis in axes)
    count = len(axes[0]) * len(axes[1]) * len(axes[2])
    spread = [Choice(next(layers), next(steps), next(clamps), None) for _ in range(count)]
    every = [Choice(*each, None) for each in product(*axes)]
    chance.shuffle(every)
    untuned = space.untuned._replace(weight=None)
    return list(dict.fromkeys([untuned, *spread, *every]))


def _shuffled_over_and_over(values: Sequence[Any], chance: random.Random) -> Iterator[Any]:
    """Yield all values in a random order, then again in another, without end."""
    while True:
        yield from chance.sample(values, len(values))
