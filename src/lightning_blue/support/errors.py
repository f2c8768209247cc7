"""The one exception that a user's input may cause; the callbacks raise the same."""

from __future__ import annotations

from blue_callbacks.errors import InputError

__all__ = ["InputError", "first_line"]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
