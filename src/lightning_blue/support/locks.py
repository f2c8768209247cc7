"""Locks that one process holds: others wait for it, or are refused."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lightning_blue.support.storage import make_folder, writing

log = logging.getLogger(__name__)

FOLDER_LOCK = ".lock"
_HELD: dict[Path, IO[str]] = {}  # by folder; a lock of this kind is the whole process's


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


def take(folder: Path) -> bool:
    """Take a folder for this process until it gives it back or ends; it may take it twice.

    Returns:
        False if another process has it. A file system without locks refuses nobody.

    Raises:
        NotWritten: if the folder cannot be written.
    """
    import fcntl

    place, path = folder.resolve(), folder / FOLDER_LOCK
    while place not in _HELD:
        with writing(path):
            lock = path.open("w")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, no child inherits it
        except (BlockingIOError, PermissionError):
            lock.close()
            return False
        except OSError as error:
            log.debug("no lock on %s: %s", folder, error)
        if _is_still(path, lock):
            _HELD[place] = lock
            atexit.register(give_back, place)
        else:  # its last holder removed it in between
            lock.close()
    return True


def _is_still(path: Path, lock: IO[str]) -> bool:
    """Whether a file that was opened stands at its path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(lock.fileno()))
    except FileNotFoundError:
        return False


def give_back(folder: Path) -> None:
    """Let other processes take a folder."""
    lock = _HELD.pop(folder.resolve(), None)
    if lock is not None:
        with suppress(OSError):
            (folder / FOLDER_LOCK).unlink()
        lock.close()
