"""Editing in one call, from Python: `edit`."""

from lightning_blue.api.call import edit
from lightning_blue.api.result import EditResult, FailedEdit

__all__ = ["EditResult", "FailedEdit", "edit"]
