"""Write files and folders whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lightning_blue.support.errors import InputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a disk that is full, or that may not be written, into InputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{path.name} could not be written: {reason}",
            where=str(path.absolute()),
            hint="make room there, or choose another folder",
        ) from error


def make_folder(path: Path) -> None:
    """Create a folder and its parents where they do not exist.

    Raises:
        InputError: if that is impossible.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all; text as UTF-8. Its folder is created.

    Raises:
        InputError: if the disk is full or may not be written; what stood there stays.
    """
    with writing(path), whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Offer the name of a file beside ``path`` that takes its place on success."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Offer an empty folder beside ``target`` that takes its place on success.

    An older ``target`` stays as it was if the block raises.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    old = building.with_name(building.name + "-old")
    try:
        yield building
        building.chmod(0o755)
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
