"""How much a run will write, estimated before any work is spent."""

from __future__ import annotations

import logging
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
        records: in a checkpoint, at most, of all edits: keys and factors.
        kept: checkpoints that are kept.
    """

    model: int
    weights: int
    records: int
    kept: int

    @property
    def certain(self) -> int:
        """The least that has to fit: the model and one checkpoint."""
        return self.model + self.weights

    @property
    def total(self) -> int:
        """What will stand there in the end, about; plots and tables are small beside it."""
        return self.model + self.kept * (self.weights + self.records)


def estimate(trainer: Trainer, module: Any, export: bool) -> Estimate:
    """Estimate what a run writes: the edited model, and checkpoints.

    A checkpoint holds the edited weights, ``(d_out, d_in)`` each, the unedited ones too where a
    transform at the end needs them, and of n edits at most ``n (d_out + 2 d_in)`` values in float32
    for each weight.

    Args:
        trainer: with its callbacks and the requests.
        module: offers ``model`` and the protocol of the callbacks.
        export: whether the edited model is saved.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    data = trainer.datamodule  # type: ignore[attr-defined]
    n = len(data.requests)
    parameters = module.model.parameters() if export else []
    model = sum(weight.numel() * weight.element_size() for weight in parameters)
    saving = [c for c in callbacks if isinstance(c, BatchCheckpoints) and c.folder is not None]
    every = saving[0].every if saving else 0
    written = -(-n // data.batch_size) // every if every else 0
    weights = records = 0
    for update in [c for c in callbacks if isinstance(c, ClosedFormUpdate)] if written else []:
        copies = 1 if update.post_edit_transform is None else 2
        for weight in _written(update, module):
            d_out, d_in = weight.shape
            weights += copies * weight.numel() * weight.element_size()
            records += 4 * n * (d_out + 2 * d_in)
    return Estimate(model, weights, records, min(NEWEST, written))


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
