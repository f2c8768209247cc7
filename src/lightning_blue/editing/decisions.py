"""What a run decided for itself, where a user gave no setting: to be said, and to be shown."""

from __future__ import annotations

from typing import Any

from blue_callbacks import ClosedFormUpdate
from lightning_blue.editing.depth import COUNT, FIRST
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.optimization import FIRST_STEP


def decisions(module: EditModule, update: ClosedFormUpdate) -> list[str]:
    """Return a sentence for each setting that was left open, with the key that changes it.

    Args:
        module: of the run.
        update: that edits it, with its layers.
    """
    return [sentence for _, _, sentence in _decided(module, update)]


def decided_settings(module: EditModule, update: ClosedFormUpdate) -> dict[str, Any]:
    """Return the settings that were decided by the names that a report shows them by."""
    decided = _decided(module, update)
    settings = {name: value for name, value, _ in decided if value is not None}
    if decided:
        settings["decided_by_default"] = ", ".join(name.replace("_", " ") for name, _, _ in decided)
    return settings


def _decided(module: EditModule, update: ClosedFormUpdate) -> list[tuple[str, Any, str]]:
    """Return name, value and sentence of each; the value is None where other places show it."""
    found: list[tuple[str, Any, str]] = []
    if update.proposed and update.layers:
        named = ", ".join(map(str, update.layers))
        found.append(
            (
                "layers",
                update.layers,
                f"critical layers {named} of {len(module.blocks)}, by depth: at most {COUNT} from "
                f"1/{FIRST} of it on, in the first half (update.layers)",
            )
        )
    if update.solver.kind == "least_squares" and update.solver.covariance_weight is None:
        widths = {module.editable_weights.read(w).shape[1] for w in update.written_weights(module)}
        weight = ", ".join(f"{width:,}" for width in sorted(widths))
        found.append(
            (
                "covariance_weight",
                weight,
                f"weight of the covariance {weight}: one for each key dimension "
                "(update.covariance_weight)",
            )
        )
    if module.target.learning_rate is None:
        found.append(
            (
                "learning_rate",
                f"{FIRST_STEP:g} |h| / sqrt(d_model)",
                "learning rate of targets by the length of h: a first step moves by "
                f"{FIRST_STEP:g} of it (model.target.learning_rate)",
            )
        )
    if module.chose_text and not module.covariance.trust:
        text = module.covariance.corpus
        found.append(
            (
                "covariance_text",
                text,
                f"text of the covariance: {text}, of the package (model.covariance.corpus)",
            )
        )
    return found
