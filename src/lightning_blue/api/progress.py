"""The one progress bar of `edit`."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from tqdm.auto import tqdm


class OneBar(Callback):
    """Counts the edits of a call, and says what is done before and after them.

    Args:
        shown: whether there is a bar at all.
    """

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._bar: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what comes before the first batch."""
        if self._shown:
            total = len(trainer.datamodule.requests)  # type: ignore[attr-defined]
            self._bar = tqdm(total=total, desc="preparing", unit="edit")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that editing has begun."""
        self._say("editing")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch."""
        if self._bar is not None:
            self._bar.update(len(batch))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is left to do."""
        self._say("measuring")

    def close(self) -> None:
        """Leave the bar as it is."""
        self._say("edited" if self._bar is not None and self._bar.n >= self._bar.total else "ended")
        if self._bar is not None:
            self._bar.close()

    def _say(self, what: str) -> None:
        if self._bar is not None:
            self._bar.set_description(what)
