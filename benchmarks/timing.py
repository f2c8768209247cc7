"""Time rivals in turn, with the machine's matmul rate and peak memory beside them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Samples:
    """Seconds of each repeat, peak memory above the start in bytes, and the last result."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    result: Any = None

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


class Clock:
    """Runs rivals in turn on one device.

    Args:
        device: where the work is done.
        dtype: of the matrix products whose rate is the machine's limit.
        size: of these square matrices.
    """

    def __init__(
        self, device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 2048
    ) -> None:
        self.device = torch.device(device)
        self.rates: list[float] = []
        self._matrix = torch.randn(size, size, device=self.device).to(dtype)

    def race(
        self, rivals: Mapping[str, Callable[[], Any]], repeats: int, warm_up: bool = True
    ) -> dict[str, Samples]:
        """Run all rivals ``repeats`` times in turn, and the matmul rate before each round.

        A round that only warms up goes first; it is not counted.
        """
        samples = {name: Samples() for name in rivals}
        for repeat in range(-1 if warm_up else 0, repeats):
            self.measure_rate()
            for name, work in rivals.items():
                with self.watched() as watch:
                    result = work()
                if repeat >= 0:
                    samples[name].seconds.append(watch.seconds)
                    samples[name].peak = max(samples[name].peak, watch.peak)
                    samples[name].result = result
        return samples

    @contextmanager
    def watched(self) -> Iterator[Watch]:
        """Measure seconds and peak memory of what runs inside."""
        watch = Watch()
        start = self._reset_peak()
        began = now()
        yield watch
        watch.seconds = now() - began
        watch.peak = max(0, self._peak() - start)

    def measure_rate(self) -> float:
        """Multiply two large square matrices; keep and return FLOP/s (best of three)."""
        fastest = float("inf")
        for _ in range(3):
            began = now()
            _ = self._matrix @ self._matrix
            fastest = min(fastest, now() - began)
        self.rates.append(2 * self._matrix.shape[0] ** 3 / fastest)
        return self.rates[-1]

    @property
    def rate(self) -> float:
        """Median matmul rate of the rounds so far, FLOP/s."""
        return statistics.median(self.rates)

    def _reset_peak(self) -> int:
        """Forget earlier peaks; return the bytes in use now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        with suppress(OSError):  # not Linux: peaks are those of the process so far
            Path("/proc/self/clear_refs").write_text("5")
        return resident_bytes("VmRSS")

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resident_bytes("VmHWM")


@dataclass
class Watch:
    """What :meth:`Clock.watched` measured."""

    seconds: float = 0.0
    peak: int = 0


def now() -> float:
    """Return the time in seconds, after waiting for the GPU where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def resident_bytes(what: str) -> int:
    """Return the process's resident memory now (``VmRSS``) or at most (``VmHWM``), 0 if unknown."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) * 1024
    return 0
