"""Options of the target search, each against a reference of its own."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import psutil
import pytest
import torch
from torch import Tensor

from blue_callbacks import ClosedFormUpdate
from conftest import LanguageModel
from helpers import fit
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing import targets
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.optimization import Predictions, TargetOptimization, optimize_targets
from lightning_blue.editing.targets import PASS_PRICE, Budget, micro_batches
from lightning_blue.language_model.states import hidden_of
from lightning_blue.support.errors import InputError
from lightning_blue.support.memory import available_memory
from test_targets import PREFIXES, REQUESTS, one_edit_at_a_time

SAME_SUBJECT = [
    EditRequest("a", "The mother tongue of {}", "Danielle Darrieux", "Rome"),
    EditRequest("b", "A twin city of {}", "Lyon", "Beirut"),
    EditRequest("c", "She plays the violin for {}", "Danielle Darrieux", "Oslo"),
]


def module_of(language_model: LanguageModel, **settings) -> EditModule:
    search = {"steps": 12, "learning_rate": 0.3, "clamp": 2.0, **settings}
    return EditModule(*language_model, target=TargetOptimization(**search), contexts=PREFIXES)


def steps_taken(module: EditModule, layer: int = 1) -> list[int]:
    return (~module.target_losses[layer][..., 0].isnan()).sum(1).tolist()


@pytest.mark.parametrize("site", ["block", "attention_and_ffn"])
def test_keep_norm_only_turns_the_state(language_model, site):
    plain, kept = (module_of(language_model, site=site, keep_norm=k) for k in (False, True))
    free, turned = plain.edit_targets(REQUESTS, 1), kept.edit_targets(REQUESTS, 1)
    cosine = torch.cosine_similarity(free, turned, dim=0)
    torch.testing.assert_close(cosine, torch.ones(3), rtol=0, atol=1e-5)
    for index, name in enumerate(["attention_output", "down_projection"]):
        if site == "block" and index:
            break
        part = "" if site == "block" else getattr(plain.architecture, name)
        norms = bare_norms(plain, plain.blocks[1].get_submodule(part))
        torch.testing.assert_close(kept.target_values[1][index].norm(dim=1), norms)
        assert (plain.target_values[1][index].norm(dim=1) / norms - 1).abs().max() > 0.03


def bare_norms(module: EditModule, part: torch.nn.Module) -> Tensor:
    """Norms of a part's outputs at the subject's last token, one prompt at a time."""
    norms = []
    for request in REQUESTS:
        until = request.prompt.split("{}")[0] + request.subject
        ids = torch.tensor([module.tokenizer(until).input_ids])
        hook = part.register_forward_hook(
            lambda _m, _a, out: norms.append(hidden_of(out)[0, -1].norm())
        )
        with torch.no_grad():
            module.model(ids)
        hook.remove()
    return torch.stack(norms)


def all_most_probable(module: EditModule, request: EditRequest, target: Tensor) -> bool:
    """Whether greedy choice says the object in every context, with the target in the state."""
    tokenizer, said = module.tokenizer, []
    object_ids = tokenizer(f" {request.target_new}", add_special_tokens=False).input_ids
    for prefix in ["", *(f"{p} " for p in PREFIXES)]:
        head = prefix + request.prompt.split("{}")[0] + request.subject
        at = len(tokenizer(head).input_ids) - 1
        prompt = tokenizer(prefix + request.text).input_ids
        bare = module.edit_outputs([request], 1)[:, 0]

        def add(_module, _args, out, at=at, bare=bare):
            hidden = hidden_of(out).clone()
            hidden[0, at] += target - bare
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        hook = module.blocks[1].register_forward_hook(add)
        with torch.no_grad():
            logits = module.model(torch.tensor([prompt + object_ids[:-1]])).logits[0]
        hook.remove()
        said.append(logits[len(prompt) - 1 :].argmax(-1).tolist() == object_ids)
    return all(said)


def test_most_probable_stops_once_the_object_would_be_said_everywhere(language_model):
    requests = SAME_SUBJECT[:2]
    settings = {"steps": 40, "learning_rate": 0.15, "clamp": 10.0, "stop_loss": 1e-9}
    long = module_of(language_model, **settings)
    short = module_of(language_model, early_stop="most_probable", **settings)
    long.edit_targets(requests, 1)
    targets = short.edit_targets(requests, 1)
    assert steps_taken(long) == [40, 40]
    for column, (request, taken) in enumerate(zip(requests, steps_taken(short), strict=True)):
        assert 1 < taken < 40
        assert all_most_probable(short, request, targets[:, column])
        earlier = module_of(language_model, **{**settings, "steps": taken - 1})
        before = earlier.edit_targets(requests, 1)[:, column]
        assert not all_most_probable(short, request, before)


@pytest.mark.parametrize(
    ("early_stop", "done"),
    [
        (None, [True, False, False, True]),
        ("most_probable", [True, True, False, True]),
        ("pmet", [True, True, False, True]),
    ],
)
def test_a_target_is_done_below_the_loss_or_where_its_object_would_be_said(early_stop, done):
    """Whichever comes first; at the first step nothing about the subject has moved."""
    nll = torch.tensor([0.01, 1.0, 1.0, 0.01])
    said = torch.tensor([False, True, False, True])

    def predict(edits: Tensor, delta: Tensor) -> Predictions:
        still = 0 * delta.sum((0, 2))
        return Predictions(nll[edits] + still, said[edits], torch.zeros(len(edits), 1))

    settings = TargetOptimization(steps=2, early_stop=early_stop)
    losses = optimize_targets(torch.ones(1, 4, 3), predict, settings).losses
    assert losses[:, 1, 0].isnan().tolist() == done


def test_same_subject_shares_one_target_and_the_mean_of_the_losses(language_model):
    alone = module_of(language_model)
    with pytest.warns(UserWarning, match=r"requests a, c of one batch are about 'Danielle Dar"):
        apart = alone.edit_targets(SAME_SUBJECT, 1)
    shared = module_of(language_model, merge_subjects=True)
    together = shared.edit_targets(SAME_SUBJECT, 1)
    assert torch.equal(together[:, 0], together[:, 2])
    assert not torch.isclose(apart[:, 0], apart[:, 2]).all()
    torch.testing.assert_close(together[:, 1], apart[:, 1], rtol=1e-4, atol=1e-4)
    first = alone.target_losses[1][:, 0, 0]
    mean = (first[0] + first[2]) / 2
    expected = torch.stack((mean, first[1], mean))
    torch.testing.assert_close(shared.target_losses[1][:, 0, 0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        shared.target_losses[1][0], shared.target_losses[1][2], equal_nan=True
    )


def test_other_subjects_are_not_warned_about(gpt2, recwarn):
    module_of(gpt2, steps=1).edit_targets(REQUESTS, 1)
    module_of(gpt2, steps=1, merge_subjects=True).edit_targets(SAME_SUBJECT, 1)
    assert not [w for w in recwarn if "one batch" in str(w.message)]


def test_a_shared_target_follows_the_mean_gradient():
    """Against a plain Adam loop on the mean of two quadratic losses."""
    torch.manual_seed(0)
    initial, goals = torch.randn(1, 3, 8), torch.randn(3, 8)

    def losses(delta: Tensor, goals: Tensor) -> Tensor:
        return (delta - goals).square().sum(-1)

    def read(edits: Tensor, delta: Tensor) -> Predictions:
        never = torch.zeros(len(edits), dtype=torch.bool)
        return Predictions(losses(delta[0], goals[edits]), never, torch.zeros(len(edits), 1))

    search = TargetOptimization(steps=20, learning_rate=0.1, weight_decay=0.0, clamp=100.0)
    found = optimize_targets(initial, read, search, torch.tensor([0, 1, 0])).values[0]
    for edits in ([0, 2], [1]):
        delta = torch.zeros(8, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=0.1)
        for _ in range(19):
            adam.zero_grad()
            losses(delta, goals[edits]).mean().backward()
            adam.step()
        expected = initial[0, edits].mean(0) + delta.detach()
        torch.testing.assert_close(found[edits], expected.expand(len(edits), -1))


def test_loss_layer_reads_a_block_through_the_final_norm_and_head(language_model):
    """Against a model that ends with this block."""
    module = module_of(language_model, loss_layer=2, kl_weight=0.0, steps=6)
    targets = module.edit_targets(REQUESTS, 1)
    model = copy.deepcopy(language_model.model)
    decoder = model.base_model
    name = "h" if hasattr(decoder, "h") else "layers"
    setattr(decoder, name, getattr(decoder, name)[:3])
    decoder.config.num_hidden_layers = 3
    ending = LanguageModel(model, language_model.tokenizer)
    for column, request in enumerate(REQUESTS):
        reference, losses = one_edit_at_a_time(ending, request, 1, module.target)
        ours = module.target_losses[1][column, :, 0]
        torch.testing.assert_close(ours, torch.tensor(losses), rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(targets[:, column], reference, rtol=2e-3, atol=2e-3)
    whole = module_of(language_model, kl_weight=0.0, steps=6)
    whole.edit_targets(REQUESTS, 1)
    assert (whole.target_losses[1][:, 0, 0] - module.target_losses[1][:, 0, 0]).abs().min() > 0.01


def test_loss_layer_leaves_the_kl_term_to_the_whole_model(language_model):
    """With the delta of the last step, against whole passes over the subject alone."""
    module = module_of(language_model, loss_layer=2, steps=3, kl_weight=1.0)
    delta = module.edit_targets(REQUESTS, 1) - module.edit_outputs(REQUESTS, 1)
    for column, request in enumerate(REQUESTS):
        ids = torch.tensor([module.tokenizer(request.subject).input_ids])
        with torch.no_grad():
            before = module.model(ids).logits[0, -1].log_softmax(-1)
            hook = module.blocks[1].register_forward_hook(partial(add_last, delta[:, column]))
            now = module.model(ids).logits[0, -1].log_softmax(-1)
            hook.remove()
        expected = (now.exp() * (now - before)).sum()
        ours = module.target_losses[1][column, 2, 2]
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
        assert expected > 1e-3


def add_last(delta, _module, _args, out):
    """A hook that adds delta at the last token."""
    hidden = hidden_of(out).clone()
    hidden[0, -1] += delta
    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def test_loss_layer_below_the_target_layer_is_refused(gpt2):
    module = module_of(gpt2, loss_layer=1, steps=1)
    module.edit_targets(REQUESTS, 1)
    with pytest.raises(InputError, match=r"loss_layer 1 lies below the target layer 2"):
        module.edit_targets(REQUESTS, 2)


@pytest.mark.parametrize(
    ("loss_layer", "said"),
    [(4, "no layer 4: its 4 layers are 0 to 3"), (1, "1 lies below the target layer 2")],
)
def test_a_loss_layer_that_cannot_be_is_refused_before_any_work(
    gpt2, monkeypatch, loss_layer, said
):
    module = module_of(gpt2, loss_layer=loss_layer, steps=1)
    monkeypatch.setattr(module, "prepare", None)  # collects the covariance
    with pytest.raises(InputError, match=said):
        fit(module, ClosedFormUpdate([0, 1, 2], "boundary", 1.0), [REQUESTS])


def splits(order: Sequence[int]) -> Iterator[list[list[int]]]:
    """Every way to cut a sequence into parts."""
    inner = range(1, len(order))
    for n in range(len(order)):
        for cuts in itertools.combinations(inner, n):
            ends = [0, *cuts, len(order)]
            yield [list(order[a:b]) for a, b in itertools.pairwise(ends)]


def padded(group: Sequence[int], lengths: Sequence[int], rows: Sequence[int]) -> int:
    return max(lengths[i] for i in group) * sum(rows[i] for i in group)


def price(groups: list[list[int]], lengths: Sequence[int], rows: Sequence[int]) -> int:
    return sum(padded(group, lengths, rows) + PASS_PRICE for group in groups)


@pytest.mark.parametrize(
    ("lengths", "rows", "budget", "expected"),
    [
        ([7], [6], 1, [[0]]),  # larger than the budget, alone
        ([5, 5, 5], [6, 6, 6], 1000, [[0, 1, 2]]),
        ([5, 5, 5], [6, 6, 6], 60, [[0], [1, 2]]),  # two fit
        ([90, 5, 5], [6, 6, 6], 10_000, [[1, 2], [0]]),  # padding costs more than a pass
        ([6, 5, 5], [6, 6, 6], 10_000, [[1, 2, 0]]),  # and here less
    ],
)
def test_micro_batches_by_hand(lengths, rows, budget, expected):
    found = micro_batches(lengths, rows, Budget(budget))
    assert price(found, lengths, rows) == price(expected, lengths, rows)
    assert sorted(map(len, found)) == sorted(map(len, expected))


@pytest.mark.parametrize("seed", range(8))
def test_micro_batches_are_the_cheapest_split_within_the_budget(seed):
    """Against every way to cut the items in the order of their lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (7,), generator=generator).tolist()
    rows = torch.randint(1, 12, (7,), generator=generator).tolist()
    for budget in (50, 300, 1000, 10_000):
        found = micro_batches(lengths, rows, Budget(budget))
        assert sorted(itertools.chain(*found)) == list(range(7))
        assert all(len(g) == 1 or padded(g, lengths, rows) <= budget for g in found)
        order = sorted(range(7), key=lambda i: lengths[i])
        allowed = (
            groups
            for groups in splits(order)
            if all(len(g) == 1 or padded(g, lengths, rows) <= budget for g in groups)
        )
        cheapest = min(price(groups, lengths, rows) for groups in allowed)
        assert price(found, lengths, rows) == cheapest


def test_tokens_per_batch_bounds_what_one_pass_holds(gpt2):
    """Columns from the lookup on times rows, as the model sees them."""
    largest = {}
    for budget in (30, 10_000):
        module, seen = module_of(gpt2, steps=2, tokens_per_batch=budget), []
        hook = module.blocks[2].register_forward_pre_hook(
            lambda _m, args, s=seen: (
                s.append(args[0][..., 0].numel()) if torch.is_grad_enabled() else None
            )
        )
        module.edit_targets(REQUESTS[::2], 1)
        hook.remove()
        largest[budget] = max(seen)
    assert largest[30] <= 30 < largest[10_000]


@pytest.mark.parametrize("seed", range(4))
def test_prefixes_take_from_the_memory_of_a_micro_batch(seed):
    """Against every way to cut the items in the order of their lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths, rows = (torch.randint(1, 20, (6,), generator=generator).tolist() for _ in range(2))
    prefixes = torch.randint(0, 400, (6,), generator=generator).tolist()

    def taken(group: Sequence[int], price: float) -> float:
        columns = max(lengths[i] for i in group) + price * max(prefixes[i] for i in group)
        return columns * sum(rows[i] for i in group)

    for budget in (Budget(10_000, 900, 0.1), Budget(200, 900, 0.1), Budget(10_000, 2000, 0.5)):
        found = micro_batches(lengths, rows, budget, prefixes)
        order = sorted(range(6), key=lambda i: lengths[i])
        fitting = [
            groups
            for groups in splits(order)
            if all(
                len(g) == 1
                or (
                    padded(g, lengths, rows) <= budget.tokens
                    and taken(g, budget.prefix_price) <= budget.memory
                )
                for g in groups
            )
        ]
        assert found in fitting
        cheapest = min(price(groups, lengths, rows) for groups in fitting)
        assert price(found, lengths, rows) == cheapest


def test_the_budget_follows_what_is_available(gpt2, monkeypatch):
    """GPT-2's layers from 1 on, counted by hand, in float32 and with as much again to spare."""
    finder = module_of(gpt2).target_finder
    d_model, d_in, n_blocks, vocabulary = 32, 96, 4, len(gpt2.tokenizer)
    computed = (n_blocks - 1) * (16 * d_model + 4 * d_in) + 4 * vocabulary
    for tokens, expected in ((100, 512), (3000, 3000), (10**6, 8192)):
        available = tokens * 2 * 4 * computed
        monkeypatch.setattr(targets, "available_memory", lambda _device, n=available: n)
        budget = finder._budget(1)
        assert budget.tokens == expected
        assert budget.memory == max(512, tokens)
        assert budget.prefix_price == 2 * d_model * (2 * n_blocks - 1) / computed


def test_a_processor_gives_what_is_available_not_what_is_free(monkeypatch):
    found = psutil.virtual_memory()._replace(free=1, available=8 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)
    monkeypatch.delattr("os.sysconf", raising=False)  # macOS has no SC_AVPHYS_PAGES, Windows none
    assert available_memory(torch.device("cpu")) == 8 * 2**30
    monkeypatch.setattr("lightning_blue.support.memory.n_processes", lambda: 4)
    assert available_memory(torch.device("cpu")) == 2 * 2**30
