"""How much a run will write, estimated before any work is spent."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lightning import Trainer
from torch import Tensor

from blue_callbacks import ClosedFormUpdate
from lightning_blue.support.checkpoints import NEWEST, BatchCheckpoints
from lightning_blue.support.space import free_space, require_space, size

log = logging.getLogger(__name__)

HINT = (
    "make room there, choose another --run.root, or write less: --run.export=false leaves out the "
    "edited model, --run.checkpoint_every=0 the checkpoints"
)


class Estimate(NamedTuple):
    """Bytes that a run will write.

    Attributes:
        model: the edited model; 0 if it is not exported.
        weights: the edited weights in a checkpoint; 0 if none is written.
        keys: past keys of all edits in a checkpoint.
        kept: checkpoints that are kept.
        records: of all batches, each once.
    """

    model: int = 0
    weights: int = 0
    keys: int = 0
    kept: int = 0
    records: int = 0

    @property
    def certain(self) -> int:
        """The least that has to fit: the model and one checkpoint."""
        return self.model + self.weights

    @property
    def total(self) -> int:
        """What will stand there in the end, about; plots and tables are small beside it."""
        return self.model + self.kept * (self.weights + self.keys) + self.records


def estimate(trainer: Trainer, module: Any, export: bool) -> Estimate:
    """Estimate what a run writes: see `size_of_run`.

    Args:
        trainer: with its callbacks and the requests.
        module: offers ``model``, ``export_dtype``, ``blocks`` and the protocol of the callbacks.
        export: whether the edited model is saved.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    data = trainer.datamodule  # type: ignore[attr-defined]
    saving = [c for c in callbacks if isinstance(c, BatchCheckpoints) and c.folder is not None]
    return size_of_run(
        [c for c in callbacks if isinstance(c, ClosedFormUpdate)],
        module,
        len(data.requests),
        data.batch_size,
        export=export,
        checkpoint_every=saving[0].every if saving else 0,
        records=any(hasattr(callback, "write_pending") for callback in callbacks),
    )


def size_of_run(
    updates: Iterable[ClosedFormUpdate],
    module: Any,
    n: int,
    batch_size: int,
    *,
    export: bool = True,
    checkpoint_every: int = 1,
    records: bool = True,
) -> Estimate:
    """Estimate what a run of n edits writes: the model, checkpoints, and a record of each batch.

    A checkpoint holds the edited weights, ``(d_out, d_in)`` each, the unedited ones too where a
    transform at the end needs them, and the past keys, ``(d_in, n)``. Records hold factors and keys
    of each edit, ``d_out + 2 d_in`` values, and under RECT a bit for each entry of the weight; of a
    fine-tuned batch, the whole change. The model is counted in the dtype that it is saved in, all
    else as float32 or what is wider.

    Args:
        updates: the callbacks that write edits.
        module: as in `estimate`.
        n: edits.
        batch_size: of them.
        export: whether the edited model is saved.
        checkpoint_every: batches from one checkpoint to the next; 0 writes none.
        records: whether a record of each batch is kept.
    """
    updates, batches = list(updates), -(-n // batch_size)
    saved = export and not any(update.plan == "none" for update in updates)  # nothing is edited
    parameters = module.model.parameters() if saved else []
    model = sum(weight.numel() * module.export_dtype.itemsize for weight in parameters)
    kept = min(NEWEST, batches // checkpoint_every) if checkpoint_every else 0
    weights = keys = recorded = 0
    for update in updates:
        copies = 1 if update.post_edit_transform is None else 2
        for weight in _written(update, module):
            d_out, d_in = weight.shape
            weights += copies * weight.numel() * weight.element_size()
            keys += 4 * n * d_in if update.past_keys else 0
            solved = update.solver.closed_form  # what is fine-tuned is recorded whole
            recorded += 4 * (n * (d_out + 2 * d_in) if solved else batches * weight.numel())
            recorded += 0 if update.rect_keep is None else batches * weight.numel() // 8
    return Estimate(model, weights if kept else 0, keys, kept, recorded if records else 0)


def _written(update: ClosedFormUpdate, module: Any) -> list[Tensor]:
    """Return the weights that the plan writes; a layer that does not exist is refused later."""
    ids = dict.fromkeys(update.written_weights(module))
    layers = range(len(module.blocks))
    return [module.editable_weights.read(each) for each in ids if each.layer in layers]


def check_room(folder: Path, needed: Estimate) -> None:
    """Say how much a run will write, and refuse one that certainly does not fit.

    Raises:
        InputError: if there is less space than the model and one checkpoint take.
    """
    require_space(folder, needed.certain, "the edited model and a checkpoint", HINT)
    free = free_space(folder)
    if free is not None:
        log.info(
            "this run will write about %s to %s; %s are free",
            *(size(needed.total), folder, size(free)),
        )
