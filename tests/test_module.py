"""Editing small language models through the Trainer."""

from __future__ import annotations

import copy

import pytest
import torch

from blue_callbacks import ClosedFormUpdate, NonFiniteError, WeightId
from helpers import fit
from lightning_blue.editing.covariance import CovarianceSource
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.optimization import TargetOptimization
from lightning_blue.language_model.architectures import (
    Architecture,
    down_projection,
    find_architecture,
)
from lightning_blue.language_model.scoring import score_targets
from lightning_blue.support.errors import InputError
from test_architectures import REQUESTS as ENDING_AT_SUBJECT
from test_targets import PREFIXES, REQUESTS


def editable(language_model, **settings) -> EditModule:
    """A module on a copy of the model, with a covariance that needs no text."""
    model, tokenizer = copy.deepcopy(language_model.model), language_model.tokenizer
    search = TargetOptimization(steps=15, learning_rate=0.5, clamp=4.0)
    module = EditModule(model, tokenizer, target=search, contexts=PREFIXES, **settings)
    module.set_covariances({layer: torch.eye(96) * 0.01 for layer in range(4)})
    return module


def nll(module: EditModule) -> list[float]:
    prompts = [request.text for request in ENDING_AT_SUBJECT]
    targets = [request.target_new for request in ENDING_AT_SUBJECT]
    scores = score_targets(module.model, module.tokenizer, prompts, targets)
    return [score.nll for score in scores]


@pytest.mark.parametrize("plan", ["boundary", "even"])
def test_one_batch_makes_every_new_object_more_probable(language_model, plan):
    module = editable(language_model)
    before = nll(module)
    fit(module, ClosedFormUpdate([0, 1, 2], plan, 0.1), [ENDING_AT_SUBJECT])
    gains = [old - new for new, old in zip(nll(module), before, strict=True)]
    assert min(gains) > 0.1
    assert max(gains) > 1.0


def test_only_the_planned_weights_change(language_model):
    module = editable(language_model)
    before = copy.deepcopy(module.model.state_dict())
    fit(module, ClosedFormUpdate([0, 1, 2], "boundary", 0.1), [REQUESTS])
    after = module.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    row = find_architecture(module.model)
    assert changed == {f"{row.block.format(n)}.{row.down_projection}.weight" for n in (0, 2)}


def test_covariances_in_memory_are_taken_as_they_are(gpt2, tmp_path):
    module = editable(gpt2, covariance=CovarianceSource(str(tmp_path / "no such text")))
    given = torch.eye(96, dtype=torch.float64) * 0.5
    module.set_covariances({2: given})
    assert torch.equal(module.key_covariance(WeightId(2)).cpu(), given)
    assert "given in memory for layers 2" in module.key_covariances.about["covariance_trusted"]
    with pytest.raises(InputError, match=r"layer 1 is \(96, 96\), not \(32, 32\)"):
        module.set_covariances({1: torch.eye(32)})
    with pytest.raises(InputError, match=r"no layer 9|layers are"):
        module.set_covariances({9: torch.eye(96)})


def test_keys_weigh_the_bare_prompt_one_half(language_model):
    """Against single forward passes over whole prompts."""
    module = editable(language_model)
    keys = module.edit_keys(REQUESTS, WeightId(1))
    projection = down_projection(module.blocks[1], module.architecture)
    for column, request in enumerate(REQUESTS):
        seen = []
        for prefix in ["", *(f"{p} " for p in PREFIXES)]:
            text = prefix + request.text
            until = prefix + request.prompt.split("{}")[0] + request.subject
            at = len(module.tokenizer(until).input_ids) - 1
            ids = torch.tensor([module.tokenizer(text).input_ids])
            read = []
            hook = projection.register_forward_pre_hook(lambda _m, a, r=read: r.append(a[0]))
            with torch.no_grad():
                module.model(ids)
            hook.remove()
            seen.append(read[0].reshape(-1, 96)[at])
        expected = seen[0] / 2 + (seen[1] + seen[2]) / 4
        torch.testing.assert_close(keys[:, column], expected, rtol=1e-4, atol=1e-5)


def test_tokens_before_the_subject_are_untouched_by_the_target(language_model):
    """A delta at the lookup changes nothing the model says at earlier positions."""
    module = editable(language_model)
    before = {n: p.detach().clone() for n, p in module.model.named_parameters()}
    module.edit_targets(REQUESTS, 1)
    assert all(torch.equal(p, before[n]) for n, p in module.model.named_parameters())
    assert all(p.grad is None for p in module.model.parameters())


def test_non_finite_loss_names_the_request_and_writes_nothing(language_model):
    module = editable(language_model)
    with torch.no_grad():
        module.blocks[3].get_submodule(module.architecture.down_projection).weight.fill_(torch.inf)
    before = module.editable_weights.read(WeightId(0)).clone()
    with pytest.raises(NonFiniteError, match=r"request a .*Danielle Darrieux.*layer 0"):
        fit(module, ClosedFormUpdate([0, 1], "boundary", 0.1), [REQUESTS])
    assert torch.equal(module.editable_weights.read(WeightId(0)), before)


def test_contexts_are_written_by_the_model_and_do_not_change(gpt2):
    module = EditModule(*gpt2, context_tokens=6)
    templates = module.templates
    assert templates[0] == "{}"
    assert len(templates) == 6
    assert all(t.startswith(s) for t, s in zip(templates[1:], ("The", "Therefore"), strict=False))
    assert all(t.count("{}") == 1 and t.endswith(". {}") for t in templates[1:])
    assert EditModule(*gpt2, context_tokens=6).templates == templates


def test_unknown_architecture_says_how_to_add_one(gpt2):
    model = copy.deepcopy(gpt2.model)
    model.config.model_type = "novel"
    with pytest.raises(InputError, match=r"'novel' is not known(.|\n)*architecture.block"):
        find_architecture(model)
    named = Architecture("transformer.h.{}", "mlp.c_proj")
    assert find_architecture(model, named) is named
    with pytest.raises(InputError, match=r"no module 'transformer.h.0.ffn'"):
        find_architecture(model, Architecture("transformer.h.{}", "ffn"))


def test_layers_that_are_not_there_are_refused(gpt2):
    module = EditModule(*gpt2, contexts=[])
    with pytest.raises(InputError, match=r"no layer 7: its 4 layers are 0 to 3"):
        fit(module, ClosedFormUpdate([0, 7]), [REQUESTS])


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_the_model_is_left_as_it_was_found(language_model, ends):
    """Flags of parameters and modes of modules, mixed on purpose, but for the edited weight."""
    model = copy.deepcopy(language_model.model)
    model.train()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    for number, part in enumerate(model.modules()):
        part.training = number % 2 == 0
    flags = {name: each.requires_grad for name, each in model.named_parameters()}
    modes = {name: each.training for name, each in model.named_modules()}

    module = editable(language_model._replace(model=model))
    model = module.model  # a copy with the same flags
    for _ in range(2):  # a second run too finds it frozen, and leaves it
        assert len({*flags.values(), *modes.values()}) == 2
        seen = []
        target = module.edit_targets

        def watched(batch, layer, target=target, seen=seen):
            seen.append(any(part.training for part in model.modules()))
            seen.append(any(part.requires_grad for part in model.parameters()))
            if ends == "badly":
                raise NonFiniteError("as asked")
            return target(batch, layer)

        module.edit_targets = watched
        update = ClosedFormUpdate([0, 1], "boundary", past_keys=False)
        update.committed = module.edit_batches_held
        if ends == "badly":
            with pytest.raises(NonFiniteError):
                fit(module, update, [REQUESTS])
        else:
            fit(module, update, [REQUESTS])
        module.edit_targets = target
        assert seen
        assert not any(seen)
        assert {name: each.requires_grad for name, each in model.named_parameters()} == flags
        assert {name: each.training for name, each in model.named_modules()} == modes
