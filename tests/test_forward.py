"""Partial forward passes against the whole one."""

from __future__ import annotations

import pytest
import torch

from lightning_blue.architectures import blocks, down_projection, find_architecture, weight_view
from lightning_blue.forward import logits_from_block, read_states


@pytest.fixture
def ids(language_model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, len(language_model.tokenizer), (3, 9), generator=generator)


def test_states_equal_those_the_model_reports(language_model, ids):
    model = language_model.model
    row = find_architecture(model)
    layers = blocks(model, row)
    states = read_states(
        model,
        ids,
        inputs_of={"key": down_projection(layers[1], row)},
        outputs_of={"out": layers[2], "first": layers[0]},
    )
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states["out"], hidden[3], rtol=0, atol=0)
    torch.testing.assert_close(states["first"], hidden[1], rtol=0, atol=0)
    written = states["key"] @ weight_view(down_projection(layers[1], row)).T
    assert states["key"].shape == (3, 9, 96)
    assert written.shape == (3, 9, 32)


def test_reading_stops_after_the_last_module_that_is_wanted(language_model, ids):
    model = language_model.model
    layers = blocks(model, find_architecture(model))
    seen = []
    hooks = [b.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, b in enumerate(layers)]
    read_states(model, ids, outputs_of={"out": layers[1]})
    for hook in hooks:
        hook.remove()
    assert seen == [0, 1]


def test_logits_from_a_block_equal_the_whole_forward_pass(language_model, ids):
    model = language_model.model
    row = find_architecture(model)
    layers = blocks(model, row)
    positions = torch.tensor([[2, 3], [8, 8], [0, 5]])
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        reference = out.logits[torch.arange(3)[:, None], positions]
        for layer in range(len(layers) - 1):
            hidden = out.hidden_states[layer + 1]
            ours = logits_from_block(model, layers, layer, ids, hidden, positions)
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_blocks_compute_again_afterwards_bitwise(language_model, ids):
    model = language_model.model
    layers = blocks(model, find_architecture(model))
    with torch.no_grad():
        before = model(ids).logits
        hidden = torch.zeros(3, 9, 32)
        logits_from_block(model, layers, 2, ids, hidden, torch.zeros(3, 1, dtype=torch.long))
        read_states(model, ids, outputs_of={"out": layers[0]})
        assert torch.equal(model(ids).logits, before)


def test_right_padding_changes_nothing_that_is_read(language_model, ids):
    model = language_model.model
    layers = blocks(model, find_architecture(model))
    padded = torch.cat((ids, torch.zeros(3, 4, dtype=torch.long)), dim=1)
    short = read_states(model, ids, outputs_of={"out": layers[3]})["out"]
    long = read_states(model, padded, outputs_of={"out": layers[3]})["out"]
    torch.testing.assert_close(long[:, :9], short, rtol=1e-5, atol=1e-6)
