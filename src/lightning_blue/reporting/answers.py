"""What the report says of answers that the model wrote freely."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lightning_blue.metrics import table
from lightning_blue.metrics.history import RunHistory
from lightning_blue.metrics.matching import GeneratedAnswer, contains, is_match
from lightning_blue.reporting.tables import markdown_table
from lightning_blue.reporting.text import CELL, fill, inline

SHOWN = 10
ENDED_BY = {
    "stop": "a stop string",
    "end": "an end-of-text token",
    "limit": "the limit of new tokens",
}


def generated_answers(history: RunHistory) -> str:
    """Show the first answers to the requests' own prompts, and count how all answers ended."""
    answers = history.answers_after or history.answers_before
    if not answers:
        return ""
    own = [answer for answer in answers if answer.prompts == table.OWN_PROMPT]
    rows = [
        [
            inline(history.requests[answer.request].shown, CELL),
            inline(answer.wanted),
            inline(answer.answer, CELL),
            ENDED_BY[answer.ended_by],
            _judged(answer),
        ]
        for answer in own[:SHOWN]
    ]
    header = ["prompt", "wanted", "answer", "ended by", "match"]
    parts = [
        markdown_table(rows, header),
        fill(_counts([answer for answer in answers if answer.prompts != table.NEIGHBOURS])),
        "All answers are in `answers.jsonl`, before and after, with their token ids.",
    ]
    return "\n\n".join(parts)


def _judged(answer: GeneratedAnswer) -> str:
    if is_match(answer.answer, answer.wanted):
        return "exact"
    return "contained" if contains(answer.longer, answer.wanted) else "no"


def _counts(answers: Sequence[GeneratedAnswer]) -> str:
    """Say how many answers are empty, and what ended them."""
    empty = sum(not answer.answer.strip() for answer in answers)
    counted = Counter(answer.ended_by for answer in answers)
    ends = ", ".join(f"{counted[key]:,} by {said}" for key, said in ENDED_BY.items())
    return (
        f"Of {len(answers):,} answers (own prompts, paraphrases, portability) {empty:,} are empty, "
        f"which counts as a failure. What ended them: {ends}."
    )
