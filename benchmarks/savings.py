"""Part ``savings``: the target search with each of its savings switched off."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

from torch import Tensor

from benchmarks.delta import edit_module
from benchmarks.results import Row
from benchmarks.timing import Clock
from benchmarks.workload import Workload
from lightning_blue.editing.forward import PLAIN, Savings

MOST_EDITS = 10


def run_savings(workload: Workload, args: Namespace, clock: Clock) -> list[Row]:
    """Optimise the targets of a few edits at each boundary layer, with all savings and without."""
    return [row for layer in args.layers for row in _at(layer, workload, args, clock)]


def _at(layer: int, workload: Workload, args: Namespace, clock: Clock) -> list[Row]:
    batch = workload.requests[: min(args.edits, MOST_EDITS)]

    def search(savings: Savings, **switches: int) -> Callable[[], Tensor]:
        module = edit_module(workload, args, **switches)
        module.savings = savings
        return partial(module.edit_targets, batch, layer)

    every = Savings()
    cases = {"all savings": search(every)}
    cases |= {
        f"without {saving.name}": search(replace(every, **{saving.name: False}))
        for saving in fields(Savings)
    }
    cases["one edit at a time"] = search(every, tokens_per_batch=1)
    cases["none, one edit at a time"] = search(PLAIN, tokens_per_batch=1)
    cases["all savings"]()  # warm up
    samples = clock.race(cases, 1, warm_up=False)
    best = samples["all savings"].median
    return [
        Row(
            "savings",
            f"layer {layer}, {name}",
            "edit",
            ours=sample.median / len(batch),
            ours_peak=sample.peak,
            details={"over_all_savings": sample.median / best},
        )
        for name, sample in samples.items()
    ]
