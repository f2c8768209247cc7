"""What a run decided for itself, where a user gave no setting: to be said, and to be shown."""

from __future__ import annotations

from typing import Any, NamedTuple

from blue_callbacks import ClosedFormUpdate
from lightning_blue.editing.depth import COUNT, FIRST
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.optimization import FIRST_STEP


class Decision(NamedTuple):
    """A setting that a run decided for itself.

    Attributes:
        name: by which a report shows it.
        key: that changes it.
        value: as a report shows it; None where other places do.
        sentence: what was decided, and by which rule.
    """

    name: str
    key: str
    value: Any
    sentence: str


def decisions(module: EditModule, update: ClosedFormUpdate) -> list[str]:
    """Return a sentence for each setting that was left open, with the key that changes it.

    Args:
        module: of the run.
        update: that edits it, with its layers.
    """
    return [f"{each.sentence} ({each.key})" for each in decided(module, update)]


def decided_settings(module: EditModule, update: ClosedFormUpdate) -> dict[str, Any]:
    """Return the settings that were decided by the names that a report shows them by."""
    found = decided(module, update)
    settings = {each.name: each.value for each in found if each.value is not None}
    if found:
        names = ", ".join(each.name.replace("_", " ") for each in found)
        settings["decided_by_default"] = names
    return settings


def decided(module: EditModule, update: ClosedFormUpdate) -> list[Decision]:
    """Return what was left open and decided, see `decisions`."""
    found: list[Decision] = []
    if not update.solver.closed_form:
        return _decided_for_baseline(module, update)
    if update.proposed and update.layers:
        named = ", ".join(map(str, update.layers))
        sentence = (
            f"critical layers {named} of {len(module.blocks)}, by depth: at most {COUNT} from "
            f"1/{FIRST} of it on, in the first half"
        )
        found.append(Decision("layers", "update.layers", update.layers, sentence))
    if update.solver.kind == "least_squares" and update.solver.covariance_weight is None:
        weight = ", ".join(f"{width:,}" for width in key_widths(module, update))
        sentence = f"weight of the covariance {weight}: one for each key dimension"
        found.append(Decision("covariance_weight", "update.covariance_weight", weight, sentence))
    if module.target.learning_rate is None and module.target.first_step == FIRST_STEP:
        sentence = (
            "learning rate of targets by the length of h: a first step moves by "
            f"{FIRST_STEP:g} of it"
        )
        rate = f"{FIRST_STEP:g} |h| / sqrt(d_model)"
        found.append(Decision("learning_rate", "model.target.learning_rate", rate, sentence))
    if module.chose_text and not module.covariance.trust:
        text = module.covariance.corpus
        sentence = f"text of the covariance: {text}, of the package"
        found.append(Decision("covariance_text", "model.covariance.corpus", text, sentence))
    return found


def _decided_for_baseline(module: EditModule, update: ClosedFormUpdate) -> list[Decision]:
    """Return what was decided for a baseline: the layer that is trained, where none was given."""
    if not (update.proposed and update.layers):
        return []
    [layer] = update.layers
    sentence = f"layer {layer} of {len(module.blocks)} is trained, at 0.7 of the depth"
    return [Decision("layers", "update.layers", update.layers, sentence)]


def key_widths(module: EditModule, update: ClosedFormUpdate) -> list[int]:
    """Return the key dimensions of the weights that are written, each once, ascending."""
    weights = update.written_weights(module)
    return sorted({module.editable_weights.read(weight).shape[1] for weight in weights})
