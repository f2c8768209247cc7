"""The one exception that a user's input may cause; the callbacks raise the same."""

from __future__ import annotations

from blue_callbacks.errors import InputError, first_line

__all__ = ["InputError", "first_line", "of_the_system"]


def of_the_system(error: OSError) -> InputError:
    """Say what the system refused: a name that is too long, a folder that may not be entered."""
    named = None if error.filename is None else str(error.filename)
    hint = "check the path, its permissions, and what stands there" if named else None
    return InputError(error.strerror or first_line(error), where=named, hint=hint)
