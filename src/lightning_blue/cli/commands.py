"""The commands behind ``python -m lightning_blue``."""

from __future__ import annotations

import logging
import math
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from transformers.utils import logging as transformers_logging

from blue_callbacks import (
    ClosedFormUpdate,
    EditGuard,
    NonFiniteError,
    SingularCovarianceError,
    UnsolvableError,
)
from lightning_blue.cli.baselines import require_closed_form
from lightning_blue.cli.parser import EditCLI, RunFileCLI
from lightning_blue.editing.covariance import covariance_file
from lightning_blue.editing.covariance_file import Collected
from lightning_blue.pretrain import FactCorpusModule, PretrainModule
from lightning_blue.reporting import MeasureEdits, RunRecord
from lightning_blue.reporting.run_folders import read_status
from lightning_blue.reporting.tables import WIDTH, score_table
from lightning_blue.reporting.text import protocol_sentence
from lightning_blue.support.errors import InputError, first_line, of_the_system
from lightning_blue.support.leftovers import sweep
from lightning_blue.support.processes import speaks
from lightning_blue.support.space import check_writable
from lightning_blue.support.text import counted
from lightning_blue.support.watch import ProcessLost


def run_command(command: str, args: Sequence[str]) -> int:
    """Run a command; return 0, 1 if editing had to stop, or 2 for input that cannot be used."""

    def work() -> int:
        _COMMANDS[command](args)
        return 0

    return carry_out(work)


def carry_out(work: Callable[[], int]) -> int:
    """Do the work of a command; return its exit code, or that of the error that ended it.

    Of several processes one reports: the first that is still there.
    """
    quiet()
    try:
        return work()
    except InputError as error:
        return _complain(str(error), 2)
    except MisconfigurationException as error:
        return _complain(f"{' '.join(str(error).split())}\n  where: trainer", 2)
    except SingularCovarianceError as error:
        return _complain(str(error), 2)
    except OSError as error:
        return _complain(str(of_the_system(error)), 2)
    except (NonFiniteError, UnsolvableError) as error:
        return _complain(str(error), 1)
    except torch.linalg.LinAlgError as error:  # what no closer place has named
        return _complain(f"a matrix cannot be decomposed: {first_line(error)}", 1)
    except ProcessLost as error:
        return _complain(str(error), error.exit_code)


def fit(args: Sequence[str]) -> None:
    """Edit facts batch by batch; print the scores and where the report is."""
    cli = EditCLI(args)
    record = cli.record
    if record.resumed and read_status(record.folder).get("status") == "finished":
        sys.stdout.write(f"the run is finished: {record.folder}\n")
        return
    checkpoint = cli.resume_from
    cli.trainer.fit(
        cli.model,
        datamodule=cli.datamodule,
        ckpt_path=checkpoint,
        weights_only=None if checkpoint is None else True,
    )
    if cli.trainer.is_global_zero:
        told = (ClosedFormUpdate, EditGuard)
        _say(cli.trainer, [note for kind in told for note in _only(cli.trainer, kind).notes])


def evaluate(args: Sequence[str]) -> None:
    """Measure a model, edited or not, against a data file without editing it."""
    cli = EditCLI(args, "evaluate")
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    if cli.trainer.is_global_zero:
        _say(cli.trainer, [])


def stats(args: Sequence[str]) -> None:
    """Collect the covariance of the layers that the update would write."""
    cli = EditCLI(args, "stats")
    update = _only(cli.trainer, ClosedFormUpdate)
    require_closed_form(update, "stats")
    module = cli.model.to(cli.trainer.strategy.root_device)
    weights = update.written_weights(module)
    module.prepare(update.layers, weights, update.solver.covariance_weight)
    layers = sorted(set(update.written_layers))
    file = covariance_file(module.model, module.tokenizer, module.covariance, layers)
    if not file.holds(layers):
        raise InputError(
            "the covariances could not be written",
            where=str(file.path),
            hint="make room there, or give another folder: --model.covariance.cache=FOLDER",
        )
    sys.stdout.write(f"covariance of layers {', '.join(map(str, layers))}: {file.path}\n")
    for name, value in module.key_covariances.about.items():
        if name != "covariance_file":
            sys.stdout.write(f"{name.removeprefix('covariance_')}: {value}\n")
    if not module.covariance.trust:
        for layer, collected in file.collected(layers).items():
            sys.stdout.write(f"layer {layer}: {_doubling(collected)}\n")


def _doubling(collected: Collected) -> str:
    """Say how far an update still moved when the tokens of its covariance doubled."""
    if not collected.changes:
        return (
            "how far an update still moves is not known: that takes text beyond what was collected "
            "(and --model.covariance.report_change)"
        )
    tokens, share = collected.changes[-1]
    if not math.isfinite(share):
        return f"half of the {tokens:,} tokens leave the covariance singular: take more of them"
    return f"from about half to {tokens:,} tokens, an update moved by {share:.0%}"


def analyze(args: Sequence[str]) -> None:
    """Make a study of the paper on a run file's model and data."""
    from lightning_blue.cli.analyze import analyze  # what no other command needs: a second

    analyze(args)


def pretrain(args: Sequence[str]) -> None:
    """Train a model until it knows the facts; print its recall."""
    cli = RunFileCLI(PretrainModule, FactCorpusModule, args, "pretrain")
    check_writable(cli.model.output)
    sweep(cli.model.output.parent)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    sys.stdout.write(f"\n{cli.model.recall_table()}\n\nmodel: {cli.model.output}\n")


def _say(trainer: Trainer, notes: Sequence[str]) -> None:
    """Print the scores, what should be known of them, and where the report is."""
    history = _only(trainer, MeasureEdits).history
    notes = [*textwrap.wrap(protocol_sentence(history), WIDTH), *notes]
    if history.ended_early:
        never = len(history.requests) - history.applied
        notes = [*notes, f"never applied: {counted(never, 'request')} ({history.ended_early})"]
    lines = "".join(f"{note}\n" for note in notes)
    report = _only(trainer, RunRecord).report
    sys.stdout.write(f"\n{score_table(history)}\n\n{lines}report: {report}\n")


class _Stderr(logging.Handler):
    """Writes what the package logs to whatever is standard error then."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{self.format(record)}\n")


def _only(trainer: Trainer, kind: type) -> Any:
    return next(c for c in trainer.callbacks if isinstance(c, kind))  # type: ignore[attr-defined]


def quiet() -> None:
    """Silence what Lightning and transformers say of things that are meant here."""
    torch.set_float32_matmul_precision("highest")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for pattern in (
        ".*does not have many workers.*",
        ".*overridden `transfer_batch_to_device`.*",
        ".*args parameter is intended to run.*",
        ".*module\\(s\\) in eval mode.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*exists and is not empty.*",
        ".*You defined a `validation_step`.*",  # studies edit without measuring in between
        ".*sync_dist=True.*",  # all processes log the same
    ):
        warnings.filterwarnings("ignore", pattern)
    own = logging.getLogger("lightning_blue")
    if not own.handlers:
        own.addHandler(_Stderr())
    own.setLevel(logging.INFO if rank_zero_only.rank == 0 else logging.ERROR)  # type: ignore[attr-defined]
    for name in (
        "pytorch.utilities.rank_zero",
        "fabric.utilities.seed",
        "fabric.utilities.distributed",
    ):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)


def _complain(message: str, code: int) -> int:
    if speaks():
        sys.stderr.write(f"error: {message}\n")
    return code


_COMMANDS = {
    "fit": fit,
    "evaluate": evaluate,
    "stats": stats,
    "analyze": analyze,
    "pretrain": pretrain,
}
