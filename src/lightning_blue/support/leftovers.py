"""Hidden names under which things are written, and what processes that died have left of them."""

from __future__ import annotations

import os
import platform
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Literal


def _machine() -> str:
    """Name where process ids count: the host, and the container, which may have the host's name."""
    name = re.sub(r"[^\w-]", "-", platform.node())[:32] or "unknown"
    with suppress(OSError):  # a system without such namespaces
        name += f"-{Path('/proc/self/ns/pid').stat().st_ino}"
    return name


_MACHINE = _machine()
_HIDDEN = re.compile(
    r"\.(?P<name>.+)\.(?P<machine>[\w-]+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.(?P<kind>partial|replaced)"
)


def hidden_name(path: Path, kind: Literal["partial", "replaced"] = "partial") -> Path:
    """Return a name beside ``path`` that nobody else has, and that says which process took it.

    Args:
        path: what will stand there in the end.
        kind: ``partial`` is being written, ``replaced`` was put aside for what replaces it.
    """
    return path.with_name(f".{path.name}.{_MACHINE}.{os.getpid()}.{secrets.token_hex(4)}.{kind}")


def sweep(folder: Path, levels: int = 1) -> None:
    """Remove what dead processes of this machine, or of this container, were still writing.

    What a live process writes stays, and what another machine or container writes. A folder that
    was put aside goes back to its place if that is empty. What cannot be removed stays, without an
    error.

    Args:
        folder: where to look.
        levels: of folders; 1 looks into ``folder`` alone.
    """
    for level in range(levels):
        with suppress(OSError):
            for path in folder.glob("*/" * level + ".*"):
                match = _HIDDEN.fullmatch(path.name)
                if match and match["machine"] == _MACHINE and not _is_alive(int(match["pid"])):
                    _clear(path, path.with_name(match["name"]), match["kind"])


def _clear(leftover: Path, place: Path, kind: str) -> None:
    with suppress(OSError):
        if kind == "replaced" and not place.exists():
            leftover.replace(place)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
