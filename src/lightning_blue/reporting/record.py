"""The callback that owns a run's folder and writes what the run leaves behind."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path
from typing import Any, Literal

from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only

from blue_callbacks import EditGuard
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.metrics.history import RunHistory
from lightning_blue.reporting import files, wandb_run
from lightning_blue.reporting.export import export_model
from lightning_blue.reporting.report import write_report
from lightning_blue.support.storage import make_folder, write_atomic


class RunRecord(Callback):
    """Write a run's configuration, edits, summary, report and model into one folder.

    Args:
        name: of the run; a number is appended where the folder exists already.
        root: folder of all runs.
        wandb: ``offline`` (no key, no network), ``online`` or ``off``.
        project: of the W&B run.
        export: whether to save the edited model in Hugging Face format.
    """

    def __init__(
        self,
        name: str = "edit",
        root: str = "runs",
        wandb: Literal["offline", "online", "off"] = "offline",
        project: str = "lightning-blue",
        export: bool = True,
    ) -> None:
        self.name, self.root = name, root
        self.wandb, self.project = wandb, project
        self.export = export
        self.folder = _free_folder(Path(root), name)
        self.config = ""  # the resolved configuration, set by the command line
        self.settings: dict[str, Any] = {}
        self.report: Path | None = None
        self._started = time.perf_counter()

    def loggers(self) -> list[Logger]:
        """Return a CSV logger and, unless it is off, a W&B logger in the run's folder.

        The first process alone has any.
        """
        if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return []
        loggers: list[Logger] = [CSVLogger(str(self.folder), name="", version="")]
        if self.wandb != "off":
            loggers.append(wandb_run.make_logger(self.folder, self.project, self.wandb))
        return loggers

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Save the resolved configuration and the requests that cannot be used."""
        self._started = time.perf_counter()
        history = _history(trainer)
        history.settings |= self.settings
        if trainer.is_global_zero:
            make_folder(self.folder)
            write_atomic(self.folder / "config.yaml", self.config)
            files.write_rejected(self.folder / "rejected.jsonl", history)
        wandb_run.define_axes(trainer.loggers)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the loss curves of the batch."""
        for curve in _history(trainer).loss_curves[-len(pl_module.target_losses) :]:
            wandb_run.log_loss_curve(trainer.loggers, curve)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write everything that was gathered."""
        history = _history(trainer)
        history.guard_events = _guard_events(trainer)
        history.seconds["prepare"] = pl_module.preparation_seconds
        history.seconds["total"] = time.perf_counter() - self._started
        if not trainer.is_global_zero:
            return
        files.write_edits(self.folder / "edits.jsonl", history)
        files.write_summary(self.folder / "summary.json", history)
        if self.export:
            export_model(self.folder / "model", pl_module.model, pl_module.tokenizer, history)
        self.report = write_report(self.folder, history, "model" if self.export else None)
        wandb_run.log_edits_table(trainer.loggers, history)
        wandb_run.log_summary(trainer.loggers, history)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """End the W&B run."""
        wandb_run.finish(trainer.loggers)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """End the W&B run, marked as failed."""
        wandb_run.finish(trainer.loggers, failed=True)


def _history(trainer: Trainer) -> RunHistory:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, MeasureEdits):
            return callback.history
    raise RuntimeError("RunRecord needs a MeasureEdits callback before it")


def _guard_events(trainer: Trainer) -> list[dict[str, Any]] | None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EditGuard) and callback.action != "off":
            return callback.events
    return None


def _free_folder(root: Path, name: str) -> Path:
    """Return the folder for a run, numbered from 2 where the name is taken."""
    names = (name if n == 1 else f"{name}-{n}" for n in count(1))
    return next(root / free for free in names if not (root / free).exists())
