"""Target optimisation of many edits together against a plain loop over single edits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.fast.predictor import FastPredictor
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.optimization import TargetOptimization, kl_divergence
from lightning_blue.editing.prompts import edit_prompts

REQUESTS = [
    EditRequest("a", "The mother tongue of {} is", "Danielle Darrieux", "English"),
    EditRequest("b", "{} is a twin city of", "Lyon", "São Paulo in Kraków"),
    EditRequest("c", "In 1998 the committee praised {}", "Apple A5", "Rome"),
]
PREFIXES = ["She plays.", "The river runs through the town."]


def one_edit_at_a_time(language_model, request, layer, search):
    """Straight-line MEMIT for one request: the whole model, every token, one prompt at a time."""
    model, tokenizer = language_model
    target = tokenizer(f" {request.target_new}", add_special_tokens=False).input_ids
    block = model.get_submodule(
        f"transformer.h.{layer}" if hasattr(model, "transformer") else f"model.layers.{layer}"
    )

    def upto(text):
        return len(tokenizer(text).input_ids) - 1

    prompts = []
    for prefix in ["", *(f"{p} " for p in PREFIXES)]:
        head = prefix + request.prompt.split("{}")[0] + request.subject
        whole = prefix + request.prompt.replace("{}", request.subject)
        prompts.append((tokenizer(whole).input_ids, upto(head)))
    kl_ids, kl_at = tokenizer(f"{request.subject} is a").input_ids, upto(request.subject)
    delta = torch.zeros(model.config.hidden_size, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=search.learning_rate)
    initial = kl_before = None
    losses = []

    def forward(ids, at):
        nonlocal initial

        def add(_module, _args, out):
            nonlocal initial
            hidden = out[0] if isinstance(out, tuple) else out
            if initial is None:
                initial = hidden[0, at].detach().clone()
            hidden = hidden.clone()
            hidden[0, at] += delta
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        hook = block.register_forward_hook(add)
        logits = model(torch.tensor([ids])).logits[0]
        hook.remove()
        return F.log_softmax(logits, dim=-1)

    for step in range(search.steps):
        nll = 0.0
        for ids, at in prompts:
            log_probs = forward(ids + target[:-1], at)
            first = len(ids) - 1
            each = [-log_probs[first + i, token] for i, token in enumerate(target)]
            nll = nll + sum(each) / len(each) / len(prompts)
        kl_now = forward(kl_ids, kl_at)[kl_at]
        kl_before = kl_now.detach() if kl_before is None else kl_before
        kl = search.kl_weight * F.kl_div(kl_before, kl_now, log_target=True, reduction="sum")
        decay = search.weight_decay * delta.norm() / initial.norm() ** 2
        loss = nll + kl + decay
        losses.append(float(loss))
        if loss < search.stop_loss or step == search.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            limit = search.clamp * initial.norm()
            if delta.norm() > limit:
                delta *= limit / delta.norm()
    return initial + delta.detach(), losses


@pytest.mark.parametrize("stop_loss", [0.05, 3.0])
def test_all_edits_together_equal_one_at_a_time(language_model, stop_loss):
    search = TargetOptimization(steps=12, learning_rate=0.3, stop_loss=stop_loss, clamp=2.0)
    module = EditModule(*language_model, target=search, contexts=PREFIXES)
    targets = module.edit_targets(REQUESTS, layer=1)
    lengths = []
    for column, request in enumerate(REQUESTS):
        reference, losses = one_edit_at_a_time(language_model, request, 1, search)
        ours = module.target_losses[1][column, :, 0]
        assert int((~ours.isnan()).sum()) == len(losses)
        torch.testing.assert_close(ours[: len(losses)], torch.tensor(losses), rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(targets[:, column], reference, rtol=2e-3, atol=2e-3)
        lengths.append(len(losses))
    if stop_loss == 3.0:
        assert min(lengths) < 12, "some edit should have stopped early"


def test_micro_batches_change_nothing(language_model):
    one, many = (
        EditModule(
            *language_model,
            target=TargetOptimization(steps=5, tokens_per_batch=tokens),
            contexts=PREFIXES,
        ).edit_targets(REQUESTS, layer=1)
        for tokens in (1, 10_000)
    )
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-4)


def test_a_predictor_that_is_asked_for_first_finds_out_whether_parts_may_be_run(gpt2):
    module = EditModule(*gpt2, contexts=PREFIXES)
    prompts = edit_prompts(module.tokenizer, REQUESTS, module.templates)
    predictor = module.target_finder.predictor(prompts, 1)
    assert module.target_finder.runs_in_parts
    assert isinstance(predictor, FastPredictor)


def test_delta_stays_in_its_ball(gpt2):
    module = EditModule(
        *gpt2, target=TargetOptimization(steps=10, learning_rate=5.0, clamp=0.3), contexts=[]
    )
    initial = module.edit_outputs(REQUESTS, 1)
    delta = module.edit_targets(REQUESTS, 1) - initial
    ratio = delta.norm(dim=0) / initial.norm(dim=0)
    torch.testing.assert_close(ratio, torch.full((3,), 0.3), rtol=1e-4, atol=0)


def test_kl_is_of_now_against_before():
    now = torch.log(torch.tensor([[0.5, 0.5]]))
    before = torch.log(torch.tensor([[0.25, 0.75]]))
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))
    torch.testing.assert_close(kl_divergence(now, before), expected[None])


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"steps is"):
        TargetOptimization(steps=0)
