"""float64 work is done on the CPU where a device has no float64; the numbers are the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from blue_callbacks import EditableWeights, KeyMemory, WeightId, precision
from blue_callbacks.closed_form import least_squares, null_space
from blue_callbacks.past_keys import fingerprint
from blue_callbacks.precision import float64_device, has_float64, in_float64
from conftest import LanguageModel
from fake_device import DEVICE, NO_FLOAT64, FakeDevice, OnDevice
from lightning_blue.editing import EditModule
from lightning_blue.editing.collecting import _add_product
from lightning_blue.editing.convergence import solved_keys
from lightning_blue.metrics import functional as F


@pytest.fixture
def device() -> Iterator[None]:
    has_float64.cache_clear()
    with FakeDevice():
        yield
    has_float64.cache_clear()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_played_device_refuses_what_the_real_one_does(device: None) -> None:
    here = OnDevice(random(3, 3))
    for convert in (
        Tensor.double,
        lambda t: t.to(torch.float64),
        lambda t: t.to("cpu", torch.float64),
        lambda t: torch.zeros(2, dtype=torch.float64, device=DEVICE),
        lambda t: t.cpu().double().to(DEVICE),
    ):
        with pytest.raises(TypeError, match=NO_FLOAT64):
            convert(here)
    with pytest.raises(RuntimeError, match="two devices"):
        here @ random(3, 3)
    assert (here @ here).device == DEVICE


def test_the_cpu_is_taken_where_a_device_has_no_float64(device: None) -> None:
    assert float64_device(DEVICE) == torch.device("cpu")
    assert float64_device(torch.device("cpu")) == torch.device("cpu")
    found = in_float64(OnDevice(random(2, 3)))
    assert found.device.type == "cpu"
    assert torch.equal(found, random(2, 3).double())


@pytest.mark.parametrize("kind", ["least squares", "null space"])
def test_batches_are_solved_and_written_as_on_the_cpu(kind: str, device: None) -> None:
    def edited(place: type | None) -> Tensor:
        """Two batches, the second respecting the first."""
        put = OnDevice if place is OnDevice else (lambda values: values)
        text = random(8, 50)
        covariance = put(text @ text.T / 50)
        whitening = (
            least_squares(covariance, 2.0)
            if kind == "least squares"
            else null_space(covariance, 0.5, threshold=1.0)
        )
        memory, weight = KeyMemory(whitening), put(random(5, 8))
        store = EditableWeights(lambda _: weight)
        for n in (2, 3):
            keys, residual = put(random(8, n)), put(random(5, n))
            left, right = memory.update(residual, keys)
            store.add(WeightId(0), left, right)
            memory.remember(keys)
        return weight.cpu()

    assert torch.equal(edited(OnDevice), edited(None))


def test_covariances_are_summed_as_on_the_cpu(device: None, monkeypatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    sums: dict[int, dict[int, Tensor]] = {0: {}, 1: {}}
    for n in (7, 9):
        _add_product(sums[0], 0, OnDevice(random(n, 6)))
        _add_product(sums[1], 0, random(n, 6))
    assert sums[0][0].device.type == "cpu"
    assert torch.equal(sums[0][0], sums[1][0])


def test_what_measures_and_compares_does_as_on_the_cpu(device: None) -> None:
    text = random(6, 40)
    covariance, keys = text @ text.T, random(6, 2)
    assert torch.equal(
        solved_keys(OnDevice(covariance), OnDevice(keys), 3.0), solved_keys(covariance, keys, 3.0)
    )
    assert fingerprint(OnDevice(text)) == fingerprint(text)
    values, request = random(5), torch.tensor([0, 0, 1, 2, 2])
    assert torch.equal(
        F.mean_by_request(OnDevice(values), OnDevice(request)), F.mean_by_request(values, request)
    )
    moments = F.ratio_moments(OnDevice(values), OnDevice(values.abs()))
    assert torch.equal(moments, F.ratio_moments(values, values.abs()))


def test_a_module_gives_its_covariance_where_it_is_solved(gpt2: LanguageModel, monkeypatch) -> None:
    module = EditModule(*gpt2)
    module.set_covariances({1: torch.eye(96, dtype=torch.float64)})
    monkeypatch.setattr(type(module), "device", DEVICE)
    monkeypatch.setattr(precision, "has_float64", lambda kind: kind != DEVICE.type)
    assert module.key_covariance(WeightId(1)).device.type == "cpu"
