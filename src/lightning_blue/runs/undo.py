"""Take edits out of a run: by going back, by subtracting them, or by solving the rest again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from blue_callbacks import KeyMemory, WeightId
from blue_callbacks.solvers import CLOSED_FORMS, Solver
from blue_callbacks.transforms import POST_EDIT_TRANSFORMS
from lightning_blue.editing.brought import MARK, BroughtStatistics
from lightning_blue.editing.covariance_file import CovarianceFile
from lightning_blue.runs.base import UneditedModel
from lightning_blue.runs.journal import Journal
from lightning_blue.runs.journal_header import JournalHeader
from lightning_blue.runs.weights import (
    Removed,
    relative_distance,
    replayed,
    solvable,
    with_changes,
)
from lightning_blue.support.errors import InputError
from lightning_blue.support.text import counted


def all_from(journal: Journal, first: int) -> Removed:
    """Select a batch and all after it.

    Raises:
        InputError: if the run does not have as many batches.
    """
    count = len(journal.files)
    if not 0 <= first <= count:
        raise InputError(
            f"the run has {counted(count, 'batch', 'batches')}; {first} of them cannot be kept",
            where=f"--to {first}",
            hint=f"choose from 0 (the unedited model) to {count} (all)",
        )
    return {batch: _every(journal, batch) for batch in range(first, count)}


def one_batch(journal: Journal, batch: int) -> Removed:
    """Select one batch.

    Raises:
        InputError: if the run does not have it.
    """
    count = len(journal.files)
    if not 0 <= batch < count:
        raise InputError(
            f"the run has no batch {batch}" + (f": they are 0 to {count - 1}" if count else ""),
            where=f"--batch {batch}",
            hint="`lightning-blue show RUN` lists them",
        )
    return {batch: _every(journal, batch)}


def requests(journal: Journal, ids: Sequence[str]) -> Removed:
    """Select edits by their request's id, wherever they are.

    Raises:
        InputError: if the run did not edit one of them.
    """
    wanted = set(ids)
    known = {one for batch in journal.request_ids for one in batch}
    missing = sorted(wanted - known)
    if missing or not wanted:
        raise InputError(
            f"the run has no request {', '.join(missing)}" if missing else "no request is named",
            where=f"--requests {','.join(ids)}",
            hint="`lightning-blue show RUN --all` lists their ids",
        )
    found = {
        batch: [column for column, one in enumerate(names) if one in wanted]
        for batch, names in enumerate(journal.request_ids)
    }
    return {batch: columns for batch, columns in found.items() if columns}


def require_possible(journal: Journal, removed: Removed, replay: bool) -> None:
    """Refuse to take out of a fine-tuned run what its records cannot tell apart.

    Raises:
        InputError: if single edits of a batch are to go, or later batches to be solved again.
    """
    if journal.header.update["solver"] in CLOSED_FORMS:
        return
    whole = "whole batches can be taken out: --to K, exactly, or --batch K"
    if replay:
        raise InputError(
            "a run that was fine-tuned was not solved, and cannot be solved again",
            where="--replay",
            hint=f"leave it out; {whole}",
        )
    for batch, columns in removed.items():
        if len(columns) < len(journal.files[batch].request_ids):
            raise InputError(
                f"batch {batch} was fine-tuned on all of its edits together, and none of them can "
                "be taken out alone",
                where="--requests",
                hint=whole,
            )


def is_exact(journal: Journal, removed: Removed) -> bool:
    """Say whether whole batches from one on are removed, so that nothing has to be solved again."""
    first = min(removed, default=len(journal.files))
    return dict(removed) == dict(all_from(journal, first))


def write_without(
    journal: Journal, removed: Removed, base: UneditedModel, covariance: CovarianceFile | None
) -> dict[WeightId, float]:
    """Write the weights of a run into its unedited model, but for some edits.

    Args:
        journal: of the run.
        removed: the edits that are left out.
        base: the unedited model, which becomes the edited one.
        covariance: to solve later batches again; None: they stay as they were.

    Returns:
        Where batches were solved again: by weight, how far that is from only subtracting, as a
        fraction of how far the run moved the weight.

    Raises:
        InputError: if the covariance is missing, or a record is damaged.
        UnsolvableError: if a system has no solution in float64.
    """
    header, distances = journal.header, {}
    for weight in dict.fromkeys(header.weights):
        original = base.weights.read(weight).clone()
        with solvable(f"the changes of {weight}"):
            plain = with_changes(original, journal.changes(weight), removed)
            result = plain
            if covariance is not None:
                result = _solved_again(journal, weight, original, removed, covariance)
                distances[weight] = relative_distance(plain, result, original)
            base.weights.write(weight, transformed(header, original, result))
    return distances


def transformed(header: JournalHeader, original: Tensor, edited: Tensor) -> Tensor:
    """Apply the run's post-edit transform, if it has one."""
    name = header.update["post_edit_transform"]
    return edited if name is None else POST_EDIT_TRANSFORMS[name](original, edited)


def statistics(header: JournalHeader, path: str | None = None) -> CovarianceFile:
    """Return the covariance file of a run.

    Args:
        header: of the run's journal.
        path: where it is, if not where the run had it.

    Raises:
        InputError: if it is not there.
    """
    where, identity = path or header.covariance["path"], header.covariance["identity"]
    if MARK in identity:
        return _brought_again(header, where)
    file = CovarianceFile(Path(where), identity, _COMPUTE_AGAIN)
    if not file.path.is_file():
        raise InputError(_NEEDED, where=str(file.path), hint=_COMPUTE_AGAIN)
    return file


_NEEDED = "solving again needs the covariance that the run was made with"
_COMPUTE_AGAIN = (
    "say where the file is: --covariance FILE; or `lightning-blue stats` with the run's "
    "config.yaml computes it again"
)


def _brought_again(header: JournalHeader, where: str) -> BroughtStatistics:
    """Return statistics that were brought from elsewhere, if they are still the same."""
    hint = "say where they are now: --covariance FILE"
    try:
        file = BroughtStatistics(where, sorted({weight.layer for weight in header.weights}))
    except InputError as error:
        raise InputError(_NEEDED, where=where, hint=hint) from error
    if file.identity != header.covariance["identity"]:
        raise InputError("these are not the statistics of the run", where=where, hint=hint)
    return file


def _every(journal: Journal, batch: int) -> list[int]:
    return list(range(len(journal.files[batch].request_ids)))


def _solved_again(
    journal: Journal,
    weight: WeightId,
    original: Tensor,
    removed: Removed,
    covariance: CovarianceFile,
) -> Tensor:
    """Replay one weight; what was whitened for it is freed with the memory."""
    update = journal.header.update
    d_in = journal.header.weights[weight].shape[1]
    found = covariance.read({weight.layer: d_in})
    if weight.layer not in found:
        raise InputError(
            f"the covariance file has no layer {weight.layer}",
            where=str(covariance.path),
            hint=_COMPUTE_AGAIN,
        )
    names = ("covariance_weight", "threshold", "energy", "ridge")
    solver = Solver(update["solver"], **{name: update[name] for name in names})
    with torch.no_grad():
        return replayed(
            original,
            journal.changes(weight),
            removed,
            KeyMemory(solver.whitening(found[weight.layer])),
            past_keys=update["past_keys"],
            rect_keep=update["rect_keep"],
        )
