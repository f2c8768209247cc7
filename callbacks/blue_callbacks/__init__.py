"""Lightning callbacks for closed-form model editing; needs torch and Lightning only."""

from blue_callbacks.batches import CommittedBatches
from blue_callbacks.closed_form import (
    KeyMemory,
    SingularCovarianceError,
    Whitening,
    least_squares,
    null_space,
)
from blue_callbacks.errors import EditRejected, InputError, NonFiniteError, UnsolvableError
from blue_callbacks.fine_tuning import FineTuning
from blue_callbacks.guard import EditGuard
from blue_callbacks.plans import PLANS, LayerUpdate, layer_updates
from blue_callbacks.protocol import EditableModule, EditStepOptimizer, apply_edit_batch
from blue_callbacks.records import EditRecord, WeightChange
from blue_callbacks.transforms import prune, prune_official, rect
from blue_callbacks.update import ClosedFormUpdate
from blue_callbacks.weights import EditableWeights, WeightId, WeightStore

__all__ = [
    "PLANS",
    "ClosedFormUpdate",
    "CommittedBatches",
    "EditGuard",
    "EditRecord",
    "EditRejected",
    "EditStepOptimizer",
    "EditableModule",
    "EditableWeights",
    "FineTuning",
    "InputError",
    "KeyMemory",
    "LayerUpdate",
    "NonFiniteError",
    "SingularCovarianceError",
    "UnsolvableError",
    "WeightChange",
    "WeightId",
    "WeightStore",
    "Whitening",
    "apply_edit_batch",
    "layer_updates",
    "least_squares",
    "null_space",
    "prune",
    "prune_official",
    "rect",
]
