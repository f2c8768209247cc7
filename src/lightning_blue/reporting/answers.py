"""What the report says of answers that the model wrote freely."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

from lightning_blue.metrics import table
from lightning_blue.metrics.history import RunHistory
from lightning_blue.metrics.matching import GeneratedAnswer, contains, is_match
from lightning_blue.reporting.tables import markdown_table
from lightning_blue.reporting.text import CELL, fill, inline

SHOWN = 10
VERDICTS = {True: "right", False: "wrong", None: "none"}
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
            _match(answer),
        ]
        for answer in own[:SHOWN]
    ]
    header = ["prompt", "wanted", "answer", "ended by", "match"]
    compared = [answer for answer in answers if answer.compared]
    if history.judge:
        header.append("judge")
        rows = [[*row, VERDICTS[each.judged]] for row, each in zip(rows, own, strict=False)]
    parts = [
        markdown_table(rows, header),
        fill(_counts(compared)),
        *([fill(_verdicts(history.judge, compared))] if history.judge else []),
        "All answers are in `answers.jsonl`, before and after, with their token ids.",
    ]
    return "\n\n".join(parts)


def _verdicts(judge: str, answers: Sequence[GeneratedAnswer]) -> str:
    """Say how many answers a judge has judged, and how far it agrees with exact match.

    Empty answers are wrong without being sent to it.
    """
    sent = [each for each in answers if each.longer.strip()]
    pairs = [(each.judged, is_match(each.answer, each.wanted)) for each in sent]
    judged = [(said, exact) for said, exact in pairs if said is not None]
    text = f"The judge, {inline(PurePath(judge).name)}, has judged {len(judged):,} of them"
    if not judged:
        return f"{text}: its metrics are absent."
    right, exact, same = (
        sum(map(test, judged)) for test in (lambda p: p[0], lambda p: p[1], lambda p: p[0] == p[1])
    )
    text += f": {right:,} right, where exact match has {exact:,}. They agree on {same:,}"
    return f"{text}, {100 * same / len(judged):.1f}%{_kappa(judged)}."


def _kappa(pairs: Sequence[tuple[bool, bool]]) -> str:
    """Say Cohen's kappa, the agreement beyond chance; it is undefined where neither varies."""
    from sklearn.metrics import cohen_kappa_score  # seconds to import, often not needed

    first, second = zip(*pairs, strict=True)
    if len({*first, *second}) == 1:
        return " (both say the same of all, so that Cohen's kappa is undefined)"
    return f" (Cohen's kappa {cohen_kappa_score(first, second):.2f})"


def verdicts_sentence(history: RunHistory) -> str:
    """Say on how many answers the judge's scores rest; empty without a judge."""
    compared = [answer for answer in history.answers_after if answer.compared]
    if not history.judge or not compared:
        return ""
    judged = sum(answer.judged is not None for answer in compared)
    return f"The judge's rest on the {judged:,} of {len(compared):,} answers that have a verdict."


def _match(answer: GeneratedAnswer) -> str:
    if is_match(answer.answer, answer.wanted):
        return "exact"
    return "contained" if contains(answer.longer, answer.wanted) else "no"


def _counts(answers: Sequence[GeneratedAnswer]) -> str:
    """Say how many answers are empty, and what ended them."""
    empty = [answer for answer in answers if not answer.answer.strip()]
    equal = sum(is_match(answer.answer, answer.wanted) for answer in empty)
    but = f", but for {equal:,} in exact match, whose object is only an article or punctuation"
    counted = Counter(answer.ended_by for answer in answers)
    ends = ", ".join(f"{counted[key]:,} by {said}" for key, said in ENDED_BY.items())
    return (
        f"Of {len(answers):,} answers (own prompts, paraphrases, portability) {len(empty):,} are "
        f"empty, which counts as a failure{but if equal else ''}. What ended them: {ends}."
    )
