"""Notice when a process of a run is lost, and end the others soon and with one message.

Every process has a thread that gives a sign of life each second, in the store that the processes
met in, and looks for those of the others; the process that started others also sees them end, and
they see it end. A process that fails says why before it ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

from torch import distributed

from blue_callbacks import (
    InputError,
    NonFiniteError,
    SingularCovarianceError,
    UnsolvableError,
)

INTERVAL = 1.0  # seconds from one look to the next
PATIENCE = 2  # looks before the work is interrupted: it may be about to fail by itself
GRACE = 10  # seconds in which a process ends by itself before it is ended
ANSWER = timedelta(seconds=30)  # for the first contact with the store

SENTENCES = (InputError, NonFiniteError, SingularCovarianceError, UnsolvableError)


class Loss(NamedTuple):
    """The process that was lost first, how, and what the others exit with."""

    rank: int
    how: str
    exit_code: int = 1
    told: bool = False  # by itself


class ProcessLost(RuntimeError):
    """Another process of the run ended before the work was done, so that this one ends too."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(BaseException):
    """Raised in the thread that works when another process is lost; becomes `ProcessLost`."""


class Watch:
    """The watch that a process keeps over the others of its run.

    Args:
        rank: of this process.
        world: number of processes.
        lost_after: seconds without a sign of life after which a process counts as lost.
        children: processes that this one started, by rank.
        parent: rank and id of the process that started this one.
        kept: says what a run that ends now leaves, for the message.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        lost_after: float,
        children: Mapping[int, subprocess.Popen[bytes]],
        parent: tuple[int, int] | None,
        kept: Callable[[], str],
    ) -> None:
        self.rank, self.world, self.lost_after = rank, world, lost_after
        self.children, self.parent = children, parent
        self.lost: Loss | None = None
        self.failed = False  # this process knows that it ends, and needs no interruption
        self.speaks = rank == 0
        self._kept = kept
        self._store: distributed.Store | None = None
        self._meetings = 0
        self._signs = dict.fromkeys(set(range(world)) - {rank}, (0, 0))  # rank -> count, since
        self._worker = threading.get_ident()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._thread.start()

    def connect(self, host: str, port: int) -> None:
        """Start to give signs of life in the store that the processes have met in."""
        store = distributed.TCPStore(host, port, is_master=False, timeout=ANSWER)
        launch = store.add(f"lightning_blue/launches/{self.rank}", 1)  # all count alike
        self._store = distributed.PrefixStore(f"lightning_blue/{launch}", store)

    def meet(self) -> None:
        """Wait until all processes are here; signals are heard and losses noticed meanwhile."""
        if self._store is None:
            return
        self._meetings += 1
        key = f"meeting/{self._meetings}"
        self._wait_for(key, self._store.add(key, 1), self.world)
        if self.rank == 0 and self._meetings > 1:
            self._store.delete_key(f"meeting/{self._meetings - 1}")

    def leave(self) -> None:
        """End the watch when all have done their work; the first process leaves last.

        The store is in it.
        """
        self.meet()
        if self._store is not None:
            with suppress(RuntimeError):  # all work is done: nobody is missed any more
                count = self._store.add("left", 1)
                if self.rank == 0:
                    self._wait_for("left", count, self.world, GRACE)
        self._ended.set()

    def fail(self, error: BaseException) -> BaseException:
        """Tell the others that this process ends, and see to it that its children do.

        Returns:
            What this process should raise: the error, or, where that is only the consequence of
            another's end, `ProcessLost`.
        """
        with self._lock:
            self.failed = True
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._worker), None)
        lost = self._reason() if _may_be_a_consequence(error) else None
        self.speaks = self._speaks(lost or Loss(self.rank, *_described(error)))
        self._tell(lost or Loss(self.rank, *_described(error)))
        self._end_others()
        return error if lost is None else ProcessLost(self._message(lost), lost.exit_code)

    def _reason(self) -> Loss | None:
        """Return the loss of another process, if there is one; wait until it is noticed."""
        deadline = time.monotonic() + (PATIENCE + 2) * INTERVAL
        while self.lost is None and time.monotonic() < deadline:
            time.sleep(INTERVAL / 10)
        return self.lost

    def _message(self, lost: Loss) -> str:
        """Say which process was lost, how, and what is kept."""
        verb = "failed" if lost.told else "was lost"
        what = f"process {lost.rank} of {self.world} {verb}: {lost.how}"
        return "\n  kept:  ".join(filter(None, (what, self._kept())))

    def _speaks(self, lost: Loss) -> bool:
        """Whether it is on this process to say why the run ended: the first that is there."""
        if self.rank == 0 or self._store is None:
            return True
        return self.rank == 1 and lost.rank == 0 and not lost.told

    def _wait_for(self, key: str, count: int, wanted: int, seconds: float = float("inf")) -> None:
        assert self._store is not None
        pause, deadline = 0.0005, time.monotonic() + seconds
        while count < wanted and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, 0.01)
            count = self._store.add(key, 0)

    def _run(self) -> None:
        """Look every second, and end this process if another is lost."""
        looks = 0  # since the loss
        while not self._ended.wait(INTERVAL):
            if self.lost is None:
                self.lost = self._find_loss()
                continue
            looks += 1
            if not self.failed and looks * INTERVAL > GRACE:
                self._exit(self.lost)
            if looks % 5 == PATIENCE:  # and again, should the first have been caught
                self._interrupt()

    def _find_loss(self) -> Loss | None:
        """Look once, and return the first process that is lost, if one is."""
        silent: dict[int, str] = {}
        told: Loss | None = None
        gone = self._gone()
        if 0 not in gone:  # the store is in it
            try:
                silent, told = self._exchange()
            except RuntimeError:
                silent = {0: "it cannot be reached"} if self.rank else {}
                time.sleep(INTERVAL)  # until a process that is ending has ended
                gone = self._gone()
        gone = silent | gone
        return told or (Loss(*min(gone.items())) if gone else None)

    def _gone(self) -> dict[int, str]:
        """Return which processes on this machine are gone, and how they ended."""
        gone = {}
        if self.parent is not None and os.getppid() != self.parent[1]:
            gone[self.parent[0]] = "it has ended"
        for rank, child in self.children.items():
            code = child.poll()
            if code is not None:
                gone[rank] = _ending(code)
        return gone

    def _exchange(self) -> tuple[dict[int, str], Loss | None]:
        """Give a sign of life; return who gave none for too long, and the first that has failed."""
        store = self._store
        if store is None:
            return {}, None
        store.add(f"alive/{self.rank}", 1)
        silent, told = {}, None
        for rank, (before, since) in self._signs.items():
            now = store.add(f"alive/{rank}", 0)
            self._signs[rank] = (now, since + 1 if now == before else 0)
            if self._signs[rank][1] * INTERVAL > self.lost_after:  # own looks: a sleep of the
                silent[rank] = f"no sign of life for {self.lost_after:g} seconds"  # machine is none
            if told is None and store.check([f"failed/{rank}"]):
                told = Loss(*json.loads(store.get(f"failed/{rank}")))
        return silent, told

    def _tell(self, loss: Loss) -> None:
        if self._store is not None:
            with suppress(RuntimeError):  # the store may be what was lost
                self._store.set(f"failed/{self.rank}", json.dumps(loss))

    def _interrupt(self) -> None:
        with self._lock:
            if not self.failed:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._worker), ctypes.py_object(Interrupted)
                )

    def _end_others(self) -> None:
        """Let the others end by themselves if they know; kill children that do not."""
        deadline = time.monotonic()
        if self._store is not None:
            deadline += GRACE
            with suppress(RuntimeError):
                count = self._store.add("ended", 1)
                if self.rank == 0:  # the store is in it
                    self._wait_for("ended", count, self.world - len(self._gone()), GRACE)
        for child in self.children.values():
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0, deadline - time.monotonic()))
            child.kill()

    def _exit(self, lost: Loss) -> None:
        """End a process whose work does not let itself be interrupted."""
        if self._speaks(lost):
            sys.stderr.write(f"error: {self._message(lost)}\n")
            sys.stderr.flush()
        for child in self.children.values():
            child.kill()
        os._exit(lost.exit_code)


def _may_be_a_consequence(error: BaseException) -> bool:
    """Say whether an error may be how this process has felt the end of another.

    Those of torch.distributed are plain RuntimeErrors, or `DistError`.
    """
    return type(error) is RuntimeError or isinstance(error, Interrupted | distributed.DistError)


def _described(error: BaseException) -> tuple[str, int, bool]:
    """Return what the others should know of an error: text, exit code, that it was told."""
    code = getattr(error, "exit_code", 2 if isinstance(error, ValueError) else 1)
    if isinstance(error, InputError | NonFiniteError | UnsolvableError) or hasattr(
        error, "exit_code"
    ):
        return str(error), code, True
    return f"{type(error).__name__}: {error}", code, True


def _ending(code: int) -> str:
    """Say how a process has ended, by its return code."""
    if code >= 0:
        return f"it ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + (
        " (by the system, if memory ran out)" if name == "SIGKILL" else ""
    )
