"""Words that the report and the model card share."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from lightning_blue.metrics.history import RunHistory
from lightning_blue.metrics.protocol_rows import TITLES
from lightning_blue.metrics.table import HARNESS, ORDINARY_TEXT, RETENTION, MetricSpec
from lightning_blue.support.text import counted

LINE = 100  # characters of a line of running text
CELL = 90  # characters of a text shown in a table
UNITS = {  # of standard errors, where it is not the request
    ORDINARY_TEXT: "of ordinary text the window",
    RETENTION: "of retention the batch (of the first batch the request)",
    HARNESS: "of general ability the record",
}


def definitions(specs: Iterable[MetricSpec], data_protocol: str) -> str:
    """Return a list that says what each metric is, and what its error rests on; empty without any.

    Args:
        specs: the metrics that were measured.
        data_protocol: ``counterfact`` or ``zsre``.
    """
    measures = {spec.title: spec.measure(data_protocol) for spec in specs}
    if not measures:
        return ""
    items = [f"{title}: {measure.definition}." for title, measure in measures.items()]
    protocols = {measure.protocol for measure in measures.values()}
    others = [unit for protocol, unit in UNITS.items() if protocol in protocols]
    unit = f"the request, or {', '.join(others)}," if others else "the request"
    items.append(f"Standard errors take {unit} as the unit.")
    return "\n".join(
        textwrap.fill(item, LINE, initial_indent="- ", subsequent_indent="  ") for item in items
    )


def rounding_lines(history: RunHistory) -> list[str]:
    """Say in which dtype the model was saved, and what that cost; nothing if it cost nothing."""
    if not history.export_dtype:
        return []
    lost = ", ".join(f"{weight} {loss:.1%}" for weight, loss in history.rounding_losses.items())
    text = (
        f"Saved in {history.export_dtype}; edits were computed and summed in float32. Rounding "
        f"lost so much of the update: {lost or 'not measured'} (Frobenius norm). What is measured "
        "at the end is measured after it. More digits, at more size: --model.export_dtype=float32."
    )
    return [textwrap.fill(text, LINE)]


def protocol_sentence(history: RunHistory) -> str:
    """Say by which protocols a run was scored, on how many requests and which control facts."""
    said = [_main_sentence(history), _added_sentence(history), _controls_sentence(history)]
    return " ".join(filter(None, said))


def _controls_sentence(history: RunHistory) -> str:
    """Say which facts retained knowledge is over, where the model was asked for them."""
    if history.controls_kept is None:
        return ""
    kept, asked = history.controls_kept
    return (
        f"Control facts: of {asked:,} facts the unedited model answers {kept:,}, and retained "
        "knowledge is over those."
    )


def _added_sentence(history: RunHistory) -> str:
    """Say which protocols were added to the main one, and how answers were generated."""
    if not history.added:
        return ""
    text = (
        f"Measured besides, and named by it: {', '.join(TITLES[name] for name in history.added)}."
    )
    how = history.generation
    if how is None:
        return text
    ends = ", ".join(map(repr, how.stops))
    forms = {"bare": "as they are", "qa": "behind an instruction", "chat": "in the chat template"}
    return (
        f"{text} Answers are generated greedily, at most {how.max_new_tokens} tokens, up to "
        f"{ends or 'no stop string'} or an end-of-text token. Prompts are sent "
        f"{forms[how.prompt]}: a request's own, and at most {how.prompts_per_kind} of each other "
        f"kind.{_end_of_targets(history)}"
    )


def _end_of_targets(history: RunHistory) -> str:
    """Say, of a run that edits, whether its targets end in an end-of-text token."""
    if history.of("test"):
        return ""
    with_end = bool(history.settings.get("end_of_text"))
    return f" Targets were optimised {'with' if with_end else 'without'} an end-of-text token."


def _main_sentence(history: RunHistory) -> str:
    total = len(history.requests)
    if not total:
        return ""
    known = sum(request.target_true is not None for request in history.requests)
    name_theirs = "names its" if total == 1 else "name their"
    named = f"{known:,} of {counted(total, 'request')} {name_theirs} current object"
    scores = "Efficacy, generalization and specificity"
    if history.protocol == "zsre":
        return f"{scores} count right tokens (protocol zsre) of all requests: {named}."
    text = f"{scores} compare the probabilities of two objects (protocol counterfact): {named}"
    left = total - known
    if not left:
        return f"{text}."
    others = "one counts" if left == 1 else f"{left:,} count"
    return f"{text}; the other {others} in the top-1 metrics alone."


def prefix_text(prefix: str) -> str:
    """Name what stands between a prompt and its object.

    >>> prefix_text(" "), prefix_text(""), prefix_text(": ")
    ('a space', 'nothing', "': '")
    """
    return {"": "nothing", " ": "a space"}.get(prefix, repr(prefix))


def fill(text: str) -> str:
    """Break running text into lines."""
    return textwrap.fill(text, LINE)


def inline(text: str, limit: int | None = None) -> str:
    """Show any text inside a line of markdown: on one line, nothing taken as markup."""
    flat = " ".join(text.split())
    if limit is not None and len(flat) > limit:
        flat = flat[: limit - 1].rstrip() + "…"
    return re.sub(r"([\\`*_\[\]<>#~$]|&(?=#?\w+;))", r"\\\1", flat)


def loaded_with(history: RunHistory) -> str:
    """Return the name of the class of transformers that loads the model of a run."""
    return str(history.settings.get("loaded_with", "AutoModelForCausalLM"))


def settings_rows(settings: Mapping[str, Any]) -> list[list[str]]:
    """Return name and value of each setting as cells; of an absolute path only the last part."""
    return [
        [inline(name.replace("_", " ")), inline(_plain(value))] for name, value in settings.items()
    ]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(part) for part in value)
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return PurePath(text).name if PurePath(text).is_absolute() else text
