"""What was edited in a run, and what its folder holds, in 80 columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blue_callbacks import WeightId
from lightning_blue.reporting.files import read_edits
from lightning_blue.runs.card import edits_in_batches
from lightning_blue.runs.journal import HEADER, RECORDS, Journal
from lightning_blue.support.errors import InputError
from lightning_blue.support.locks import FOLDER_LOCK
from lightning_blue.support.text import counted

WIDTH = 80
EDITS_A_BATCH = 3  # shown, unless all are asked for
RUN_FILES = ("config.yaml", "summary.json", f"{RECORDS}/{HEADER}")  # one of them makes a run

Row = Mapping[str, Any]


def describe_run(folder: Path, every_edit: bool = False) -> str:
    """Describe a run, finished or not.

    Args:
        folder: of the run.
        every_edit: list all edits of a batch, not the first few.

    Returns:
        Lines of at most 80 characters.

    Raises:
        InputError: if it is no run, or its journal is damaged.
    """
    if not any((folder / name).is_file() for name in RUN_FILES):
        raise InputError(
            "there is no such run", where=str(folder), hint="give its folder, e.g. runs/quickstart"
        )
    has_journal = (folder / RECORDS / HEADER).is_file()
    journal = Journal(folder) if has_journal else None
    rows = read_edits(folder) if (folder / "edits.jsonl").is_file() else []
    lines = [*_head(folder, journal), "", *_batches(journal, rows, every_edit), ""]
    lines += ["in the folder:", *_contents(folder)]
    return "\n".join(_cut(line) for line in lines)


def size(n_bytes: float) -> str:
    """Spell a size.

    >>> size(512), size(14_700_000)
    ('512 B', '14.7 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            break
        n_bytes /= 1000
    return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"


def _head(folder: Path, journal: Journal | None) -> Iterator[str]:
    """Say what was edited, how, and how it ended."""
    yield f"run:      {folder}"
    if journal is None:
        yield "records:  none; this run cannot be undone or exported"
    else:
        header = journal.header
        model = header.model
        yield f"model:    {model.name_or_path} ({model.type}, {model.dtype})"
        yield f"          unedited fingerprint {model.fingerprint}"
        update = header.update
        layers = ", ".join(map(str, update["layers"])) if header.weights else "none written"
        yield f"update:   {update['plan']}, {update['solver']}, layers {layers}"
        for name in ("rect_keep", "post_edit_transform"):
            if update[name] is not None:
                yield f"          {name} {update[name]}"
        yield f"written:  {edits_in_batches(journal.request_ids)}"
    yield from _scores(folder / "summary.json")


def _scores(path: Path) -> Iterator[str]:
    """Say the scores before and after, of a run that was measured."""
    numbers = _json(path) if path.is_file() else {}
    for name in ("efficacy", "generalization", "specificity", "perplexity"):
        before, after = numbers.get(f"pre/{name}"), numbers.get(f"post/{name}")
        if isinstance(before, float | int) and isinstance(after, float | int):
            yield f"{name + ':':<16}{before:8.2f} -> {after:.2f}"


def _batches(journal: Journal | None, rows: Sequence[Row], every_edit: bool) -> Iterator[str]:
    """List the batches and their edits: from the journal, or else from the measured edits."""
    by_batch: dict[int, list[Row]] = {}
    for row in rows:
        if row.get("batch") is not None:
            by_batch.setdefault(int(row["batch"]), []).append(row)
    ids = dict(enumerate(journal.request_ids)) if journal else {}
    for batch in sorted(set(ids) | set(by_batch)):
        edits = by_batch.get(batch) or [{"case_id": name} for name in ids[batch]]
        norms = journal.files[batch].norms if journal and batch in ids else {}
        yield _batch(batch, edits, norms)
        shown = edits if every_edit else edits[:EDITS_A_BATCH]
        yield from map(_edit, shown)
        if len(edits) > len(shown):
            yield f"    ... and {len(edits) - len(shown)} more (--all)"


def _batch(batch: int, edits: list[Row], norms: Mapping[WeightId, float]) -> str:
    """Sum a batch up: mean efficacy at the end of the run, and norms of what was added."""
    shares = [share for share in map(_efficacy, edits) if share is not None]
    scored = f", efficacy at the end {sum(shares) / len(shares):.0%}" if shares else ""
    added = "".join(f", {weight} {norm:.2g}" for weight, norm in norms.items())
    return f"batch {batch}: {counted(len(edits), 'edit')}{scored}" + (
        f"; norm{added[1:]}" if added else ""
    )


def _edit(edit: Row) -> str:
    """One edit: whether it holds at the end, its id, and what it says."""
    share = _efficacy(edit)
    held = "  ?" if share is None else "yes" if share == 1 else " no" if share == 0 else "pt."
    said = f"{edit['prompt']} -> {edit['target_new']}" if "prompt" in edit else ""
    return f"    {held}  {edit['case_id']!s:<6} {said}".rstrip()


def _efficacy(edit: Row) -> float | None:
    share = (edit.get("after") or {}).get("efficacy")
    return None if share is None else float(share)


def _contents(folder: Path) -> Iterator[str]:
    """List what stands in the folder, with sizes."""
    for path in sorted(folder.iterdir()):
        if path.name == FOLDER_LOCK:
            continue
        inside = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        total = sum(map(_bytes, inside))
        name = path.name + ("/" if path.is_dir() else "")
        count = f"  {counted(len(inside), 'file')}" if path.is_dir() else ""
        yield f"  {size(total):>9}  {name}{count}"


def _bytes(path: Path) -> int:
    """Return the size of a file, 0 if it is gone: a run that goes on prunes its checkpoints."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _json(path: Path) -> Row:
    try:
        found: Row = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"the file is damaged: {error}", where=str(path), hint="bring it back from a copy"
        ) from error
    return found


def _cut(line: str) -> str:
    """Keep a line within the width."""
    flat = line.replace("\n", " ")
    return flat if len(flat) <= WIDTH else flat[: WIDTH - 3] + "..."
