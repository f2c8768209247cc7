"""The progress bar of a run: edit batches, not epochs."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class EditProgressBar(TQDMProgressBar):
    """Count edit batches; bars of the target optimisation and the evaluation appear below it."""

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Say edit batches where Lightning says epoch."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("edit batches")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Show no version number of a logger."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
