"""Keys and residuals that are not finite are refused by the name of the edits they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from blue_callbacks.errors import NonFiniteError
from blue_callbacks.protocol import EditableModule, culprits, edit_names, not_finite
from blue_callbacks.weights import WeightId


def require_finite_keys(module: EditableModule, batch: Any, weight: WeightId, keys: Tensor) -> None:
    """Refuse keys ``(d_in, n)`` that are not finite.

    Raises:
        NonFiniteError: naming the edits, which are read one by one for it.
    """
    bad = not_finite(keys)
    if bad:
        bad = culprits(module, batch, bad, lambda part: module.edit_keys(part, weight))
        raise _error(module, batch, f"keys of {weight}", bad)


def require_finite_residual(
    module: EditableModule,
    batch: Any,
    weight: WeightId,
    residual: Tensor,
    target: Tensor,
    layer: int,
) -> None:
    """Refuse a residual ``(d_out, n)`` that is not finite, of a target at a layer.

    Raises:
        NonFiniteError: naming the edits.
    """
    bad = not_finite(residual)
    if bad:
        bad = not_finite(target) or culprits(
            module, batch, bad, lambda part: module.edit_outputs(part, layer)
        )
        raise _error(module, batch, f"residual of {weight}", bad)


def _error(module: EditableModule, batch: Any, what: str, columns: Sequence[int]) -> NonFiniteError:
    names = edit_names(module, batch, columns)
    return NonFiniteError(
        f"{what} not finite for {names}; the weights are as they were before this batch"
    )
