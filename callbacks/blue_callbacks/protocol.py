"""What a LightningModule must offer so that the callbacks here can edit it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from blue_callbacks.errors import EditRejected, InputError
from blue_callbacks.weights import WeightId, WeightStore

NAMED = 5  # edits that a message names


class EditableModule(Protocol):
    """A module whose layers hold linear maps from keys to values.

    ``batch`` is whatever the module's own dataloader yields: the edits that are applied together.
    ``n`` is the number of edits in it; columns keep their order in every answer.

    Optional: ``weights_of(layer)`` returns the ids of a layer's edited weights (by default one,
    without a name); ``propose_layers()`` returns critical layers, ascending, for a callback that
    was given none; ``prepare(critical, written, weight)`` is called once before the first batch
    with the critical layers, the written weights' ids and the covariance's weight (None: d_in);
    ``output_multiple(weight)`` says by how much the outputs at a layer move for a unit of the
    weight's own output, where that is not 1; ``request_ids(batch)`` and ``edit_name(batch,
    column)`` name edits in records and in messages; ``ordinary_loss()`` and
    ``retained_knowledge()`` are what `EditGuard` watches beside the weights; ``single_edit(batch,
    column)`` returns a batch of one edit, by which that is told from the others whose numbers are
    not finite.

    The baselines ask for other methods. Fine-tuning: ``edit_gradient(batch, columns, weight)``
    returns the losses ``(k,)`` of k edits, in nats per target token, and the gradient of their mean
    with respect to the weight, ``(d_out, d_in)``; ``propose_trained_layers()`` is asked in the
    place of ``propose_layers()``. In-context editing: ``remembering(batch)`` returns a context
    manager that puts a batch's facts where they are retrieved from, and takes them out again if its
    block raises.
    """

    @property
    def editable_weights(self) -> WeightStore:
        """The weights by id; :class:`EditableWeights` where they are plain tensors."""
        ...

    def key_covariance(self, weight: WeightId) -> Tensor:
        """Return the second moment of the weight's inputs over ordinary data, ``(d_in, d_in)``."""
        ...

    def edit_keys(self, batch: Any, weight: WeightId) -> Tensor:
        """Return the inputs of the weight for each edit, now, ``(d_in, n)``."""
        ...

    def edit_targets(self, batch: Any, layer: int) -> Tensor:
        """Find the outputs at the layer that would make each edit true, ``(d_out, n)``."""
        ...

    def edit_outputs(self, batch: Any, layer: int) -> Tensor:
        """Return the outputs at the layer for each edit, now, ``(d_out, n)``."""
        ...


def weights_of(module: EditableModule, layer: int) -> Sequence[WeightId]:
    """Return the ids of the weights that are edited at a layer, in the order of writing."""
    method = getattr(module, "weights_of", None)
    return [WeightId(layer)] if method is None else cast(Sequence[WeightId], method(layer))


def output_multiple(module: EditableModule, weight: WeightId) -> float:
    """Return by how much a layer's outputs move for a unit of a weight's own output."""
    method = getattr(module, "output_multiple", None)
    return 1.0 if method is None else float(method(weight))


def edit_name(module: EditableModule, batch: Any, column: int) -> str:
    """Name an edit of the batch in a message."""
    method = getattr(module, "edit_name", None)
    return f"edit {column} of the batch" if method is None else str(method(batch, column))


def edit_names(module: EditableModule, batch: Any, columns: Sequence[int]) -> str:
    """Name edits of the batch in a message, the first few of many."""
    named = ", ".join(edit_name(module, batch, column) for column in columns[:NAMED])
    more = len(columns) - NAMED
    return f"{named} and {more} more" if more > 0 else named


def not_finite(values: Tensor) -> list[int]:
    """Return the columns of ``(d, n)`` that hold NaN or infinity."""
    return (~torch.isfinite(values)).any(dim=0).nonzero().flatten().tolist()


def culprits(
    module: EditableModule, batch: Any, columns: list[int], read: Callable[[Any], Tensor]
) -> list[int]:
    """Return those of the columns that are not finite by themselves.

    Edits that are computed together share their NaN: a masked position still counts 0 x NaN.

    Args:
        module: that the batch is for.
        batch: of n edits.
        columns: that are not finite when all edits are read together.
        read: from a batch of one edit to its values, ``(d, 1)``.

    Returns:
        A part of the columns; all, where each alone is finite or the module reads none alone.
    """
    single = getattr(module, "single_edit", None)
    if single is None:
        return columns
    return [column for column in columns if not_finite(read(single(batch, column)))] or columns


def request_ids(module: EditableModule, batch: Any, n: int) -> tuple[str, ...]:
    """Return an id for each of the n edits of a batch; their column where the module has none."""
    method = getattr(module, "request_ids", None)
    return tuple(map(str, range(n))) if method is None else tuple(method(batch))


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
    method ``on_edit_batch(trainer, module, batch)`` is called in order. Where a callback rejects
    the batch (:class:`EditRejected`), the weights are as before it, and the run goes on or stops as
    the rejection says.

    Raises:
        InputError: if no callback of the trainer edits.
    """
    trainer = module.trainer
    hooks = edit_hooks(trainer, "on_edit_batch")
    if not hooks:
        raise InputError(
            "no callback of the trainer edits: the batch would change nothing",
            hint="add ClosedFormUpdate(layers=[...]) to the trainer's callbacks",
        )

    def edit() -> None:
        try:
            with torch.no_grad():
                for hook in hooks:
                    hook(trainer, module, batch)
        except EditRejected as rejection:
            trainer.should_stop = trainer.should_stop or rejection.stop

    module.optimizers().step(closure=edit)  # type: ignore[union-attr]


def edit_hooks(trainer: Trainer, name: str) -> list[Callable[..., None]]:
    """Return the methods of that name of all callbacks that have one, in order."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [getattr(callback, name) for callback in callbacks if hasattr(callback, name)]
