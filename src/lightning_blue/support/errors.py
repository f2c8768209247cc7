"""The one exception that a user's input may cause; the callbacks raise the same."""

from __future__ import annotations

from blue_callbacks.errors import InputError

__all__ = ["InputError"]
