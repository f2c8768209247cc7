"""Part ``protocols``: what each way of scoring requests costs beside scoring under one protocol."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial

from benchmarks.results import Row
from benchmarks.timing import Clock
from benchmarks.workload import Workload
from lightning_blue.metrics.evaluation import Evaluation, evaluate
from lightning_blue.metrics.generated import with_answers
from lightning_blue.metrics.negation import TEXT

ALONE = "probability alone"


def run_protocols(workload: Workload, args: Namespace, clock: Clock) -> list[Row]:
    """Evaluate the same records in each way in turn; each case says the ratio.

    On a processor that is of processor time, which other work on the machine hardly changes. Of
    answers, only the first prompt of each kind is asked, as a run does by default. A random model
    seldom stops by itself: its answers are the longest there are.
    """
    model, tokenizer = workload.model, workload.tokenizer
    records = workload.requests[: args.records]
    score = partial(evaluate, model, tokenizer, records, generate=False, continuation_tokens=0)
    scored = score()

    def answers(negation: str | None = None) -> Evaluation:
        return with_answers(scored, model, tokenizer, records, negation=negation)

    ways: dict[str, Callable[[], Evaluation]] = {
        ALONE: score,
        "teacher_forced alone": partial(score, protocol="zsre"),
        "probability and teacher_forced": partial(score, added=("teacher_forced",)),
        "probability and negation probes": partial(score, negation=TEXT),
        "generation, without the scores": answers,
        "generation and negation probes, without the scores": partial(answers, TEXT),
    }
    spent: dict[str, list[float]] = {way: [] for way in ways}
    samples = clock.race(
        {way: _timed(work, spent[way]) for way, work in ways.items()}, args.repeats
    )
    if args.device != "cpu":
        spent = {way: sample.seconds for way, sample in samples.items()}
    ratios = {way: min(seconds) / min(spent[ALONE]) for way, seconds in spent.items()}
    return [
        Row(
            "protocols",
            f"{way}: {ratios[way]:.2g} x",
            "record",
            ours=sample.median / len(records),
            ours_peak=sample.peak,
            details={
                "records": len(records),
                "of_probability_alone": ratios[way],
                "spent": spent[way],
                "seconds": sample.seconds,
                "tokens_per_answer": _tokens(sample.result),
            },
        )
        for way, sample in samples.items()
    ]


def _timed(work: Callable[[], Evaluation], spent: list[float]) -> Callable[[], Evaluation]:
    """Return the same work, which notes its processor time."""

    def timed() -> Evaluation:
        began = time.process_time()
        result = work()
        spent.append(time.process_time() - began)
        return result

    return timed


def _tokens(evaluation: Evaluation) -> float | None:
    """Return how long answers are on average, in tokens."""
    lengths = [len(answer.ids) for answer in evaluation.answers]
    return sum(lengths) / len(lengths) if lengths else None
