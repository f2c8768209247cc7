"""Critical layers for a model that nobody has published any of: by depth."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_blue.support.errors import InputError

FIRST = 7  # the first critical layer stands at a seventh of the depth
COUNT = 5


def layers_by_depth(n_layers: int) -> list[int]:
    """Return five layers from a seventh of the depth on, none behind the middle.

    Published for MEMIT: 4 to 8 of 32 blocks (Llama-3-8B) and of 28 (Llama-3.2-3B, Qwen2.5-7B),
    which are these; 3 to 8 of 28 (GPT-J). It misses 4 to 8 of 16 (Llama-3.2-1B) by two layers, and
    the 13 to 17 of GPT2-XL's 48. Behind the last critical layer at least one block reads what was
    written.

    >>> [layers_by_depth(n) for n in (28, 32, 48)]
    [[4, 5, 6, 7, 8], [4, 5, 6, 7, 8], [6, 7, 8, 9, 10]]
    >>> [layers_by_depth(n) for n in (12, 6, 4, 2, 1)]
    [[1, 2, 3, 4, 5], [0, 1, 2, 3], [0, 1, 2], [0], [0]]
    """
    first = n_layers // FIRST
    last = min(first + COUNT - 1, n_layers // 2, n_layers - 2)
    return list(range(first, max(first, last) + 1))


def trained_layer(n_layers: int, usable: Sequence[int]) -> int:
    """Return the layer that fine-tuning trains where none is given: at 0.7 of the depth.

    LocFT-BF's published settings train 22 of 32 (Llama-3-8B), 23 of 32 (Mistral-7B) and, far below
    these, 6 of 28 (Qwen2.5-7B); its paper finds late layers the most reliable.

    Args:
        n_layers: of the model.
        usable: layers with a down projection that can be written, at least one.

    >>> [trained_layer(n, range(n)) for n in (32, 12, 4, 1)]
    [22, 8, 3, 0]
    """
    wanted = min(round(0.7 * n_layers), n_layers - 1)
    return min(usable, key=lambda layer: (abs(layer - wanted), layer))


def proposed_layers(n_layers: int, usable: Sequence[int]) -> list[int]:
    """Return those of `layers_by_depth` that can be edited.

    Args:
        n_layers: of the model.
        usable: layers with a down projection that can be written.

    Raises:
        InputError: if there is none, as in most mixtures of experts.
    """
    layers = [layer for layer in layers_by_depth(n_layers) if layer in usable]
    if not layers:
        wanted = ", ".join(map(str, layers_by_depth(n_layers)))
        named = f"[{','.join(map(str, usable))}]"
        raise InputError(
            f"none of the layers that are proposed by depth ({wanted} of {n_layers}) can be edited",
            where="update.layers",
            hint=f"choose among those that can be: --update.layers={named}",
        )
    return layers
