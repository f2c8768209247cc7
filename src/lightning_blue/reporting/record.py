"""The callback that owns a run's folder and writes the outputs of the run."""

from __future__ import annotations

import json
import time
from itertools import count
from pathlib import Path, PurePath
from typing import Any, Literal

from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only

from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.metrics.history import LossCurve, RunHistory
from lightning_blue.reporting import files, wandb_run
from lightning_blue.reporting.export import export_model
from lightning_blue.reporting.report import write_report
from lightning_blue.support.errors import InputError
from lightning_blue.support.storage import make_folder, write_atomic, writing

STATUS = "run.json"


class RunRecord(Callback):
    """Write a run's configuration, edits, summary, report and model into one folder.

    Args:
        name: of the run; a number is appended where the folder exists already.
        root: folder of all runs.
        wandb: ``offline`` (no key, no network), ``online`` or ``off``.
        project: of the W&B run.
        export: whether to save the edited model in Hugging Face format.
        checkpoint_every: batches from one checkpoint to the next; 0 writes none.
    """

    def __init__(
        self,
        name: str = "edit",
        root: str = "runs",
        wandb: Literal["offline", "online", "off"] = "offline",
        project: str = "lightning-blue",
        export: bool = True,
        checkpoint_every: int = 1,
    ) -> None:
        if checkpoint_every < 0:
            raise ValueError(f"checkpoint_every must not be negative, it is {checkpoint_every}")
        self.name, self.root = _inside(name), root
        self.wandb, self.project = wandb, project
        self.export = export
        self.checkpoint_every = checkpoint_every
        self.config = ""  # the resolved configuration, set by the command line
        self.settings: dict[str, Any] = {}
        self.report: Path | None = None
        self.resumed = False
        self._folder: Path | None = None
        self._wandb_id: str | None = None
        self._started = time.perf_counter()

    @property
    def folder(self) -> Path:
        """The run's folder; claimed at first use, so that no other run can have it too.

        The first process alone claims it, and writes into it.
        """
        if rank_zero_only.rank != 0 and self._folder is None:  # type: ignore[attr-defined]
            return Path(self.root) / self.name
        if self._folder is None:
            self._folder = claim_folder(Path(self.root), self.name)
        return self._folder

    def resume(self, folder: Path) -> None:
        """Go on in the folder of a run that was stopped."""
        self._folder, self.resumed = folder, True
        self._wandb_id = read_status(folder).get("wandb_id")

    def state_dict(self) -> dict[str, Any]:
        """Return how long the run has taken."""
        return {"seconds": time.perf_counter() - self._started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Add the time before the run was stopped."""
        self._started -= state_dict["seconds"]

    def loggers(self) -> list[Logger]:
        """Return a CSV logger and, unless it is off, a W&B logger in the run's folder.

        The first process alone has any.
        """
        if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return []
        loggers: list[Logger] = [
            CSVLogger(str(self.folder), name="", version="", flush_logs_every_n_steps=1)
        ]
        if self.wandb != "off":
            logger = wandb_run.make_logger(self.folder, self.project, self.wandb, self._wandb_id)
            self._wandb_id = logger.version
            loggers.append(logger)
        return loggers

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Save the resolved configuration and the requests that cannot be used."""
        self._started = time.perf_counter()
        if trainer.is_global_zero:
            make_folder(self.folder)
            write_atomic(self.folder / "config.yaml", self.config)
            self._write_status("running")
        wandb_run.define_axes(trainer.loggers)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Write what could not be used; give the loggers what was measured before a resume."""
        history = self._history(trainer)
        if not trainer.is_global_zero:
            return
        files.write_rejected(self.folder / "rejected.jsonl", history)
        if self.resumed:
            for logger in trainer.loggers:
                if isinstance(logger, CSVLogger):  # starts an empty file; W&B has its curves
                    for applied, values in history.logged:
                        logger.log_metrics({**values}, step=applied)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the loss curves of the batch."""
        for layer, losses in pl_module.target_losses.items():
            wandb_run.log_loss_curve(trainer.loggers, LossCurve(batch_idx, layer, losses.cpu()))

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write everything that was gathered; all ``on_train_end`` hooks have run by then."""
        self._write(trainer, pl_module, self.export)
        if trainer.is_global_zero:
            ended_early = self._history(trainer).ended_early
            self._write_status("ended early" if ended_early else "finished", ended_early)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write what was measured of a model as it is."""
        self._write(trainer, pl_module, export=False)
        if trainer.is_global_zero:
            self._write_status("finished")

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """End the W&B run."""
        wandb_run.finish(trainer.loggers)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Write what is there, marked as partial, and end the W&B run as failed."""
        history = self._history(trainer)
        if self._folder is not None and trainer.is_global_zero:
            reason = files.first_line(exception)
            if history.applied and not isinstance(exception, InputError):
                history.ended_early = history.ended_early or reason
                self._write(trainer, pl_module, export=False)
            self._write_status("failed", reason)
        wandb_run.finish(trainer.loggers, failed=True)

    def _write(self, trainer: Trainer, module: Any, export: bool) -> None:
        history = self._history(trainer)
        history.seconds["prepare"] = module.preparation_seconds
        history.seconds["total"] = time.perf_counter() - self._started
        if not trainer.is_global_zero:
            return
        files.write_edits(self.folder / "edits.jsonl", history)
        files.write_summary(self.folder / "summary.json", history)
        if export:
            export_model(self.folder / "model", module.model, module.tokenizer, history)
        self.report = write_report(self.folder, history, "model" if export else None)
        wandb_run.log_edits_table(trainer.loggers, history)
        wandb_run.log_summary(trainer.loggers, history)

    def _write_status(self, status: str, reason: str = "") -> None:
        content = {"status": status, "reason": reason, "wandb_id": self._wandb_id}
        write_atomic(self.folder / STATUS, json.dumps(content, indent=2) + "\n")

    def _history(self, trainer: Trainer) -> RunHistory:
        """Return the history that the run is measured into, with the settings that it shows."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MeasureEdits):
                callback.history.settings = self.settings | callback.history.settings
                return callback.history
        raise InputError(
            "RunRecord writes what a MeasureEdits callback has measured, and there is none",
            hint="add MeasureEdits() to the trainer's callbacks",
        )


def claim_folder(root: Path, name: str) -> Path:
    """Make the folder for a run, numbered from 2 where the name is taken.

    Raises:
        InputError: if it cannot be made.
    """
    for number in count(1):
        folder = root / (name if number == 1 else f"{name}-{number}")
        with writing(folder):
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                if not folder.exists() or folder.is_dir():
                    continue
                raise
        return folder
    raise AssertionError("count() has an end")


def folders_of(root: Path, name: str) -> list[Path]:
    """Return the folders of all runs of a name, the newest last."""
    numbered = [
        (int(folder.name.removeprefix(f"{name}-")), folder)
        for folder in root.glob(f"{name}-*")
        if folder.name.removeprefix(f"{name}-").isdigit()
    ]
    first = [root / name] if (root / name).is_dir() else []
    return [*first, *(folder for _, folder in sorted(numbered))]


def read_status(folder: Path) -> dict[str, Any]:
    """Return what is known of a run: status, reason, W&B id; empty if nothing is."""
    try:
        content = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _inside(name: str) -> str:
    """Refuse a name that would lead out of the folder of all runs."""
    path = PurePath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise InputError(
            f"{name!r} is not the name of a run",
            where="run.name",
            hint="give a name without '..' that does not start at the root; --run.root says where",
        )
    return name
