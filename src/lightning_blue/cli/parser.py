"""Run files and flags on LightningCLI: sections trainer, model, data, update, measure and run."""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

from blue_callbacks import ClosedFormUpdate, EditGuard
from blue_callbacks.ranges import SEED, check_ranges
from blue_callbacks.trainer_checks import check_trainer
from lightning_blue.cli.help import program
from lightning_blue.cli.own_model import require_model
from lightning_blue.cli.run_files import explain, require_sections, unresolved, with_bases
from lightning_blue.data import EditDataModule
from lightning_blue.editing import edit_module
from lightning_blue.editing.decisions import decisions
from lightning_blue.reporting import MeasureEdits, RunRecord
from lightning_blue.reporting.guarded import guarded
from lightning_blue.reporting.progress import EditProgressBar, ProgressLines
from lightning_blue.reporting.run_folders import read_status, run_to_resume
from lightning_blue.reporting.settings import run_settings
from lightning_blue.reporting.wandb_logger import require_key
from lightning_blue.runs.journal import EditJournal
from lightning_blue.support.checkpoints import (
    FOLDER,
    BatchCheckpoints,
    WholeCheckpointIO,
    checkpoints,
)
from lightning_blue.support.errors import InputError, first_line
from lightning_blue.support.processes import EditStrategy
from lightning_blue.support.space import check_writable

log = logging.getLogger(__name__)

TRAINER_DEFAULTS = {
    "devices": 1,
    "max_epochs": 1,
    "val_check_interval": 1,
    "check_val_every_n_epoch": None,  # or stock callbacks would look at the end of the epoch alone
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}


class RunFileCLI(LightningCLI):
    """LightningCLI for one command that was chosen already; interpolation sees the whole config."""

    def __init__(
        self, model: Any, data: Any, args: Sequence[str], command: str, **kwargs: Any
    ) -> None:
        self.command = command
        super().__init__(
            model,
            data,
            args=with_bases(args),
            run=False,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=None,
            parser_kwargs={
                "parser_mode": "omegaconf+",
                "exit_on_error": False,
                "prog": program(command),
            },
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
        except (OmegaConfBaseException, RecursionError) as error:
            raise unresolved(error) from error
        if not isinstance(self.config["seed_everything"], bool):
            check_ranges("", vars(self.config), seed_everything=SEED)

    def before_instantiate_classes(self) -> None:
        """Put the model off: it is loaded last, when no setting can turn out to be wrong."""
        self.parser.add_instantiator(_later, LightningModule, prepend=True)

    def instantiate_classes(self) -> None:
        """Build everything, the model last.

        Raises:
            InputError: for a value that a constructor refuses.
        """
        try:
            super().instantiate_classes()
            self.model = self.model()
        except InputError:
            raise
        except ValueError as error:
            raise InputError(str(error), where="the configuration") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer.

        Raises:
            InputError: naming the flags that were given, for one that Lightning stumbles over.
        """
        try:
            return super().instantiate_trainer(**kwargs)
        except (InputError, MisconfigurationException):
            raise
        except Exception as error:  # of any kind: Lightning checks few of its flags
            raise InputError(
                f"no Trainer can be made of these flags: {first_line(error)}",
                where=", ".join(self._changed("trainer")) or "trainer",
                hint="leave out the one that it is about, or give another value",
            ) from error

    def _changed(self, section: str) -> list[str]:
        """Return the keys of a section whose values are not the defaults."""
        given, defaults = (c[section].as_flat() for c in (self.config, self.parser.get_defaults()))
        return [f"{section}.{k}" for k, v in vars(given).items() if v != getattr(defaults, k, None)]


def _later(class_type: type, *args: Any, **kwargs: Any) -> Any:
    return partial(class_type, *args, **kwargs)


class EditCLI(RunFileCLI):
    """What ``fit`` and all commands that read its keys are configured by.

    Args:
        args: of the command line.
        command: that is configured; those behind ``evaluate`` leave no run folder.
    """

    def __init__(
        self,
        args: Sequence[str],
        command: Literal[
            "fit", "evaluate", "stats", "analyze", "check", "init", "locate", "tune"
        ] = "fit",
    ) -> None:
        require_sections(args)
        self.recorded = command in ("fit", "evaluate")
        self.resume_from: Path | None = None
        super().__init__(
            edit_module, EditDataModule, args, command, trainer_defaults=TRAINER_DEFAULTS
        )

    @property
    def record(self) -> RunRecord:
        """The callback that owns the run's folder."""
        record: RunRecord = self._get(self.config_init, "run")
        return record

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make the callbacks of a run sections of the configuration."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            help="go on with a run that was stopped: a checkpoint, or `last` for the newest of "
            "run.name",
        )
        parser.add_argument(
            "--for_model",
            type=str | None,
            help="the model that the settings of the run file were chosen on: fit and stats refuse "
            "one of another build; null: any",
        )
        parser.add_lightning_class_args(ClosedFormUpdate, "update")
        parser.add_lightning_class_args(EditGuard, "guard")
        parser.add_lightning_class_args(MeasureEdits, "measure")
        parser.add_lightning_class_args(RunRecord, "run")

    def before_instantiate_classes(self) -> None:
        """Refuse what would fail when the model is loaded already: the run's folder, W&B's key.

        And what would not fail but ruin the model: settings that belong to another one.
        """
        super().before_instantiate_classes()
        for_model = self._get(self.config, "for_model")
        if for_model is not None and self.command != "evaluate":
            keys = ("model.name_or_path", "model.revision", "data.path")
            require_model(for_model, *(self._get(self.config, key) for key in keys))
        if self.recorded and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            check_writable(Path(self._get(self.config, "run.root")))
            if self._get(self.config, "run.wandb") == "online":
                require_key()

    def instantiate_classes(self) -> None:
        """Build everything; what fails leaves no empty folder to a run of the same name."""
        try:
            super().instantiate_classes()
            if self.command not in ("evaluate", "locate", "tune"):
                self._decide()
        except BaseException:
            if hasattr(self, "config_init"):
                self.record.give_folder_back()
            raise

    def _decide(self) -> None:
        """Settle with the model what the run file leaves open, say it, and write it down."""
        update = self._get(self.config_init, "update")
        update.find_layers(self.model)
        if update.proposed and update.layers:  # a run that writes no layer has none
            self.config["update"]["layers"] = update.layers
            self.record.config = self.parser.dump(self.config, skip_none=False, skip_check=True)
        for sentence in decisions(self.model, update):
            log.info("decided: %s", sentence)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give the trainer the run's loggers, checkpoints and strategy beside the user's."""
        self._find_checkpoint()
        self.record.config = self.parser.dump(self.config, skip_none=False, skip_check=True)
        self.record.settings = run_settings(self.config, self.command)
        callbacks = self._listed("trainer.callbacks")
        if self.recorded:
            kwargs["logger"] = self._loggers()
            again = self.record.resumed and self.resume_from is None
            callbacks[:0] = [self._checkpoints(), EditJournal(self.record.folder, again)]
            kwargs["plugins"] = [*self._listed("trainer.plugins"), WholeCheckpointIO()]
        else:
            kwargs["logger"] = False
        if any(isinstance(callback, Checkpoint) for callback in callbacks):
            kwargs["enable_checkpointing"] = True
        shown = self._get(self.config, "trainer.enable_progress_bar") is not False
        if shown and sys.stderr.isatty():
            callbacks.append(EditProgressBar())
        elif shown:
            callbacks.insert(0, ProgressLines())
        kwargs["enable_progress_bar"] = shown and sys.stderr.isatty()
        kwargs["callbacks"] = callbacks
        strategy = self._get(self.config, "trainer.strategy")
        several = self._several()
        if strategy == "ddp" or (strategy == "auto" and several):
            kwargs["strategy"] = EditStrategy()
        trainer = super().instantiate_trainer(**kwargs)
        if self.command == "fit":
            check_trainer(trainer)
        return trainer

    def _loggers(self) -> Any:
        """Add the user's own loggers to the run's; ``false`` leaves out all of them."""
        chosen = self._get(self.config_init, "trainer.logger")
        if chosen is False:
            return False
        users = [] if chosen in (None, True) else chosen
        users = users if isinstance(users, list) else [users]
        return [*self.record.loggers(), *map(guarded, users)]

    def _checkpoints(self) -> Callback:
        checkpointing = BatchCheckpoints(self.record.checkpoint_every)
        checkpointing.folder = self.record.folder / FOLDER
        return checkpointing

    def _find_checkpoint(self) -> None:
        """Find the checkpoint and the folder that a resumed run goes on with.

        Where ``last`` finds a run that was stopped before its first checkpoint, or none, the run
        starts from the beginning: a job that is restarted may always say ``last``.
        """
        asked: str | None = self._get(self.config, "ckpt_path")
        record = self.record
        if asked is None:
            return
        if self.command != "fit":
            raise InputError(
                f"{self.command} goes on with no run",
                where=f"ckpt_path = {asked}",
                hint="leave it out; evaluate measures the model that model.name_or_path names",
            )
        if asked == "last":
            run = run_to_resume(Path(record.root), record.name)
            if run is not None:
                record.resume(run)
                self.resume_from = next(iter(checkpoints(run / FOLDER)[-1:]), None)
            return
        path = Path(asked)
        if not path.is_file():
            raise InputError(
                "there is no such checkpoint",
                where=f"ckpt_path = {asked}",
                hint="give a file of a run's folder checkpoints/, or `last`",
            )
        if path.parent.name == FOLDER and read_status(path.parents[1]):
            record.resume(path.parents[1])
        self.resume_from = path

    def _listed(self, key: str) -> list[Any]:
        """Return what the user gave for a key that takes one object or a list."""
        given = self._get(self.config_init, key) or []
        return [*given] if isinstance(given, list) else [given]

    def _several(self) -> bool:
        """Return whether the trainer is to start more than one process."""
        asked = [self._get(self.config, f"trainer.{key}") for key in ("devices", "accelerator")]
        return process_count(*asked) > 1 or self._get(self.config, "trainer.num_nodes") > 1


def process_count(devices: int | str | list[int], accelerator: str) -> int:
    """Return how many processes a Trainer starts on a machine: one for each device.

    Args:
        devices: a number of devices, their indices (``0,1`` or a list), ``auto`` or -1.
        accelerator: as the Trainer's.

    Raises:
        InputError: for anything but a number where there are only processors.
    """
    available = torch.cuda.device_count()
    others = available or torch.backends.mps.is_available()
    if accelerator == "cpu" or (accelerator == "auto" and not others):
        if str(devices) == "auto":
            return 1
        if str(devices).isdecimal() and int(str(devices)) > 0:
            return int(str(devices))
        raise InputError(
            f"{devices!r} is not a number of processes, and processors have no indices",
            where="trainer.devices",
            hint="for two processes give --trainer.devices=2",
        )
    if str(devices) in ("auto", "-1"):
        return available
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    return len(devices) if isinstance(devices, list) else int(devices)
