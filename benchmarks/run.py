"""Part ``run``: batches of edits, an evaluation after each, and one of everything at the end."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import textbook
from benchmarks.delta import edit_module, edit_rows, settings
from benchmarks.evaluation import generation_floor, scoring_floor
from benchmarks.floor import (
    closed_form_operations,
    costs_of,
    keys_operations,
    search_operations,
)
from benchmarks.results import Row
from benchmarks.textbook_evaluation import evaluate_record
from benchmarks.timing import Clock, now
from benchmarks.workload import COVARIANCE_TEXT, Workload
from blue_callbacks import ClosedFormUpdate, WeightId
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing import EditModule
from lightning_blue.editing.covariance import CovarianceSource
from lightning_blue.metrics.evaluation import evaluate

TOKENS_PER_DIM = 1.5  # enough for a covariance that has a factor; both sides take the same


class Evaluate(Callback):
    """Evaluate each batch after its edit, without texts, and all records at the end, with texts.

    Args:
        batches: what is edited.
    """

    def __init__(self, batches: Sequence[list[EditRequest]]) -> None:
        self.batches = batches
        self.seconds: list[float] = []  # of each edit batch, without its evaluation
        self.forwards: dict[int, list[int]] = {}  # by target layer, of every edit
        self.evaluating = 0.0
        self._started = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Start the clock of the edit batch."""
        self._started = now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Stop the clock; evaluate the batch."""
        self.seconds.append(now() - self._started)
        for layer, losses in pl_module.target_losses.items():
            counts = (~losses[..., 0].isnan()).sum(1).tolist()
            self.forwards.setdefault(layer, []).extend(counts)
        self._evaluate(pl_module, batch, texts=False)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Evaluate everything."""
        self._evaluate(pl_module, [r for batch in self.batches for r in batch], texts=True)

    def _evaluate(self, module: EditModule, requests: list[EditRequest], texts: bool) -> None:
        began = now()
        evaluate(module.model, module.tokenizer, requests, generate=texts, continuation_tokens=0)
        self.evaluating += now() - began


def fit(module: LightningModule, batches: Sequence[Any], callbacks: list[Callback]) -> None:
    """Apply edit batches in order with a silent Trainer on the module's device."""
    on_gpu = module.device.type == "cuda"
    trainer = Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data: Any = list(batches)
    trainer.fit(module, DataLoader(data, batch_size=None, collate_fn=lambda x: x))


def run_whole(workload: Workload, args: Namespace, clock: Clock) -> list[Row]:
    """Run ours in full; time the textbook's phases on a few edits and records of each batch."""
    size = args.edits
    requests = workload.requests[: size * args.batches]
    batches = [requests[start : start + size] for start in range(0, len(requests), size)]
    module = edit_module(workload, args)
    unedited = {n: textbook.weight_of(workload.model, n).clone() for n in args.layers}
    with tempfile.TemporaryDirectory() as cache:
        module.covariance = CovarianceSource(
            COVARIANCE_TEXT, tokens_per_dim=TOKENS_PER_DIM, cache=cache
        )
        module.prepare(args.layers, [WeightId(layer) for layer in args.layers])
    watcher = Evaluate(batches)
    update = ClosedFormUpdate(args.layers, covariance_weight=settings(args).covariance_weight)

    clock.measure_rate()
    with clock.watched() as watch:
        fit(module, batches, [update, watcher])
    clock.measure_rate()
    our_phases = {what: seconds / len(requests) for what, seconds in module.seconds.items()}
    our_phases["evaluation"] = watcher.evaluating / len(requests)
    our_phases["closed form"] = sum(watcher.seconds) / len(requests) - sum(
        our_phases[what] for what in ("targets", "keys", "outputs")
    )
    _restore(workload, unedited)
    with clock.watched() as rival:
        phases = _textbook_phases(workload, module, batches, args)
    clock.measure_rate()
    _restore(workload, unedited)
    floor = _floor(workload, batches, watcher.forwards, args) / clock.rate
    return [
        Row(
            "run",
            f"{len(batches)} batches of {size}, textbook's texts {texts} at a time",
            "edit",
            ours=watch.seconds / len(requests),
            textbook=_extrapolated(phases, texts, batches),
            floor=floor / len(requests),
            ours_peak=watch.peak,
            textbook_peak=rival.peak,
            details={
                "edits": len(requests),
                "our_phases": our_phases,
                "our_edit_seconds_by_batch": watcher.seconds,
                "textbook_phases": phases,
                "textbook_edits_per_batch": args.textbook_edits,
            },
        )
        for texts in ("one prompt", "one record")
    ]


def _restore(workload: Workload, weights: dict[int, Tensor]) -> None:
    for layer, weight in weights.items():
        textbook.weight_of(workload.model, layer).copy_(weight)


def _textbook_phases(
    workload: Workload, module: EditModule, batches: Sequence[list[EditRequest]], args: Namespace
) -> dict[str, float]:
    """Edit a few requests of each batch; return seconds per edit, batch and record."""
    model, tokenizer = workload.model, workload.tokenizer
    covariances = {layer: module.key_covariance(WeightId(layer)) for layer in args.layers}
    past = {n: torch.zeros_like(c, dtype=torch.float64) for n, c in covariances.items()}
    edit = solve = score = 0.0
    for batch in batches:
        few = batch[: args.textbook_edits]
        began = now()
        seconds = [0.0]
        textbook.edit_batch(
            model, tokenizer, few, args.layers, covariances, past, settings(args), seconds
        )
        edit += now() - began - seconds[0]
        solve += seconds[0]
        began = now()
        for request in few:
            evaluate_record(model, tokenizer, request)
        score += now() - began
    n = sum(len(batch[: args.textbook_edits]) for batch in batches)
    phases = {"edit": edit / n, "solve": solve / len(batches), "score": score / n}
    for texts in ("one prompt", "one record"):
        few = batches[0][: args.textbook_texts]
        began = now()
        for request in few:
            evaluate_record(model, tokenizer, request, texts=texts)
        phases[texts] = (now() - began) / len(few)
    return phases


def _extrapolated(
    phases: dict[str, float], texts: str, batches: Sequence[list[EditRequest]]
) -> float:
    """Seconds per edit of the whole run, the textbook way.

    Edits and records cost the same each; a solve costs the same for few keys as for many, since
    the factorisation of the ``(d_in, d_in)`` system is what it spends its time on.
    """
    per_edit = phases["edit"] + phases["score"] + phases[texts]
    return per_edit + phases["solve"] * len(batches) / sum(map(len, batches))


def _floor(
    workload: Workload,
    batches: Sequence[list[EditRequest]],
    forwards: dict[int, list[int]],
    args: Namespace,
) -> float:
    """Operations of everything, the closed form's counted at the matmul rate of float32."""
    costs = costs_of(workload.model)
    d_out = workload.model.config.hidden_size
    total, done = 0, 0
    for batch in batches:
        edits = edit_rows(workload, batch)
        rows = [
            row[: lookup + 1]
            for edit in edits
            for row, lookup in zip(edit.ids[:-1], edit.lookups[:-1], strict=True)
        ]
        for layer in args.layers:
            counts = forwards[layer][done : done + len(batch)]
            total += search_operations(costs, edits, layer, counts)
            total += keys_operations(costs, rows, layer)
            total += closed_form_operations(costs.d_in, d_out, len(batch), done)
        total += scoring_floor(workload, batch, costs)
        done += len(batch)
    everything = [request for batch in batches for request in batch]
    total += scoring_floor(workload, everything, costs)
    return total + generation_floor(workload, everything, costs)
