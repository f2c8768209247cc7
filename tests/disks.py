"""A disk that fails: every attempt of Python to write under a folder, from the n-th on."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_HIDDEN = re.compile(r"\.([^/]+?)\.[\w-]+\.\d+\.[0-9a-f]{8}\.\w+")  # of what is not whole yet


class Disk:
    """Counts the attempts to write under a folder, and refuses them from the n-th on.

    Args:
        root: of what is watched.
        fails_from: number of the first write that fails, from 0; None: all succeed.
        code: the error, as in `errno`.
    """

    def __init__(self, root: Path, fails_from: int | None, code: int) -> None:
        self.root, self.fails_from, self.code = str(root), fails_from, code
        self.written: list[str] = []  # paths, in order

    def see(self, event: str, args: tuple[Any, ...]) -> None:
        """Look at one audit event."""
        path = _written(event, args)
        if path is None or not path.startswith(self.root):
            return
        self.written.append(_HIDDEN.sub(r"\1", path))
        if self.fails_from is not None and len(self.written) > self.fails_from:
            raise OSError(self.code, os.strerror(self.code), path)


_disks: list[Disk] = []  # an audit hook stays for ever: this is what it tells


def _hook(event: str, args: tuple[Any, ...]) -> None:
    for disk in _disks:
        disk.see(event, args)


sys.addaudithook(_hook)


def _written(event: str, args: tuple[Any, ...]) -> str | None:
    """Return the path that an audit event is about to write; None if it writes none."""
    if event == "os.mkdir":
        return None if Path(args[0]).exists() else os.fspath(args[0])
    if event == "os.rename":
        return os.fspath(args[1])
    if event != "open" or not isinstance(args[0], str):
        return None
    _, mode, flags = args
    writes = set(mode) & set("wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return args[0] if writes else None


@contextmanager
def failing(root: Path, fails_from: int | None, code: int) -> Iterator[Disk]:
    """Put a failing disk under a folder while the block runs."""
    disk = Disk(root, fails_from, code)
    _disks.append(disk)
    try:
        yield disk
    finally:
        _disks.remove(disk)
