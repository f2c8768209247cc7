"""What a W&B run shows. Every function passes over loggers that are not W&B's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_blue.metrics.evaluation import RequestOutcome
from lightning_blue.metrics.history import LossCurve, RunHistory
from lightning_blue.reporting.files import answer_rows, summary
from lightning_blue.reporting.guarded import attempt, has_failed
from lightning_blue.reporting.views import batch_of, mean_losses, outcome_pairs
from lightning_blue.reporting.wandb_logger import AXIS, RunWandbLogger, sync_command

if TYPE_CHECKING:
    from wandb import Run

INNER_AXIS = "inner/step"
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
ANSWER_COLUMNS = (
    "case_id",
    "stage",
    "prompts",
    "prompt",
    "wanted",
    "aliases",
    "answer",
    "ended_by",
    "exact_match",
    "containment",
    "alias_match",
    "judge",
    "same",
)


def define_axes(loggers: Iterable[Logger]) -> None:
    """Put everything over edits applied, except the inner losses, which have their own axis.

    Lightning puts ``*`` over its global step, and which of two patterns counts is not defined where
    both match. Therefore this pattern itself is replaced, and inner losses are named one by one.
    """
    _tell(
        loggers,
        lambda run: run.define_metric("*", step_metric=AXIS, step_sync=True, overwrite=True),
    )


def expect_curves(loggers: Iterable[Logger], n_batches: float) -> None:
    """Tell how many batches there are: of one alone nothing but the inner losses has a course."""
    for logger in loggers:
        if isinstance(logger, RunWandbLogger):
            logger.curves = n_batches > 1


def log_loss_curve(loggers: Iterable[Logger], curve: LossCurve) -> None:
    """Log the mean losses of a batch at one target layer, in nats.

    The series ``inner/layer_L/total`` (nll, kl, weight_decay) go on from batch to batch, over
    inner steps counted from the first batch.
    """
    means = mean_losses(curve).tolist()
    names = [f"inner/layer_{curve.layer}/{term}" for term in TERMS]

    def log(run: Run) -> None:
        run.define_metric(INNER_AXIS, hidden=True)
        for name in names:
            run.define_metric(name, step_metric=INNER_AXIS)
        for step, terms in enumerate(means):
            values = {k: v for k, v in zip(names, terms, strict=True) if math.isfinite(v)}
            run.log({INNER_AXIS: curve.batch * len(means) + step, **values})

    _tell(loggers, log)


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

    def log(run: Run) -> None:
        from wandb import Table

        run.log({"edits": Table(columns=list(COLUMNS), data=rows)})

    _tell(loggers, log)


def log_answers_table(loggers: Iterable[Logger], history: RunHistory) -> None:
    """Log the table ``answers``: every answer that the model wrote freely, if it was asked to."""
    rows = answer_rows(history)
    if not rows:
        return

    def log(run: Run) -> None:
        from wandb import Table

        data = [[_cell(row[name]) for name in ANSWER_COLUMNS] for row in rows]
        run.log({"answers": Table(columns=list(ANSWER_COLUMNS), data=data)})

    _tell(loggers, log)


def log_pictures(loggers: Iterable[Logger], folder: Path) -> None:
    """Log the pictures of the report, ``FOLDER/NAME.png``, as ``report/NAME``."""
    pictures = sorted(folder.glob("*.png"))
    if not pictures:
        return

    def log(run: Run) -> None:
        from wandb import Image

        run.log({f"report/{path.stem}": Image(str(path)) for path in pictures})

    _tell(loggers, log)


def log_summary(loggers: Iterable[Logger], history: RunHistory) -> None:
    """Put the numbers of ``summary.json`` into the run's summary."""
    numbers = summary(history)
    _tell(loggers, lambda run: run.summary.update(numbers))


def finish(loggers: Iterable[Logger], *, failed: bool = False) -> None:
    """End the runs, those of loggers that have failed too: the next one here starts its own."""

    def end(run: Run) -> None:
        try:
            run.finish(exit_code=int(failed))
        except TimeoutError:
            folder = Path(run.dir).parent
            rank_zero_warn(f"W&B has not taken everything; send the rest: {sync_command(folder)}")

    _tell(loggers, end)
    for logger in loggers:
        if isinstance(logger, RunWandbLogger) and has_failed(logger):
            logger.abandon()


def _tell(loggers: Iterable[Logger], what: Callable[[Run], object]) -> None:
    """Do something with the run of each W&B logger that has not failed."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            attempt(logger, lambda logger=logger: what(logger.experiment))  # type: ignore[misc]


def _cell(value: object) -> object:
    """Write a list as people read it; W&B's columns are of one type."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _probability(outcome: RequestOutcome | None, target: str) -> float | None:
    return None if outcome is None else getattr(outcome, f"probability_{target}")
