"""A callback that ends one process of a run, for the tests of what the others then do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from lightning import Callback

from lightning_blue.support.errors import InputError


class Saboteur(Callback):
    """End a process in the middle of the second edit batch, or elsewhere.

    Args:
        folder: gets a file with the id of each process, and ``when``, written at the sabotage.
        rank: of the process that ends.
        how: ``killed``, ``frozen``, ``refused`` (InputError), ``broken`` (RuntimeError) or
            ``stopped``: by SIGTERM, sent to the first process.
        where: ``batch``, ``end`` of the run, or ``start``: before the processes have met.
        others: how long the other processes are busy alone meanwhile, in seconds.
    """

    def __init__(
        self, folder: str, rank: int, how: str, where: str = "batch", others: float = 0
    ) -> None:
        self.folder, self.rank, self.how, self.where = Path(folder), rank, how, where
        self.others = others
        self.own = int(os.environ.get("LOCAL_RANK", "0"))
        (self.folder / f"process{self.own}").write_text(str(os.getpid()))
        self._at("start")

    def on_edit_written(self, trainer: Any, module: Any, record: Any) -> None:
        if record.batch == 1:
            self._at("batch")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._at("end")

    def _at(self, where: str) -> None:
        if where != self.where:
            return
        if self.own != self.rank:
            _be_busy(self.others)
            return
        time.sleep(0.5)  # the others are where they wait
        (self.folder / "when").touch()
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.how == "stopped":
            os.kill(int((self.folder / "process0").read_text()), signal.SIGTERM)
            _be_busy(600)
        raise InputError("sabotage") if self.how == "refused" else RuntimeError("sabotage")


def _be_busy(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.01)
