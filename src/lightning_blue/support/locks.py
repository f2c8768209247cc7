"""A lock that one process holds and others wait for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_blue.support.storage import make_folder, writing

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock of a file; whoever else wants it waits until the block ends.

    The system frees it if its holder dies.

    Args:
        path: of the lock, an empty file that stays.
        what: is waited for, for the log.

    Raises:
        NotWritten: if there can be no such file, or no lock on it.
    """
    import fcntl  # no system but Unix has it, and nothing needs it that is not shared

    make_folder(path.parent)
    with writing(path):
        lock = path.open("w")
    with lock:
        with writing(path):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for %s: another process is at it", what)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
