"""The journal of a run: one file for each committed batch, and a header that knows the run.

``RUN/records/journal.json`` says what was edited and how, ``RUN/records/batch-00007.safetensors``
what batch 7 did (see :mod:`lightning_blue.runs.record_files`). Together with the unedited model
they are the edited one.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from transformers.pytorch_utils import Conv1D

from blue_callbacks import ClosedFormUpdate, EditRecord, WeightChange, WeightId
from lightning_blue.editing.covariance import covariance_file
from lightning_blue.editing.module import EditModule
from lightning_blue.language_model.architectures import down_projection
from lightning_blue.language_model.loading import loaded_name
from lightning_blue.reporting.files import FACTS, versions
from lightning_blue.runs.record_files import RecordFile, write_record
from lightning_blue.support.errors import InputError
from lightning_blue.support.storage import NotWritten, make_folder, write_atomic

FORMAT, VERSION = "lightning-blue journal", 1
RECORDS, HEADER = "records", "journal.json"


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
                f"the journal cannot be read: {error!r}", where=str(path), hint=_RESTORE
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
                f"the journal is damaged: {error!r}", where=str(path), hint=_RESTORE
            ) from error


_RESTORE = "bring the file back from a copy"


class EditJournal(Callback):
    """Write a record of each committed batch into the run's folder.

    In a run that is resumed, with the same folder, records of batches beyond the checkpoint are
    removed before the first batch. Only the first process writes.

    Args:
        run_folder: of the run; the journal is its folder ``records``.
        again: whether the run starts from its beginning in a folder where it was stopped before
            its first checkpoint: the records that are there are then removed.
    """

    def __init__(self, run_folder: str | Path, again: bool = False) -> None:
        self.folder = Path(run_folder) / RECORDS
        self.again = again
        self.header: JournalHeader | None = None  # until the run starts; None: nothing is written
        self._pending: list[EditRecord] = []  # could not be written yet

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the header, or go on with the one that is there.

        Raises:
            InputError: if the folder holds another run's records, or not all of this one's.
        """
        if not trainer.is_global_zero:
            return
        update = _update_of(trainer)
        there = self.folder / HEADER
        if self.again and update.committed == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        if not there.exists():
            self._start(pl_module, update)
            return
        self.header = JournalHeader.read(there)
        fresh = update.committed == 0 and trainer.ckpt_path is None
        if fresh or self.header.update != _plain(_settings(update)):
            raise InputError(
                "the folder holds the records of another run",
                where=str(self.folder),
                hint="start the run in a folder of its own",
            )
        self.truncate(update.committed)

    def on_edit_committed(self, trainer: Trainer, module: Any, record: EditRecord) -> None:
        """Write the batch's record; where it cannot be written, once more with the next one."""
        if self.header is None or not trainer.is_global_zero:
            return
        self._pending.append(record)
        try:
            self.write_pending()
        except NotWritten as error:
            if len(self._pending) == 1:  # the first that fails speaks for those after it
                rank_zero_warn(
                    f"{error.path} could not be written: {error.reason}; the run goes on, and the "
                    "record is written as soon as there is room"
                )

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Try once more to write what could not be written.

        Raises:
            NotWritten: if that fails.
        """
        self.write_pending()

    def write_pending(self) -> None:
        """Write the records that could not be written before.

        Raises:
            NotWritten: if they cannot be written now either.
        """
        while self._pending and self.header is not None:
            record = self._pending[0]
            path = self.folder / record_name(record.batch)
            write_record(path, record, self.header.run, self.header.model.fingerprint)
            del self._pending[0]

    def truncate(self, committed: int) -> None:
        """Remove the records of batches that a resumed run will make again.

        Args:
            committed: how many batches are in the weights that the run goes on with.

        Raises:
            InputError: if records of batches before that are missing.
        """
        for path in sorted(self.folder.glob("batch-*.safetensors")):
            if int(path.stem.rpartition("-")[2]) >= committed:
                path.unlink()
        record_files(self.folder, committed)

    def _start(self, module: EditModule, update: ClosedFormUpdate) -> None:
        """Describe the run before its first batch."""
        if update.committed:
            rank_zero_warn(
                f"{update.committed} batches were committed without a journal; none is kept, and "
                "this run cannot be undone in part"
            )
            return
        self.header = describe(module, update)
        make_folder(self.folder)
        write_atomic(self.folder / HEADER, self.header.to_json())


class Journal:
    """The journal of a run, opened for reading.

    Args:
        run_folder: the run.

    Attributes:
        header: what stays the same over the run.
        files: one for each committed batch, in order.

    Raises:
        InputError: if there is no such run, it has no records, or they are damaged or another's.
    """

    def __init__(self, run_folder: str | Path) -> None:
        self.run_folder = Path(run_folder)
        if not self.run_folder.is_dir():
            raise InputError("there is no such run", where=str(run_folder), hint=_WHICH)
        folder = self.run_folder / RECORDS
        if not (folder / HEADER).is_file():
            raise InputError(
                "the run has no records of its batches",
                where=str(folder),
                hint="records are written by `lightning-blue fit`; " + _WHICH,
            )
        self.header = JournalHeader.read(folder / HEADER)
        self.files = record_files(folder)
        for file in self.files:
            if (file.run, file.model) != (self.header.run, self.header.model.fingerprint):
                raise InputError(
                    "this record belongs to another run", where=str(file.path), hint=_RESTORE
                )

    @property
    def request_ids(self) -> list[tuple[str, ...]]:
        """Ids of the edits of each batch."""
        return [file.request_ids for file in self.files]

    def require_edits(self) -> None:
        """Refuse a run of which nothing can be made.

        Raises:
            InputError: if it wrote no weight, or has no committed batch.
        """
        self.require_weights()
        if not self.files:
            raise InputError(
                "the run has no committed batch",
                where=str(self.run_folder),
                hint="go on with it: the command it was started with, and --ckpt_path=last",
            )

    def require_weights(self) -> None:
        """Refuse a run that wrote no weight, where an edited model is wanted.

        Raises:
            InputError: if its facts stand in prompts.
        """
        if not self.header.weights:
            raise InputError(
                "the run changed no weight: its facts stand in front of prompts",
                where=str(self.run_folder),
                hint="take the unedited model, and the facts and their wording from "
                f"{self.run_folder / FACTS}",
            )

    def changes(self, weight: WeightId) -> Iterator[tuple[int, WeightChange]]:
        """Read what each batch did to a weight, one batch after the other, with its number."""
        for file in self.files:
            for change in file.changes(weight):
                yield file.batch, change


_WHICH = "give the folder of a run, e.g. runs/quickstart"


def record_name(batch: int) -> str:
    """Return the name of a batch's file."""
    return f"batch-{batch:05d}.safetensors"


def record_files(folder: Path, count: int | None = None) -> list[RecordFile]:
    """Open the files of all batches in order, or of the first ``count``.

    Raises:
        InputError: if one is missing or damaged.
    """
    there = sorted(folder.glob("batch-*.safetensors")) if count is None else range(count)
    files = []
    for batch in range(len(there)):
        path = folder / record_name(batch)
        if not path.is_file():
            raise InputError(
                f"the record of batch {batch} is missing", where=str(path), hint=_RESTORE
            )
        files.append(RecordFile(path))
        if files[-1].batch != batch:
            raise InputError(
                f"this is the record of batch {files[-1].batch}", where=str(path), hint=_RESTORE
            )
    return files


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
        update=_plain(_settings(update)),
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


def _update_of(trainer: Trainer) -> ClosedFormUpdate:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ClosedFormUpdate):
            return callback
    raise RuntimeError("EditJournal needs a ClosedFormUpdate callback before it")


def _settings(update: ClosedFormUpdate) -> dict[str, Any]:
    settings: dict[str, Any] = update.state_dict()["settings"]
    return settings


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as JSON gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain
