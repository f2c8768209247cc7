"""The commands behind ``python -m lightning_blue``: LightningCLI in front of the Trainer."""

from __future__ import annotations

import logging
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any

import torch
import wandb
from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from transformers.utils import logging as transformers_logging

from blue_callbacks import ClosedFormUpdate, EditGuard, NonFiniteError, SingularCovarianceError
from lightning_blue.cli.run_files import explain, with_bases
from lightning_blue.data import EditDataModule
from lightning_blue.editing import edit_module
from lightning_blue.editing.covariance import covariance_file
from lightning_blue.pretrain import FactCorpusModule, PretrainModule
from lightning_blue.reporting import MeasureEdits, RunRecord
from lightning_blue.reporting.progress import EditProgressBar
from lightning_blue.reporting.tables import score_table
from lightning_blue.support.errors import InputError
from lightning_blue.support.processes import EditStrategy

TRAINER_DEFAULTS = {
    "devices": 1,
    "max_epochs": 1,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}


class _CLI(LightningCLI):
    """LightningCLI for one command that was chosen already; interpolation sees the whole config."""

    def __init__(self, model: Any, data: Any, args: Sequence[str], **kwargs: Any) -> None:
        super().__init__(
            model,
            data,
            args=with_bases(args),
            run=False,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=None,
            parser_kwargs={"parser_mode": "omegaconf+", "exit_on_error": False},
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let a run file name the file that it differs from."""
        parser.add_argument(
            "--base", type=str | list[str] | None, help="run files that this one differs from"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; name the nearest key where one does not exist."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise InputError(explain(error.message, parser.get_defaults().keys())) from error

    def instantiate_classes(self) -> None:
        """Build everything; a value that a constructor refuses is the a user error."""
        try:
            super().instantiate_classes()
        except InputError:
            raise
        except ValueError as error:
            raise InputError(str(error), where="the configuration") from error


class EditCLI(_CLI):
    """Sections ``trainer``, ``model``, ``data``, ``update``, ``guard``, ``measure`` and ``run``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make the callbacks of a run sections of the configuration."""
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(ClosedFormUpdate, "update")
        parser.add_lightning_class_args(EditGuard, "guard")
        parser.add_lightning_class_args(MeasureEdits, "measure")
        parser.add_lightning_class_args(RunRecord, "run")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give the trainer the run's loggers and strategy unless the user chose others."""
        record: RunRecord = self._get(self.config_init, "run")
        record.config = self.parser.dump(self.config, skip_none=False)
        record.settings = _settings(self.config)
        if self._get(self.config, "trainer.logger") is None:
            kwargs["logger"] = record.loggers()
        if not sys.stderr.isatty():
            kwargs["enable_progress_bar"] = False
        elif self._get(self.config, "trainer.enable_progress_bar") is not False:
            callbacks = self._get(self.config_init, "trainer.callbacks") or []
            callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
            kwargs["callbacks"] = [*callbacks, EditProgressBar()]
        if self._get(self.config, "trainer.strategy") in ("auto", "ddp") and self._several():
            kwargs["strategy"] = EditStrategy()
        return super().instantiate_trainer(**kwargs)

    def _several(self) -> bool:
        """Return whether the trainer is to start more than one process."""
        devices = self._get(self.config, "trainer.devices")
        if str(devices) in ("auto", "-1"):
            devices = torch.cuda.device_count()
        count = len(devices) if isinstance(devices, list) else int(devices)
        return count > 1 or self._get(self.config, "trainer.num_nodes") > 1


def run_command(command: str, args: Sequence[str]) -> int:
    """Run a command; return 0, 1 if editing had to stop, or 2 for input that cannot be used.

    Of several processes the first one speaks for all: the others fail as it does, and return 0.
    """
    _quiet()
    try:
        {"fit": fit, "stats": stats, "pretrain": pretrain}[command](args)
    except InputError as error:
        return _complain(str(error), 2)
    except wandb.errors.UsageError as error:
        hint = "\n  hint:  run `wandb login`, or choose --run.wandb=offline"
        return _complain(f"W&B cannot be used: {error}{hint}", 2)
    except SingularCovarianceError as error:
        return _complain(str(error), 2)
    except NonFiniteError as error:
        return _complain(str(error), 1)
    return 0


def fit(args: Sequence[str]) -> None:
    """Edit facts batch by batch; print the scores and where the report is."""
    cli = EditCLI(edit_module, EditDataModule, args, trainer_defaults=TRAINER_DEFAULTS)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    if not cli.trainer.is_global_zero:
        return
    record = _only(cli.trainer, RunRecord)
    history = _only(cli.trainer, MeasureEdits).history
    told = (ClosedFormUpdate, EditGuard)
    notes = "".join(f"{note}\n" for kind in told for note in _only(cli.trainer, kind).notes)
    sys.stdout.write(f"\n{score_table(history)}\n\n{notes}report: {record.report}\n")


def stats(args: Sequence[str]) -> None:
    """Collect the covariance of the layers that the update would write."""
    cli = EditCLI(edit_module, EditDataModule, args, trainer_defaults=TRAINER_DEFAULTS)
    update = _only(cli.trainer, ClosedFormUpdate)
    module = cli.model.to(cli.trainer.strategy.root_device)
    module.prepare(update.layers, update.written_layers, update.covariance_weight)
    file = covariance_file(module.model, module.tokenizer, module.covariance)
    sys.stdout.write(f"covariance of layers {update.written_layers}: {file.path}\n")
    for layer, changes in file.changes(update.written_layers).items():
        tokens, share = changes[-1]
        sys.stdout.write(
            f"layer {layer}: from about half to {tokens:,} tokens, an update moved by {share:.0%}\n"
        )


def pretrain(args: Sequence[str]) -> None:
    """Train a model until it knows the facts; print its recall."""
    cli = _CLI(PretrainModule, FactCorpusModule, args)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    sys.stdout.write(f"\n{cli.model.recall_table()}\n\nmodel: {cli.model.output}\n")


def _only(trainer: Trainer, kind: type) -> Any:
    return next(c for c in trainer.callbacks if isinstance(c, kind))  # type: ignore[attr-defined]


def _settings(config: Any) -> dict[str, Any]:
    """Pick what the reader of a report wants to know."""
    keys = ["model.name_or_path", "model.target.site", "data.path", "data.batch_size"]
    keys += [f"update.{key}" for key in ("plan", "layers", "solver", "past_keys")]
    keys += [f"update.{key}" for key in ("covariance_weight", "rect_keep", "post_edit_transform")]
    names = {"model.name_or_path": "model", "data.path": "data"}
    return {names.get(key, key.rpartition(".")[2]): config[key] for key in keys}


def _quiet() -> None:
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
    ):
        warnings.filterwarnings("ignore", pattern)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _complain(message: str, code: int) -> int:
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return 0
    sys.stderr.write(f"error: {message}\n")
    return code
