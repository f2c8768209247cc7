"""Part ``shortcuts``: the target search with each of its shortcuts switched off."""

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
from lightning_blue.editing.fast.frozen import NO_SHORTCUTS, Shortcuts

MOST_EDITS = 10


def run_shortcuts(workload: Workload, args: Namespace, clock: Clock) -> list[Row]:
    """Optimise a few edits' targets at each boundary layer, with all shortcuts and without."""
    return [row for layer in args.layers for row in _at(layer, workload, args, clock)]


def _at(layer: int, workload: Workload, args: Namespace, clock: Clock) -> list[Row]:
    batch = workload.requests[: min(args.edits, MOST_EDITS)]

    def search(shortcuts: Shortcuts, **switches: int) -> Callable[[], Tensor]:
        module = edit_module(workload, args, **switches)
        module.target_finder.shortcuts = shortcuts
        return partial(module.edit_targets, batch, layer)

    every = Shortcuts()
    cases = {"all shortcuts": search(every)}
    cases |= {
        f"without {shortcut.name}": search(replace(every, **{shortcut.name: False}))
        for shortcut in fields(Shortcuts)
    }
    cases["one edit at a time"] = search(every, tokens_per_batch=1)
    cases["none, one edit at a time"] = search(NO_SHORTCUTS, tokens_per_batch=1)
    cases["all shortcuts"]()  # warm up
    samples = clock.race(cases, 1, warm_up=False)
    best = samples["all shortcuts"].median
    return [
        Row(
            "shortcuts",
            f"layer {layer}, {name}",
            "edit",
            ours=sample.median / len(batch),
            ours_peak=sample.peak,
            details={"over_all_shortcuts": sample.median / best},
        )
        for name, sample in samples.items()
    ]
