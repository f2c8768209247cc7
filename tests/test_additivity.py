"""Whether what is written to a weight arrives: measured on random models, against plain passes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from blue_callbacks import ClosedFormUpdate
from helpers import fit
from lightning_blue.editing.additivity import Reach, measure_reach
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.optimization import TargetOptimization
from lightning_blue.editing.target_site import choose_site, describe
from lightning_blue.language_model.architectures import blocks, down_projection, find_architecture
from lightning_blue.support.errors import InputError
from random_models import random_model, tokenizer
from test_architectures import REQUESTS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PROMPTS = [[5, 9, 77, 300, 12, 8], [0, 41, 41, 7], [200, 3, 19, 18, 90, 450, 33]]


def reach(model, layer=1, prompts=PROMPTS):
    row = find_architecture(model)
    block = blocks(model, row)[layer]
    return measure_reach(model, prompts, block, down_projection(block, row), layer)


@pytest.fixture(scope="module")
def llama():
    return random_model("llama")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon", "bloom"])
def test_where_the_block_adds_its_ffn_the_multiple_is_exactly_one(name, dtype):
    model = random_model(name).to(dtype)
    for layer in (0, 2):
        assert reach(model, layer)["block"][::2] == reach(model, layer)["ffn"][::2] == (1.0, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fixed_multiple_is_measured(dtype):
    """The mean over tokens of what is off by one rounding each is off by less."""
    found = reach(random_model("granite").to(dtype))["block"]
    assert found.fixed
    assert found.multiple == pytest.approx(0.22, rel=2 * torch.finfo(dtype).eps, abs=1e-5)
    assert found.missed == pytest.approx(0.78, abs=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["olmo2", "glm4", "exaone4", "gemma2", "opt, norms behind"])
def test_a_norm_is_no_multiple(name, dtype):
    found = reach(random_model(name).to(dtype))
    assert not found["block"].fixed
    assert found["block"].missed > 0.5
    assert found["ffn"][::2] == (1.0, True)


class Scaled(nn.Module):
    """An FFN whose output is multiplied by a function of the token."""

    def __init__(self, inner: nn.Module, factor) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor
        self.down_proj = inner.down_proj

    def forward(self, hidden):
        return self.factor(hidden) * self.inner(hidden)


def scaled(llama, factor):
    model = copy.deepcopy(llama)
    model.model.layers[1].mlp = Scaled(model.model.layers[1].mlp, factor)
    return model


def test_a_gate_that_depends_on_the_token_is_no_multiple(llama):
    def gate(hidden):
        return torch.sigmoid(hidden[..., :1])

    assert not reach(scaled(llama, gate))["block"].fixed


@pytest.mark.parametrize("factor", [3.0, -1.0, 0.01])
def test_any_multiple_of_any_sign_is_one(llama, factor):
    found = reach(scaled(llama, lambda hidden: factor))["block"]
    assert found.fixed
    assert found.multiple == pytest.approx(factor, rel=1e-3)


def test_an_output_that_the_block_ignores_is_refused(llama):
    found = reach(scaled(llama, lambda hidden: 0.0))
    assert found["block"][::2] == (0.0, True)
    with pytest.raises(InputError, match=r"layer 1 does not arrive at the block's output"):
        choose_site("auto", {1: found})


class Frozen(nn.Linear):
    """A linear map that computes with a copy of its weight, as a quantised one does."""

    def forward(self, hidden):
        if not hasattr(self, "copy"):
            self.copy = self.weight.clone()
        return nn.functional.linear(hidden, self.copy)


def test_a_weight_that_is_not_the_one_computed_with_is_refused(llama):
    model = copy.deepcopy(llama)
    model.model.layers[1].mlp.down_proj.__class__ = Frozen
    found = reach(model)
    with pytest.raises(InputError, match=r"the projection's output as it should: .* 100%"):
        choose_site("ffn", {1: found})


class Routed(nn.Module):
    """Every other token is sent to one of two experts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.down_proj, self.inner = inner.down_proj, inner

    def forward(self, hidden):
        out = torch.zeros_like(hidden)
        out[:, ::2] = self.inner(hidden[:, ::2])
        return out


def test_a_projection_that_some_tokens_pass_by_is_refused(llama):
    model = copy.deepcopy(llama)
    model.model.layers[1].mlp = Routed(model.model.layers[1].mlp)
    with pytest.raises(InputError, match=r"ran 1 times on 12 of 21 tokens"):
        reach(model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_hooks_are_as_before(dtype):
    model = random_model("gpt2").to(dtype)
    before = copy.deepcopy(model.state_dict())
    reach(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_weights_are_as_before_when_a_pass_fails(llama):
    model = copy.deepcopy(llama)
    before = copy.deepcopy(model.state_dict())
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        reach(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_is_said_of_what_is_not_finite_or_zero(llama):
    for value in (torch.nan, 0.0):
        model = copy.deepcopy(llama)
        model.model.layers[1].mlp.up_proj.weight.data.fill_(value)
        assert reach(model) is None
    assert choose_site("auto", {1: None}) == ("block", {1: 1.0})


PLAIN, BENT = Reach(1.0, 0.0, True), Reach(0.4, 0.8, False)


def test_one_bent_layer_moves_the_site_of_all():
    reaches = {0: {"ffn": PLAIN, "block": PLAIN}, 1: {"ffn": PLAIN, "block": BENT}}
    site = choose_site("auto", reaches)
    assert site == ("ffn", {0: 1.0, 1: 1.0})
    assert describe(site, reaches).startswith("layer 1: the block's output does not follow")
    with pytest.raises(InputError, match=r"off by 80%(.|\n)*--model.target.site=ffn"):
        choose_site("block", reaches)


@pytest.mark.parametrize("site", ["ffn", "attention_and_ffn"])
def test_a_site_inside_the_ffn_needs_no_multiple(site):
    multiple = {"ffn": PLAIN, "block": Reach(0.22, 0.78, True)}
    assert choose_site(site, {0: multiple}) == (site, {0: 1.0})
    assert choose_site("block", {0: multiple}) == ("block", {0: 0.22})


def module(name: str, **target) -> EditModule:
    settings = TargetOptimization(**{"steps": 3, **target})
    made = EditModule(random_model(name), tokenizer(bos=True), target=settings, contexts=[])
    made.key_covariances.by_layer = {n: torch.eye(64) for n in range(3)}
    return made


def test_an_explicit_block_site_is_refused_before_anything_is_optimised(monkeypatch):
    olmo = module("olmo2", site="block")
    monkeypatch.setattr(olmo.target_finder, "find", None)
    with pytest.raises(InputError, match=r"off by \d+% of a known change(.|\n)*site=ffn"):
        fit(olmo, ClosedFormUpdate([0, 2]), [REQUESTS])


def test_a_resumed_run_keeps_what_was_measured(monkeypatch):
    for name, site in (("granite", "block"), ("olmo2", "ffn")):
        first, second = module(name), module(name)
        fit(first, ClosedFormUpdate([0, 2]), [REQUESTS])
        checkpoint = {}
        first.on_save_checkpoint(checkpoint)
        second.on_load_checkpoint(checkpoint)
        monkeypatch.setattr("lightning_blue.editing.target_site.measure_reach", None)
        fit(second, ClosedFormUpdate([0, 2]), [REQUESTS])
        assert second.found_settings == first.found_settings
        assert second.found_settings["site"] == site
        assert second.site.multiples == first.site.multiples
        monkeypatch.undo()
