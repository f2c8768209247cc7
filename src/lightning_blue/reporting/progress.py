"""How far a run is: a progress bar in a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from lightning_blue.metrics import table
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.metrics.history import RunHistory
from lightning_blue.support.text import counted


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


class ProgressLines(Callback):
    """Write a line for each edit batch to standard error, for runs that no terminal shows.

    The line of a batch is written when the next one starts or editing ends: what was measured of
    the batch is known by then, and its time is whole. Therefore this callback comes before those
    that measure.
    """

    def __init__(self) -> None:
        self._batch: int | None = None  # that is under way
        self._applied = 0  # edits, before it
        self._first = 0  # batch of this process
        self._started = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what comes before the first batch, which takes long on a large model."""
        n = len(_history(trainer).requests)
        _say(
            trainer,
            f"{counted(n, 'request')}: contexts, covariances and the unedited model come first",
        )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write the line of the batch before this one."""
        if self._batch is None:
            self._first, self._started = batch_idx, time.perf_counter()
        self._finish(trainer)
        self._batch, self._applied = batch_idx, _history(trainer).applied

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last batch's line, and what is done now."""
        self._finish(trainer, over=True)
        _say(trainer, "editing is done: measuring all edits again")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what takes so long."""
        _say(trainer, f"measuring {counted(len(_history(trainer).requests), 'request')}")

    def _finish(self, trainer: Trainer, over: bool = False) -> None:
        """Write the line of the batch that was under way."""
        if self._batch is None:
            return
        history = _history(trainer)
        batches = int(trainer.num_training_batches)
        if trainer.max_steps > 0:
            batches = min(batches, trainer.max_steps)
        done = self._batch + 1
        each = (time.perf_counter() - self._started) / (done - self._first)
        left = 0 if over else batches - done
        parts = [
            f"{history.applied:,} of {counted(len(history.requests), 'edit')}",
            _efficacy(history) if history.applied > self._applied else "rejected",
            f"about {duration(each * left)} of editing left" if left else "",
        ]
        _say(trainer, f"batch {done} of {batches}: {', '.join(filter(None, parts))}")


def duration(seconds: float) -> str:
    """Write a time that is only known roughly.

    >>> [duration(s) for s in (0.4, 47, 600, 12_000)]
    ['1 s', '47 s', '10 min', '3 h 20 min']
    """
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _history(trainer: Trainer) -> RunHistory:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((c.history for c in callbacks if isinstance(c, MeasureEdits)), RunHistory())


def _efficacy(history: RunHistory) -> str:
    """Say how many edits of the newest batch were written, by the first metric that there is."""
    metrics = history.of("batch")[-1].metrics
    spec = next((spec for spec in table.METRICS if spec.name in metrics), None)
    value = metrics[spec.name].get("value") if spec else None
    return "" if spec is None or value is None else f"{spec.title} {value:.1f}"


def _say(trainer: Trainer, line: str) -> None:
    if trainer.is_global_zero:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()  # a job's log is read while it runs
