"""A run that was stopped and resumed ends where the uninterrupted run ends, to the last bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer

from blue_callbacks import ClosedFormUpdate, CommittedBatches
from blue_callbacks.fine_tuning import FineTuning
from helpers import write_jsonl
from histories import small_history
from lightning_blue.data import EditDataModule
from lightning_blue.editing import EditModule
from lightning_blue.metrics.asked import require_same
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.metrics.history import RunHistory
from lightning_blue.metrics.matching import GeneratedAnswer
from lightning_blue.metrics.retention import Retention, RetentionSettings
from lightning_blue.support.checkpoints import BatchCheckpoints, WholeCheckpointIO, checkpoints
from lightning_blue.support.errors import InputError
from test_lightning import (  # noqa: F401  (fixtures)
    corpus,
    data_of,
    facts,
    measuring,
    module,
    trainer_of,
    weights,
)

LAYERS = [0, 1, 2]
METHODS: dict[str, dict[str, Any]] = {
    "memit": {"plan": "even"},
    "memit_blue": {},
    "without past keys": {"past_keys": False},
    "rect": {"rect_keep": 0.4},
    "alphaedit": {"solver": "null_space", "energy": 0.3},
    "prune": {"post_edit_transform": "prune"},
    "fine-tuning": {"solver": "fine_tuning", "plan": "first", "fine_tuning": FineTuning(lr=0.05)},
    "in-context": {"solver": "in_context", "plan": "none"},
}


class Crash(Callback):
    """End the run with an error: before some batch, or while it is written."""

    def __init__(self, batch: int, hook: str = "on_train_batch_start") -> None:
        self.batch = batch
        setattr(self, hook, self._crash)

    def _crash(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.batch:
            raise ZeroDivisionError


def update(**settings: Any) -> ClosedFormUpdate:
    return ClosedFormUpdate(LAYERS, covariance_weight=1.0, **settings)


def run(
    module: EditModule,  # noqa: F811
    facts: Path,  # noqa: F811
    folder: Path,
    *callbacks: Any,
    resume: bool = False,
    data: EditDataModule | None = None,
    flags: dict[str, Any] | None = None,
    **settings: Any,
) -> Trainer:
    """Edit in batches of two with a checkpoint after each, from the newest one if asked."""
    checkpointing = BatchCheckpoints()
    checkpointing.folder = folder
    trainer = trainer_of(
        checkpointing,
        *callbacks,
        update=update(**settings),
        plugins=[WholeCheckpointIO()],
        **(flags or {}),
    )
    path = checkpoints(folder)[-1] if resume else None
    trainer.fit(module, datamodule=data or data_of(facts), ckpt_path=path, weights_only=True)
    return trainer


def measured(trainer: Trainer) -> list[Any]:
    """What was measured, without seconds; loss curves as plain numbers."""
    history = trainer.callbacks[1].history
    curves = [(c.batch, c.layer, c.losses.nan_to_num(-1).tolist()) for c in history.loss_curves]
    return [history.measurements, history.logged, history.after, history.batches, curves]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("crash", [Crash(1), Crash(2, "on_edit_written")])
def test_a_resumed_run_equals_the_uninterrupted_one(module, facts, tmp_path, method, crash):  # noqa: F811
    whole, unedited = copy.deepcopy(module), copy.deepcopy(module)
    expected = run(whole, facts, tmp_path / "whole", **METHODS[method])
    with pytest.raises(ZeroDivisionError):
        run(module, facts, tmp_path / "halves", crash, **METHODS[method])
    resumed = run(unedited, facts, tmp_path / "halves", resume=True, **METHODS[method])
    assert same(weights(unedited), weights(whole))
    assert measured(resumed) == measured(expected)
    assert resumed.callbacks[1].history.resumed_after == [2 * crash.batch]


@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_measured_less_often_is_measured_where_it_would_have_been(
    module,  # noqa: F811
    facts,  # noqa: F811
    tmp_path,
    batch,
):
    every_second = {"val_check_interval": 2}
    whole, unedited = copy.deepcopy(module), copy.deepcopy(module)
    expected = run(whole, facts, tmp_path / "whole", flags=every_second)
    assert [m.edits for m in expected.callbacks[1].history.of("cumulative")] == [4]
    with pytest.raises(ZeroDivisionError):
        run(module, facts, tmp_path / "halves", Crash(batch), flags=every_second)
    resumed = run(unedited, facts, tmp_path / "halves", resume=True, flags=every_second)
    assert measured(resumed) == measured(expected)


def test_a_history_takes_over_all_that_a_checkpoint_has():
    history = small_history()
    history.logged = [(2, {"batch/efficacy": 100.0})]
    history.answers_before = [
        GeneratedAnswer(0, "p", "Where?", "Rome", ("Roma",), " In", " In. Rome", (3, 4), "stop")
    ]
    history.first_values = {0: {"efficacy": 1.0}}
    history.retention = Retention({0: [0]}, {0: {0: {"efficacy": 1.0}}})
    taken = RunHistory(requests=history.requests)
    taken.load_state_dict(copy.deepcopy(history.state_dict()))
    state = ("batches", "measurements", "logged", "first_values", "retention", "before", "seconds")
    for name in state:
        assert getattr(taken, name) == getattr(history, name) != type(getattr(history, name))()
    assert taken.answers_before == history.answers_before
    assert taken.resumed_after == [3]
    for ours, theirs in zip(taken.loss_curves, history.loss_curves, strict=True):
        assert ours[:2] == theirs[:2]
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=0, atol=0, equal_nan=True)


def test_contexts_that_the_unedited_model_wrote_are_kept(module, facts, tmp_path):  # noqa: F811
    module.contexts = None
    whole, unedited = copy.deepcopy(module), copy.deepcopy(module)
    run(whole, facts, tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        run(module, facts, tmp_path / "halves", Crash(2))
    unedited.seed = 17  # would write others
    run(unedited, facts, tmp_path / "halves", resume=True)
    assert unedited.templates == whole.templates
    assert same(weights(unedited), weights(whole))


def test_a_run_stopped_while_it_measures_at_the_end_applies_nothing_again(
    module,  # noqa: F811
    facts,  # noqa: F811
    tmp_path,
):
    whole, unedited = copy.deepcopy(module), copy.deepcopy(module)
    expected = run(whole, facts, tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        run(module, facts, tmp_path / "halves", Crash(3, "on_train_end"))
    trainer = run(unedited, facts, tmp_path / "halves", resume=True)
    assert same(weights(unedited), weights(whole))
    assert measured(trainer) == measured(expected)


def test_the_newest_two_checkpoints_are_kept_and_hold_no_model(module, facts, tmp_path):  # noqa: F811
    run(module, facts, tmp_path)
    kept = checkpoints(tmp_path)
    assert [path.name for path in kept] == ["batch-00002.ckpt", "batch-00003.ckpt"]
    saved = torch.load(kept[-1], weights_only=True)
    assert saved["state_dict"] == {}
    (past,) = {len(p) for p in saved["callbacks"]["ClosedFormUpdate"]["past"].values()}
    assert past == 3
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


@pytest.mark.parametrize("limit", ["max_steps", "limit_train_batches"])
def test_a_run_that_ended_at_a_limit_goes_on_behind_it(module, facts, tmp_path, limit):  # noqa: F811
    whole, unedited = copy.deepcopy(module), copy.deepcopy(module)
    run(whole, facts, tmp_path / "whole")
    part = run(module, facts, tmp_path / "part", flags={limit: 2})
    assert limit in part.callbacks[1].history.ended_early
    resumed = run(unedited, facts, tmp_path / "part", resume=True)
    assert same(weights(unedited), weights(whole))
    assert resumed.callbacks[1].history.applied == 6


def stopped(module: EditModule, facts: Path, folder: Path) -> EditModule:  # noqa: F811
    """Stop a run after one batch; return the unedited module."""
    unedited = copy.deepcopy(module)
    with pytest.raises(ZeroDivisionError):
        run(module, facts, folder, Crash(1))
    return unedited


def test_another_model_is_refused(module, facts, tmp_path):  # noqa: F811
    unedited = stopped(module, facts, tmp_path)
    with torch.no_grad():
        next(unedited.model.parameters()).add_(0.1)
    with pytest.raises(InputError, match=r"another model(.|\n)*name_or_path"):
        run(unedited, facts, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plan": "even"}, "started with plan boundary, not even"),
        ({"past_keys": False}, "started with past_keys True, not False"),
        ({"rect_keep": 0.4}, "started with rect_keep None, not 0.4"),
    ],
)
def test_another_method_is_refused(module, facts, tmp_path, settings, message):  # noqa: F811
    unedited = stopped(module, facts, tmp_path)
    before = weights(unedited)
    with pytest.raises(InputError, match=message):
        run(unedited, facts, tmp_path, resume=True, **settings)
    assert same(weights(unedited), before)


def test_other_layers_are_refused(module, facts, tmp_path, monkeypatch):  # noqa: F811
    unedited = stopped(module, facts, tmp_path)
    monkeypatch.setattr("test_resume.LAYERS", [0, 2])
    with pytest.raises(InputError, match=r"started with layers \[0, 1, 2\], not \[0, 2\]"):
        run(unedited, facts, tmp_path, resume=True)


def test_other_requests_and_batches_are_refused(module, facts, tmp_path):  # noqa: F811
    unedited = stopped(module, facts, tmp_path)
    with pytest.raises(InputError, match="batches of 2, not of 3"):
        run(unedited, facts, tmp_path, resume=True, data=data_of(facts, 3))
    lines = facts.read_text().splitlines()
    facts.write_text("\n".join(reversed(lines)))
    with pytest.raises(InputError, match="other requests or control facts, or in another order"):
        run(copy.deepcopy(unedited), facts, tmp_path, resume=True)


def test_another_covariance_is_refused(module, facts, tmp_path):  # noqa: F811
    unedited = stopped(module, facts, tmp_path)
    unedited.prepare([], [])
    unedited.key_covariances.by_layer = {layer: torch.eye(96) for layer in LAYERS}
    with pytest.raises(InputError, match="covariance of layer0 is not the one"):
        run(unedited, facts, tmp_path, resume=True)


def test_a_dataloader_that_starts_at_its_beginning_is_refused(module, facts, tmp_path):  # noqa: F811
    unedited = stopped(module, facts, tmp_path)

    class Restarting(EditDataModule):
        def train_dataloader(self):
            return CommittedBatches(self.requests, 2, committed=0)

    before = weights(unedited)
    with pytest.raises(InputError, match=r"batch 0, which was applied before(.|\n)*global_step"):
        run(unedited, facts, tmp_path, resume=True, data=Restarting(str(facts), batch_size=2))
    assert not same(weights(unedited), before)  # those of the first batch, and no more


def test_batches_whose_edits_share_a_case_id_are_told_apart(module, facts, tmp_path):  # noqa: F811
    records = [json.loads(line) | {"case_id": "x"} for line in facts.read_text().splitlines()]
    write_jsonl(facts, records)
    whole, unedited = copy.deepcopy(module), copy.deepcopy(module)
    run(whole, facts, tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        run(module, facts, tmp_path / "halves", Crash(1))
    run(unedited, facts, tmp_path / "halves", resume=True)
    assert same(weights(unedited), weights(whole))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_named(module, facts, tmp_path, content):  # noqa: F811
    (tmp_path / "batch-00001.ckpt").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read(.|\n)*batch-00001"):
        run(module, facts, tmp_path, resume=True)


def test_a_checkpoint_that_carries_code_is_not_run(module, facts, tmp_path):  # noqa: F811
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Evil()}, tmp_path / "batch-00001.ckpt")
    with pytest.raises(InputError, match="cannot be read"):
        run(module, facts, tmp_path, resume=True)
    assert not (tmp_path / "ran").exists()


def test_other_ways_to_measure_are_refused(module, facts, corpus, tmp_path):  # noqa: F811
    """What is measured before any edit and at the end has to be the same."""

    def measure(**settings: Any) -> MeasureEdits:
        started = {"text": str(corpus), "text_tokens": 64, "generate": False}
        return MeasureEdits(**{**started, **settings})

    unedited = copy.deepcopy(module)
    with pytest.raises(ZeroDivisionError):
        run(module, facts, tmp_path / "run", measure(), Crash(1))
    other = tmp_path / "other.txt"
    other.write_text(corpus.read_text().replace("Basel", "Lyon"))
    before = weights(unedited)
    for settings, message in (
        ({"text_tokens": 32}, r"started with measure\.text_tokens 64, not 32;"),
        ({"text": None}, r"started with measure\.text, which is gone;"),
        ({"text": str(other)}, r"started with other content of measure\.text;"),
        ({"cumulative": 3}, r"started with measure\.cumulative 100, not 3;"),
        ({"generate": True}, r"started with measure\.generate False, not True;"),
        (
            {"seed": 1, "cumulative": 3},
            r"started with measure\.seed 0, not 1; measure\.cumulative 100",
        ),
        (
            {"retention": RetentionSettings(9)},
            r"started with measure\.retention\.prompts 0, not 9;",
        ),
    ):
        with pytest.raises(InputError, match=message):
            run(unedited, facts, tmp_path / "run", measure(**settings), resume=True)
        assert same(weights(unedited), before)
    moved = tmp_path / "moved.txt"
    moved.write_text(corpus.read_text())
    going_on = measure(text=str(moved), tokens_per_batch=512)  # how much at a time may change
    run(unedited, facts, tmp_path / "run", going_on, resume=True)
    assert going_on.history.resumed_after == [2]


def test_what_follows_from_a_text_or_tasks_that_are_gone_is_not_said():
    towns = {"measure.ability.tasks": {"towns": "a"}, "measure.ability.limit": 9}
    with pytest.raises(InputError, match=r"started with no measure\.ability\.tasks;") as caught:
        require_same({}, towns)
    assert "limit" not in str(caught.value)
    both = towns | {"measure.ability.tasks": {"towns": "a", "words": "b"}}
    with pytest.raises(InputError, match=r"measure\.ability\.tasks towns, words, not towns;"):
        require_same(both, towns)
    require_same(towns, dict(towns))


def test_a_checkpoint_that_does_not_say_how_it_was_measured_is_taken():
    history = small_history()
    state = history.state_dict()
    del state["asked"]
    RunHistory(requests=history.requests, asked={"measure.seed": 3}).load_state_dict(state)


def test_a_checkpoint_s_model_may_be_measured_in_another_way():
    history = small_history()
    history.asked = {"measure.text": {"text": "a"}, "measure.seed": 3}
    RunHistory(requests=history.requests).load_state_dict(history.state_dict())  # Trainer.test
