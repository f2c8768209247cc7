"""What a W&B run shows. Every function passes over loggers that are not W&B's."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import wandb
from lightning.pytorch.loggers import Logger, WandbLogger

from lightning_blue.metrics.evaluation import RequestOutcome
from lightning_blue.metrics.history import LossCurve, RunHistory
from lightning_blue.reporting.files import summary
from lightning_blue.reporting.views import batch_of, mean_losses, outcome_pairs
from lightning_blue.support.storage import make_folder

AXIS, INNER_AXIS = "edits/applied", "inner/step"
TERMS = ("total", "nll", "kl", "weight_decay")
COLUMNS = (
    "case_id",
    "batch",
    "subject",
    "prompt",
    "target_new",
    "target_true",
    "text before",
    "text after",
    "probability of new before",
    "probability of new after",
    "probability of true before",
    "probability of true after",
)


def make_logger(
    folder: Path, project: str, mode: Literal["offline", "online"], run_id: str | None = None
) -> WandbLogger:
    """Return a logger that writes under ``folder`` and prints nothing.

    ``run_id`` is the id of the W&B run to go on with; a new one by default.

    The run itself starts when the logger is used first; ``offline`` needs no key and no network.

    Raises:
        InputError: if the folder cannot be created.
    """
    make_folder(folder)  # wandb turns to a temporary folder if this one does not exist
    quiet = wandb.Settings(silent=True, console="off")
    wandb.termsetup(quiet, None)  # for what is said before the run has its settings
    return WandbLogger(
        project=project,
        name=folder.name,
        id=run_id or secrets.token_hex(4),
        resume="allow",
        save_dir=folder,
        offline=mode == "offline",
        settings=quiet,
    )


def define_axes(loggers: Iterable[Logger]) -> None:
    """Put everything over edits applied, except the inner losses, which have their own axis.

    Lightning puts ``*`` over its global step, and which of two patterns counts is not defined where
    both match. Therefore this pattern itself is replaced, and inner losses are named one by one.
    """
    for run in _runs(loggers):
        run.define_metric("*", step_metric=AXIS, step_sync=True, overwrite=True)


def log_loss_curve(loggers: Iterable[Logger], curve: LossCurve) -> None:
    """Log the mean losses of a batch at one target layer, in nats.

    The series ``inner/layer_L/total`` (nll, kl, weight_decay) go on from batch to batch, over
    inner steps counted from the first batch.
    """
    means = mean_losses(curve).tolist()
    names = [f"inner/layer_{curve.layer}/{term}" for term in TERMS]
    for run in _runs(loggers):
        run.define_metric(INNER_AXIS, hidden=True)
        for name in names:
            run.define_metric(name, step_metric=INNER_AXIS)
        for step, terms in enumerate(means):
            values = {k: v for k, v in zip(names, terms, strict=True) if math.isfinite(v)}
            run.log({INNER_AXIS: curve.batch * len(means) + step, **values})


def log_edits_table(loggers: Iterable[Logger], history: RunHistory) -> None:
    """Log the table ``edits``: each request with texts and probabilities before and after."""
    rows = [
        [
            request.case_id,
            batch_of(history, index),
            request.subject,
            request.text,
            request.target_new,
            request.target_true,
            *(outcome and outcome.continuation for outcome in (before, after)),
            *(_probability(outcome, "new") for outcome in (before, after)),
            *(_probability(outcome, "true") for outcome in (before, after)),
        ]
        for index, (request, before, after) in enumerate(outcome_pairs(history))
    ]
    for run in _runs(loggers):
        run.log({"edits": wandb.Table(columns=list(COLUMNS), data=rows)})


def log_summary(loggers: Iterable[Logger], history: RunHistory) -> None:
    """Put the numbers of ``summary.json`` into the run's summary."""
    numbers = summary(history)
    for run in _runs(loggers):
        run.summary.update(numbers)


def finish(loggers: Iterable[Logger], *, failed: bool = False) -> None:
    """End the runs, so that the next one in this process starts its own."""
    for run in _runs(loggers):
        run.finish(exit_code=int(failed))


def _runs(loggers: Iterable[Logger]) -> list[wandb.Run]:
    return [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]


def _probability(outcome: RequestOutcome | None, target: str) -> float | None:
    return None if outcome is None else getattr(outcome, f"probability_{target}")
