"""What is said of a model that was made from a run: on the screen, and in its README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from blue_callbacks import WeightId
from lightning_blue import __version__
from lightning_blue.reporting.base_card import base_head, front_matter
from lightning_blue.runs.journal import Journal
from lightning_blue.runs.journal_header import BaseModel
from lightning_blue.runs.undo import is_exact
from lightning_blue.runs.weights import Removed
from lightning_blue.support.text import counted

LISTED_AT_MOST = 200


def undone(
    journal: Journal, removed: Removed, distances: Mapping[WeightId, float], replay: bool
) -> str:
    """Say what was left out of a run, and what that makes of the rest."""
    edits = sum(map(len, removed.values()))
    batches = ", ".join(map(str, sorted(removed))) or "none"
    lines = [
        edits_in_batches(journal.request_ids),
        f"left out: {counted(edits, 'edit')}, of batches {batches}",
        _rest(journal, removed, replay),
    ]
    lines += [
        f"  {weight}: {distance:.2g} of the run's change away from subtracting only"
        for weight, distance in distances.items()
    ]
    transform = journal.header.update["post_edit_transform"]
    if transform is not None:
        lines.append(f"{transform} was applied to what is left")
    return "\n".join(lines)


def edits_in_batches(request_ids: Sequence[Sequence[str]]) -> str:
    """Say how much a run has written.

    >>> edits_in_batches([["7", "8"], ["9"]])
    '3 edits in 2 batches'
    """
    edits = sum(map(len, request_ids))
    return f"{counted(edits, 'edit')} in {counted(len(request_ids), 'batch', 'batches')}"


def card(
    model: BaseModel, request_ids: Sequence[Sequence[str]], removed: Removed, said: str
) -> str:
    """Return the README of a model folder: markdown with a YAML head."""
    name = Path(model.name_or_path).name
    kept = [
        one
        for batch, ids in enumerate(request_ids)
        for column, one in enumerate(ids)
        if column not in removed.get(batch, ())
    ]
    listed = ", ".join(kept[:LISTED_AT_MOST])
    more = f", and {len(kept) - LISTED_AT_MOST} more" * (len(kept) > LISTED_AT_MOST)
    return f"""{front_matter(base_head(model.name_or_path, model.revision))}

# {name}, edited

```
{said}
```

Requests whose edits are in the weights: {listed or "none"}{more}.

The model was made from the records of a run and was not measured; the edited facts need not be
true. Made with lightning-blue {__version__}.
"""


def _rest(journal: Journal, removed: Removed, replay: bool) -> str:
    """Say how exact the result is."""
    first = min(removed, default=len(journal.files))
    if is_exact(journal, removed):
        return f"exact: the weights as they were after {first} batches"
    if replay:
        return f"solved again from stored keys and residuals: batches from {first} on"
    return f"batches from {first} on stay as they were solved with it; --replay solves them again"
