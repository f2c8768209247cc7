"""Lightning callbacks for closed-form model editing; needs torch and Lightning only."""

from blue_callbacks.closed_form import (
    KeyMemory,
    SingularCovarianceError,
    Whitening,
    least_squares,
    null_space,
)
from blue_callbacks.plans import PLANS, PlanStep, plan_steps
from blue_callbacks.protocol import EditableModule, EditStepOptimizer, apply_edit_batch
from blue_callbacks.transforms import prune, prune_official, rect
from blue_callbacks.update import ClosedFormUpdate, NonFiniteError

__all__ = [
    "PLANS",
    "ClosedFormUpdate",
    "EditStepOptimizer",
    "EditableModule",
    "KeyMemory",
    "NonFiniteError",
    "PlanStep",
    "SingularCovarianceError",
    "Whitening",
    "apply_edit_batch",
    "least_squares",
    "null_space",
    "plan_steps",
    "prune",
    "prune_official",
    "rect",
]
