"""A run as one small file: apply it to the unedited model, and it is the edited one.

For each weight the file holds the batches' factors; or, where that is smaller or a post-edit
transform makes it more than a sum of batches, the edited weight itself, in the precision that the
model is saved in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from blue_callbacks import WeightId
from blue_callbacks.records import apply_factors
from blue_callbacks.solvers import CLOSED_FORMS
from lightning_blue.reporting.files import versions
from lightning_blue.runs.base import UneditedModel
from lightning_blue.runs.journal import Journal
from lightning_blue.runs.journal_header import BaseModel, WrittenWeight
from lightning_blue.runs.record_files import digest, opened, write_tensors
from lightning_blue.runs.undo import write_without

FORMAT, VERSION = "lightning-blue patch", "1"
FACTORS, WHOLE = "factors", "whole"


def write_patch(path: Path, journal: Journal, base: Callable[[], UneditedModel]) -> dict[str, str]:
    """Write the patch of a run.

    Args:
        path: the file.
        journal: of the run.
        base: loads the unedited model; called only if a weight is stored whole.

    Returns:
        Weight -> ``factors`` or ``whole``.

    Raises:
        InputError: if a record is damaged, or the disk is full or may not be written.
    """
    header = journal.header
    forms = {weight: _form(journal, weight) for weight in header.weights}
    edited: UneditedModel | None = None
    if WHOLE in forms.values():
        edited = base()
        write_without(journal, {}, edited, None)
    tensors: dict[str, Tensor] = {}
    notes: dict[str, Any] = {}
    for weight, form in forms.items():
        if edited is not None and form == WHOLE:
            value = edited.weights.read(weight).to(edited.saved_dtype)
            mine = {f"{weight}/{WHOLE}": value.contiguous()}
        else:
            mine = _factors(journal, weight)
        tensors |= mine
        place = asdict(header.weights[weight])
        notes[str(weight)] = {**place, "form": form, "sha256": digest(mine)}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "run": header.run,
        "model": json.dumps(asdict(header.model)),
        "update": json.dumps(header.update),
        "request_ids": json.dumps(journal.request_ids),
        "versions": json.dumps(versions()),
        "weights": json.dumps(notes),
    }
    write_tensors(path, tensors, metadata)
    return {str(weight): form for weight, form in forms.items()}


class Patch:
    """A patch file; opening it reads the metadata only.

    Args:
        path: the file.

    Attributes:
        model: the unedited model that it belongs to.
        weights: where the weights stand.
        request_ids: of each batch.

    Raises:
        InputError: if there is none, or it is damaged or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with opened(path, FORMAT, VERSION) as (_, metadata):
            self.model = BaseModel(**json.loads(metadata["model"]))
            self.request_ids: list[list[str]] = json.loads(metadata["request_ids"])
            self._notes: dict[str, Any] = json.loads(metadata["weights"])
            self.weights = {
                WeightId.parse(name): WrittenWeight(
                    note["module"], (note["shape"][0], note["shape"][1]), note["transposed"]
                )
                for name, note in self._notes.items()
            }

    def apply(self, base: UneditedModel) -> None:
        """Make the unedited model the edited one.

        Raises:
            InputError: if the file is damaged.
        """
        for weight in self.weights:
            base.weights.write(weight, self._edited(weight, base.weights.read(weight)))

    def _edited(self, weight: WeightId, original: Tensor) -> Tensor:
        with opened(self.path, FORMAT, VERSION) as (file, _):
            there = list(file.keys())
            mine = [name for name in there if name.startswith(f"{weight}/")]
            tensors = {name: file.get_tensor(name) for name in mine}
            note = self._notes[str(weight)]
            if digest(tensors) != note["sha256"]:
                raise ValueError("its numbers are not those that were written")
            if note["form"] == WHOLE:
                return tensors[f"{weight}/{WHOLE}"].to(original)
            return _applied(original, tensors)


def load_for(patch: Patch, path: str) -> UneditedModel:
    """Load the model that a patch is to be applied to.

    Raises:
        InputError: if it is another one than the patch was made for.
    """
    return UneditedModel(patch.model, patch.weights, path)


def _form(journal: Journal, weight: WeightId) -> str:
    """Choose the smaller form; a transformed or fine-tuned weight is no sum of factors."""
    header = journal.header
    update = header.update
    if update["post_edit_transform"] is not None or update["solver"] not in CLOSED_FORMS:
        return WHOLE
    d_out, d_in = header.weights[weight].shape
    edits = sum(map(len, journal.request_ids))
    masks = len(journal.files) * d_out * d_in / 8 if header.update["rect_keep"] is not None else 0
    whole = d_out * d_in * header.model.saved_dtype.itemsize
    return FACTORS if edits * (d_out + d_in) * 4 + masks <= whole else WHOLE


def _factors(journal: Journal, weight: WeightId) -> dict[str, Tensor]:
    """Return the factors of all batches; names sort as the batches do."""
    found: dict[str, Tensor] = {}
    for batch, change in journal.changes(weight):
        name = f"{weight}/{batch:05d}"
        found |= {f"{name}.left": change.left, f"{name}.right": change.right}
        if change.kept is not None:
            found[f"{name}.kept"] = change.kept
    return found


def _applied(original: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Add the factors batch by batch, with the arithmetic of the run."""
    current = original
    for name in sorted(name.removesuffix(".left") for name in tensors if name.endswith(".left")):
        left, right = tensors[f"{name}.left"], tensors[f"{name}.right"]
        current = apply_factors(current, left, right, tensors.get(f"{name}.kept"))
    return current
