"""Partial forward passes against the whole one."""

from __future__ import annotations

import pytest
import torch

from lightning_blue.editing.fast.frozen import NO_SHORTCUTS, Shortcuts, freeze
from lightning_blue.editing.fast.passes import Pass, logits_with
from lightning_blue.editing.fast.rows import AlignedRows
from lightning_blue.language_model.architectures import (
    blocks,
    down_projection,
    feed_forward,
    find_architecture,
    weight_view,
)
from lightning_blue.language_model.shared_prefixes import reads_forests
from lightning_blue.language_model.states import hidden_of, read_states


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
        {"input_ids": ids},
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
    read_states(model, {"input_ids": ids}, outputs_of={"out": layers[1]})
    for hook in hooks:
        hook.remove()
    assert seen == [0, 1]


def aligned(ids: torch.Tensor) -> AlignedRows:
    """Rows of 9, 7 and 6 tokens, aligned at column 4."""
    rows = torch.zeros_like(ids)
    rows[0], rows[1, 2:], rows[2, 3:] = ids[0], ids[1, :7], ids[2, :6]
    return AlignedRows(rows, torch.tensor([0, 2, 3]), torch.tensor([9, 9, 9]), 4)


DELTA = torch.linspace(-1, 1, 32)  # no constant: a LayerNorm would remove that
READS = (torch.tensor([0, 0, 1, 2, 2]), torch.tensor([4, 8, 5, 7, 4]))  # rows and columns
SHORTCUTS = [
    Shortcuts(),
    Shortcuts(skip_blocks=False),
    Shortcuts(reuse_prefix=False),
    Shortcuts(share_prefixes=False),
    Shortcuts(read_few=False),
    NO_SHORTCUTS,
]


@pytest.mark.parametrize("shortcuts", SHORTCUTS)
@pytest.mark.parametrize("inside", [False, True])
def test_logits_equal_the_whole_forward_pass(language_model, ids, inside, shortcuts):
    """With something added behind a block, or behind its down projection, at the aligned column."""
    model = language_model.model
    row = find_architecture(model)
    layers = blocks(model, row)
    rows = aligned(ids)
    for layer, block in enumerate(layers):
        site = down_projection(block, row) if inside else block
        frozen = freeze(model, layers, layer - inside, rows, [site], shortcuts)
        delta = DELTA.expand(3, 32)
        with torch.no_grad():
            one = Pass(frozen, [(site, delta)], *READS)
            (ours,) = logits_with(model, layers, [one], shortcuts)
            for i, (length, start) in enumerate([(9, 0), (7, 2), (6, 3)]):
                before, logits = whole_pass(model, site, ids[i, :length], 4 - start)
                mine = READS[0] == i
                reference = logits[READS[1][mine] - start]
                torch.testing.assert_close(ours[mine], reference, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(frozen.outputs[0][i], before, rtol=1e-4, atol=1e-5)


def test_rows_can_be_selected(language_model, ids):
    model = language_model.model
    layers = blocks(model, find_architecture(model))
    frozen = freeze(model, layers, 1, aligned(ids))
    with torch.no_grad():
        (every,) = logits_with(model, layers, [Pass(frozen, [], *READS)])
        index = torch.tensor([2, 0])
        reads = (torch.tensor([0, 1]), torch.tensor([7, 8]))
        (some,) = logits_with(model, layers, [Pass(frozen.select(index), [], *reads)])
    torch.testing.assert_close(some, every[[3, 1]], rtol=1e-4, atol=1e-5)


def whole_pass(model, module, ids, at):
    """All tokens of one row through all layers, with DELTA added to an output at a token."""
    before = []

    def add(_module, _args, out):
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        before.append(hidden[0, at].clone())
        hidden[:, at] += DELTA
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    hook = module.register_forward_hook(add)
    logits = model(ids[None]).logits[0]
    hook.remove()
    return before[0], logits


def test_blocks_compute_again_afterwards_bitwise(language_model, ids):
    model = language_model.model
    layers = blocks(model, find_architecture(model))
    rows = aligned(ids)
    with torch.no_grad():
        reference = model(ids).logits
        frozen = freeze(model, layers, 2, rows)
        one = Pass(frozen, [(layers[2], torch.ones(3, 32))], *READS)
        logits_with(model, layers, [one, one])
        read_states(model, {"input_ids": ids}, outputs_of={"out": layers[0]})
        assert torch.equal(model(ids).logits, reference)


def test_right_padding_changes_nothing_that_is_read(language_model, ids):
    model = language_model.model
    layers = blocks(model, find_architecture(model))
    padded = torch.cat((ids, torch.zeros(3, 4, dtype=torch.long)), dim=1)
    short = read_states(model, {"input_ids": ids}, outputs_of={"out": layers[3]})["out"]
    long = read_states(model, {"input_ids": padded}, outputs_of={"out": layers[3]})["out"]
    torch.testing.assert_close(long[:, :9], short, rtol=1e-4, atol=1e-5)


def tokens_seen(module, work) -> list[int]:
    """Run something; return how many tokens the module computed in each of its calls."""
    seen: list[int] = []
    hook = module.register_forward_hook(
        lambda _m, _args, out: seen.append(hidden_of(out).numel() // hidden_of(out).shape[-1])
    )
    try:
        with torch.no_grad():
            work()
    finally:
        hook.remove()
    return seen


def test_common_beginnings_are_computed_once(language_model, ids):
    model = language_model.model
    layers = blocks(model, find_architecture(model))
    rows = aligned(ids[:1].expand(3, 9))  # each begins as the longest does
    assert reads_forests(model)
    shared = tokens_seen(layers[0], lambda: freeze(model, layers, 1, rows))
    apart = Shortcuts(share_prefixes=False)
    other = aligned(ids)
    assert shared == [9]
    assert tokens_seen(layers[0], lambda: freeze(model, layers, 1, other, shortcuts=apart)) == [27]


def test_the_head_and_the_last_ffn_see_only_what_is_read(language_model, ids):
    model = language_model.model
    row = find_architecture(model)
    layers = blocks(model, row)
    ffn = feed_forward(layers[-1], row)
    one = Pass(freeze(model, layers, 1, aligned(ids)), [], *READS, None, ffn)

    def run():
        return logits_with(model, layers, [one, one])

    assert tokens_seen(ffn, run) == [5, 5]
    assert tokens_seen(model.get_output_embeddings(), run) == [10]  # once for both passes
