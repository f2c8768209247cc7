"""The machine-readable files of a run: one line per request, and one flat summary."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_blue import __version__
from lightning_blue.data.checks import CONTRADICTION, count_by_kind
from lightning_blue.metrics import table
from lightning_blue.metrics.evaluation import RequestOutcome, flatten
from lightning_blue.metrics.history import RunHistory
from lightning_blue.metrics.matching import GeneratedAnswer, contains, is_any, is_match
from lightning_blue.reporting.views import (
    FinalLoss,
    batch_of,
    edits_with_targets_read,
    final_losses,
    metrics_at,
    outcome_pairs,
    seconds_per_edit,
)
from lightning_blue.support.errors import InputError
from lightning_blue.support.storage import write_atomic

FACTS = "facts.json"  # of a run that changes no weight, in the place of a model
ASKED = frozenset({"case_id", "subject", "prompt", "target_new"})  # of each line of edits.jsonl
SUMMARY_STAGES = ("pre", "post", "first_batch", "test")


def write_edits(path: Path, history: RunHistory) -> None:
    """Write ``edits.jsonl``: each request with its outcome before and after.

    An outcome is flat: ``case_id``, each metric that the table of metrics marks as per request
    (null where the request offers nothing to measure), and the other fields of `RequestOutcome`.

    Raises:
        InputError: if the file cannot be written.
    """
    ends = final_losses(history)
    rows = (
        {
            "case_id": request.case_id,
            "subject": request.subject,
            "prompt": request.text,
            **_joined(history, index),
            "target_new": request.target_new,
            "target_true": request.target_true,
            "batch": batch_of(history, index),
            "before": _outcome(before, history.added),
            "after": _outcome(after, history.added),
            "target_optimization": _ends(ends.get(index, {})),
        }
        for index, (request, before, after) in enumerate(outcome_pairs(history))
    )
    _write_lines(path, rows)


def read_edits(folder: Path) -> list[dict[str, Any]]:
    """Read what `write_edits` wrote into the folder of a run, one mapping a request.

    Raises:
        InputError: if ``edits.jsonl`` is missing or damaged.
    """
    path = folder / "edits.jsonl"
    try:
        # not splitlines: texts hold characters that end a line there, as U+2028, and none in JSON
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        if not all(isinstance(row, dict) and row.keys() >= ASKED for row in rows):
            raise ValueError("a line is no request with its outcome")
    except (OSError, ValueError) as error:
        raise InputError(
            f"what the run edited cannot be read: {error}",
            where=str(path),
            hint="give the folder of a finished run, or bring the file back from a copy",
        ) from error
    return rows


def write_answers(path: Path, history: RunHistory) -> None:
    """Write ``answers.jsonl``: every answer that the model wrote freely, if it was asked to.

    A line holds the request (``case_id``), the ``stage`` (``pre``, ``post`` or ``test``), which of
    its ``prompts`` was asked, that ``prompt`` as the data has it, the wanted object (after a
    negated prompt the new one) and its aliases, the answer and the longer text, by alias that holds
    a stop string what it is compared with, the answer's token ids, what ended it, whether it
    matches (`lightning_blue.metrics.matching`), and whether the ``judge`` calls it right. For a
    neighbour's prompt ``same`` says whether the ids are those of the unedited model. What does not
    apply is null.

    Raises:
        InputError: if the file cannot be written.
    """
    rows = answer_rows(history)
    if rows:
        _write_lines(path, rows)


def answer_rows(history: RunHistory) -> list[dict[str, Any]]:
    """Return what `write_answers` writes, a row for each answer before and after."""
    last = "test" if history.of("test") else "post"
    taken = {"pre": history.answers_before, last: history.answers_after}
    return [_answer(history, stage, each) for stage, answers in taken.items() for each in answers]


def write_rejected(path: Path, history: RunHistory) -> None:
    """Write ``rejected.jsonl``, one line per request that could not be used, if there are any.

    Raises:
        InputError: if the file cannot be written.
    """
    if history.rejected:
        _write_lines(path, (asdict(rejected) for rejected in history.rejected))


def write_metrics(path: Path, history: RunHistory) -> None:
    """Write ``metrics.csv`` whole, where the logger that adds to it has failed.

    Raises:
        NotWritten: if the file cannot be written; of what stands there, only whole lines stay.
    """
    rows = [{**values, "step": applied} for applied, values in history.logged]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, sorted({key for row in rows for key in row}))
    writer.writeheader()
    writer.writerows(rows)
    try:
        write_atomic(path, table.getvalue())
    except InputError:
        with suppress(OSError):
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        raise


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Spread nested mappings over keys with ``/`` between.

    >>> flat({"update": {"plan": "even"}, "seed": 1})
    {'update/plan': 'even', 'seed': 1}
    """
    spread: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}/{key}" if above else str(key)
        spread |= flat(value, name) if isinstance(value, Mapping) else {name: value}
    return spread


def summary(history: RunHistory) -> dict[str, Any]:
    """Return a run's numbers under flat keys; what was not measured has no key.

    A value that is not finite has none either, but its counts have.

    ``pre/efficacy``, ``pre/efficacy/standard_error`` and so on for each stage and metric,
    ``protocol`` and, where more than one was measured, ``protocol/added``,
    ``edits/applied``, ``edits/requested`` (usable requests), ``edits/rejected``, ``guard/events``,
    ``controls/kept`` and ``controls/asked`` where control facts were asked for,
    ``export/dtype`` and ``export/rounding_loss/...`` where the model is saved in another dtype than
    it was edited in, ``edits/targets_read`` where targets were read that another run has kept,
    ``seconds/edit`` (of one edit, without those), ``seconds/editing``, ``seconds/evaluate``,
    ``seconds/ability``, ``seconds/prepare`` and ``seconds/total`` (of the run), ``settings/...``
    and ``versions/...``.
    """
    numbers: dict[str, Any] = {}
    for stage in SUMMARY_STAGES:
        measured = flatten(metrics_at(history, stage))
        numbers |= {f"{stage}/{key}": number for key, number in measured.items()}
    contradicted = count_by_kind(history.rejected).get(CONTRADICTION, 0)  # inside a batch
    numbers |= {
        "edits/applied": history.applied,
        "edits/superseded": history.applied - len(history.in_force) + contradicted,
        "edits/requested": len(history.requests),
        "edits/rejected": len(history.rejected),
        "edits/ended_early": history.ended_early,
        "protocol": history.protocol,
        "protocol/known_objects": sum(r.target_true is not None for r in history.requests),
    }
    if history.added:
        numbers["protocol/added"] = ", ".join(history.added)
    if history.controls_kept is not None:
        numbers["controls/kept"], numbers["controls/asked"] = history.controls_kept
    if history.guard_events is not None:
        numbers["guard/events"] = len(history.guard_events)
    if history.targets_read:
        numbers["edits/targets_read"] = edits_with_targets_read(history)
    each = seconds_per_edit(history)
    numbers |= {} if each is None else {"seconds/edit": each}
    if history.export_dtype:
        numbers["export/dtype"] = history.export_dtype
    numbers |= {f"export/rounding_loss/{w}": lost for w, lost in history.rounding_losses.items()}
    numbers |= {f"seconds/{part}": seconds for part, seconds in history.seconds.items()}
    numbers |= flat(history.settings, "settings")
    return numbers | {f"versions/{name}": number for name, number in versions().items()}


def write_summary(path: Path, history: RunHistory) -> None:
    """Write ``summary.json``, see `summary`.

    Raises:
        InputError: if the file cannot be written.
    """
    write_atomic(path, _json(summary(history), indent=2) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of what a run's numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "lightning": version("lightning"),
        "lightning_blue": __version__,
    }


def _outcome(outcome: RequestOutcome | None, added: Sequence[str]) -> dict[str, Any] | None:
    if outcome is None:
        return None
    fields = asdict(outcome)
    values = table.per_request(fields.pop("values"), added)
    return {"case_id": fields.pop("case_id"), **values, **fields}


def _answer(history: RunHistory, stage: str, answer: GeneratedAnswer) -> dict[str, Any]:
    known = answer.unedited is not None
    compared, neighbour = answer.compared, answer.prompts == table.NEIGHBOURS
    return {
        "case_id": history.requests[answer.request].case_id,
        "stage": stage,
        "prompts": answer.prompts,
        "prompt": answer.prompt,
        "wanted": answer.wanted,
        "aliases": answer.aliases,
        "answer": answer.answer,
        "longer": answer.longer,
        "alias_texts": answer.alias_texts,
        "ids": answer.ids,
        "ended_by": answer.ended_by,
        "exact_match": is_match(answer.answer, answer.wanted) if compared else None,
        "containment": None if neighbour else contains(answer.longer, answer.wanted),
        "alias_match": is_any(answer) if compared and answer.aliases else None,
        "judge": answer.judged,
        "same": answer.ids == answer.unedited if known else None,
    }


def _joined(history: RunHistory, index: int) -> dict[str, str | None]:
    """Return what stands between prompt and object, and why; null where it is not known."""
    if index >= len(history.joints):
        return {"target_prefix": None, "joined_by": None}
    known = history.joints[index]
    return {"target_prefix": known.prefix, "joined_by": known.reason}


def _ends(ends: Mapping[int, FinalLoss]) -> dict[str, dict[str, float]]:
    return {str(layer): end._asdict() for layer, end in ends.items()}


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(_json(row) + "\n" for row in rows))


def _json(value: Any, indent: int | None = None) -> str:
    """Spell a value in strict JSON, which has no NaN and no infinity: they become null."""
    return json.dumps(
        _finite(value), indent=indent, allow_nan=False, ensure_ascii=False, default=str
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value
