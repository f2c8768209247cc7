"""Optimisation steps by layer when every layer is computed in turn (Table 1 of the paper)."""

from __future__ import annotations

from torch import Tensor

from blue_callbacks.plans import PLANS
from lightning_blue.reporting.plots import BLUE, INK
from lightning_blue.studies.bench import Bench
from lightning_blue.studies.pictures import new_figure
from lightning_blue.studies.results import Result, Row, estimate


def steps(bench: Bench) -> Result:
    """Give each layer a target of its own, each layer written before the next is computed.

    All records are edited in one batch, with the plan ``computed``.
    """
    _ = bench.targets
    bench.module.target_losses.clear()
    with bench.edited(PLANS["computed"](bench.layers)):
        losses = {layer: value.cpu() for layer, value in bench.module.target_losses.items()}
    stop = bench.module.target.stop_loss
    counts = {layer: steps_taken(value[..., 0], stop) for layer, value in losses.items()}
    rows: list[Row] = []
    for layer, count in counts.items():
        mean, done = estimate(count), float((count == 0).double().mean())
        values = {"steps": mean.mean, "standard_error": mean.error, "none_needed": done}
        last = estimate(_last(losses[layer][..., 0]))
        rows.append({"layer": layer, **values, "last_loss": last.mean, "records": len(count)})
    figure = new_figure(5.6, 3.8)
    axis = figure.subplots()
    axis.bar(
        [str(row["layer"]) for row in rows],
        [row["steps"] for row in rows],
        0.6,
        yerr=[row["standard_error"] for row in rows],
        color=BLUE,
        ecolor=INK,
        capsize=3,
    )
    axis.set_xlabel("layer")
    axis.set_ylabel("optimisation steps, mean over records")
    means = ", ".join(f"{row['steps']:.2f} (layer {row['layer']})" for row in rows)
    return Result(rows, f"mean steps until the loss is below {stop:g}: {means}.", figure)


def steps_taken(total: Tensor, stop: float) -> Tensor:
    """Count the steps before an edit was done, ``(n,)``.

    As the paper's table counts: an edit whose loss is below the limit at once took 0, one that
    never got there took all.

    Args:
        total: loss at each step, NaN once an edit is done, ``(n, steps)``.
        stop: the limit.

    >>> nan = float("nan")
    >>> steps_taken(Tensor([[3.0, 0.01, nan], [0.02, nan, nan], [3.0, 2.0, 1.0]]), 0.05)
    tensor([1, 0, 3])
    """
    passes = (~total.isnan()).sum(1)
    ended = (passes < total.shape[1]) | (_last(total) < stop)
    return passes - ended.long()


def _last(total: Tensor) -> Tensor:
    """Return the last loss of each edit that is a number, ``(n,)``."""
    passes = (~total.isnan()).sum(1)
    return total.gather(1, (passes - 1).clamp(min=0)[:, None])[:, 0]
