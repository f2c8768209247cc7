"""What stays the same over a run that keeps a journal: the model, the settings, the weights."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from blue_callbacks import ClosedFormUpdate, WeightId
from lightning_blue.editing.covariance import covariance_file
from lightning_blue.editing.module import EditModule
from lightning_blue.language_model.architectures import down_projection
from lightning_blue.language_model.loading import loaded_name
from lightning_blue.reporting.files import versions
from lightning_blue.support.errors import InputError

FORMAT, VERSION = "lightning-blue journal", 1
RESTORE = "bring the file back from a copy"


@dataclass(frozen=True)
class BaseModel:
    """The model that was edited.

    Attributes:
        name_or_path: as it was given to the run.
        revision: commit on the hub; None for a local one.
        type: of its architecture, e.g. ``llama``.
        dtype: of its weights in the run, e.g. ``float32``.
        fingerprint: of the unedited weights.
        export_dtype: in which the edited model is saved; None (in older records): ``dtype``.
    """

    name_or_path: str
    revision: str | None
    type: str
    dtype: str
    fingerprint: str
    export_dtype: str | None = None

    @property
    def saved_dtype(self) -> torch.dtype:
        """The dtype of what is saved."""
        dtype: torch.dtype = getattr(torch, self.export_dtype or self.dtype)
        return dtype


@dataclass(frozen=True)
class WrittenWeight:
    """Where a weight that the run writes stands in the model.

    Attributes:
        module: full name of the module.
        shape: ``(d_out, d_in)``.
        transposed: whether the model stores it as ``(d_in, d_out)``, as Conv1D does.
    """

    module: str
    shape: tuple[int, int]
    transposed: bool


@dataclass(frozen=True)
class JournalHeader:
    """What stays the same over a run.

    Attributes:
        run: an id of the run alone; its files carry it too.
        model: the unedited model.
        update: settings of :class:`blue_callbacks.ClosedFormUpdate`.
        covariance: the statistics file's path and what it was computed from.
        weights: by id, in the order of writing.
        versions: of the libraries.
    """

    run: str
    model: BaseModel
    update: dict[str, Any]
    covariance: dict[str, Any]
    weights: dict[WeightId, WrittenWeight]
    versions: dict[str, str]

    def to_json(self) -> str:
        """Spell the header as the file does."""
        weights = {str(weight): asdict(written) for weight, written in self.weights.items()}
        named = {**asdict(self), "weights": weights}
        return json.dumps({"format": FORMAT, "version": VERSION, **named}, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> JournalHeader:
        """Read the file.

        Raises:
            InputError: if it is damaged, no journal, or of another version.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            kind, version = found.pop("format"), found.pop("version")
        except Exception as error:
            raise InputError(
                f"the journal cannot be read: {error!r}", where=str(path), hint=RESTORE
            ) from error
        if (kind, version) != (FORMAT, VERSION):
            raise InputError(
                f"this is {kind!r} of version {version}; {FORMAT!r} of version {VERSION} can be "
                "read",
                where=str(path),
                hint="use the release of lightning-blue that wrote it",
            )
        try:
            found["model"] = BaseModel(**found["model"])
            found["weights"] = {
                WeightId.parse(weight): WrittenWeight(**{**written, "shape": (*written["shape"],)})
                for weight, written in found["weights"].items()
            }
            return cls(**found)
        except Exception as error:
            raise InputError(
                f"the journal is damaged: {error!r}", where=str(path), hint=RESTORE
            ) from error


def describe(module: EditModule, update: ClosedFormUpdate) -> JournalHeader:
    """Describe a run whose weights are still unedited.

    Raises:
        InputError: if a layer cannot be edited.
    """
    model = module.model
    module.check_layers(update.layers)
    covariance: dict[str, Any] = {}
    if update.solver.closed_form:
        source, layers = module.covariance, update.written_layers
        statistics = covariance_file(model, module.tokenizer, source, layers)
        covariance = {"path": str(statistics.path), "identity": statistics.identity}
    return JournalHeader(
        run=uuid.uuid4().hex[:16],
        model=BaseModel(
            name_or_path=loaded_name(model),
            revision=getattr(model.config, "_commit_hash", None),
            type=model.config.model_type,
            dtype=str(model.dtype).removeprefix("torch."),
            fingerprint=module.identity,
            export_dtype=str(module.export_dtype).removeprefix("torch."),
        ),
        update=plain_settings(update),
        covariance=covariance,
        weights=_written(module, update.written_weights(module)),
        versions=versions(),
    )


def _written(module: EditModule, weights: Sequence[WeightId]) -> dict[WeightId, WrittenWeight]:
    """Find the modules whose weights are written."""
    names = {id(part): name for name, part in module.model.named_modules()}
    found = {}
    for weight in weights:
        projection = down_projection(module.blocks[weight.layer], module.architecture)
        d_out, d_in = module.editable_weights.read(weight).shape
        transposed = isinstance(projection, Conv1D)
        found[weight] = WrittenWeight(names[id(projection)], (d_out, d_in), transposed)
    return found


def plain_settings(update: ClosedFormUpdate) -> dict[str, Any]:
    """Return the settings of an update as JSON gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(update.state_dict()["settings"]))
    return plain
