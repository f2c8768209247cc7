"""Plans: which layer is written, with whose target, with what share of the residual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class LayerUpdate(NamedTuple):
    """One weight to write: ``share * (target - output)`` at ``target_layer`` goes to ``layer``."""

    layer: int
    target_layer: int
    share: float


def even(layers: Sequence[int]) -> list[LayerUpdate]:
    """Spread the last layer's residual over all critical layers (MEMIT, Eq. 6 of the paper).

    Each layer takes ``1 / layers left`` of what still remains when its turn comes.
    """
    last = layers[-1]
    return [LayerUpdate(layer, last, 1 / (len(layers) - i)) for i, layer in enumerate(layers)]


def square_root(layers: Sequence[int]) -> list[LayerUpdate]:
    """Spread the last layer's residual, each layer taking ``1 / sqrt(layers left)`` (PMET)."""
    last = layers[-1]
    return [LayerUpdate(layer, last, (len(layers) - i) ** -0.5) for i, layer in enumerate(layers)]


def boundary(layers: Sequence[int]) -> list[LayerUpdate]:
    """Give the first and the last critical layer a target of their own (BLUE, Sec. 4.3)."""
    return [LayerUpdate(layer, layer, 1.0) for layer in dict.fromkeys((layers[0], layers[-1]))]


def computed(layers: Sequence[int]) -> list[LayerUpdate]:
    """Give every critical layer a target of its own (Table 1 of the paper)."""
    return [LayerUpdate(layer, layer, 1.0) for layer in layers]


def first(layers: Sequence[int]) -> list[LayerUpdate]:
    """Write the first critical layer only; a baseline for what the boundary plan gains."""
    return [LayerUpdate(layers[0], layers[0], 1.0)]


def last(layers: Sequence[int]) -> list[LayerUpdate]:
    """Write the last critical layer only; a baseline for what the boundary plan gains."""
    return [LayerUpdate(layers[-1], layers[-1], 1.0)]


def none(layers: Sequence[int]) -> list[LayerUpdate]:
    """Write no layer; the plan of methods that leave the weights alone (in-context editing)."""
    return []


Plan = Callable[[Sequence[int]], list[LayerUpdate]]

PLANS: dict[str, Plan] = {
    "even": even,
    "square_root": square_root,
    "boundary": boundary,
    "computed": computed,
    "first": first,
    "last": last,
    "none": none,
}


def layer_updates(plan: str, layers: Sequence[int]) -> list[LayerUpdate]:
    """Lay out a named plan over the critical layers.

    Args:
        plan: a name in ``PLANS``.
        layers: critical layers, ascending, e.g. ``[4, 5, 6, 7, 8]``.

    Raises:
        ValueError: if the plan is unknown, or the layers are empty, repeated or not ascending.

    >>> layer_updates("first", [4, 5, 6, 7, 8])
    [LayerUpdate(layer=4, target_layer=4, share=1.0)]
    """
    if plan not in PLANS:
        raise ValueError(f"unknown plan {plan!r}; the plans are {', '.join(PLANS)}")
    if not layers or list(layers) != sorted(set(layers)) or min(layers) < 0:
        raise ValueError(
            f"critical layers must be distinct, ascending and not negative, not {list(layers)}"
        )
    return PLANS[plan](layers)
