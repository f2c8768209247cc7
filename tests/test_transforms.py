"""RECT, PRUNE and half-precision weights: as functions of tensors and through the callback."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback

from blue_callbacks import ClosedFormUpdate, WeightId
from blue_callbacks.transforms import prune, prune_official, rect
from helpers import fit
from test_update_callback import Chain, batches


def test_rect_keeps_the_largest_relative_changes():
    weight = torch.tensor([[1.0, -2.0, 4.0, 8.0, 0.5, -1.0]])
    change = torch.tensor([[0.5, 0.1, -0.3, 0.2, 0.4, 0.05]])
    delta = change * weight  # by size alone the fourth entry would come first
    kept = rect(weight, delta, keep=0.4)  # limit: the 3rd smallest, int(6 * 60 / 100)
    assert kept.ne(0).tolist() == [[True, False, True, True, True, False]]
    assert torch.equal(kept[kept.ne(0)], delta[kept.ne(0)])


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 1.0])
def test_rect_keeps_the_share_that_was_asked_for(share):
    torch.manual_seed(0)
    weight, delta = torch.randn(80, 50), torch.randn(80, 50)
    kept = rect(weight, delta, share).flatten()
    order = (delta / weight).abs().flatten().argsort(descending=True)
    n = min(4000, int(4000 * share) + 1)  # the entry at the limit itself is kept
    assert int(kept.ne(0).sum()) == n
    assert torch.equal(kept[order[:n]], delta.flatten()[order[:n]])


@pytest.mark.parametrize("n", [*range(2, 23), 1003, 10001])
@pytest.mark.parametrize("percent", [40, 20, 7, 29])
def test_the_rank_of_the_limit_is_that_of_the_published_code(n, percent):
    smallest = int(n * (100 - percent) / 100)  # counted from 1, as torch.kthvalue does
    changes = torch.arange(1, n + 1, dtype=torch.float64)[None]
    kept = rect(torch.ones(1, n, dtype=torch.float64), changes, keep=percent / 100)
    assert int(kept.ne(0).sum()) == n - max(smallest, 1) + 1


def test_rect_keeps_ties_at_the_limit():
    tied = torch.tensor([[0.5, 0.2, 0.2, 0.2, 0.1]])
    assert rect(torch.ones(1, 5), tied, keep=0.4).ne(0).tolist() == [[True] * 4 + [False]]


def spectrum(d_out: int, d_in: int, values: list[float], seed: int) -> torch.Tensor:
    """A random matrix with given singular values."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(d_out, d_out, generator=generator, dtype=torch.double))[0]
    right = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator, dtype=torch.double))[0]
    n = len(values)
    return left[:, :n] @ torch.diag(torch.tensor(values, dtype=torch.double)) @ right[:, :n].T


def test_prune_compresses_singular_values_above_the_original_ones():
    original = spectrum(6, 9, [2.0, 1.5, 1.0], seed=0)
    update = spectrum(6, 9, [20.0, 4.0, 1.9, 0.3], seed=1)
    finished = prune(original, original + update)
    left, _, right = np.linalg.svd(update.numpy())
    values = [np.log(20 / 2) + 2, np.log(4 / 2) + 2, 1.9, 0.3]
    expected = original.numpy() + (left[:, :4] * values) @ right[:4]
    np.testing.assert_allclose(finished.numpy(), expected, atol=1e-10)
    twice = prune_official(original, original + update)  # counts the update a second time
    np.testing.assert_allclose(twice.numpy(), expected + update.numpy(), atol=1e-10)


def test_prune_leaves_a_small_update_alone():
    original = spectrum(6, 9, [2.0, 1.5, 1.0], seed=0)
    update = spectrum(6, 9, [1.9, 0.3], seed=1)
    torch.testing.assert_close(prune(original, original + update), original + update)


def twins(seed: int = 0) -> tuple[Chain, Chain]:
    """Two equal networks with equal covariances, which no write changes."""
    torch.manual_seed(seed)
    chain, twin = Chain(), Chain()
    twin.load_state_dict(chain.state_dict())
    covariances = {
        WeightId(n): chain.key_covariance(WeightId(n)).detach().clone() for n in range(4)
    }
    chain.key_covariance = twin.key_covariance = covariances.__getitem__
    return chain, twin


def straight_line(
    chain: Chain, batch, layers: tuple[int, ...], past: dict[int, torch.Tensor] | None = None
) -> dict[int, torch.Tensor]:
    """One batch of MEMIT with whole updates, written out; returns them by layer."""
    last, deltas = layers[-1], {}
    target = chain.edit_targets(batch, last)
    for n, layer in enumerate(layers):
        keys = chain.edit_keys(batch, WeightId(layer)).detach().double()
        residual = (target - chain.edit_outputs(batch, last)).detach().double() / (len(layers) - n)
        system = 0.5 * chain.key_covariance(WeightId(layer)).double() + keys @ keys.T
        if past is not None:
            system = system + past[layer] @ past[layer].T
        deltas[layer] = (residual @ keys.T @ torch.linalg.inv(system)).float()
        chain.weights[layer].data += deltas[layer]
    return deltas


def keep_largest(weight: torch.Tensor, delta: torch.Tensor, share: float) -> torch.Tensor:
    """RECT by sorting."""
    change = (delta / weight).abs().numpy()
    mask = change >= np.sort(change, axis=None)[int(change.size * (100 - 100 * share) / 100) - 1]
    return torch.from_numpy(np.where(mask, delta.numpy(), 0))


@pytest.mark.parametrize("past_keys", [False, True])
def test_rect_cuts_when_all_layers_were_solved_on_whole_updates(past_keys):
    """Past keys are those of the weights as they are after the cut."""
    chain, twin = twins()
    data = batches(3)
    update = ClosedFormUpdate([0, 1, 2], "even", 0.5, past_keys=past_keys, rect_keep=0.4)
    fit(chain, update, data)
    past = {n: twin.weights[n].new_empty(twin.weights[n].shape[1], 0).double() for n in range(3)}
    for batch in data:
        before = [weight.detach().clone() for weight in twin.weights]
        deltas = straight_line(twin, batch, (0, 1, 2), past if past_keys else None)
        for layer, delta in deltas.items():
            twin.weights[layer].data = before[layer] + keep_largest(before[layer], delta, 0.4)
        for layer, keys in past.items():
            left = twin.edit_keys(batch, WeightId(layer)).detach().double()
            past[layer] = torch.cat((keys, left), dim=1)
    for ours, reference in zip(chain.weights, twin.weights, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


class Watched(ClosedFormUpdate):
    """Notes the weights after each batch."""

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        self.seen = [weight.detach().clone() for weight in pl_module.weights]


@pytest.mark.parametrize("post_edit_transform", ["prune", "prune_official"])
def test_prune_acts_once_on_the_update_of_all_batches(post_edit_transform):
    chain, twin = twins()
    data = [(x, 20 * y) for x, y in batches(3)]
    original = [weight.detach().clone() for weight in twin.weights]
    update = Watched(
        [0, 1, 2], "even", 0.5, past_keys=False, post_edit_transform=post_edit_transform
    )
    fit(chain, update, data)
    for batch in data:
        straight_line(twin, batch, (0, 1, 2))
    for layer in range(3):
        before, edited = original[layer].numpy(), twin.weights[layer].detach().numpy()
        torch.testing.assert_close(
            update.seen[layer], torch.from_numpy(edited), rtol=1e-3, atol=1e-3
        )
        left, values, right = np.linalg.svd(edited - before)
        limit = np.linalg.svd(before)[1][0]
        assert values[0] > 2 * limit > 0 < values[-1]
        squeezed = np.where(values > limit, np.log(values / limit) + limit, values)
        base = edited if post_edit_transform == "prune_official" else before
        expected = base + (left * squeezed) @ right
        np.testing.assert_allclose(chain.weights[layer].detach(), expected, rtol=0, atol=2e-3)
    assert torch.equal(chain.weights[3], original[3])


class Ramp(Chain):
    """Asks for the same small step from wherever it is, every time."""

    def edit_keys(self, batch, layer):
        return batch[0].T

    def edit_outputs(self, batch, layer):
        return torch.zeros_like(batch[1]).T

    def edit_targets(self, batch, layer):
        return batch[1].T

    def key_covariance(self, layer):
        return torch.eye(10)


def test_a_hundred_tiny_updates_add_up_in_bfloat16():
    torch.manual_seed(0)
    full, half = Ramp(n_layers=1), Ramp(n_layers=1)
    start = torch.randn(10, 10).bfloat16()
    full.weights[0].data, half.weights[0].data = start.float(), start.clone()
    data = [(torch.randn(3, 10), torch.randn(3, 10).mul(0.0005).add(0.002))] * 100
    for module in (full, half):
        fit(module, ClosedFormUpdate([0], "first", 1.0, past_keys=False), data)
    moved = full.weights[0] - start.float()
    one_at_a_time = start.clone()
    for _ in range(100):
        one_at_a_time += (moved / 100).bfloat16()
    assert half.weights[0].dtype == torch.bfloat16
    assert torch.equal(half.weights[0], full.weights[0].bfloat16())
    lost = (one_at_a_time.float() - full.weights[0]).norm() / moved.norm()
    assert lost > 0.2, "these updates would not even be lost without a float32 version"


def test_a_run_in_half_precision_resumes_from_its_checkpoint(tmp_path):
    """Stopped after two of four batches and resumed: equal to the run that never stopped."""
    whole, halves = twins()
    data = [(x, 5 * y) for x, y in batches(4)]
    for chain in (whole, halves):
        for weight in chain.weights:
            weight.data = weight.data.bfloat16()
        chain.run = lambda x, layer, chain=chain: run(chain, x, layer)
    unedited = copy.deepcopy(halves.state_dict())

    def update() -> ClosedFormUpdate:
        return ClosedFormUpdate([0, 2], "boundary", 0.5, post_edit_transform="prune")

    def run(chain, x, layer):
        for weight in chain.weights[: layer + 1]:
            key = torch.relu(x)
            x = x + key @ weight.float().T
        return key, x

    fit(whole, update(), data)
    checkpoint = tmp_path / "two.ckpt"
    trainer = fit(halves, update(), data, callbacks=[SaveAfter(2, checkpoint)])
    assert trainer.global_step == 4
    halves.load_state_dict(unedited)
    halves.edit_batches_held = 0
    fit(halves, update(), data, ckpt_path=checkpoint)
    for ours, reference in zip(halves.weights, whole.weights, strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, reference)


class SaveAfter(Callback):
    """Save a checkpoint after some batches."""

    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.batches:
            trainer.save_checkpoint(self.path)
