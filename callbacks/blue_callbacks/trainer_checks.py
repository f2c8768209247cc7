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
    _check_gradients(trainer)
    _check_validation(trainer)
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        name = type(trainer.strategy).__name__
        what = "the closed form needs whole weights in every process"
        _refuse("strategy", name, what, "one device, or ddp: each process holds the whole model")


def _check_gradients(trainer: Trainer) -> None:
    if trainer.gradient_clip_val:
        what = "nothing would be clipped: an edit step has no gradients"
        _refuse("gradient_clip_val", trainer.gradient_clip_val, what, "leave it out")
    if trainer.accumulate_grad_batches != 1:
        what = "nothing would be accumulated: an edit step has no gradients"
        hint = "leave it out; data.batch_size says how many requests are edited together"
        _refuse("accumulate_grad_batches", trainer.accumulate_grad_batches, what, hint)


def _check_validation(trainer: Trainer) -> None:
    for name in ("val_check_interval", "check_val_every_n_epoch"):
        value = getattr(trainer, name, None)  # Lightning sets no interval that is a duration
        if isinstance(value, int | float) and value <= 0:  # Lightning divides by it, after a batch
            _refuse(name, value, "it is never time to validate", "give 1 or more, or leave it out")


def leave_gradients_unscaled(trainer: Trainer) -> None:
    """Take away the gradient scaler of ``16-mixed``: an edit step has no gradients to scale.

    The scaler would look for them after the weights were written, and fail.
    """
    plugin = trainer.precision_plugin
    if isinstance(plugin, MixedPrecision):
        plugin.scaler = None


def _refuse(name: str, value: object, what: str, hint: str) -> None:
    raise InputError(f"with {name}={value}, {what}", where=f"trainer.{name}", hint=hint)
