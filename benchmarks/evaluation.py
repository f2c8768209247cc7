"""Part ``evaluation``: scores of records, and texts that the model writes."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from benchmarks.floor import Costs, costs_of, generation_operations, scoring_operations
from benchmarks.results import Row
from benchmarks.textbook import target_tokens
from benchmarks.textbook_evaluation import evaluate_record, score_record
from benchmarks.timing import Clock, Samples
from benchmarks.workload import Workload
from lightning_blue.data.requests import EditRequest
from lightning_blue.metrics.evaluation import Evaluation, evaluate

TEXT_LENGTH = 100


def run_evaluation(workload: Workload, args: Namespace, clock: Clock) -> list[Row]:
    """Evaluate records without and with texts, both ways in turn.

    Texts are written with a KV cache by all; the textbook takes one prompt at a time, and in a row
    of its own, as its tougher variant, all prompts of a record together.
    """
    model, tokenizer = workload.model, workload.tokenizer
    records = workload.requests[: args.records]
    few, fewest = records[: args.textbook_records], records[: args.textbook_texts]
    rivals = {
        "ours": lambda: _ours(workload, records, False),
        "textbook": lambda: [evaluate_record(model, tokenizer, r) for r in few],
    }
    scored = clock.race(rivals, args.repeats)
    rivals = {
        "ours": lambda: _ours(workload, records, True),
        "one prompt": lambda: [
            evaluate_record(model, tokenizer, r, texts="one prompt") for r in fewest
        ],
        "one record": lambda: [
            evaluate_record(model, tokenizer, r, texts="one record") for r in fewest
        ],
    }
    written = clock.race(rivals, args.repeats, warm_up=False)
    costs = costs_of(model)
    scoring = scoring_floor(workload, records, costs) / clock.rate
    texts = generation_floor(workload, records, costs) / clock.rate
    worst = _worst_difference(workload, scored["ours"].result, few)
    return [
        _row("without texts", scored["ours"], scored["textbook"], scoring, records, few, worst),
        *(
            _row(
                f"with texts, textbook {rival} at a time",
                written["ours"],
                written[rival],
                scoring + texts,
                records,
                fewest,
                worst,
            )
            for rival in ("one prompt", "one record")
        ),
    ]


def _ours(workload: Workload, records: Sequence[EditRequest], texts: bool) -> Evaluation:
    return evaluate(
        workload.model, workload.tokenizer, records, generate=texts, continuation_tokens=0
    )


def _row(
    case: str,
    ours: Samples,
    rival: Samples,
    floor: float,
    records: Sequence[EditRequest],
    few: Sequence[EditRequest],
    worst: float,
) -> Row:
    prompts = sum(1 + len(r.paraphrases) + len(r.neighborhood) for r in records)
    return Row(
        "evaluation",
        case,
        "record",
        ours=ours.median / len(records),
        textbook=rival.median / len(few),
        floor=floor / len(records),
        ours_peak=ours.peak,
        textbook_peak=rival.peak,
        details={
            "records": len(records),
            "textbook_records": len(few),
            "prompts_per_record": prompts / len(records),
            "texts_per_record": sum(len(r.generation_prompts) for r in records) / len(records),
            "seconds": {"ours": ours.seconds, "textbook": rival.seconds},
            "worst_nll_difference": worst,
        },
    )


def _worst_difference(
    workload: Workload, evaluation: Evaluation, few: Sequence[EditRequest]
) -> float:
    """Compare nats per target token of both objects of the first records."""
    worst = 0.0
    for outcome, request in zip(evaluation.outcomes, few, strict=False):
        new, true = score_record(workload.model, workload.tokenizer, request)[0]
        worst = max(worst, abs(outcome.nll_new - new.nll))
        worst = max(worst, abs((outcome.nll_true or 0.0) - true.nll))
    return worst


def scoring_floor(workload: Workload, records: Sequence[EditRequest], costs: Costs) -> int:
    """Count the operations that scoring all objects of all records needs."""
    rows: list[tuple[list[int], int]] = []
    for request in records:
        prompts = [(p, request.target_true or "") for p in (request.text, *request.paraphrases)]
        prompts += [(probe.prompt, probe.answer) for probe in request.neighborhood]
        for prompt, other in prompts:
            start = workload.tokenizer(prompt)["input_ids"]
            for target in (request.target_new, other):
                ids = target_tokens(workload.tokenizer, target)
                rows.append((start + ids[:-1], len(ids)))
    return scoring_operations(costs, rows)


def generation_floor(workload: Workload, records: Sequence[EditRequest], costs: Costs) -> int:
    """Count the operations that writing all texts needs."""
    prompts = [p for request in records for p in request.generation_prompts]
    encoded = workload.tokenizer(prompts)["input_ids"] if prompts else []
    length = min(TEXT_LENGTH, workload.model.config.max_position_embeddings)
    return generation_operations(costs, encoded, length)
