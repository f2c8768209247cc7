"""The edited model of a run, and the unedited one, in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_blue.language_model.loading import DTYPES, load_language_model
from lightning_blue.language_model.saving import rounded
from lightning_blue.runs.base import UneditedModel
from lightning_blue.runs.journal import HEADER, RECORDS, Journal
from lightning_blue.runs.journal_header import JournalHeader
from lightning_blue.runs.show import RUN_FILES
from lightning_blue.runs.undo import write_without
from lightning_blue.support.errors import InputError

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def is_run(path: str) -> bool:
    """Say whether a path is the folder of a run, and not of a model."""
    folder = Path(path)
    is_model = (folder / "config.json").is_file()
    return not is_model and any((folder / name).is_file() for name in RUN_FILES)


def models_of(run: Path, before: bool, base: str | None = None) -> Iterator[Loaded]:
    """Yield the unedited model of a run if it is wanted, and then the edited one.

    The edited one is the folder ``model`` of the run, or where that was not written, the unedited
    one with what the run's records hold, in the dtype that the run saves. Both are on the CPU; ask
    the first before the second is taken, which may be the same one edited.

    Args:
        run: its folder.
        before: whether the unedited model is wanted too.
        base: where that is, if not where the run found it.

    Raises:
        InputError: if there is neither a model nor records, or the unedited model is another.
    """
    exported = (run / "model" / "config.json").is_file()
    if exported and not before and base is None:
        yield _exported(run)
        return
    journal = Journal(run)
    journal.require_weights()
    unedited = UneditedModel(journal.header.model, journal.header.weights, base)
    if before:
        yield unedited.model, unedited.tokenizer
    if exported:
        del unedited
        yield _exported(run)
        return
    journal.require_edits()
    write_without(journal, {}, unedited, None)
    for weight in dict.fromkeys(journal.header.weights):
        saved = rounded(unedited.weights.read(weight), unedited.saved_dtype)
        unedited.weights.write(weight, saved)
    yield unedited.model, unedited.tokenizer


def chat_of(run: Path) -> tuple[bool, str | None]:
    """Return whether a run put a chat template around its prompts, and its system text."""
    data: dict[str, Any] = {}
    path = run / "config.yaml"
    if path.is_file():
        try:
            data = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("data") or {}
        except (yaml.YAMLError, ValueError, AttributeError) as error:
            raise InputError(
                f"the run's configuration is damaged: {' '.join(str(error).split())}",
                where=str(path),
                hint="bring the file back from a copy",
            ) from error
    return bool(data.get("chat")), data.get("system")


def _exported(run: Path) -> Loaded:
    """Load the model that a run has saved, in the dtype that the run worked in."""
    header = run / RECORDS / HEADER
    dtype = JournalHeader.read(header).model.dtype if header.is_file() else "float32"
    return load_language_model(str(run / "model"), dtype if dtype in DTYPES else "float32")
