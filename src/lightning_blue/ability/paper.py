"""What the task files in ``tasks/`` share: records, how answers are read, weighted F1.

They ask as the evaluation that the paper's code carries (``glue_eval``) does: without examples, the
first ten records kept for those; the model goes on for five tokens, and the first of some words
that these hold is its answer. F1 is the mean over true classes, weighted by their sizes; an
answer that holds none of the words is a class of its own, so that a model that says nothing
sensible comes near 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_blue.support.errors import InputError

FOR_EXAMPLES = 10  # records at the beginning of each file
NO_ANSWER = -1

Reader = Callable[[Mapping[str, Any], Sequence[str]], dict[str, tuple[int, int]]]


def records(file: str, folder: str | None = None, **_: Any) -> dict[str, Any]:
    """Read one of the six files.

    Args:
        file: its name, one JSON object a line.
        folder: that holds it: ``measure.ability.data``, or ``--metadata`` of lm-eval's command.

    Returns:
        Data sets ``examples`` and ``test``.

    Raises:
        InputError: if there is no such file.
    """
    from datasets import Dataset

    if folder is None or not (Path(folder) / file).is_file():
        where = f"measure.ability.data = {folder}"
        hint = "give the folder that holds sst2, mrpc, cola, rte, mmlu and nli as .jsonl"
        raise InputError(f"there is no {file} to read the task from", where=where, hint=hint)
    text = (Path(folder) / file).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    return {
        "examples": Dataset.from_list(rows[:FOR_EXAMPLES]),
        "test": Dataset.from_list(rows[FOR_EXAMPLES:]),
    }


def weighted_f1(items: Sequence[tuple[int, int]]) -> float:
    """Return the F1 score of pairs of true and predicted class: mean over true classes by size.

    >>> round(weighted_f1([(1, 1), (1, 1), (0, 1), (0, NO_ANSWER)]), 3)
    0.4
    """
    from sklearn.metrics import f1_score

    true, predicted = zip(*items, strict=True)
    return float(f1_score(true, predicted, average="weighted", zero_division=0))


def _reader(classes: Mapping[str, int], target: Callable[[Any], int], marker: str = "") -> Reader:
    """Return what reads a class out of a continuation: that of the first word of a list in it.

    Args:
        classes: of each word, in the order in which they are looked for.
        target: the true class of a record.
        marker: where the continuation repeats it, only what follows its last occurrence counts.
    """

    def read(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, tuple[int, int]]:
        answer = (results[0].split(marker)[-1] if marker else results[0]).lower()
        found = (number for word, number in classes.items() if word in answer)
        return {"f1": (target(doc), next(found, NO_ANSWER))}

    return read


def _label(doc: Mapping[str, Any]) -> int:
    return int(doc["label"])


sst = _reader({"positive": 1, "negative": 0}, _label, "Sentiment :")
mrpc = _reader({"yes": 1, "no": 0}, _label, "Answer:")
cola = _reader({"yes": 1, "no": 0}, _label, "Answer:")
rte = _reader({"false": 0, "true": 1}, _label, "answer:")
rte_entailed = _reader({"false": 0, "true": 1}, lambda doc: 1 - _label(doc), "answer:")
nli = _reader(
    {"true": 1, "false": 0},
    lambda doc: int(doc["label"] == "entailment"),
    "True or False? Answer:",
)
mmlu = _reader(
    {f"{letter}\n": i for i, letter in enumerate("abcd")}, lambda doc: int(doc["answer"])
)
