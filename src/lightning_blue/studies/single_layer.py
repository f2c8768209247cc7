"""Real edits of one layer at a time, with distributed and with computed residuals (Fig. 4, 8)."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from blue_callbacks.plans import LayerUpdate
from lightning_blue.metrics import table
from lightning_blue.metrics.evaluation import Metrics
from lightning_blue.reporting.plots import BELOW, INK
from lightning_blue.studies.bench import Bench
from lightning_blue.studies.pictures import KINDS, by_layer, new_figure
from lightning_blue.studies.results import (
    Estimate,
    Result,
    Row,
    measured_of,
    metric_rows,
    of_metric,
)

SHOWN = ("efficacy", "generalization", "specificity", "fluency", "consistency")

Measured = dict[tuple[str, int], Metrics]  # kind, layer


def single_layer(bench: Bench) -> Result:
    """Edit all records in one batch, in one layer, with either residual; measure, and take it back.

    The distributed residual is what the plan ``even`` would give the layer if no other had been
    written.
    """
    _ = bench.targets
    before = bench.measure(generate=True)
    names = measured_of(SHOWN, before)
    measured: Measured = {}
    for layer in bench.layers:
        for kind, update in layer_update(bench, layer).items():
            with bench.edited([update]):
                measured[kind, layer] = bench.measure(generate=True)
    rows: list[Row] = metric_rows(before, {"layer": "", "kind": "unedited"})
    for (kind, layer), metrics in measured.items():
        rows += metric_rows(metrics, {"layer": layer, "kind": kind})
    finding = _finding(bench, before, measured, names)
    return Result(rows, finding, _figure(bench, before, measured, names))


def layer_update(bench: Bench, layer: int) -> dict[str, LayerUpdate]:
    """Return kind -> how the layer is written."""
    return {
        "distributed": LayerUpdate(layer, bench.layers[-1], bench.shares[layer]),
        "computed": LayerUpdate(layer, layer, 1.0),
    }


def _mean(bench: Bench, measured: Measured, kind: str, name: str) -> float:
    values = [of_metric(measured[kind, layer], name).mean for layer in bench.layers]
    return sum(values) / len(values)


def _finding(bench: Bench, before: Metrics, measured: Measured, names: Sequence[str]) -> str:
    """Compare means over layers, as the paper does."""
    parts = []
    for name in names:
        share, own = (_mean(bench, measured, k, name) for k in ("distributed", "computed"))
        ratio = f", {own / share:.2f} times" if share > 0 else ""
        was = of_metric(before, name).mean
        parts.append(
            f"{name} {own:.1f} computed, {share:.1f} distributed{ratio} ({was:.1f} before)"
        )
    return f"mean over layers: {'; '.join(parts)}."


def _figure(bench: Bench, before: Metrics, measured: Measured, names: Sequence[str]) -> Figure:
    figure = new_figure(3.1 * len(names), 3.8)
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names, strict=True):
        spec = table.by_name(name)
        for kind in ("computed", "distributed"):
            line: list[Estimate] = [of_metric(measured[kind, each], name) for each in bench.layers]
            by_layer(axis, bench.layers, line, label=kind, **KINDS[kind])
        axis.axhline(of_metric(before, name).mean, color=INK, linestyle=":", label="unedited model")
        axis.set_ylabel(spec.label)
        if spec.unit == table.PERCENT:
            axis.set_ylim(-2, 104)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), **BELOW, ncols=3)
    return figure
