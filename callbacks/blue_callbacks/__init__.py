"""Lightning callbacks for closed-form model editing; needs torch and Lightning only."""

from blue_callbacks.closed_form import (
    KeyMemory,
    SingularCovarianceError,
    Whitening,
    least_squares,
    null_space,
)
from blue_callbacks.plans import PLANS, LayerUpdate, layer_updates
from blue_callbacks.protocol import EditableModule, EditStepOptimizer, apply_edit_batch
from blue_callbacks.transforms import prune, prune_official, rect
from blue_callbacks.update import ClosedFormUpdate, NonFiniteError

__all__ = [
    "PLANS",
    "ClosedFormUpdate",
    "EditStepOptimizer",
    "EditableModule",
    "KeyMemory",
    "LayerUpdate",
    "NonFiniteError",
    "SingularCovarianceError",
    "Whitening",
    "apply_edit_batch",
    "layer_updates",
    "least_squares",
    "null_space",
    "prune",
    "prune_official",
    "rect",
]
