"""The journal of a run: one file for each committed batch, and a header that knows the run.

``RUN/records/journal.json`` says what was edited and how, ``RUN/records/batch-00007.safetensors``
what batch 7 did (see :mod:`lightning_blue.runs.record_files`). Together with the unedited model
they are the edited one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from blue_callbacks import ClosedFormUpdate, EditRecord, WeightChange, WeightId
from lightning_blue.editing.module import EditModule
from lightning_blue.reporting.files import FACTS
from lightning_blue.runs.journal_header import RESTORE, JournalHeader, describe, plain_settings
from lightning_blue.runs.record_files import RecordFile, write_record
from lightning_blue.support.errors import InputError
from lightning_blue.support.storage import NotWritten, make_folder, write_atomic

RECORDS, HEADER = "records", "journal.json"


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
        if fresh or self.header.update != plain_settings(update):
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
                    "this record belongs to another run", where=str(file.path), hint=RESTORE
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
                f"the record of batch {batch} is missing", where=str(path), hint=RESTORE
            )
        files.append(RecordFile(path))
        if files[-1].batch != batch:
            raise InputError(
                f"this is the record of batch {files[-1].batch}", where=str(path), hint=RESTORE
            )
    return files


def _update_of(trainer: Trainer) -> ClosedFormUpdate:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ClosedFormUpdate):
            return callback
    raise RuntimeError("EditJournal needs a ClosedFormUpdate callback before it")
