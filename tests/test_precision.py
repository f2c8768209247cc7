"""The same edits with a model in bfloat16 and in float32, on a model that knows facts.

bfloat16 keeps 8 bits: a forward pass is off by a few tenths of a percent for each layer, and Adam
turns that into a few percent of a target. Everything behind the forward pass is in float32 or
better. Measured: keys within 1.4%, targets within 2.3%, updates within 5.9%; the limits are wider.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from blue_callbacks import ClosedFormUpdate, WeightId
from helpers import fit
from lightning_blue.data import read_requests
from lightning_blue.editing.covariance import CovarianceSource
from lightning_blue.editing.module import edit_module
from lightning_blue.editing.optimization import TargetOptimization

CONTEXTS = ["It is said.", "As we know.", "In short."]  # given: each precision would write others
LAYERS = (0, 3)


class Edited(NamedTuple):
    """What one batch of edits did, by layer."""

    keys: dict[int, Tensor]
    targets: dict[int, Tensor]
    updates: dict[int, Tensor]


@pytest.fixture(scope="module")
def edit(tmp_path_factory):
    requests = read_requests("almanac")[0][:4]
    source = CovarianceSource(tokens_per_dim=1.5, cache=str(tmp_path_factory.mktemp("stats")))
    search = TargetOptimization(steps=15, learning_rate=3.0, weight_decay=0.1, clamp=3.0)

    def run(precision: str) -> Edited:
        dtype = "bfloat16" if precision == "bf16-true" else "float32"
        module = edit_module(dtype=dtype, target=search, contexts=CONTEXTS)
        whole = edit_module(contexts=CONTEXTS, covariance=source)  # one covariance for all
        whole.prepare(LAYERS, [WeightId(layer) for layer in LAYERS])
        module.key_covariance = whole.key_covariance
        before = {n: module.editable_weights.read(WeightId(n)).clone() for n in LAYERS}
        keys: dict[int, Tensor] = {}
        ask = module.edit_keys
        module.edit_keys = lambda batch, weight: keys.setdefault(weight.layer, ask(batch, weight))
        module.prepare = lambda *_: None
        update = ClosedFormUpdate([0, 1, 2, 3], "boundary", 1000)
        fit(module, update, [requests], precision=precision)
        weights = {n: module.editable_weights.read(WeightId(n)) for n in LAYERS}
        targets = {n: values[-1] for n, values in module.target_values.items()}
        return Edited(keys, targets, {n: weights[n] - before[n] for n in LAYERS})

    return run


def deviation(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_updates_in_bfloat16_are_those_in_float32(edit, precision):
    exact, found = edit("32-true"), edit(precision)
    for limit, ours, reference in zip((0.04, 0.06, 0.15), found, exact, strict=True):
        for layer in LAYERS:
            assert ours[layer].dtype == torch.float32
            assert deviation(ours[layer], reference[layer]) < limit
