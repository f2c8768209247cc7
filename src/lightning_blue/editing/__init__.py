"""Edit a language model: targets, keys, covariances, and the module that offers them."""

from lightning_blue.editing.architectures import ARCHITECTURES, Architecture
from lightning_blue.editing.covariance import CovarianceSource
from lightning_blue.editing.module import EditModule, edit_module
from lightning_blue.editing.targets import TargetSearch

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "CovarianceSource",
    "EditModule",
    "TargetSearch",
    "edit_module",
]
