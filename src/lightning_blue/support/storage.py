"""Write files and folders whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError

from lightning_blue.support.errors import InputError
from lightning_blue.support.leftovers import hidden_name

_FOREIGN = re.compile(r"os error (\d+)")  # as writers in Rust name a failure of the system


class NotWritten(InputError):
    """Something could not be written: the disk is full, or may not be written.

    Args:
        path: what was to be written.
        reason: as the system gives it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path.name} could not be written: {reason}",
            where=str(path.absolute()),
            hint="make room there, or choose another folder",
        )
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        """Survive the way to another process."""
        return type(self), (self.path, self.reason)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a disk that is full, or that may not be written, into `NotWritten`.

    Of blocks within each other, the outermost says what could not be written.
    """
    try:
        yield
    except NotWritten as error:
        raise NotWritten(path, error.reason) from error
    except InputError:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise NotWritten(path, reason) from error


def _reason(error: Exception) -> str | None:
    """Return why the system refused to write; None for an error of another kind."""
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__  # torch raises its own
    foreign = _FOREIGN.search(str(error))
    if foreign:
        return os.strerror(int(foreign[1]))
    if isinstance(error, OSError | SafetensorError):
        return getattr(error, "strerror", None) or " ".join(str(error).split())
    return None


@contextmanager
def unless_full(consequence: str) -> Iterator[None]:
    """Warn of what could not be written in the block, and go on.

    Args:
        consequence: what follows from it, for the warning.
    """
    try:
        yield
    except NotWritten as error:
        rank_zero_warn(f"{error.path} could not be written: {error.reason}; {consequence}")


def make_folder(path: Path) -> None:
    """Create a folder and its parents where they do not exist.

    Raises:
        NotWritten: if that is impossible.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all; text as UTF-8. Its folder is created.

    Raises:
        NotWritten: if the disk is full or may not be written; what stood there stays.
    """
    with writing(path), whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Offer the name of a file beside ``path`` that takes its place on success.

    Whoever may read its neighbours may read it too: some writers let only the owner.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = hidden_name(path)
    try:
        partial.touch()
        mode = partial.stat().st_mode & 0o777
        yield partial
        _set_mode(partial, mode)
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Offer an empty folder beside ``target`` that takes its place on success.

    An older ``target`` stays as it was if the block raises. As with `whole_file`, all files in it
    may be read by whoever may read their neighbours.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    building, old = hidden_name(target), hidden_name(target, "replaced")
    try:
        building.mkdir()
        mode = building.stat().st_mode & 0o666
        yield building
        for path in building.rglob("*"):
            if path.is_file():
                _set_mode(path, mode)
        if target.exists():
            target.replace(old)
        try:
            building.replace(target)
        except OSError:
            if old.exists():
                old.replace(target)
            raise
    finally:
        for leftover in (building, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _set_mode(path: Path, mode: int) -> None:
    with suppress(PermissionError):  # some file systems know no modes
        path.chmod(mode)
