"""What a LightningModule must offer so that the callbacks here can edit it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer


class EditableModule(Protocol):
    """A module whose layers hold linear maps from keys to values.

    ``batch`` is whatever the module's own dataloader yields: the edits that are applied together.
    ``n`` is the number of edits in it; columns keep their order in every answer.
    """

    def editable_weight(self, layer: int) -> Tensor:
        """Return the weight as a ``(d_out, d_in)`` view; writing to it changes the model."""
        ...

    def key_covariance(self, layer: int) -> Tensor:
        """Return the second moment of the layer's keys over ordinary inputs, ``(d_in, d_in)``."""
        ...

    def edit_keys(self, batch: Any, layer: int) -> Tensor:
        """Return the inputs of the layer's weight for each edit, now, ``(d_in, n)``."""
        ...

    def edit_targets(self, batch: Any, layer: int) -> Tensor:
        """Find the outputs at the layer that would make each edit true, ``(d_out, n)``."""
        ...

    def edit_outputs(self, batch: Any, layer: int) -> Tensor:
        """Return the outputs at the layer for each edit, now, ``(d_out, n)``."""
        ...


class EditStepOptimizer(Optimizer):
    """An optimizer whose step applies one edit batch.

    The closure does the work; going through an optimizer makes Lightning's ``global_step``, and
    with it ``max_steps`` and checkpoint intervals, count edit batches.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, defaults={})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure, which writes the weights."""
        return None if closure is None else closure()


def apply_edit_batch(module: LightningModule, batch: Any) -> None:
    """Apply one edit batch: call this in ``training_step``, with manual optimisation.

    Steps the module's optimizer once; inside that step every callback of the trainer that has a
    method ``on_edit_batch(trainer, module, batch)`` is called in order.
    """
    trainer = module.trainer

    def edit() -> None:
        with torch.no_grad():
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                hook = getattr(callback, "on_edit_batch", None)
                if hook is not None:
                    hook(trainer, module, batch)

    module.optimizers().step(closure=edit)  # type: ignore[union-attr]
