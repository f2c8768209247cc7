"""Refuse Trainer settings under which edits would be applied twice, in part, or not at all."""

from __future__ import annotations

from lightning import Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from blue_callbacks.errors import InputError

NOTHING = "nothing would be edited"


def check_trainer(trainer: Trainer) -> None:
    """Check the settings of a Trainer that is about to edit.

    Raises:
        InputError: naming the setting, what it would do, and what to choose instead.
    """
    if trainer.max_epochs != 1:
        what = NOTHING if trainer.max_epochs == 0 else "every batch would be edited again and again"
        _refuse("max_epochs", trainer.max_epochs, what, "max_epochs=1: one pass over the requests")
    if trainer.max_steps == 0:
        _refuse("max_steps", 0, NOTHING, "leave it out, or give the number of batches to apply")
    if trainer.limit_train_batches == 0:
        _refuse("limit_train_batches", 0, NOTHING, "leave it out")
    if getattr(trainer, "overfit_batches", 0):
        _refuse(
            "overfit_batches", "given", "a part of the requests would be edited", "leave it out"
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        name = type(trainer.strategy).__name__
        what = "the closed form needs whole weights in every process"
        _refuse("strategy", name, what, "one device, or ddp: each process holds the whole model")


def leave_gradients_unscaled(trainer: Trainer) -> None:
    """Take away the gradient scaler of ``16-mixed``: an edit step has no gradients to scale.

    The scaler would look for them after the weights were written, and fail.
    """
    plugin = trainer.precision_plugin
    if isinstance(plugin, MixedPrecision):
        plugin.scaler = None


def _refuse(name: str, value: object, what: str, hint: str) -> None:
    raise InputError(f"with {name}={value}, {what}", where=f"trainer.{name}", hint=hint)
