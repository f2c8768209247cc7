"""The unedited model of a run, found again and recognised; and folders of what is made from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blue_callbacks import EditableWeights, WeightId
from lightning_blue.editing.fingerprints import model_fingerprint
from lightning_blue.language_model.architectures import weight_view
from lightning_blue.language_model.loading import DTYPES, load_language_model
from lightning_blue.language_model.saving import save_language_model
from lightning_blue.runs.journal_header import BaseModel, WrittenWeight
from lightning_blue.support.errors import InputError, first_line
from lightning_blue.support.storage import whole_folder, write_atomic, writing

MADE_HERE = ("config.json", "adapter_config.json")  # what a folder that may be replaced holds


class UneditedModel:
    """A run's model as it was before the run, loaded in the run's precision.

    Args:
        known: what is known of it.
        weights: those that the run writes.
        path: where it is, if not where the run found it.

    Attributes:
        model: on the CPU, frozen, in eval mode.
        tokenizer: its tokenizer.
        weights: to be read and written by id; half precision is accumulated in float32.
        saved_dtype: in which the run saves its model.
        edited: names of the weights that the run writes.

    Raises:
        InputError: if it cannot be loaded, or is another model.
    """

    def __init__(
        self, known: BaseModel, weights: Mapping[WeightId, WrittenWeight], path: str | None = None
    ) -> None:
        self.model, self.tokenizer = _loaded(known, path)
        found = model_fingerprint(self.model)
        if found != known.fingerprint:
            raise InputError(
                f"this is not the unedited model of the run: its fingerprint is {found}, and that "
                f"of the run's model {known.fingerprint}",
                where=path or known.name_or_path,
                hint=f"give the {known.type} model that was edited, as it was then: --model PATH",
            )
        self.saved_dtype = known.saved_dtype
        self.edited = [f"{written.module}.weight" for written in weights.values()]
        self.weights = EditableWeights(
            lambda weight: weight_view(self.model.get_submodule(weights[weight].module))
        )

    def save(self, folder: Path, card: str) -> None:
        """Save the model, its tokenizer and a README: the whole folder or nothing.

        Raises:
            InputError: if the disk is full or may not be written.
        """
        with writing(folder), whole_folder(folder) as building:
            save_language_model(building, self.model, self.tokenizer, self.saved_dtype, self.edited)
            write_atomic(building / "README.md", card)


def check_output(path: Path, force: bool) -> None:
    """Refuse to write over something, unless told to and it is of the kind that is written.

    Args:
        path: a file or a folder that is to be made.
        force: whether a model, an adapter or a patch that is there may be replaced.

    Raises:
        InputError: if there is something that may not be replaced.
    """
    if not path.exists():
        return
    if not (path.is_file() or any((path / name).is_file() for name in MADE_HERE)):
        raise InputError(
            "the output exists and is no model and no adapter, so that it is not replaced",
            where=str(path),
            hint="choose another --output",
        )
    if not force:
        raise InputError(
            "the output exists already",
            where=str(path),
            hint="choose another --output, or replace it with --force",
        )


def _loaded(known: BaseModel, path: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model; a precision that models are not loaded in is made of float32."""
    dtype = known.dtype if known.dtype in DTYPES else "float32"
    revision = known.revision if path is None else None
    try:
        model, tokenizer = load_language_model(path or known.name_or_path, dtype, revision)
    except InputError as error:
        reason = first_line(error)
        raise InputError(
            f"the unedited model is needed: {reason}",
            where=path or known.name_or_path,
            hint="say where it is: --model PATH",
        ) from error
    if dtype != known.dtype:
        model.to(getattr(torch, known.dtype))
    return model, tokenizer
