"""Whether a folder can be written, and how much fits into it; asked before any work is spent."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from lightning_blue.support.errors import InputError
from lightning_blue.support.storage import writing

_PROBE = 4096  # bytes: a file that is empty fits on a disk that is full


def check_writable(folder: Path) -> None:
    """Write to a folder, or to the nearest one above it that exists; nothing stays there.

    Raises:
        NotWritten: if it cannot be written, or is a file.
    """
    with writing(folder):
        nearest = _nearest(folder)
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=nearest) as probe:
            probe.write(b"\0" * _PROBE)
            probe.flush()


def free_space(folder: Path) -> int | None:
    """Return how many bytes fit into a folder, existing or not; None where nobody knows."""
    try:
        usage = shutil.disk_usage(_nearest(folder))
    except OSError:
        return None
    return usage.free if usage.total else None


def require_space(folder: Path, needed: int, what: str, hint: str) -> None:
    """Refuse to start what certainly does not fit.

    Args:
        folder: where it will be written, existing or not.
        needed: bytes.
        what: it is, for the message.
        hint: how to do with less.

    Raises:
        InputError: if there is less space than that.
    """
    free = free_space(folder)
    if free is not None and free < needed:
        raise InputError(
            f"{size(needed)} are needed for {what}, and {size(free)} are free",
            where=str(folder.absolute()),
            hint=hint,
        )


def size(n_bytes: float) -> str:
    """Spell a number of bytes for people.

    >>> size(512), size(19_200_000), size(1.64e10)
    ('0.5 kB', '19.2 MB', '16.4 GB')
    """
    for unit in ("kB", "MB", "GB"):
        n_bytes /= 1000
        if n_bytes < 1000:
            return f"{n_bytes:.1f} {unit}"
    return f"{n_bytes / 1000:.1f} TB"


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())
