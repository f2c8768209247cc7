"""Parts ``growth`` and ``many``: seconds per edit against batches done and edits in a batch."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from statistics import mean

from benchmarks.delta import edit_module
from benchmarks.results import Row
from benchmarks.run import TOKENS_PER_DIM, Evaluate, fit
from benchmarks.timing import Clock
from benchmarks.workload import COVARIANCE_TEXT, load_workload
from blue_callbacks import ClosedFormUpdate
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.covariance import CovarianceSource

STEPS = 5


class EditsOnly(Evaluate):
    """Clock the edit batches, evaluate nothing."""

    def _evaluate(self, module: object, requests: list[EditRequest], texts: bool) -> None:
        """Leave the evaluation out."""


def run_growth(args: Namespace, clock: Clock) -> list[Row]:
    """Edit with a small model of growing history and growing batches; ours alone."""
    smoke = args.preset == "smoke"
    n_batches, size = (10, 2) if smoke else (100, 20)
    few, many = (2, 6) if smoke else (100, 1000)
    seconds = _edit(args, [size] * n_batches)
    tenth = n_batches // 10
    rows = [
        Row("growth", f"first {n} batches of {size}", "edit", ours=mean(seconds[:n]) / size)
        for n in (max(1, tenth), n_batches)
    ]
    rows[1].details = {"over_the_first": rows[1].ours / rows[0].ours, "seconds": seconds}
    # The last tenth alone says whether a late batch costs more than an early one.
    late = mean(seconds[-max(1, tenth) :]) / size
    rows.append(Row("growth", f"last {max(1, tenth)} batches of {size}", "edit", ours=late))
    sizes = [
        Row("growth", f"one batch of {n}", "edit", ours=_edit(args, [n])[0] / n)
        for n in (few, many)
    ]
    sizes[1].details = {"over_the_smaller": sizes[1].ours / sizes[0].ours}
    return [*rows, *sizes]


def run_many(args: Namespace, clock: Clock) -> list[Row]:
    """Edit as much in one batch as the paper's Table 4 does, with a small model; ours alone."""
    n = 30 if args.preset == "smoke" else 10_000
    with clock.watched() as watch:
        (seconds,) = _edit(args, [n])
    return [Row("many", f"one batch of {n:,}", "edit", ours=seconds / n, ours_peak=watch.peak)]


def _edit(args: Namespace, sizes: list[int]) -> list[float]:
    """Apply batches of these sizes to a fresh small model; return the seconds of each."""
    settings = Namespace(**{**vars(args), "steps": min(STEPS, args.steps)})
    small = (4, 32) if args.preset == "smoke" else (4, 256)
    workload = load_workload(
        "tiny" if args.preset == "smoke" else "gpt2-small",
        sum(sizes),
        device=args.device,
        n_layers=small[0],
        d_model=small[1],
    )
    batches, start = [], 0
    for size in sizes:
        batches.append(workload.requests[start : start + size])
        start += size
    module = edit_module(workload, settings)
    module.edit_targets(workload.requests[:2], 1)  # warm up
    watcher = EditsOnly(batches)
    with tempfile.TemporaryDirectory() as cache:
        module.covariance = CovarianceSource(
            COVARIANCE_TEXT, tokens_per_dim=TOKENS_PER_DIM, cache=cache
        )
        fit(module, batches, [ClosedFormUpdate([1, 2]), watcher])
    return watcher.seconds
