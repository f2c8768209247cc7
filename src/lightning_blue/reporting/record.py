"""The callback that owns a run's folder and writes the outputs of the run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any, Literal

import yaml
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from blue_callbacks import ClosedFormUpdate, EditGuard, NonFiniteError
from blue_callbacks.ranges import WHOLE, check_ranges
from lightning_blue.editing.decisions import decided_settings
from lightning_blue.editing.module import EditModule
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.metrics.history import LossCurve, RunHistory
from lightning_blue.reporting import files, wandb_run
from lightning_blue.reporting.disk_space import check_room, estimate
from lightning_blue.reporting.export import export_model
from lightning_blue.reporting.guarded import guarded, has_failed
from lightning_blue.reporting.report import PLOTS, write_report
from lightning_blue.reporting.retention import write_retention
from lightning_blue.reporting.run_folders import STATUS, claim_folder, inside, read_status
from lightning_blue.reporting.wandb_logger import RunWandbLogger, make_logger
from lightning_blue.support.checkpoints import FOLDER, checkpoints
from lightning_blue.support.errors import InputError, first_line
from lightning_blue.support.leftovers import sweep
from lightning_blue.support.locks import give_back, take
from lightning_blue.support.storage import (
    NotWritten,
    make_folder,
    unless_full,
    write_atomic,
)

TAGS = ("method", "model", "data", "plan", "solver")  # settings that a W&B run is tagged with


class RunRecord(Callback):
    """Write a run's configuration, edits, summary, report and model into one folder.

    Args:
        name: the run's name; a number is appended where the folder exists already.
        root: folder of all runs.
        wandb: ``offline`` (no key, no network), ``online`` or ``off``.
        project: the project of the W&B run.
        export: whether to save the edited model in Hugging Face format; in-context editing changes
            no weight, and its facts are saved in any case.
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
        self.name, self.root = inside(name), root
        self.wandb, self.project = wandb, project
        self.export = export
        self.checkpoint_every = checkpoint_every
        check_ranges("run", vars(self), checkpoint_every=WHOLE)
        self.config = ""  # the resolved configuration, set by the command line
        self.settings: dict[str, Any] = {}
        self.report: Path | None = None
        self.resumed = False
        self._folder: Path | None = None
        self._wandb_id: str | None = None
        self._stage = "fit"  # or test
        self._begun = False  # whether this process has said that the run is running
        self._started = time.perf_counter()

    @property
    def folder(self) -> Path:
        """The run's folder; rank 0 claims it at first use, so that no other run can have it too."""
        if self._folder is None and rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            self._folder = Path(self.root) / self.name  # where nothing is written from here
        if self._folder is None:
            self._folder = claim_folder(Path(self.root), self.name)
        return self._folder

    def give_folder_back(self) -> None:
        """Remove the folder where it was claimed for a run that has not begun."""
        mine = rank_zero_only.rank == 0 and not self.resumed  # type: ignore[attr-defined]
        if mine and self._folder is not None:
            give_back(self._folder)
            with suppress(OSError):  # something stands in it
                self._folder.rmdir()
            self._folder = None

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

        The first process alone has any. They are guarded: none of them can end the run.

        Raises:
            InputError: if another process is at work in the folder.
        """
        if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return []
        self._take_folder()  # the logger of curves removes the file that is there
        csv = CSVLogger(str(self.folder), name="", version="", flush_logs_every_n_steps=1)
        return [guarded(csv), *([] if self.wandb == "off" else [guarded(self._wandb_logger())])]

    def _wandb_logger(self) -> RunWandbLogger:
        tags = [PurePath(str(self.settings.get(key, ""))).name for key in TAGS]
        logger = make_logger(
            self.folder,
            self.project,
            "online" if self.wandb == "online" else "offline",
            self._wandb_id,
            group=self.name,
            tags=tags,
        )
        self._wandb_id = logger.version
        return logger

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Save the resolved configuration; give it to the loggers; say how much will be written.

        Raises:
            InputError: if the folder cannot be written, or has no room for the run.
        """
        self._started = time.perf_counter()
        pl_module.rounding.active = self.export
        if trainer.is_global_zero:
            sweep(Path(self.root), levels=3)  # runs, and the folders of each
            sweep(self.folder, levels=2)
            make_folder(self.folder)
            self._take_folder()
            self._stage = stage
            if not self.resumed:
                self._begin()
            if stage == "fit":
                check_room(self.folder, estimate(trainer, pl_module, self.export))
        for logger in trainer.loggers:
            logger.log_hyperparams(self._hyper_parameters())
        wandb_run.define_axes(trainer.loggers)

    def _take_folder(self) -> None:
        """Refuse a folder in which another process is at work: it would lose its records."""
        if not take(self.folder):
            raise InputError(
                "another process is making this run",
                where=str(self.folder),
                hint="let it end, or stop it; a second run needs a name of its own (run.name)",
            )

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Write what could not be used; give the loggers what was measured before a resume."""
        history = self._history(trainer)
        if not trainer.is_global_zero:
            return
        if self.resumed:  # the checkpoint was accepted: only now is the run's own file replaced
            self._begin()
        with unless_full("it is written again at the end"):
            files.write_rejected(self.folder / "rejected.jsonl", history)
        if history.resumed_after:
            for logger in trainer.loggers:
                if isinstance(logger, CSVLogger):  # starts an empty file; W&B has its curves
                    for applied, values in history.logged:
                        logger.log_metrics({**values}, step=applied)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Tell W&B whether there will be curves."""
        wandb_run.expect_curves(trainer.loggers, trainer.num_training_batches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the loss curves of the batch."""
        for layer, losses in pl_module.target_losses.items():
            wandb_run.log_loss_curve(trainer.loggers, LossCurve(batch_idx, layer, losses.cpu()))

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write everything that was gathered; all ``on_train_end`` hooks have run by then.

        Raises:
            InputError: naming what could not be written, after all else was.
        """
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
        """End the W&B run, and leave the folder to other processes."""
        wandb_run.finish(trainer.loggers)
        if trainer.is_global_zero:
            give_back(self.folder)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Write what is there, marked as partial, and end the W&B run as failed."""
        reason = first_line(exception)
        try:
            if trainer.is_global_zero and not isinstance(exception, InputError):
                self._write_partial(trainer, pl_module, exception, reason)
        finally:
            if self._begun and trainer.is_global_zero:
                with unless_full("nothing says that the run has failed"):
                    self._write_status("failed", reason)
            wandb_run.finish(trainer.loggers, failed=True)
            if trainer.is_global_zero:
                give_back(self.folder)

    def _write(self, trainer: Trainer, module: Any, export: bool) -> None:
        history = self._history(trainer)
        history.guard_events = _guard_events(trainer)
        if history.settings.get("site") == "auto":
            history.settings["site"] = module.site.name  # as it was measured
        if export and module.export_dtype != module.model.dtype:
            history.export_dtype = str(module.export_dtype).removeprefix("torch.")
            history.rounding_losses = module.rounding.losses
        history.seconds["prepare"] = module.preparation_seconds
        history.seconds["total"] = time.perf_counter() - self._started
        if not trainer.is_global_zero:
            return
        failures = self._write_outputs(trainer, module, history, export)
        wandb_run.log_edits_table(trainer.loggers, history)
        wandb_run.log_answers_table(trainer.loggers, history)
        wandb_run.log_pictures(trainer.loggers, self.folder / PLOTS)
        wandb_run.log_summary(trainer.loggers, history)
        if failures:
            raise self._not_written(failures)

    def _write_partial(
        self, trainer: Trainer, module: Any, exception: BaseException, reason: str
    ) -> None:
        """Write what was measured of a run that failed; what it failed of is worse than this.

        A signal leaves little time, and another error nothing to trust: what was measured so far
        has to do. Where a batch was not finite the model is as before it, measured and saved.
        """
        try:
            measuring = self._measuring(trainer)
            if not measuring.history.applied:
                return
            measuring.history.ended_early = measuring.history.ended_early or reason
            failed_batch = isinstance(exception, NonFiniteError)
            if failed_batch:
                measuring.measure_end(trainer, module)
            self._write(trainer, module, self.export and failed_batch)
        except Exception as error:
            rank_zero_warn(f"the report of the part that was done is not complete: {error}")

    def _begin(self) -> None:
        """Write the configuration and that the run is running."""
        write_atomic(self.folder / "config.yaml", self.config)
        self._write_status("running")
        self._begun = True

    def _write_outputs(
        self, trainer: Trainer, module: Any, history: RunHistory, export: bool
    ) -> list[NotWritten]:
        """Write one output after the other, each whole or not at all; return what failed."""
        folder = self.folder
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]

        def write_model() -> None:
            if module.memory.facts:  # no weight was changed
                write_atomic(folder / files.FACTS, module.memory.to_json())
            elif export:
                export_model(
                    folder / "model",
                    module.model,
                    module.tokenizer,
                    history,
                    module.export_dtype,
                    module.edited_names,
                )

        def report() -> None:
            there = export and (folder / "model").exists()
            self.report = write_report(folder, history, "model" if there else None)

        def write_metrics() -> None:
            if any(has_failed(each) for each in trainer.loggers if isinstance(each, CSVLogger)):
                files.write_metrics(folder / "metrics.csv", history)

        outputs: list[Callable[[], None]] = [
            lambda: files.write_edits(folder / "edits.jsonl", history),
            lambda: files.write_summary(folder / "summary.json", history),
            lambda: files.write_answers(folder / "answers.jsonl", history),
            lambda: files.write_rejected(folder / "rejected.jsonl", history),
            lambda: write_retention(folder / "retention.csv", history),
            write_metrics,
            write_model,
            report,
            *(c.write_pending for c in callbacks if hasattr(c, "write_pending")),
        ]
        failures = []
        for write in outputs:
            try:
                write()
            except NotWritten as error:
                failures.append(error)
        return failures

    def _not_written(self, failures: Sequence[NotWritten]) -> InputError:
        names = ", ".join(str(error.path.relative_to(self.folder)) for error in failures)
        go_on = " with --ckpt_path=last" if checkpoints(self.folder / FOLDER) else ""
        return InputError(
            f"{names} could not be written: {failures[0].reason}",
            where=str(self.folder.absolute()),
            hint=f"make room there, and run the same command again{go_on}",
        )

    def _hyper_parameters(self) -> dict[str, Any]:
        """Return the resolved configuration under flat keys, ``update/plan`` for instance."""
        named = {"method": self.settings["method"]} if "method" in self.settings else {}
        return named | files.flat(yaml.safe_load(self.config) if self.config else self.settings)

    def _write_status(self, status: str, reason: str = "") -> None:
        content = {
            "status": status,
            "reason": reason,
            "command": self._stage,
            "name": self.name,
            "wandb_id": self._wandb_id,
        }
        write_atomic(self.folder / STATUS, json.dumps(content, indent=2) + "\n")

    def _history(self, trainer: Trainer) -> RunHistory:
        """Return the history that the run is measured into, with the settings that it shows."""
        history = self._measuring(trainer).history
        module = trainer.lightning_module
        found = dict(getattr(module, "found_settings", {}))
        for update in (c for c in trainer.callbacks if isinstance(c, ClosedFormUpdate)):  # type: ignore[attr-defined]
            if self._stage == "fit" and isinstance(module, EditModule):
                found |= decided_settings(module, update)
        history.settings = self.settings | history.settings | found
        return history

    def _measuring(self, trainer: Trainer) -> MeasureEdits:
        """Return the callback that measures the run."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MeasureEdits):
                return callback
        raise InputError(
            "RunRecord writes what a MeasureEdits callback has measured, and there is none",
            hint="add MeasureEdits() to the trainer's callbacks",
        )


def _guard_events(trainer: Trainer) -> list[dict[str, Any]] | None:
    """Return the events of a guard that has judged a batch."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EditGuard) and callback.readings:
            return callback.events
    return None
