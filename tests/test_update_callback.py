"""The callback on plain torch networks: no language model is involved."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningModule

from blue_callbacks import (
    ClosedFormUpdate,
    EditableWeights,
    EditRecord,
    EditStepOptimizer,
    NonFiniteError,
    WeightId,
    apply_edit_batch,
)
from blue_callbacks.closed_form import Whitening
from helpers import fit

README = Path(__file__).resolve().parents[1] / "callbacks" / "README.md"


def readme_example() -> str:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[0]


def test_readme_example_edits_a_plain_network_in_under_60_lines():
    code = readme_example()
    assert len(code.splitlines()) < 60
    scope: dict = {}
    exec(compile(code, "callbacks/README.md", "exec"), scope)
    assert scope["error"] < 0.05
    assert scope["trainer"].global_step == 3
    assert scope["update"].past_keys_by_weight[WeightId(0)].shape == (64, 12)


HIDE = """
import importlib.metadata, sys
hidden = {"transformers", "datasets", "tokenizers", "lightning_blue"}
real = importlib.metadata.Distribution.from_name.__func__
def from_name(cls, name):
    if name in hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(cls, name)
importlib.metadata.Distribution.from_name = classmethod(from_name)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder())
"""


def test_runs_without_transformers():
    """The package and the README's example work where nothing of Hugging Face can be imported."""
    code = HIDE + readme_example() + "\nassert error < 0.05, error\n"
    code += "assert not hidden & {name.partition('.')[0] for name in sys.modules}\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


class Chain(LightningModule):
    """Residual blocks x + W_l relu(x): outputs of one layer are inputs of the next."""

    def __init__(self, d: int = 10, n_layers: int = 4) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weights = torch.nn.ParameterList(torch.randn(d, d) * 0.1 for _ in range(n_layers))
        self.ordinary = torch.randn(400, d)
        self.asked: list[tuple[str, int]] = []
        self.editable_weights = EditableWeights(lambda weight: self.weights[weight.layer].data)

    def run(self, x: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return key and output of a layer, row by row."""
        for weight in self.weights[: layer + 1]:
            key = torch.relu(x)
            x = x + key @ weight.T
        return key, x

    def training_step(self, batch, batch_idx):
        apply_edit_batch(self, batch)

    def configure_optimizers(self):
        return EditStepOptimizer(self.parameters())

    def key_covariance(self, weight):
        keys = self.run(self.ordinary, weight.layer)[0]
        return keys.T @ keys / len(keys)

    def edit_keys(self, batch, weight):
        self.asked.append(("keys", weight.layer))
        return self.run(batch[0], weight.layer)[0].T

    def edit_targets(self, batch, layer):
        self.asked.append(("targets", layer))
        return (self.run(batch[0], layer)[1] + batch[1]).T

    def edit_outputs(self, batch, layer):
        self.asked.append(("outputs", layer))
        return self.run(batch[0], layer)[1].T


def batches(n: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(3, 10), torch.randn(3, 10)) for _ in range(n)]


def test_boundary_asks_for_the_last_target_after_the_first_layer_is_written():
    torch.manual_seed(0)
    chain, data = Chain(), batches(1)
    before = [weight.detach().clone() for weight in chain.weights]
    fit(chain, ClosedFormUpdate([0, 1, 2], "boundary", 1.0), data)
    assert chain.asked == [(what, n) for n in (0, 2) for what in ("targets", "keys", "outputs")]
    changed = [not torch.equal(a, b) for a, b in zip(before, chain.weights, strict=True)]
    assert changed == [True, False, True, False]


def test_even_asks_for_one_target_before_any_layer_is_written():
    torch.manual_seed(0)
    chain = Chain()
    fit(chain, ClosedFormUpdate([0, 1, 2], "even", 1.0), batches(1))
    assert [layer for what, layer in chain.asked if what == "targets"] == [2]
    assert chain.asked[0] == ("targets", 2)


@pytest.mark.parametrize("plan", ["boundary", "even"])
def test_sequence_equals_a_straight_line_of_dense_solves(plan):
    """MEMIT with past keys, written out with dense inverses, gives the same weights."""
    torch.manual_seed(0)
    chain, data = Chain(), batches(3)
    twin = Chain()
    twin.load_state_dict(chain.state_dict())
    twin.ordinary = chain.ordinary
    fit(chain, ClosedFormUpdate([0, 1, 2], plan, 0.5), data)
    c = {layer: twin.key_covariance(WeightId(layer)).double() for layer in (0, 1, 2)}
    past = {layer: torch.empty(10, 0).double() for layer in (0, 1, 2)}
    written = (0, 2) if plan == "boundary" else (0, 1, 2)
    for batch in data:
        fixed = None if plan == "boundary" else twin.edit_targets(batch, 2)
        for layer in written:
            at = layer if plan == "boundary" else 2
            target = twin.edit_targets(batch, layer) if fixed is None else fixed
            share = 1.0 if plan == "boundary" else 1 / (3 - layer)
            k = twin.edit_keys(batch, WeightId(layer)).detach().double()
            r = share * (target - twin.edit_outputs(batch, at)).detach().double()
            a = 0.5 * c[layer] + past[layer] @ past[layer].T + k @ k.T
            twin.weights[layer].data += (r @ k.T @ torch.linalg.inv(a)).float()
        for layer in written:
            keys = twin.edit_keys(batch, WeightId(layer)).detach().double()
            past[layer] = torch.cat((past[layer], keys), dim=1)
    for ours, reference in zip(chain.weights, twin.weights, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_a_failure_in_the_second_layer_leaves_all_weights_as_before_the_batch():
    torch.manual_seed(0)
    chain = Chain()
    before = [weight.detach().clone() for weight in chain.weights]
    real = chain.edit_targets

    def targets(batch, layer):
        return real(batch, layer) * (torch.nan if layer == 2 else 1.0)

    chain.edit_targets = targets
    chain.edit_name = lambda batch, column: f"fact number {column}"
    with pytest.raises(NonFiniteError, match="residual of layer2 not finite for fact number 0"):
        fit(chain, ClosedFormUpdate([0, 1, 2], "boundary", 1.0), batches(1))
    for weight, old in zip(chain.weights, before, strict=True):
        assert torch.equal(weight, old)


def test_past_keys_survive_in_the_callback_state():
    torch.manual_seed(0)
    data = batches(3)
    whole, halves = Chain(), Chain()
    halves.load_state_dict(whole.state_dict())
    halves.ordinary = whole.ordinary
    covariances = {WeightId(layer): whole.key_covariance(WeightId(layer)) for layer in (0, 2)}
    whole.key_covariance = halves.key_covariance = covariances.__getitem__
    fit(whole, ClosedFormUpdate([0, 1, 2], "boundary", 0.5), data)
    first, second = (ClosedFormUpdate([0, 1, 2], "boundary", 0.5) for _ in range(2))
    fit(halves, first, data[:2])
    second.load_state_dict(first.state_dict())
    fit(halves, second, data[2:])
    for ours, reference in zip(halves.weights, whole.weights, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_what_a_transform_compares_with_survives_in_the_callback_state():
    torch.manual_seed(0)
    chain, data = Chain(), batches(2)
    covariances = {WeightId(layer): chain.key_covariance(WeightId(layer)) for layer in (0, 2)}
    chain.key_covariance = covariances.__getitem__
    unedited = {WeightId(layer): chain.weights[layer].detach().clone() for layer in (0, 2)}
    first, second = (
        ClosedFormUpdate([0, 2], "boundary", 0.5, post_edit_transform="prune") for _ in range(2)
    )
    fit(chain, first, data[:1])
    second.load_state_dict(first.state_dict())
    fit(chain, second, data[1:])
    for weight, original in unedited.items():
        assert torch.equal(second.original[weight], original)


@pytest.mark.parametrize(("rect_keep", "fails"), [(None, 1), (0.4, 2)])
def test_a_batch_that_fails_while_keys_are_remembered_has_never_been(rect_keep, fails, monkeypatch):
    """Memory runs out when the second weight's keys are taken in; the callback then goes on.

    Six keys of ten dimensions are folded into the whitening: at the end of the second batch, or,
    under RECT, whose keys are taken in with those of the next batch, in the midst of the third.
    """
    torch.manual_seed(0)
    chain, twin, data = Chain(), Chain(), batches(4)
    twin.load_state_dict(chain.state_dict())
    covariances = {WeightId(layer): chain.key_covariance(WeightId(layer)) for layer in (0, 2)}
    chain.key_covariance = twin.key_covariance = covariances.__getitem__
    ours, theirs = (
        ClosedFormUpdate([0, 2], "boundary", 0.5, rect_keep=rect_keep) for _ in range(2)
    )
    for place, batch in enumerate(data):
        if place != fails:
            fit(twin, theirs, [batch])
    real, calls = Whitening.folded, []

    def folded(whitening, rows):
        calls.append(rows)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return real(whitening, rows)

    monkeypatch.setattr(Whitening, "folded", folded)
    for place, batch in enumerate(data):
        if place != fails:
            fit(chain, ours, [batch])
            continue
        before = [weight.detach().clone() for weight in chain.weights]
        with pytest.raises(torch.OutOfMemoryError):
            fit(chain, ours, [batch])
        assert all(map(torch.equal, chain.weights, before))
    for weight, reference in zip(chain.weights, twin.weights, strict=True):
        torch.testing.assert_close(weight, reference, rtol=1e-5, atol=1e-6)


def test_max_steps_counts_edit_batches():
    torch.manual_seed(0)
    trainer = fit(Chain(), ClosedFormUpdate([0, 1], "boundary", 1.0), batches(5), max_steps=2)
    assert trainer.global_step == 2


class Mixture(LightningModule):
    """One layer whose output is the sum of two projections, each with keys of its own."""

    first, second = WeightId(0, "first"), WeightId(0, "second")

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.features = {
            self.first: torch.nn.Linear(6, 20),
            self.second: torch.nn.Linear(6, 12),
        }
        self.first_weight = torch.nn.Parameter(torch.randn(5, 20) * 0.1)
        self.second_weight = torch.nn.Parameter(torch.randn(5, 12) * 0.1)
        self.ordinary = torch.randn(200, 6)
        self.editable_weights = EditableWeights(lambda weight: self.weight(weight).data)

    def weight(self, weight: WeightId) -> torch.nn.Parameter:
        return {self.first: self.first_weight, self.second: self.second_weight}[weight]

    def keys(self, x: torch.Tensor, weight: WeightId) -> torch.Tensor:
        return torch.relu(self.features[weight](x)).detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(self.keys(x, weight) @ self.weight(weight).T for weight in self.weights_of(0))

    def training_step(self, batch, batch_idx):
        apply_edit_batch(self, batch)

    def configure_optimizers(self):
        return EditStepOptimizer(self.parameters())

    def weights_of(self, layer):
        return [self.first, self.second]

    def key_covariance(self, weight):
        keys = self.keys(self.ordinary, weight)
        return keys.T @ keys / len(keys) + 0.01 * torch.eye(keys.shape[1])

    def edit_keys(self, batch, weight):
        return self.keys(batch[0], weight).T

    def edit_targets(self, batch, layer):
        return batch[1].T

    def edit_outputs(self, batch, layer):
        return self(batch[0]).T


def test_two_weights_of_a_layer_share_its_residual():
    """The first takes half of the residual, the second all that is left; written out densely."""
    torch.manual_seed(0)
    module = Mixture()
    data = [(torch.randn(3, 6), torch.randn(3, 5)) for _ in range(2)]
    ids = module.weights_of(0)
    expected = {weight: module.weight(weight).detach().double() for weight in ids}
    covariance = {weight: module.key_covariance(weight).double() for weight in ids}
    past = {weight: torch.empty(len(covariance[weight]), 0).double() for weight in ids}
    for inputs, wanted in data:
        keys = {weight: module.keys(inputs, weight).double().T for weight in ids}
        for weight, share in zip(ids, (1 / 2, 1), strict=True):
            now = sum(expected[each] @ keys[each] for each in ids)
            residual = share * (wanted.double().T - now)
            k = keys[weight]
            system = 0.01 * covariance[weight] + past[weight] @ past[weight].T + k @ k.T
            expected[weight] = expected[weight] + residual @ k.T @ torch.linalg.inv(system)
        past = {weight: torch.cat((past[weight], keys[weight]), dim=1) for weight in ids}

    update = ClosedFormUpdate([0], "boundary", 0.01)
    fit(module, update, data)

    for weight in ids:
        torch.testing.assert_close(
            module.weight(weight).detach().double(), expected[weight], rtol=1e-4, atol=1e-5
        )
        assert update.past_keys_by_weight[weight].shape[1] == 6
    for inputs, wanted in data:
        assert (module(inputs) - wanted).norm() < 0.1 * wanted.norm()


def test_a_checkpoint_knows_its_method_by_the_names_of_the_configuration():
    settings = ClosedFormUpdate([0, 2], solver="null_space", ridge=3.0).state_dict()["settings"]
    constructor = inspect.signature(ClosedFormUpdate).parameters
    assert set(settings) <= set(constructor)
    assert (settings["solver"], settings["ridge"], settings["layers"]) == (
        "null_space",
        3.0,
        [0, 2],
    )
    assert ClosedFormUpdate([0]).state_dict()["settings"] == {
        "layers": [0],
        "plan": "boundary",
        "past_keys": True,
        "rect_keep": None,
        "post_edit_transform": None,
        "solver": "least_squares",
        "covariance_weight": None,
        "threshold": 0.02,  # AlphaEdit's nullspace_threshold
        "energy": None,
        "ridge": 10.0,  # its L2
    }


class Look(Callback):
    """Keep the record of each batch."""

    def __init__(self) -> None:
        self.records: list[EditRecord] = []

    def on_edit_committed(self, trainer, module, record):
        self.records.append(record)


def test_norms_are_of_what_was_added_and_asked_for_and_say_how_large_the_null_space_is():
    torch.manual_seed(0)
    chain, data, look = Chain(), batches(2), Look()
    covariances = {WeightId(layer): chain.key_covariance(WeightId(layer)) for layer in (0, 2)}
    chain.key_covariance = covariances.__getitem__
    update = ClosedFormUpdate([0, 2], "boundary", solver="null_space", threshold=1e6)
    said = "layer2: the null space keeps 10 of 10 key dimensions; choose another update.threshold"
    with pytest.warns(UserWarning, match=said):
        fit(chain, update, data[:1])
    before = [weight.detach().clone() for weight in chain.weights]
    asked = {0: chain.edit_targets(data[1], 0) - chain.edit_outputs(data[1], 0)}
    fit(chain, update, data[1:], callbacks=[look])
    assert {key for key in update.norms if key.endswith("null_space")} == {
        "layer0/null_space",
        "layer2/null_space",
    }
    (record,) = look.records
    for change in record.changes:
        layer = change.weight.layer
        added = (chain.weights[layer] - before[layer]).detach()
        assert update.norms[f"layer{layer}/delta_norm"] == pytest.approx(
            float(added.norm()), rel=1e-4
        )
        assert change.left.dtype == change.right.dtype == torch.float32
    expected = float(asked[0].norm(dim=0).mean())
    assert update.norms["layer0/residual_norm"] == pytest.approx(expected, rel=1e-5)
