"""Residuals by layer, and Theorem 4.1 and Lemma 4.2 on a model's own tensors (Fig. 5).

First on the unedited model, where the proof's assumption holds: the residual that is distributed is
the one that the last layer has before any write. Then in batches that are really written with the
plan ``even``: there the last layer's residual shrinks as the layers below it are written.
"""

from __future__ import annotations

from typing import Any

from lightning import Callback, Trainer
from torch import Tensor

from blue_callbacks import EditRecord, KeyMemory, WeightChange, WeightId
from blue_callbacks.plans import PLANS
from lightning_blue.runs.weights import written_operator
from lightning_blue.studies.bench import Bench
from lightning_blue.studies.bounds import Bound, spectral_norm, update_operator, weight_shift
from lightning_blue.studies.residual_figure import residual_figure
from lightning_blue.studies.results import Result, Row, estimate

BATCH_SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
ROUNDING = 1e-5  # of a bound, relative: the written factors are float32


def residuals(bench: Bench) -> Result:
    """Measure residuals, bounds and errors by layer, batch size and number of batches."""
    bench.prepare()
    norms = _norms(bench)
    theorem = [row for layer in bench.layers for row in _theorem(bench, layer)]
    lemma = [row for layer in bench.layers for row in _lemma(bench, layer)]
    written = _written(bench)
    figure = residual_figure(norms, theorem, lemma, bench.layers, _batch_size(bench))
    files = {"residuals_bounds": [*theorem, *lemma], "residuals_written": written}
    return Result(norms, _finding(bench, norms, theorem, lemma, written), figure, files)


def _batch_size(bench: Bench) -> int:
    """Return the run's batch size, or less where that would leave fewer than four batches."""
    return max(1, min(bench.batch_size, len(bench.requests) // 4))


def _norms(bench: Bench) -> list[Row]:
    """Return by layer the norms of the residuals, means over records."""
    last, rows = bench.residual(bench.layers[-1]), []
    for layer in bench.layers:
        own = bench.residual(layer)
        apart = estimate((own - last).norm(dim=0))
        row: Row = {"layer": layer, "apart": apart.mean, "standard_error": apart.error}
        row |= {"computed": float(own.norm(dim=0).mean()), "last": float(last.norm(dim=0).mean())}
        row |= {"output": float(bench.output(layer).norm(dim=0).mean())}
        rows.append({**row, "spectral_apart": spectral_norm(own - last)})
    return rows


def _memory(bench: Bench, layer: int) -> KeyMemory:
    covariance = bench.module.key_covariance(WeightId(layer))
    return KeyMemory(bench.update.solver.whitening(covariance))


def _theorem(bench: Bench, layer: int) -> list[Row]:
    """The first b records as one batch, for growing b; no past keys."""
    keys = bench.module.edit_keys(bench.requests, WeightId(layer))
    memory, n = _memory(bench, layer), len(bench.requests)
    rows = []
    for size in sorted({n, *(size for size in BATCH_SIZES if size < n)}):
        q = update_operator(memory, keys[:, :size])
        bound = _bound(bench, layer, slice(0, size), q)
        rows.append(_row("theorem 4.1", layer, size, 0, 0, bound, bound.q_norm))
    return rows


def _lemma(bench: Bench, layer: int) -> list[Row]:
    """Batches of the run's size in order, with the keys of earlier ones.

    And what as many other batches make of the first one's Q: its keys held fixed, not counted among
    the past ones.
    """
    keys = bench.module.edit_keys(bench.requests, WeightId(layer))
    size, rows = _batch_size(bench), []
    memory, others = _memory(bench, layer), _memory(bench, layer)
    for number in range(len(bench.requests) // size):
        columns = slice(number * size, (number + 1) * size)
        if number:
            others.remember(keys[:, columns])
        first = spectral_norm(update_operator(others, keys[:, :size]))
        q = update_operator(memory, keys[:, columns])
        bound = _bound(bench, layer, columns, q)
        rows.append(_row("lemma 4.2", layer, size, number, number * size, bound, first))
        memory.remember(keys[:, columns])
    return rows


def _bound(bench: Bench, layer: int, columns: slice, q: Tensor) -> Bound:
    places = (layer, bench.layers[-1])
    own, last = (_written_residual(bench, each, layer)[:, columns] for each in places)
    after = len(bench.layers) - 1 - bench.layers.index(layer)
    return weight_shift(own, bench.shares[layer] * last, last, after, q)


def _written_residual(bench: Bench, target_layer: int, layer: int) -> Tensor:
    """Return a target layer's residual as the weight of a layer has to write it, ``(d, n)``."""
    return bench.residual(target_layer) / bench.multiple(layer)


def _row(
    of: str, layer: int, size: int, batch: int, past: int, bound: Bound, first_batch: float
) -> Row:
    """One line of the bounds; ``q_norm_first_batch`` is |Q| of the first batch's keys."""
    ratio = bound.error / bound.bound if bound.bound else float("nan")
    place = {"of": of, "layer": layer, "batch_size": size, "batch": batch, "past_keys": past}
    return place | {**bound._asdict(), "ratio": ratio, "q_norm_first_batch": first_batch}


class _Watch(Callback):
    """Compare what each batch of a run wrote with what computed residuals would have written."""

    def __init__(self, bench: Bench, size: int) -> None:
        self.bench, self.size = bench, size
        self.rows: list[Row] = []

    def on_edit_committed(self, trainer: Trainer, module: Any, record: EditRecord) -> None:
        """Note error and bounds of each layer."""
        begin = record.batch * self.size
        columns = slice(begin, begin + len(record.request_ids))
        for change in record.changes:
            self.rows.append(self._compare(record.batch, columns, change))

    def _compare(self, batch: int, columns: slice, change: WeightChange) -> Row:
        bench, layer = self.bench, change.weight.layer
        seen = bench.module.outputs_seen[layer].cpu()
        computed = (bench.target(layer)[:, columns].cpu() - seen) / bench.multiple(layer)
        distributed, now = change.residual, change.residual / change.share
        before = _written_residual(bench, bench.layers[-1], layer)[:, columns].cpu()
        after = len(bench.layers) - 1 - bench.layers.index(layer)
        q = written_operator(change)
        present = weight_shift(computed, distributed, now, after, q)
        assumed = weight_shift(computed, distributed, before, after, q)
        left = spectral_norm(now) / spectral_norm(before)
        row: Row = {"layer": layer, "batch_size": self.size, "batch": batch, **present._asdict()}
        return {**row, "bound_assumed": assumed.bound, "residual_left": left}


def _written(bench: Bench) -> list[Row]:
    """Edit with the plan ``even``: batches of the run's size in order, then one batch of all.

    Targets are those of the unedited model throughout; transforms of the update are left out, since
    the theorem knows none.
    """
    module, rows = bench.module, []
    _ = bench.targets
    module.keep_known = module.watching = True
    try:
        for size in dict.fromkeys((_batch_size(bench), len(bench.requests))):
            watch = _Watch(bench, size)
            plain = {"rect_keep": None, "post_edit_transform": None}
            with bench.edited(PLANS["even"](bench.layers), size, [watch], **plain):
                rows += watch.rows
    finally:
        module.keep_known = module.watching = False
    return rows


def violations(rows: list[Row], bound: str = "bound") -> list[Row]:
    """Return the rows whose error exceeds a bound by more than rounding."""
    return [row for row in rows if row["error"] > row[bound] * (1 + ROUNDING) + ROUNDING]


def _finding(
    bench: Bench, norms: list[Row], theorem: list[Row], lemma: list[Row], written: list[Row]
) -> str:
    first, last = bench.layers[0], bench.layers[-1]
    ratios = [row["ratio"] for row in [*theorem, *lemma] if row["layer"] != last]
    apart = ", ".join(f"{row['apart']:.2f}" for row in norms)
    in_place = violations(written, "bound_assumed")
    left = [row["residual_left"] for row in written if row["layer"] == last]
    text = (
        f"`|R^l* - R^L|` by layer: {apart}. The bounds hold in "
        f"{len(theorem) + len(lemma) - len(violations([*theorem, *lemma]))} of "
        f"{len(theorem) + len(lemma)} cases on the unedited model"
    )
    if ratios:
        text += (
            f"; below the last layer the error is {min(ratios):.0%} to {max(ratios):.0%} of them"
        )
    text += (
        f". In batches really written, with the residual that is left when a layer's turn comes, "
        f"they hold in {len(written) - len(violations(written))} of {len(written)}; with the "
        f"residual before any write, as the proof assumes, in {len(written) - len(in_place)}: the "
        f"last layer finds {min(left):.0%} to {max(left):.0%} of it left. "
    )
    return text + _q_norms(theorem, lemma, first, last)


def _q_norms(theorem: list[Row], lemma: list[Row], first: int, last: int) -> str:
    """Say how |Q| moves with the batch size and with batches before."""
    parts = []
    for layer in dict.fromkeys((first, last)):
        sizes = [row for row in theorem if row["layer"] == layer]
        batches = [row for row in lemma if row["layer"] == layer]
        parts.append(
            f"in layer {layer} from {sizes[0]['q_norm']:.3g} (one edit) to "
            f"{sizes[-1]['q_norm']:.3g} ({sizes[-1]['batch_size']}) with the batch, from "
            f"{batches[0]['q_norm']:.3g} to {batches[-1]['q_norm']:.3g} over {len(batches)} "
            f"batches; the first batch's, after all others, is "
            f"{batches[-1]['q_norm_first_batch']:.3g}"
        )
    return f"`|Q|` goes {'; '.join(parts)}."
