"""One process of a sweep: started once, whoever asks, and told what became of it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from lightning_blue.reporting.run_folders import read_status
from lightning_blue.support.errors import InputError, first_line
from lightning_blue.support.storage import make_folder
from lightning_blue.sweeps.planned import DIGITS, DONE, PlannedRun

SHOWN = ("efficacy", "generalization", "specificity")  # on the line of a run
NO_RESULT = "its folder does not hold the run that the sweep asks for; move it away"
_PAUSE = 0.2  # seconds after a look at a lock that another process holds


@dataclass(frozen=True)
class Outcome:
    """What became of a task: ``finished``, ``ended early``, ``failed``, or ``stopped``."""

    name: str
    state: str
    said: str = ""
    seconds: float = 0.0
    log: Path | None = None

    @property
    def ok(self) -> bool:
        """Whether there is a result."""
        return self.state in DONE


@dataclass
class Processes:
    """The processes that a sweep has started on this machine, so that it can end them."""

    ending: threading.Event = field(default_factory=threading.Event)
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)

    def end(self) -> None:
        """Ask all processes to end, as SIGTERM does: each leaves a report of what it has done."""
        self.ending.set()
        for process in list(self.running):
            with suppress(ProcessLookupError):
                process.terminate()


@dataclass(frozen=True)
class Task:
    """A command of this program that is run once, in a process of its own.

    Two sweeps may ask for the same task, or one that was killed and is started again while its
    processes go on: the process that works holds a lock, and the others leave the task to it.

    Attributes:
        name: of the task.
        command: arguments of ``python -m lightning_blue``.
        root: folder of the sweep, for its lock and its log.
    """

    name: str
    command: tuple[str, ...]
    root: Path

    @property
    def log(self) -> Path:
        """What the process has printed."""
        return self.root / "logs" / f"{self.name}.log"

    @property
    def lock(self) -> Path:
        """What a process holds while it works on the task."""
        return self.root / "locks" / f"{self.name}.lock"

    def result(self) -> Outcome | None:
        """Return what is there already; None if there is nothing."""
        return None

    @property
    def argv(self) -> Sequence[str]:
        """What the process is started as."""
        return (sys.executable, "-m", "lightning_blue", *self.command)

    def run(self, environment: Mapping[str, str], processes: Processes | None = None) -> Outcome:
        """Run the task, once no other process works on it, unless that one has done it."""
        while True:
            outcome = self.attempt(environment, processes)
            if outcome is not None:
                return outcome

    def attempt(
        self, environment: Mapping[str, str], processes: Processes | None = None
    ) -> Outcome | None:
        """Run the task, unless it is done; None, after a moment, if another process works on it."""
        processes = processes or Processes()
        began = time.monotonic()
        try:
            with self._locked() as lock:
                if lock is None:
                    stopped = processes.ending.wait(_PAUSE)
                    return Outcome(self.name, "stopped") if stopped else None
                found = self.result()
                if found is not None:
                    return found
                said = self.log.stat().st_size if self.log.exists() else 0  # by earlier attempts
                code = self._start(environment, processes, lock)
        except (OSError, InputError) as error:  # a full disk, for instance
            return Outcome(self.name, "failed", first_line(error), 0.0, self.log)
        stopped = processes.ending.is_set()
        return self._outcome(code, time.monotonic() - began, stopped, said)

    def _start(self, environment: Mapping[str, str], processes: Processes, lock: IO[str]) -> int:
        """Run the process to its end; it holds the lock too, should this one die."""
        make_folder(self.log.parent)
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                pass_fds=[lock.fileno()],
                start_new_session=True,  # Ctrl-C reaches the sweep, which ends its runs
            )
        processes.running.add(process)
        if processes.ending.is_set():
            process.terminate()
        lock.seek(0)
        lock.truncate()
        lock.write(f"{process.pid}\n")
        lock.flush()
        code = process.wait()
        processes.running.discard(process)
        return code

    @contextmanager
    def _locked(self) -> Iterator[IO[str] | None]:
        """Hold the task's lock, which the system frees with its holder; None if another has it."""
        make_folder(self.lock.parent)
        with self.lock.open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield lock

    def _outcome(self, code: int, seconds: float, stopped: bool, said: int) -> Outcome:
        if code == 0:
            return self._done(seconds)
        state = "stopped" if stopped else "failed"
        return Outcome(self.name, state, self._reason(code, said), seconds, self.log)

    def _done(self, seconds: float) -> Outcome:
        """Return what a process that ended well has left."""
        return Outcome(self.name, "finished", "", seconds, self.log)

    def _reason(self, code: int, said: int) -> str:
        """Say why the process failed: its last error message, or how it ended."""
        with suppress(OSError):
            lines = self.log.read_bytes()[said:].decode(errors="replace").splitlines()
            for line in reversed(lines[-40:]):
                if line.startswith("error: "):
                    return line.removeprefix("error: ")
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


@dataclass(frozen=True)
class RunTask(Task):
    """A run of the sweep."""

    planned: PlannedRun

    @property
    def lock(self) -> Path:
        """A lock for what the run is, whatever the axes are called."""
        return self.root / "locks" / f"{self.planned.identity[:DIGITS]}.lock"

    def result(self) -> Outcome | None:
        """Return the run's outcome where it is finished, or where another run is in its place."""
        if self.planned.is_displaced:
            return Outcome(self.name, "failed", NO_RESULT, 0.0, self.log)
        state = self.planned.state
        if state not in DONE:
            return None
        folder = self.planned.folder
        said = str(read_status(folder).get("reason", "")) if state == "ended early" else ""
        summary = _summary(folder)
        seconds = summary.get("seconds/total") or 0.0
        scores = [
            f"{name} {summary[f'post/{name}']:.1f}"
            for name in SHOWN
            if isinstance(summary.get(f"post/{name}"), float | int)
        ]
        read = summary.get("edits/targets_read")
        shared = [f"targets of {read:.0f} edits read"] if read else []
        text = ", ".join([*filter(None, [said]), *scores, *shared])
        return Outcome(self.name, state, text, seconds, self.log)

    def _done(self, seconds: float) -> Outcome:
        return self.result() or Outcome(self.name, "failed", NO_RESULT, seconds, self.log)


def environment(threads: int | None = None, device: str | None = None) -> dict[str, str]:
    """Return the environment of a process: its share of threads, and its own device.

    Args:
        threads: of the processor; None leaves them as they are.
        device: value of ``CUDA_VISIBLE_DEVICES``; None leaves all of them visible.
    """
    own = dict(os.environ)
    own.pop("PL_GLOBAL_SEED", None)
    if threads is not None:
        own |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    if device is not None:
        own["CUDA_VISIBLE_DEVICES"] = device
    return own


def _summary(folder: Path) -> dict[str, float]:
    try:
        found: dict[str, float] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found
