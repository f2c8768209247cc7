"""What a run will cost: seconds, memory and disk, from rates, shapes and the number of edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from blue_callbacks import ClosedFormUpdate, EditGuard
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.health import CONTROL_FACTS, ORDINARY_TOKENS
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.metrics.instruments import CONTINUATION_TOKENS
from lightning_blue.preflight.timing import Rates

RANGE = (0.6, 1.5)  # times the estimate; two runs took 0.74 and 0.92 of it on their own processor
MEMORY_RANGE = (0.8, 1.6)
TEXT_TOKENS = 100  # of a generated text with its prompt, about
DOUBLINGS = 3  # covariances that are compared with each other for the report on a text's length


@dataclass(frozen=True)
class Workload:
    """How much of each part a run does; see `workload`."""

    edits: int = 0
    covariance_tokens: int = 0
    factors: int = 0
    questions: int = 0
    texts: int = 0
    written_tokens: int = 0
    scored_tokens: int = 0


class Part(NamedTuple):
    """A part of a run: what it is, how much of it there is, and the seconds that takes."""

    name: str
    amount: int
    unit: str
    seconds: float


def workload(
    requests: Sequence[EditRequest],
    batch_size: int,
    update: ClosedFormUpdate,
    measure: MeasureEdits,
    guard: EditGuard,
    *,
    missing_layers: int,
    tokens: int,
    compared: bool,
    controls: int = 0,
) -> Workload:
    """Count what a run does.

    Args:
        requests: that are edited.
        batch_size: of them.
        update: the plan.
        measure: what is measured, and when.
        guard: what is looked at after each batch.
        missing_layers: covariances that no file holds.
        tokens: of ordinary text that each is collected from.
        compared: whether it is reported how far they still move as tokens double.
        controls: control facts.
    """
    n, batches = len(requests), -(-len(requests) // batch_size)
    ends = [min((batch + 1) * batch_size, n) for batch in range(batches)]
    sampled = sum(min(measure.cumulative, applied) for applied in ends)
    first = min(batch_size, n)
    times_controls = 2 + (batches if measure.cumulative else 0)
    watched = 0 if guard.action == "off" else batches + 1
    texts, written = 2 * n, 2 * n * CONTINUATION_TOKENS
    if measure.generate:
        more = 2 * sum(len(request.generation_prompts) for request in requests)
        texts, written = texts + more, written + more * TEXT_TOKENS
    scored = times_controls * measure.text_tokens if measure.text is not None else 0
    scored += watched * ORDINARY_TOKENS if guard.loss_increase is not None else 0
    asked = 2 * n + n + sampled + first + times_controls * controls
    asked += watched * min(controls, CONTROL_FACTS)
    weights = len(update.written_layers)
    return Workload(
        edits=n,
        covariance_tokens=tokens if missing_layers else 0,
        factors=weights + (DOUBLINGS * missing_layers if compared else 0),
        questions=asked,
        texts=texts,
        written_tokens=written,
        scored_tokens=scored,
    )


def parts(work: Workload, rates: Rates) -> list[Part]:
    """Multiply what is done by what a unit of it takes; seconds grow in proportion to it."""
    begun, behind = work.texts * rates.text, work.written_tokens - work.texts
    return [
        Part(name, amount, unit, seconds)
        for name, amount, unit, seconds in (
            ("covariance", *_times(work.covariance_tokens, "tokens", rates.covariance_token)),
            ("factorisation", *_times(work.factors, "systems", rates.factor)),
            ("targets", *_times(work.edits, "edits", rates.target)),
            ("keys and solves", *_times(work.edits, "edits", rates.key)),
            ("probabilities", *_times(work.questions, "requests", rates.question)),
            ("texts", work.written_tokens, "tokens", begun + behind * rates.written),
            ("ordinary text", *_times(work.scored_tokens, "tokens", rates.scored_token)),
        )
    ]


def _times(amount: int, unit: str, each: float) -> tuple[int, str, float]:
    return amount, unit, amount * each


def editing_memory(
    weights: Sequence[tuple[int, int]],
    *,
    edits: int,
    batch_tokens: int,
    token_bytes: int,
    half_precision: bool,
    transformed: bool,
) -> int:
    """Estimate the bytes that editing takes beside the model.

    Of each written weight: its covariance and the factor of it with the inverted blocks, float64,
    and another square while it is factored; keys of all edits; a copy to go back to, a sum in
    float32 where the model is in half precision, the unedited weight where a transform needs it.
    Beside these, the states of the tokens that are optimised at once.

    Args:
        weights: ``(d_out, d_in)`` of each written weight.
        edits: in all.
        batch_tokens: tokens that are optimised at once.
        token_bytes: that each of them takes.
        half_precision: whether the model is.
        transformed: whether a post-edit transform is applied at the end.
    """
    copies = 1 + half_precision + transformed
    held = sum(
        2 * 8 * d_in**2 + 2 * 8 * edits * d_in + copies * 4 * d_out * d_in
        for d_out, d_in in weights
    )
    working = max((2 * 8 * d_in**2 for _, d_in in weights), default=0)
    return held + max(working, batch_tokens * token_bytes)
