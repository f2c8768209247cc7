"""Part ``closed_form``: the update of one layer at the size of Llama-3's, without a model."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import textbook
from benchmarks.floor import closed_form_operations
from benchmarks.results import Row
from benchmarks.timing import Clock
from blue_callbacks import ClosedFormUpdate, EditableWeights, WeightId

WEIGHT = 15000.0


class LinearLayer:
    """One editable linear map; an edit batch is a pair of keys and targets.

    Args:
        weight: ``(d_out, d_in)``.
        covariance: second moment of ordinary keys, ``(d_in, d_in)``.
    """

    def __init__(self, weight: Tensor, covariance: Tensor) -> None:
        self.weight = weight
        self.covariance = covariance
        self.editable_weights = EditableWeights(lambda _weight: self.weight)

    def key_covariance(self, weight: WeightId) -> Tensor:
        """Return the second moment of ordinary keys, ``(d_in, d_in)``."""
        return self.covariance

    def edit_keys(self, batch: tuple[Tensor, Tensor], weight: WeightId) -> Tensor:
        """Return the batch's keys, ``(d_in, n)``."""
        return batch[0]

    def edit_targets(self, batch: tuple[Tensor, Tensor], layer: int) -> Tensor:
        """Return the batch's targets, ``(d_out, n)``."""
        return batch[1]

    def edit_outputs(self, batch: tuple[Tensor, Tensor], layer: int) -> Tensor:
        """Return zero: targets are residuals here, ``(d_out, n)``."""
        return torch.zeros_like(batch[1])


def ordinary_keys(d_in: int, device: str) -> Tensor:
    """Make a covariance like a language model's: a few strong directions over a weak floor."""
    factor = torch.randn(d_in, d_in // 8, device=device)
    covariance = torch.addmm(torch.eye(d_in, device=device), factor, factor.T, beta=0.1)
    return covariance.div_(d_in // 8)


def run_closed_form(args: Namespace, clock: Clock) -> list[Row]:
    """Write a batch of new keys after many past ones, both ways in turn.

    Each repeat is the next batch of one run: its keys are remembered, so that the past grows.
    """
    torch.manual_seed(0)
    d_in, d_out, device = args.d_in, args.d_out, args.device
    weight = torch.zeros(d_out, d_in, device=device)
    layer = LinearLayer(weight, ordinary_keys(d_in, device))
    past_keys = torch.randn(d_in, args.past, device=device)
    new = (torch.randn(d_in, args.new, device=device), torch.randn(d_out, args.new, device=device))
    update = ClosedFormUpdate([0], "first", covariance_weight=WEIGHT)
    trainer: Any = SimpleNamespace(callbacks=[update])
    with torch.no_grad(), clock.watched() as factoring:
        update.on_fit_start(trainer, layer)  # type: ignore[arg-type]
    with torch.no_grad(), clock.watched() as filling:
        nothing = torch.zeros(d_out, args.past, device=device)
        update.on_edit_batch(trainer, layer, (past_keys, nothing))
    moment = past_keys.double() @ past_keys.double().T

    twin = torch.zeros_like(layer.weight)

    def ours() -> None:
        update.on_edit_batch(trainer, layer, new)

    def dense() -> None:
        keys, residual = new
        twin.add_(textbook.solve(layer.covariance, WEIGHT, moment, keys, residual).float())
        moment.addmm_(keys.double(), keys.double().T)

    with torch.no_grad():
        samples = clock.race({"ours": ours, "textbook": dense}, args.repeats)
    operations = closed_form_operations(d_in, d_out, args.new, args.past)
    size = f"{d_in:,} to {d_out:,}, {args.new:,} new keys after {args.past:,}"
    row = Row(
        "closed_form",
        size,
        "batch",
        ours=samples["ours"].median,
        textbook=samples["textbook"].median,
        floor=operations / clock.rate,
        ours_peak=samples["ours"].peak + max(0, factoring.peak) + _bytes(layer),
        textbook_peak=samples["textbook"].peak + moment.nbytes + _bytes(layer),
        details={
            "seconds": {name: s.seconds for name, s in samples.items()},
            "matmul_gflops_float64": clock.rate / 1e9,
            "relative_difference": float((layer.weight - twin).norm() / twin.norm()),
            "past_as_one_batch_seconds": filling.seconds,
        },
    )
    once = Row(
        "closed_form",
        f"factorisation, once a run and layer, d_in {d_in:,}",
        "run",
        ours=factoring.seconds,
        floor=d_in**3 / 3 / clock.rate,
        ours_peak=factoring.peak,
    )
    return [row, once]


def _bytes(layer: LinearLayer) -> int:
    """Bytes of what both ways are given."""
    return layer.weight.nbytes + layer.covariance.nbytes
