"""Words that the report and the model card share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

_COMMON = """\
- generalization: the same on paraphrases; specificity: on prompts about neighbouring subjects, with
  their own objects.
- score: harmonic mean of the three. top-1: share of prompts after which every token of the wanted
  object is the most probable one.
- fluency: weighted entropy of the bigrams and trigrams of generated texts, in bits, times 100;
  consistency: tf-idf similarity of those texts with reference texts, times 100.
- perplexity: of ordinary text; recall: top-1 on known facts that were not edited. Both show damage.
- Standard errors take the request, or for perplexity the window of text, as the unit."""
DEFINITIONS = {
    "counterfact": "- efficacy: share of requests whose new object is more probable than the true "
    "one\n  after the prompt (on neighbours: the neighbour's own object than the new one).\n"
    + _COMMON,
    "zsre": "- efficacy: share of the new object's tokens that are most probable after the prompt,"
    "\n  under teacher forcing.\n" + _COMMON,
}
CELL = 90  # characters of a text shown in a table


def inline(text: str, limit: int | None = None) -> str:
    """Show any text inside a line of markdown: on one line, nothing taken as markup."""
    flat = " ".join(text.split())
    if limit is not None and len(flat) > limit:
        flat = flat[: limit - 1].rstrip() + "…"
    return re.sub(r"([\\`*_\[\]<>#~$])", r"\\\1", flat)


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
