"""Random models of many architectures, edited and run in parts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from blue_callbacks import ClosedFormUpdate, WeightId
from blue_callbacks.closed_form import KeyMemory
from helpers import fit
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.fast.frozen import ALL_SHORTCUTS, NO_SHORTCUTS, Shortcuts, freeze
from lightning_blue.editing.fast.passes import Pass, logits_with
from lightning_blue.editing.fast.plain import PlainPredictor
from lightning_blue.editing.fast.predictor import FastPredictor, can_run_in_parts
from lightning_blue.editing.fast.rows import AlignedRows
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.optimization import TargetOptimization
from lightning_blue.editing.prompts import EditPrompts, context_templates, edit_prompts
from lightning_blue.language_model.architectures import (
    Architecture,
    blocks,
    down_projection,
    feed_forward,
    find_architecture,
    site_modules,
    weight_view,
)
from lightning_blue.language_model.scoring import score_targets
from lightning_blue.support.errors import InputError
from random_models import random_model, tokenizer
from test_targets import PREFIXES

REQUESTS = [  # said at the subject itself: random attention carries little from there
    EditRequest("a", "The mother tongue of {}", "Danielle Darrieux", "French"),
    EditRequest("b", "A twin city of {}", "Lyon", "Beirut"),
    EditRequest("c", "In 1998 the committee praised {}", "Apple A5", "Rome"),
]
PARTS = [  # those that differ in what running only parts of them meets
    "gpt2",
    "gptj",
    "gpt_neox",
    "opt",
    "opt, norms behind",
    "bloom",
    "falcon",
    "mpt",
    "llama",
    "llama, tied head",
    "mistral",
    "mistral, short window",
    "qwen2",
    "qwen3",
    "phi",
    "phi3",
    "gemma2",
    "gemma3_text",
    "cohere",
    "granite",
    "gemma3 that sees",
    "qwen2_5_vl_text",
]


class Case(NamedTuple):
    """A random model, never to be changed, its tokenizer and its row."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    row: Architecture

    @property
    def site(self) -> str:
        bent = ("gemma2", "gemma3", "gemma3_text")
        behind = not getattr(self.model.config, "do_layer_norm_before", True)
        return "ffn" if behind or self.model.config.model_type in bent else "block"

    @property
    def d_in(self) -> int:
        return weight_view(down_projection(self.layers[0], self.row)).shape[1]

    @property
    def layers(self) -> list[torch.nn.Module]:
        return blocks(self.model, self.row)

    def module(self, **settings: Any) -> EditModule:
        """A module on a copy of the model, with a covariance that needs no text."""
        model = copy.deepcopy(self.model)
        search = {"steps": 10, "learning_rate": 0.5, "clamp": 4.0, "site": self.site}
        target = TargetOptimization(**{**search, **settings.pop("target", {})})
        settings = {"contexts": PREFIXES, **settings}
        module = EditModule(model, self.tokenizer, target=target, **settings)
        module.set_covariances({n: torch.eye(self.d_in) * 0.01 for n in range(3)})
        return module


@pytest.fixture(scope="module", params=PARTS)
def case(request: pytest.FixtureRequest) -> Case:
    model = random_model(request.param)
    bos = model.config.model_type not in ("gpt2", "gptj", "phi")
    return Case(model, tokenizer(bos), find_architecture(model))


def nll(module: EditModule) -> list[float]:
    prompts = [request.text for request in REQUESTS]
    targets = [request.target_new for request in REQUESTS]
    return [s.nll for s in score_targets(module.model, module.tokenizer, prompts, targets)]


def test_an_edit_batch_raises_every_new_object_and_solves_its_normal_equations(case, monkeypatch):
    """Eq. 5 at each written layer: ``Delta (lambda C0 + K K^T) = R K^T``."""
    seen = []
    real = KeyMemory.update

    def update(memory, residual, keys):
        seen.append((residual.double(), keys.double()))
        return real(memory, residual, keys)

    monkeypatch.setattr(KeyMemory, "update", update)
    module = case.module()
    before, weights = (
        nll(module),
        {n: module.editable_weights.read(WeightId(n)).double() for n in (0, 1, 2)},
    )
    fit(module, ClosedFormUpdate([0, 1, 2], "boundary", 0.1), [REQUESTS])
    gains = [old - new for old, new in zip(before, nll(module), strict=True)]
    assert min(gains) > 2.0
    assert torch.equal(module.editable_weights.read(WeightId(1)).double(), weights[1])
    for layer, (residual, keys) in zip((0, 2), seen, strict=True):
        delta = module.editable_weights.read(WeightId(layer)).double() - weights[layer]
        system = 0.1 * 0.01 * torch.eye(case.d_in).double() + keys @ keys.T
        wanted = residual @ keys.T
        assert (delta @ system - wanted).norm() < 1e-3 * wanted.norm()


IDS = torch.randint(3, 480, (3, 9), generator=torch.Generator().manual_seed(0))
STARTS = (0, 2, 3)  # columns of padding on the left
LENGTHS = (9, 7, 5)  # the last row is padded on the right too
READS = (torch.tensor([0, 0, 1, 2, 2]), torch.tensor([5, 8, 5, 6, 7]))  # rows and columns


DELTA = torch.linspace(-1, 1, 96).view(3, 32).roll(7, 1)  # no norm takes it away


def aligned() -> AlignedRows:
    ids = torch.zeros_like(IDS)
    for row, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        ids[row, start : start + length] = IDS[row, :length]
    ends = torch.tensor(STARTS) + torch.tensor(LENGTHS)
    return AlignedRows(ids, torch.tensor(STARTS), ends, 5)


def own_call(model: PreTrainedModel, sites: list[torch.nn.Module], row: int):
    """The model's own call on one row without padding, with its delta at the sites' outputs."""

    def add(_module, _args, out):
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        hidden.view(LENGTHS[row], -1)[5 - STARTS[row]] += DELTA[row]
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    hooks = [site.register_forward_hook(add) for site in sites]
    logits = model(IDS[row : row + 1, : LENGTHS[row]]).logits[0]
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("site", ["block", "ffn", "attention_and_ffn"])
@torch.no_grad()
def test_partial_passes_equal_whole_ones(case, site):
    """With all shortcuts, with none, and by the model's own call; rows padded on either side."""
    for layer, block in enumerate(case.layers):
        sites = site_modules(site, block, case.row)
        found = []
        for shortcuts in (ALL_SHORTCUTS, NO_SHORTCUTS):
            start = layer if site == "block" else layer - 1
            frozen = freeze(case.model, case.layers, start, aligned(), sites, shortcuts)
            added = [(module, DELTA) for module in sites]
            ffn = feed_forward(case.layers[-1], case.row)
            passes = [Pass(frozen, added, *READS, None, ffn), Pass(frozen, [], *READS)]
            found.append(torch.cat(logits_with(case.model, case.layers, passes, shortcuts)))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
        whole = [own_call(case.model, sites, row) for row in range(3)]
        expected = [whole[i][at - STARTS[i]] for i, at in zip(*READS, strict=True)]
        torch.testing.assert_close(found[0][:5], torch.stack(expected), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_columns_before_the_lookup_are_untouched(case):
    """In every layer, bitwise; and the column itself and those after it are not."""
    head = case.model.get_output_embeddings()
    rows, at = aligned(), 5
    for layer, block in enumerate(case.layers):
        sites = site_modules(case.site, block, case.row)
        frozen = freeze(case.model, case.layers, -1, rows, shortcuts=NO_SHORTCUTS)
        seen: list[list[torch.Tensor]] = []
        for added in ([], [(module, DELTA) for module in sites]):
            states: list[torch.Tensor] = []
            hooks = [
                module.register_forward_pre_hook(
                    lambda _m, args, kwargs, s=states: s.append(
                        args[0] if args else kwargs["hidden_states"]
                    ),
                    with_kwargs=True,
                )
                for module in (*case.layers[layer + 1 :], head)
            ]
            logits_with(case.model, case.layers, [Pass(frozen, added, *READS)], NO_SHORTCUTS)
            for hook in hooks:
                hook.remove()
            seen.append(states)
        assert len(seen[0]) == len(case.layers) - layer
        for depth, (old, new) in enumerate(zip(*seen, strict=True)):
            for row, start in enumerate(STARTS):
                assert torch.equal(old[row, start:at], new[row, start:at])
                assert not torch.allclose(old[row, at], new[row, at])
                spread = not torch.equal(old[row, at + 1], new[row, at + 1])
                assert spread == (depth > 0)  # by the attention of blocks in between


def leftovers(model: PreTrainedModel) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    ]


@torch.no_grad()
def test_the_unedited_pass_is_bitwise_as_before(case):
    module = case.module(target={"steps": 2})
    whole = module.model(IDS).logits
    left = leftovers(module.model)
    for layer in (0, 1, 2):
        module.edit_targets(REQUESTS, layer)
        module.edit_keys(REQUESTS, WeightId(layer))
        module.edit_outputs(REQUESTS, layer)
    assert torch.equal(module.model(IDS).logits, whole)
    assert leftovers(module.model) == left


STABLELM = Architecture("model.layers.{}", "mlp.down_proj")


def test_modules_named_by_the_user_make_an_unknown_architecture_editable():
    model = random_model("stablelm")
    with pytest.raises(InputError, match=r"'stablelm' is not known"):
        find_architecture(model)
    module = Case(model, tokenizer(bos=True), STABLELM).module(architecture=STABLELM)
    before = nll(module)
    fit(module, ClosedFormUpdate([0, 2], "boundary", 0.1), [REQUESTS])
    assert all(new < old - 0.1 for old, new in zip(before, nll(module), strict=True))
    with pytest.raises(InputError, match=r"attention's output projection"):
        EditModule(
            model,
            tokenizer(bos=True),
            target=TargetOptimization(site="attention_and_ffn"),
            architecture=STABLELM,
        )


class Counting(GPT2Block):
    """A block that depends on how many columns it is given."""

    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states * (1 + 0.1 * hidden_states.shape[1]), *args, **kwargs)


class Whole(GPT2Block):
    """A block that no cache may be given to."""

    def forward(self, hidden_states, past_key_values=None, *args, **kwargs):
        if past_key_values is not None:
            raise NotImplementedError("no cache")
        return super().forward(hidden_states, None, *args, **kwargs)


@pytest.fixture
def foreign() -> PreTrainedModel:
    return random_model("gpt2")


def fast_predictor(
    model: PreTrainedModel, prompts: Sequence[EditPrompts], shortcuts: Shortcuts = ALL_SHORTCUTS
) -> FastPredictor:
    layers = blocks(model, find_architecture(model))
    return FastPredictor(model, layers, 0, [layers[0]], prompts, shortcuts=shortcuts)


def plain_predictor(model: PreTrainedModel, prompts: Sequence[EditPrompts]) -> PlainPredictor:
    layers = blocks(model, find_architecture(model))
    return PlainPredictor(model, layers, [layers[0]], prompts)


@pytest.fixture
def prompts() -> list[EditPrompts]:
    return edit_prompts(tokenizer(False), REQUESTS, context_templates(PREFIXES))


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Counting, r"change its logits by [1-9]"), (Whole, r"fails \(NotImplementedError: no cache")],
)
def test_a_model_that_cannot_be_run_in_parts_is_found_out(foreign, prompts, kind, message):
    foreign.transformer.h[1].__class__ = kind
    fast = partial(fast_predictor, foreign, prompts[:1])
    with pytest.warns(UserWarning, match=message):
        assert not can_run_in_parts(fast, plain_predictor(foreign, prompts[:1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_warned_of_where_the_logits_stay_the_same(foreign, prompts, dtype, recwarn):
    model = foreign.to(dtype)
    fast = partial(fast_predictor, model, prompts[:1])
    assert can_run_in_parts(fast, plain_predictor(model, prompts[:1]))
    assert not recwarn


def test_mixed_precision_is_no_reason_to_run_whole_prompts(foreign, prompts, recwarn):
    """bfloat16 rounds the two ways of running apart by more than structure is judged by."""
    fast = partial(fast_predictor, foreign, prompts[:1])
    plain = plain_predictor(foreign, prompts[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert can_run_in_parts(fast, plain)
        assert torch.is_autocast_enabled("cpu")
    assert not recwarn


def test_the_plain_predictor_adds_delta_in_the_model_s_own_pass(foreign, prompts):
    """Against the embedding: what is added behind block 0 at a token, written out."""
    delta = torch.linspace(-1, 1, 32)
    plain = plain_predictor(foreign, prompts)
    row, block = prompts[1].rewriting[-1], foreign.transformer.h[0]
    real = block.forward

    def forward(hidden_states, *args, **kwargs):
        output = real(hidden_states, *args, **kwargs)
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, row.lookup] += delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with torch.no_grad():
        found = plain.target_logits(row, prompts[1], delta[None])
        block.forward = forward
        logits = foreign(torch.tensor([row.ids])).logits[0]
        del block.forward
    torch.testing.assert_close(found, logits[-len(prompts[1].target) :])


@pytest.mark.parametrize("shortcuts", [ALL_SHORTCUTS, NO_SHORTCUTS])
def test_fast_predictions_are_the_plain_ones(foreign, prompts, shortcuts):
    """All edits first, then two of them, with a delta each."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(1, len(prompts), 32, generator=generator)
    fast, plain = fast_predictor(foreign, prompts, shortcuts), plain_predictor(foreign, prompts)
    torch.testing.assert_close(fast.initial, plain.initial)
    with torch.no_grad():
        for edits in (torch.arange(len(prompts)), torch.tensor([0, 2])):
            ours, reference = (p(edits, delta[:, edits]) for p in (fast, plain))
            torch.testing.assert_close(ours.nll, reference.nll, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours.subject, reference.subject, rtol=1e-4, atol=1e-4)
            assert torch.equal(ours.most_probable, reference.most_probable)


def test_a_forward_that_was_put_on_a_block_stays_there(foreign, prompts):
    """As accelerate's, for models spread over devices."""
    block = foreign.transformer.h[0]
    real, calls = block.forward, []

    def forward(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    block.forward = forward
    fast = fast_predictor(foreign, prompts)
    assert calls  # when the prompts were frozen
    calls.clear()
    fast.logits(torch.zeros(1, 3, 32))
    assert block.forward is forward
    assert not calls


def test_the_module_finds_out_once_and_still_edits(foreign):
    foreign.transformer.h[1].__class__ = Whole
    module = Case(foreign, tokenizer(False), find_architecture(foreign)).module()
    before = nll(module)
    with pytest.warns(UserWarning, match="running only parts") as said:
        fit(module, ClosedFormUpdate([0, 2], "boundary", 0.1), [REQUESTS, REQUESTS])
    assert len([w for w in said if "running only parts" in str(w.message)]) == 1
    assert not module.target_finder.runs_in_parts
    assert all(new < old - 2 for old, new in zip(before, nll(module), strict=True))
