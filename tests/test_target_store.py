"""Targets that runs share: what is read is to the bit what would have been computed."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from blue_callbacks import WeightId
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing import EditModule, TargetOptimization
from lightning_blue.editing.covariance import CovarianceSource
from lightning_blue.editing.optimization import Targets
from lightning_blue.editing.target_store import TargetFile, TargetStore
from lightning_blue.editing.targets import TargetFinder
from lightning_blue.metrics.history import READ
from lightning_blue.reporting.files import summary
from lightning_blue.reporting.report import report
from lightning_blue.reporting.views import seconds_per_edit
from runs_made import REQUESTS, small_module
from test_lightning import corpus, data_of, facts, trainer_of, weights  # noqa: F401  (fixtures)
from test_resume import measured, update

LIMIT = 60.0  # seconds that another thread may take on a busy machine
TARGET = TargetOptimization(steps=6, clamp=4.0)


@pytest.fixture
def optimised(monkeypatch) -> list[int]:
    """The layers whose targets are optimised, as it happens."""
    layers: list[int] = []
    find = TargetFinder.find

    def watched(self, prompts, groups, layer):
        layers.append(layer)
        return find(self, prompts, groups, layer)

    monkeypatch.setattr(TargetFinder, "find", watched)
    return layers


@pytest.fixture
def build(gpt2, corpus, tmp_path) -> Callable[..., EditModule]:  # noqa: F811
    """Make a module of the small model, with a store unless told otherwise."""

    def module(cache_targets: bool = True, **changes: Any) -> EditModule:
        source = CovarianceSource(str(corpus), tokens_per_dim=20, cache=str(tmp_path / "stats"))
        settings = {"target": TARGET, "contexts": ["She plays."], "covariance": source}
        given = {**settings, "cache_targets": cache_targets, **changes}
        return EditModule(copy.deepcopy(gpt2.model), gpt2.tokenizer, **given)

    return module


@pytest.fixture
def edit(build, facts, optimised):  # noqa: F811
    """Edit three batches of two; return the Trainer, the module, and what was optimised for it."""

    def run(cache_targets: bool = True, module: EditModule | None = None, **settings: Any):
        optimised.clear()
        module = module or build(cache_targets)
        trainer = trainer_of(update=update(**settings))
        trainer.fit(module, datamodule=data_of(facts))
        return trainer, module, [*optimised]

    return run


@pytest.mark.parametrize(
    ("settings", "computed"),
    [
        ({"plan": "even"}, [2] * 3),  # one target layer in each of three batches
        ({"plan": "boundary"}, [0, 2] * 3),
        ({"plan": "boundary", "rect_keep": 0.4, "past_keys": False}, [0, 2] * 3),
    ],
)
def test_a_run_that_reads_ends_as_one_that_computes(edit, settings, computed):
    """Weights, losses, norms, curves and scores; computed by no store, a new one, a full one."""
    alone, plain, all_of_them = edit(cache_targets=False, **settings)
    first, writing, by_the_first = edit(**settings)
    second, reading, by_the_second = edit(**settings)
    assert all_of_them == by_the_first == computed
    assert by_the_second == computed[len(computed) // 3 :]  # of the later batches alone
    for trainer, module in ((first, writing), (second, reading)):
        for ours, theirs in zip(weights(module), weights(plain), strict=True):
            assert torch.equal(ours, theirs)
        assert measured(trainer) == measured(alone)
        for layer, values in plain.target_values.items():
            assert torch.equal(module.target_values[layer], values)


def test_what_methods_and_plans_have_in_common(edit):
    """All of the first batch where weights are the same until then, else its first layer."""
    later = [0, 2] * 2
    assert edit(plan="boundary")[2] == [0, 2, *later]
    cut_at_the_end = {"past_keys": False, "rect_keep": 0.4}
    assert edit(plan="boundary", **cut_at_the_end)[2] == later
    null_space = {"solver": "null_space", "energy": 0.3}
    assert edit(plan="boundary", **null_space)[2] == [2, *later]  # layer 0 was written otherwise
    assert edit(plan="even")[2] == [2, 2, 2]  # its only target layer, on unedited weights
    assert edit(plan="even", **null_space)[2] == [2, 2]
    assert edit(plan="last")[2] == [2, 2]


def test_what_was_read_is_told_and_is_not_in_the_seconds_per_edit(edit, caplog, tmp_path):
    caplog.set_level("INFO")
    computed = edit(plan="boundary")[0].callbacks[1].history
    assert computed.targets_read == {}
    assert READ not in computed.seconds
    assert "edits/targets_read" not in summary(computed)
    assert seconds_per_edit(computed) == computed.seconds["editing"] / 6
    caplog.clear()
    history = edit(plan="boundary")[0].callbacks[1].history
    assert history.targets_read == {0: [0, 2]}
    assert caplog.text.count("targets of batch 0, layer") == 2
    assert str(tmp_path / "stats" / "targets-layer0-") in caplog.text
    numbers = summary(history)
    assert numbers["edits/targets_read"] == 2
    assert 0 < history.seconds[READ] < history.seconds["editing"]
    later = history.seconds["editing"] - history.seconds[READ]
    assert numbers["seconds/edit"] == later / 4
    said = " ".join(report(history, [], None).split())
    assert "Targets of batch 0, layer 0, 2, were read from the cache" in said
    assert "The seconds per edit leave out the batch's 2 edits" in said
    again = copy.deepcopy(computed)
    again.load_state_dict(history.state_dict())  # as a run that is resumed
    assert again.targets_read == history.targets_read


def test_where_all_targets_were_read_no_edit_was_timed(edit):
    history = edit(plan="even")[0].callbacks[1].history
    history.targets_read = {number: [2] for number in history.batches}
    history.seconds[READ] = history.seconds["editing"]
    assert seconds_per_edit(history) is None
    assert "seconds/edit" not in summary(history)


# What the targets of a batch depend on


def key(module: EditModule, batch: list[EditRequest] = REQUESTS[:2], layer: int = 1) -> str:
    """The name of the file that the targets of a batch are kept in."""
    before = set(module.target_store.folder.glob("targets-*"))
    weight = WeightId(1)
    module.note_unedited([weight])
    module._edited = [weight]
    module.edit_targets(batch, layer)
    found = set(module.target_store.folder.glob("targets-*")) - before
    return found.pop().name if found else ""


def test_the_same_is_found_by_another_module_and_seed(build):
    assert key(build())
    assert key(build()) == ""
    assert key(build(seed=5)) == ""  # contexts are given: nothing is random


def a_prompt() -> list[EditRequest]:
    return [replace(REQUESTS[0], prompt="{} lives in"), REQUESTS[1]]


@pytest.mark.parametrize(
    ("changes", "batch"),
    [
        ({}, REQUESTS[1::-1]),  # order
        ({}, REQUESTS[:1]),  # another batch
        ({}, a_prompt()),
        ({}, [replace(REQUESTS[0], target_new="Danish"), REQUESTS[1]]),
        ({}, [replace(REQUESTS[0], target_prefix=""), REQUESTS[1]]),  # the joint
        ({"contexts": ["He plays."]}, REQUESTS[:2]),
        ({"contexts": None}, REQUESTS[:2]),  # written by the model
        ({"target": replace(TARGET, steps=7)}, REQUESTS[:2]),
        ({"target": replace(TARGET, learning_rate=0.3)}, REQUESTS[:2]),
        ({"target": replace(TARGET, loss_layer=2)}, REQUESTS[:2]),
        ({"target": replace(TARGET, site="ffn")}, REQUESTS[:2]),
        ({"target": replace(TARGET, tokens_per_batch=40)}, REQUESTS[:2]),
        ({"target": replace(TARGET, end_of_text=True)}, REQUESTS[:2]),
    ],
)
def test_whatever_changes_the_targets_changes_the_key(build, changes, batch):
    assert key(build())
    assert key(build(**changes), batch)


def test_so_do_weights_layer_dtype_threads_and_the_model_itself(build, monkeypatch):
    assert key(build())
    assert key(build(), layer=2)
    module = build()
    module.model.double()
    assert key(module)
    module = build()
    key(module)  # nothing new, and the unedited weights are known
    with torch.no_grad():  # what an edit of a bit would be
        weight = module.layers.projection(WeightId(1)).weight
        weight.view(torch.int32)[3, 5] ^= 1
    assert key(module)
    module = build()
    with torch.no_grad():  # another model, also where its config is the same
        module.model.transformer.wpe.weight.mul_(1.001)
    assert key(module)
    module = build()
    module.model.config.layer_norm_epsilon = 1e-4
    assert key(module)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert key(build())


def test_a_batch_behind_edits_or_unknown_weights_is_left_alone(build):
    module = build()
    module.edit_targets(REQUESTS[:2], 1)  # nothing says that the weights are the unedited ones
    module.note_unedited([WeightId(1)])
    module.edit_batches_held = 1
    module.edit_targets(REQUESTS[2:4], 1)
    assert list(module.target_store.folder.glob("targets-*")) == []
    assert build(covariance=CovarianceSource(cache=None)).target_store is None
    assert build(cache_targets=False).target_store is None


def test_half_precision_is_told_by_what_the_model_computes_with(llama, tmp_path, optimised):
    """The sum beside the weights in float32 is no part of the key."""
    llama.model.save_pretrained(tmp_path / "base")
    llama.tokenizer.save_pretrained(tmp_path / "base")
    values = []
    for _ in range(2):
        module = small_module(tmp_path / "base", "bfloat16")
        module.target_store = TargetStore(tmp_path / "stats")
        module.note_unedited([WeightId(0)])
        values.append(module.edit_targets(REQUESTS[:2], 0))
    assert optimised == [0]
    assert torch.equal(*values)


# The store


IDENTITY = {"layer": "3", "model": "a"}


def some(value: float = 1.0) -> Targets:
    return Targets(torch.full((1, 2, 3), value), torch.tensor([[[value, torch.nan, -0.0, 1e-45]]]))


def bits(targets: Targets) -> list[list[int]]:
    return [tensor.view(torch.int32).flatten().tolist() for tensor in targets]


def test_numbers_come_back_to_the_last_bit(tmp_path):
    store = TargetStore(tmp_path)
    written, file = store.shared(IDENTITY, None, some)
    assert file is None
    found, file = store.shared(IDENTITY, None, lambda: pytest.fail("optimised again"))
    assert file == TargetFile(tmp_path, IDENTITY).path
    assert bits(found) == bits(written) == bits(some())
    with safe_open(file, framework="pt") as opened:  # people may read what a file is of
        assert opened.metadata()["model"] == "a"
    assert json.dumps([p.name for p in tmp_path.iterdir() if p.name[0] != "."]).count("tar") == 1


def test_of_several_runs_one_optimises(tmp_path):
    made: list[int] = []

    def optimise() -> Targets:
        time.sleep(0.2)
        made.append(1)
        return some(float(len(made)))

    found: list[Any] = []
    runs = [
        threading.Thread(
            target=lambda: found.append(TargetStore(tmp_path).shared(IDENTITY, None, optimise))
        )
        for _ in range(3)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join(LIMIT)
    assert made == [1]
    assert sorted(file is None for _, file in found) == [False, False, True]
    assert all(bits(targets) == bits(some()) for targets, _ in found)


class Rank:
    """The strategy of one of two processes: the second is told what the first has read."""

    def __init__(self, rank: int, told: list[Any]) -> None:
        self.is_global_zero, self.told = rank == 0, told

    def broadcast(self, value):
        if self.is_global_zero:
            self.told.append(value)
        return self.told[-1]


def test_of_processes_that_work_together_the_first_reads_and_writes(tmp_path):
    told: list[Any] = []
    first, second = (TargetStore(tmp_path / name) for name in ("first", "second"))
    for store, rank in ((first, 0), (second, 1)):  # both optimise, each its part
        assert store.shared(IDENTITY, Rank(rank, told), some)[1] is None
    assert not second.folder.exists()
    for store, rank in ((first, 0), (second, 1)):
        found, file = store.shared(IDENTITY, Rank(rank, told), lambda: pytest.fail("again"))
        assert file is not None
        assert bits(found) == bits(some())


def test_where_nothing_can_be_written_a_run_goes_on(tmp_path):
    stands = tmp_path / "file"
    stands.write_text("no folder")
    with pytest.warns(UserWarning, match="could not be written"):
        found, file = TargetStore(stands).shared(IDENTITY, None, some)
    assert (bits(found), file) == (bits(some()), None)


def test_a_run_that_fails_leaves_no_targets_and_no_lock(tmp_path):
    def fails() -> Targets:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        TargetStore(tmp_path).shared(IDENTITY, None, fails)
    assert list(tmp_path.glob("targets-*")) == []
    assert bits(TargetStore(tmp_path).shared(IDENTITY, None, some)[0]) == bits(some())
