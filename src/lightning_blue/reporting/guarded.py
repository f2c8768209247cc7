"""Loggers whose failures cost a warning, not the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_blue.support.errors import InputError

Result = TypeVar("Result")


def guarded(logger: Logger) -> Logger:
    """Let a logger that fails, of a full disk for instance, be passed over from then on.

    The logger remains an instance of its class, and Lightning calls it as before. The first failure
    is said in a warning; what a user can fix before the run (InputError, a misconfiguration) is
    raised.
    """
    kind = type(logger)
    if not isinstance(logger, GuardedLogger):
        logger.__class__ = type(kind.__name__, (GuardedLogger, kind), {"__doc__": kind.__doc__})
    return logger


def attempt(logger: Logger, action: Callable[[], Result]) -> Result | None:
    """Do something with a logger; where it is guarded, a failure is a warning and the end of it."""
    if not isinstance(logger, GuardedLogger):
        return action()
    return logger.attempt(action)


def has_failed(logger: Logger) -> bool:
    """Return whether a guarded logger has failed."""
    return isinstance(logger, GuardedLogger) and bool(logger.failure)


class GuardedLogger(Logger):
    """What `guarded` puts before the class of a logger."""

    failure: str = ""  # of the logger, once it has failed

    def attempt(self, action: Callable[[], Result]) -> Result | None:
        """Return what the action returns; None once the logger has failed."""
        if self.failure:
            return None
        try:
            return action()
        except (InputError, MisconfigurationException):
            raise
        except Exception as error:
            if not self.failure:  # one call within another has said it already
                self.failure = " ".join(str(error).split()) or type(error).__name__
                name = type(self).__name__
                rank_zero_warn(f"{name} has failed, the run goes on without it: {self.failure}")
            return None

    @property
    def experiment(self) -> Any:
        """What the logger writes to; once it has failed, something that takes everything."""
        experiment = self.attempt(lambda: getattr(super(GuardedLogger, self), "experiment"))  # noqa: B009
        return _DummyExperiment() if experiment is None else experiment

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Log values, unless the logger has failed; so do the methods below."""
        self._call("log_metrics", *args, **kwargs)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log hyper-parameters."""
        self._call("log_hyperparams", *args, **kwargs)

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        """Log the graph of a model."""
        self._call("log_graph", *args, **kwargs)

    def save(self) -> None:
        """Write what was logged."""
        self._call("save")

    def finalize(self, status: str) -> None:
        """Close the logger."""
        self._call("finalize", status)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Take a checkpoint over."""
        self._call("after_save_checkpoint", checkpoint_callback)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> None:
        self.attempt(lambda: getattr(super(GuardedLogger, self), method)(*args, **kwargs))
