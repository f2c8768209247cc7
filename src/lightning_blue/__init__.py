"""Locate-then-edit model editing as Lightning training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_blue.api import EditResult, edit
    from lightning_blue.language_model.loading import load_language_model

__version__ = "0.1.0"
__all__ = ["EditResult", "__version__", "edit", "load_language_model"]

_LAZY = {  # loaded when asked for: torch and transformers take seconds
    "EditResult": "lightning_blue.api",
    "edit": "lightning_blue.api",
    "load_language_model": "lightning_blue.language_model.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
