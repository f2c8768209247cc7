"""Edit a language model: targets, keys, covariances, and the module that offers them."""

from lightning_blue.editing.covariance import CovarianceSource
from lightning_blue.editing.module import EditModule, edit_module
from lightning_blue.editing.optimization import TargetOptimization
from lightning_blue.language_model.architectures import ARCHITECTURES, Architecture

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "CovarianceSource",
    "EditModule",
    "TargetOptimization",
    "edit_module",
]
