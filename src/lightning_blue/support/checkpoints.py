"""Checkpoints of a run: written whole or not at all, the newest two, found again by number."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from lightning_blue.support.errors import InputError, first_line
from lightning_blue.support.storage import NotWritten, whole_file, writing

NEWEST = 2  # checkpoints that are kept
FOLDER = "checkpoints"
_NAME = re.compile(r"batch-(\d+)\.ckpt")


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there; reads tensors and plain values.

    A checkpoint that cannot be written costs a warning, once, and the run goes on: what it has
    edited until then would be lost otherwise. Those that were written before stay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failing = False  # whether the newest checkpoint could not be written
        self._warned = False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint, whole or not at all; warn where it cannot be written."""
        try:
            with writing(Path(path)), whole_file(Path(path)) as partial, partial.open("wb") as file:
                torch.save(checkpoint, file)
        except NotWritten as error:
            self.failing = True
            if not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"{error.path} could not be written: {error.reason}; the run goes on, and "
                    "what was saved before stays. Make room there, or leave out what is large: "
                    "--run.checkpoint_every=N writes fewer checkpoints"
                )
        else:
            self.failing = False

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, unless the one that takes its place could not be written."""
        if not self.failing:
            with suppress(OSError):
                super().remove_checkpoint(path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU, without running any code that it may hold.

        Raises:
            InputError: if it cannot be read.
        """
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for files that are damaged
            raise InputError(
                f"the checkpoint cannot be read: {first_line(error)}",
                where=str(path),
                hint="take the one before it, or start a new run",
            ) from error
        return checkpoint


class BatchCheckpoints(Callback):
    """Write a checkpoint when all that belongs to an edit batch is done, and keep the newest two.

    That is before the next batch starts, so that the measurements of the last one are in it; a run
    that is killed applies at most one batch again. What a checkpoint holds does not grow with the
    model: the edited weights, and the keys and measurements of the batches so far.

    Args:
        every: batches from one checkpoint to the next; 0 writes none.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 0:
            raise ValueError(f"checkpoint_every must not be negative, it is {every}")
        self.every = every
        self.folder: Path | None = None
        self._newest = 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Take the folder from the first process, which has claimed it."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        """Let a run that ended at a limit go on behind it once the limit is higher.

        And let validation, which counts batches over all epochs, come where it would have come:
        the batch before which a checkpoint was written counted as begun.
        """
        progress = trainer.fit_loop.epoch_loop.batch_progress
        progress.total.reset_on_restart()
        progress.is_last_batch = progress.current.ready >= trainer.num_training_batches

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Save the batches before this one."""
        self._save(trainer)

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        """Save the last batch, which no other follows."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        last = progress.is_last_batch or trainer.global_step == trainer.max_steps
        if trainer.state.fn == "fit" and not trainer.sanity_checking and last:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        applied = trainer.global_step
        if self.folder is None or not self.every or applied == 0 or applied == self._newest:
            return
        if applied % self.every:
            return
        path = self.folder / f"batch-{applied:05d}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        self._newest = applied
        if trainer.is_global_zero and path.exists():
            for old in checkpoints(self.folder)[:-NEWEST]:
                with suppress(OSError):
                    old.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest last."""
    return sorted(path for path in folder.glob("batch-*.ckpt") if _NAME.fullmatch(path.name))
