"""Ctrl-C and SIGTERM end a run where it stands, with its own exit code and no traceback."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

BOTH = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asked for the end; like KeyboardInterrupt, nothing should catch it by accident."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def stop(number: int, _frame: FrameType | None) -> None:
    """Handle a signal: raise `Stopped`, and let a second signal end the process at once."""
    for handled in BOTH:
        signal.signal(handled, signal.SIG_DFL)
    raise Stopped(number)


@contextmanager
def stoppable(numbers: Sequence[signal.Signals] = BOTH) -> Iterator[None]:
    """Let signals raise `Stopped` inside the block, in the main thread of a process.

    Args:
        numbers: which; both by default.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in BOTH}
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
