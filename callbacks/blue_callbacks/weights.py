"""Weights that callbacks may read and write, by id; half precision is accumulated in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from blue_callbacks.errors import NonFiniteError


class WeightId(NamedTuple):
    """Names one weight: its layer, and which of the layer's weights where several are edited.

    ``name`` is empty for a layer's only edited weight; for others it tells them apart, for
    instance ``experts.3`` or ``attention_output``.

    >>> str(WeightId(3)), str(WeightId(3, "experts.7"))
    ('layer3', 'layer3.experts.7')
    >>> WeightId.parse("layer3.experts.7")
    WeightId(layer=3, name='experts.7')
    """

    layer: int
    name: str = ""

    def __str__(self) -> str:
        """Spell the id as files and logs do."""
        return f"layer{self.layer}" + (f".{self.name}" if self.name else "")

    @classmethod
    def parse(cls, text: str) -> WeightId:
        """Read what ``str`` has written."""
        layer, _, name = text.removeprefix("layer").partition(".")
        return cls(int(layer), name)


class WeightStore(Protocol):
    """How callbacks reach a module's weights; all of them as ``(d_out, d_in)``.

    A module whose weights are sharded, quantised or on other devices brings a store of its own.
    """

    def read(self, weight: WeightId) -> Tensor:
        """Return the weight in float32 or better; not to be written to."""
        ...

    def write(self, weight: WeightId, value: Tensor) -> None:
        """Set the weight.

        Raises:
            NonFiniteError: if the value is not finite in the model's precision.
        """
        ...

    def add(self, weight: WeightId, left: Tensor, right: Tensor) -> None:
        """Add ``left @ right``, ``(d_out, n)`` and ``(n, d_in)``, from any device.

        Raises:
            NonFiniteError: as `write` does.
        """
        ...


class EditableWeights:
    """A store of weights that are plain tensors of the module.

    What is below float32 is accumulated in float32 beside the model, so that small updates are not
    lost to rounding; the model sees the rounded sum.

    Args:
        view: from an id to the tensor of the model, as a ``(d_out, d_in)`` view: writing to it
            changes the model. Asked anew each time, because modules move between devices.

    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> weights = EditableWeights(lambda weight: model.weight.data)
    >>> weights.write(WeightId(0), torch.zeros(2, 2))
    >>> weights.add(WeightId(0), torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 2.0]]))
    >>> model.weight.tolist()
    [[0.0, 2.0], [0.0, 0.0]]
    """

    def __init__(self, view: Callable[[WeightId], Tensor]) -> None:
        self._view = view
        self._accumulated: dict[WeightId, Tensor] = {}  # float32, of weights below it

    def read(self, weight: WeightId) -> Tensor:
        """Return the weight in float32 or better; not to be written to."""
        view = self._view(weight)
        if view.dtype in (torch.float32, torch.float64):
            return view
        accumulated = self._accumulated.get(weight)
        if accumulated is None or not torch.equal(accumulated.to(view), view):
            accumulated = view.float()  # new here, or set by somebody else
        self._accumulated[weight] = accumulated.to(view.device)
        return self._accumulated[weight]

    def write(self, weight: WeightId, value: Tensor) -> None:
        """Set the weight."""
        self._publish(weight, self.read(weight).copy_(value))

    def add(self, weight: WeightId, left: Tensor, right: Tensor) -> None:
        """Add ``left @ right``, ``(d_out, n)`` and ``(n, d_in)``."""
        current = self.read(weight)
        here = [factor.to(current.dtype).to(current.device) for factor in (left, right)]
        current.addmm_(*here)
        self._publish(weight, current)

    def go_on_from(self, earlier: EditableWeights) -> None:
        """Take over what another store of the same weights has summed up below their rounding."""
        self._accumulated = {w: value.clone() for w, value in earlier._accumulated.items()}

    def _publish(self, weight: WeightId, current: Tensor) -> None:
        """Let the model see a weight that was changed, if it is finite in the model's precision."""
        view = self._view(weight)
        if view.dtype != current.dtype:
            view.copy_(current)
        if not bool(torch.isfinite(view.sum(dtype=current.dtype))):
            raise NonFiniteError(f"the update of {weight} is not finite in {view.dtype}")


@contextmanager
def restored_on_error(
    store: WeightStore, weights: Sequence[WeightId]
) -> Iterator[dict[WeightId, Tensor]]:
    """Yield copies of the weights, and write these back if the block raises anything."""
    before = {weight: store.read(weight).clone() for weight in weights}
    try:
        yield before
    except BaseException:
        for weight, value in before.items():
            store.write(weight, value)
        raise
