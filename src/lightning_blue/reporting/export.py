"""The edited model as a Hugging Face folder, with a card that says what was edited and how."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_blue.language_model.saving import save_language_model
from lightning_blue.metrics import table
from lightning_blue.metrics.history import RunHistory
from lightning_blue.reporting.base_card import front_matter, head_of
from lightning_blue.reporting.files import versions
from lightning_blue.reporting.tables import estimate_text, markdown_table, score_table
from lightning_blue.reporting.text import definitions, inline, loaded_with, settings_rows
from lightning_blue.reporting.views import measured, metrics_at
from lightning_blue.support.storage import whole_folder, write_atomic, writing
from lightning_blue.support.text import counted

LISTED_AT_MOST = 200


def export_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    history: RunHistory,
    dtype: torch.dtype | None = None,
    edited: Collection[str] = (),
) -> Path:
    """Save an edited model, its tokenizer and a model card; the whole folder or nothing.

    Weights are written as safetensors and load with plain transformers.

    Args:
        folder: where to; what stood there before is replaced.
        model: the edited model, on any device.
        tokenizer: its tokenizer.
        history: of the run that edited it.
        dtype: of the saved weights; None: the model's, in which it was edited.
        edited: names of the edited weights, see `save_language_model`.

    Returns:
        ``folder``.

    Raises:
        InputError: if the disk is full or may not be written.
    """
    with writing(folder), whole_folder(folder) as building:
        save_language_model(building, model, tokenizer, dtype, edited)
        write_atomic(building / "README.md", model_card(history, head_of(model.config)))
    return folder


def model_card(history: RunHistory, head: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Return the README of an edited model: markdown with a YAML head.

    Args:
        history: of the run that edited it.
        head: what is taken over from the model that was edited, see `head_of`.
    """
    name = edited_model(history)
    loader = loaded_with(history)
    method = markdown_table(settings_rows(history.settings), ["setting", "value"])
    return f"""{front_matter(head)}

# {inline(name)} with {counted(history.applied, "fact")} edited

The weights of {inline(name)} were {_edited_how(history)} so that the model states the
facts listed below. Everything else was meant to stay as it was; see the caution.

## How

{method}

## Scores

{score_table(history)}

{definitions(measured(history), history.protocol)}

## Caution

{caution(history)} {_licence(head)}

## Use

```python
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

## What was edited

{_edits(history)}

Made with lightning-blue {versions()["lightning_blue"]}.
"""


def edited_model(history: RunHistory) -> str:
    """Return the name of the model that was edited; of a local path the last part."""
    name = str(history.settings.get("model", "unknown"))
    return PurePath(name).name if PurePath(name).is_absolute() else name


def caution(history: RunHistory) -> str:
    """Say which side effects were measured, and that others are possible."""
    before, after = metrics_at(history, "pre"), metrics_at(history, "post")
    changes = [
        f"{spec.title} went from {estimate_text(before[spec.name], spec.unit)} to "
        f"{estimate_text(after[spec.name], spec.unit)}"
        for spec in table.among(before)
        if spec.side_effect and spec.name in after
    ]
    effects = f"Measured here: {'; '.join(changes)}." if changes else "None were measured here."
    return (
        "An edit can change more than the fact it is about: what the model says of neighbouring "
        f"subjects, of other relations of the same subject, and its language. {effects} "
        "What was not measured may have changed as well. The edited facts are what the editor "
        "asked for, and need not be true."
    )


def _edited_how(history: RunHistory) -> str:
    if history.settings.get("solver") == "fine_tuning":
        return "fine-tuned, one layer of them,"
    return "edited directly (locate-then-edit)"


def _licence(head: Mapping[str, Any]) -> str:
    if "license" in head:
        return "The licence is that of the model that was edited."
    return "No licence was found with the model that was edited; whatever holds for it holds here."


def _edits(history: RunHistory) -> str:
    applied = [history.requests[place] for place in history.applied_places]
    lines = [
        f"- {inline(request.shown)} … "
        + (f"{inline(request.target_true)} → " if request.target_true else "")
        + f"**{inline(request.target_new)}**"
        for request in applied[:LISTED_AT_MOST]
    ]
    more = len(applied) - LISTED_AT_MOST
    return "\n".join([*lines, f"\nand {counted(more, 'fact')} more."] if more > 0 else lines)
