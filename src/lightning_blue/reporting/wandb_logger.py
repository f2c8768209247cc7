"""The W&B logger of a run: it never waits long for a server, and goes on offline without one.

``wandb`` is imported when it is used, and only then.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_blue.reporting.files import SUMMARY_STAGES
from lightning_blue.support.errors import InputError
from lightning_blue.support.storage import make_folder

if TYPE_CHECKING:
    from wandb import Settings

START_SECONDS = 15  # that a run waits for the server when it starts
FINISH_SECONDS = 120  # and for the last values to arrive when it ends
AXIS = "edits/applied"
CONSTANTS = ("count", "prompts", "tokens", "null_space")  # what the last part of a key says
TAG_LENGTH = 64  # at most, as W&B has it
HINT = "run `wandb login`, or choose --run.wandb=offline"


class RunWandbLogger(WandbLogger):
    """Logs to a server, or offline where none answers; what is measured once is no curve.

    Stages that are measured once (``pre``, ``post``, ``first_batch``, ``test``) go to the summary
    of the W&B run, and so do numbers that stay the same (of prompts behind a metric, for instance).
    All others are curves.

    Attributes:
        curves: whether the run has several batches; of one batch nothing has a course.
    """

    curves = True

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started at first use.

        Raises:
            InputError: if the server does not take the key.
        """
        if self._experiment is None and not self._offline:
            self._start_online()
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log values over edits applied; put what is measured once into the summary."""
        once = {k: v for k, v in metrics.items() if k != AXIS and not self._has_course(k)}
        if once:
            self.experiment.summary.update(once)
        courses = {k: v for k, v in metrics.items() if k not in once}
        if courses.keys() - {AXIS}:
            super().log_metrics(courses, step)

    def _has_course(self, key: str) -> bool:
        first, _, rest = key.partition("/")
        constant = rest.rpartition("/")[2] in CONSTANTS
        return self.curves and first not in SUMMARY_STAGES and not constant

    def abandon(self) -> None:
        """End the W&B run of a logger that has failed, whatever becomes of it."""
        if self._experiment is not None:
            with suppress(Exception):
                self._experiment.finish(exit_code=1)

    def _start_online(self) -> None:
        from wandb.errors import AuthenticationError, UsageError

        folders = set(self._run_folders())
        try:
            _ = super().experiment
        except (AuthenticationError, UsageError) as error:
            raise InputError(f"W&B cannot be used: {error}", hint=HINT) from error
        except Exception as error:  # of many kinds, from a network that is down to a full server
            self._start_offline(error, [new for new in self._run_folders() if new not in folders])

    def _start_offline(self, error: Exception, failed: Iterable[Path]) -> None:
        import wandb

        wandb.teardown()  # or its service would hold the id
        for folder in failed:
            shutil.rmtree(folder, ignore_errors=True)
        self._offline = True
        folder = Path(super().experiment.dir).parent
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        rank_zero_warn(
            f"W&B did not answer ({reason}): the run is logged offline. "
            f"Send it later: {sync_command(folder)}"
        )

    def _run_folders(self) -> list[Path]:
        return list(Path(str(self._save_dir)).glob("wandb/run-*"))


def make_logger(
    folder: Path,
    project: str,
    mode: Literal["offline", "online"],
    run_id: str | None = None,
    group: str | None = None,
    tags: Iterable[str] = (),
) -> RunWandbLogger:
    """Return a logger that writes under ``folder`` and prints nothing.

    The W&B run has the folder's name. It starts when the logger is used first; ``offline`` needs no
    key and no network.

    Args:
        folder: of the run.
        project: of the W&B run.
        mode: whether to send what is logged to a server.
        run_id: of the W&B run to go on with; a new one by default.
        group: of the W&B run, unless WANDB_RUN_GROUP says another.
        tags: of the W&B run, unless WANDB_TAGS says others.

    Raises:
        NotWritten: if the folder cannot be created.
    """
    import wandb

    make_folder(folder)  # wandb turns to a temporary folder if this one does not exist
    settings = quiet_settings()
    wandb.termsetup(settings, None)  # for what is said before the run has its settings
    named: dict[str, Any] = {}
    if mode == "offline":  # Lightning says so by the environment, which W&B reads once a process
        named["mode"] = mode
    if "WANDB_RUN_GROUP" not in os.environ:
        named["group"] = group
    if "WANDB_TAGS" not in os.environ:
        named["tags"] = [tag[:TAG_LENGTH] for tag in dict.fromkeys(tags) if tag]
    return RunWandbLogger(
        project=project,
        name=folder.name,
        id=run_id or secrets.token_hex(4),
        resume="allow",
        save_dir=folder,
        offline=mode == "offline",
        settings=settings,
        **named,
    )


def require_key() -> None:
    """Make sure, without a network, that there is a key; in a terminal it can be typed.

    Raises:
        InputError: if there is none, or none that can be right.
    """
    import wandb

    settings = quiet_settings()
    wandb.termsetup(settings, None)
    wandb.setup(settings)  # or it would ask the server who this is
    try:
        wandb.login(force=True, verify=False)
    except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
        raise InputError(f"W&B cannot be used: {error}", hint=HINT) from error


def quiet_settings() -> Settings:
    """Return settings that print nothing and never wait without an end."""
    import wandb

    limits: dict[str, Any] = {
        "init_timeout": float(os.environ.get("WANDB_INIT_TIMEOUT", START_SECONDS)),
        "finish_timeout": float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)),
        "finish_timeout_raises": True,
    }
    known = {key: value for key, value in limits.items() if key in wandb.Settings.model_fields}
    return wandb.Settings(silent=True, console="off", **known)


def sync_command(folder: Path) -> str:
    """Return the command that sends what was logged into the folder of a W&B run."""
    here, folder = Path.cwd(), folder.absolute()
    return f"`wandb sync {folder.relative_to(here) if folder.is_relative_to(here) else folder}`"
