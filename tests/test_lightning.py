"""What a Lightning user expects of a Trainer: stock callbacks, flags, seeds; or a refusal."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import distributed
from torch.amp import GradScaler

from blue_callbacks import ClosedFormUpdate, WeightId
from blue_callbacks.trainer_checks import check_trainer
from conftest import ROOT, LanguageModel
from helpers import write_jsonl
from lightning_blue.__main__ import main
from lightning_blue.data import EditDataModule
from lightning_blue.editing import EditModule, TargetOptimization
from lightning_blue.editing.covariance import CovarianceSource
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.metrics.generated import GenerationSettings
from lightning_blue.metrics.instruments import Instruments
from lightning_blue.reporting import RunRecord
from lightning_blue.support.errors import InputError
from test_conf import flags, small_run  # noqa: F401  (a fixture)

PLACES = ["Rome", "Oslo", "Bern", "Lima", "Kyiv", "Riga"]
FACTS = [
    {
        "subject": f"Tower {index}",
        "prompt": "{} lies in",
        "target_new": place,
        "target_true": "Paris",
        "paraphrases": [f"You find Tower {index} in"],
        "neighborhood_prompts": [{"prompt": "The Louvre lies in", "answer": "Paris"}],
    }
    for index, place in enumerate(PLACES)
]


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.jsonl"
    write_jsonl(path, FACTS)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    sentence = "The river runs through the town of Basel, and {} plays the violin in Oslo.\n"
    path.write_text("".join(sentence.format(number) for number in range(400)))
    return path


@pytest.fixture
def module(gpt2: LanguageModel, corpus: Path, tmp_path: Path) -> EditModule:
    source = CovarianceSource(str(corpus), tokens_per_dim=20, cache=str(tmp_path / "stats"))
    return EditModule(
        copy.deepcopy(gpt2.model),
        gpt2.tokenizer,
        target=TargetOptimization(steps=6, clamp=4.0),
        contexts=["She plays."],
        covariance=source,
    )


def trainer_of(*callbacks: Any, update: ClosedFormUpdate | None = None, **flags: Any) -> Trainer:
    """A Trainer that edits layers 0 and 2 and measures each batch."""
    update = update or ClosedFormUpdate([0, 1, 2], "boundary", 1.0)
    settings = {
        "max_epochs": 1,
        "val_check_interval": 1,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "accelerator": "cpu",
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    }
    measure = [] if any(isinstance(c, MeasureEdits) for c in callbacks) else [measuring()]
    return Trainer(callbacks=[update, *measure, *callbacks], **{**settings, **flags})


def measuring() -> MeasureEdits:
    return MeasureEdits(generate=False)


def data_of(facts: Path, batch_size: int = 2) -> EditDataModule:
    return EditDataModule(str(facts), batch_size=batch_size)


def weights(module: EditModule) -> list[torch.Tensor]:
    return [module.editable_weights.read(WeightId(layer)).clone() for layer in (0, 2)]


def test_stock_early_stopping_ends_a_run_whose_score_stays(module, facts):
    """A score of 200 is never reached: the second check finds no improvement over the first."""
    stop = EarlyStopping("cumulative/score", mode="max", min_delta=200, patience=1)
    trainer = trainer_of(stop)
    trainer.fit(module, datamodule=data_of(facts))
    assert trainer.global_step == 2
    history = trainer.callbacks[1].history
    assert history.applied == 4
    assert history.ended_early == "a callback stopped the run"
    (post,) = history.of("post")
    assert post.metrics["efficacy"]["count"] == 4  # only what was applied


def test_stock_model_checkpoint_monitors_a_batch(module, facts, tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="batch/efficacy", mode="max", save_top_k=-1)
    trainer = trainer_of(best)
    trainer.fit(module, datamodule=data_of(facts))
    assert len(list(tmp_path.glob("*.ckpt"))) == 3
    (measured,) = {float(trainer.callback_metrics["batch/efficacy"])} - {None}
    assert 0 <= measured <= 100
    saved = torch.load(best.best_model_path, weights_only=True)
    assert saved["state_dict"] == {}
    assert set(saved["edited_weights"]) == {"layer0", "layer2"}


def test_loss_curves_name_their_batch_and_layer(module, facts):
    measure = measuring()
    trainer_of(measure).fit(module, datamodule=data_of(facts))
    curves = [(curve.batch, curve.layer) for curve in measure.history.loss_curves]
    assert curves == [(0, 0), (0, 2), (1, 0), (1, 2), (2, 0), (2, 2)]


def test_every_metric_can_be_monitored(module, facts):
    trainer = trainer_of()
    trainer.fit(module, datamodule=data_of(facts))
    names = {"efficacy", "generalization", "specificity", "score", "efficacy_top1"}
    for stage in ("batch", "cumulative"):
        assert {f"{stage}/{name}" for name in names} <= set(trainer.callback_metrics)
    taken = trainer.callbacks[1].history.of("cumulative")
    assert [measurement.edits for measurement in taken] == [2, 4, 6]


def test_the_cumulative_sample_is_of_applied_edits_alone(module, facts, monkeypatch):
    """A sample as large as the file: after the first batch it holds the two applied requests."""
    asked: list[list[str]] = []
    real = Instruments.evaluate

    def watch(self, module, requests, whole=False):
        asked.append([request.case_id for request in requests])
        return real(self, module, requests, whole)

    monkeypatch.setattr(Instruments, "evaluate", watch)
    trainer = trainer_of()
    data = data_of(facts)
    trainer.fit(module, datamodule=data)
    ids = [request.case_id for request in data.requests]
    samples = [sorted(asked[index]) for index in (2, 4, 6)]  # pre, then batch and sample in turn
    assert samples == [sorted(ids[:count]) for count in (2, 4, 6)]


def test_an_edit_that_a_later_one_replaces_is_no_failure(module, facts, tmp_path):
    """Tower 0 is edited in the first batch and again in the last: the last one counts."""
    again = {**FACTS[0], "target_new": "Oslo"}
    write_jsonl(facts, [*FACTS[:5], again])
    trainer = trainer_of()
    trainer.fit(module, datamodule=data_of(facts))
    history = trainer.callbacks[1].history
    assert history.applied == 6
    assert history.in_force == [1, 2, 3, 4, 5]
    (post,) = history.of("post")
    assert post.metrics["efficacy"]["count"] == 5
    assert set(history.after) == {1, 2, 3, 4, 5}
    assert history.of("cumulative")[1].metrics["efficacy"]["count"] == 4  # not yet replaced
    assert history.of("cumulative")[2].metrics["efficacy"]["count"] == 5


def test_validation_less_often_measures_less_often(module, facts):
    trainer = trainer_of(val_check_interval=3)
    trainer.fit(module, datamodule=data_of(facts))
    assert [taken.edits for taken in trainer.callbacks[1].history.of("cumulative")] == [6]


def test_validation_may_come_after_a_time(module, facts):
    trainer = trainer_of(val_check_interval="00:00:00:00", num_sanity_val_steps=0)
    trainer.fit(module, datamodule=data_of(facts))
    assert [m.edits for m in trainer.callbacks[1].history.of("cumulative")] == [2, 4, 6]


def test_trainer_test_measures_without_editing(module, facts):
    before = weights(module)
    trainer = trainer_of()
    (results,) = trainer.test(module, datamodule=data_of(facts), verbose=False)
    assert results["test/efficacy"] == results["test/efficacy"]
    assert len(trainer.callbacks[1].history.after) == 6
    assert all(torch.equal(old, new) for old, new in zip(before, weights(module), strict=True))
    trainer_of().fit(module, datamodule=data_of(facts))
    (edited,) = trainer_of().test(module, datamodule=data_of(facts), verbose=False)
    assert edited["test/efficacy"] > results["test/efficacy"]


def test_trainer_test_keeps_what_the_model_writes_and_how_long_it_took(module, facts):
    measure = measuring()
    started = time.perf_counter()
    trainer_of(measure).test(module, datamodule=data_of(facts), verbose=False)
    assert all(outcome.continuation for outcome in measure.history.after.values())
    assert 0 < measure.history.seconds["evaluate"] <= time.perf_counter() - started
    assert [(taken.stage, taken.edits) for taken in measure.history.measurements] == [("test", 0)]


class Stop(Callback):
    """End a run once the unedited model is measured."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        raise ZeroDivisionError


def test_what_is_kept_of_an_unedited_model_belongs_to_all_that_it_depends_on(
    module, facts, corpus, tmp_path
):
    def kept(
        module: EditModule,
        precision: Any = "32-true",
        data: EditDataModule | None = None,
        **settings: Any,
    ) -> int:
        chosen = {"text": str(corpus), "text_tokens": 64, **settings}
        measure = MeasureEdits(generate=False, unedited_cache=str(tmp_path / "unedited"), **chosen)
        with pytest.raises(ZeroDivisionError):
            trainer_of(measure, Stop(), precision=precision).fit(
                module, datamodule=data or data_of(facts)
            )
        (pre,) = measure.history.of("pre")
        if chosen["text"] is not None:
            assert pre.metrics["perplexity"]["tokens"] <= chosen["text_tokens"]
        return len(list((tmp_path / "unedited").glob("*.json")))

    assert kept(module) == 1
    assert kept(module) == 1
    model = copy.deepcopy(module.model)
    next(model.parameters()).data.mul_(1.5)
    found = {"contexts": ["She plays."], "covariance": module.covariance}
    assert kept(EditModule(model, module.tokenizer, module.target, **found)) == 2
    assert kept(module, text_tokens=32) == 3
    assert kept(module, text=None) == 4
    assert kept(module, seed=3) == 5
    assert kept(module, "bf16-mixed") == 6
    rows = [{**fact, "target_true": "Ulm"} for fact in FACTS]
    write_jsonl(tmp_path / "true.jsonl", rows)
    true = str(tmp_path / "true.jsonl")
    assert kept(module, data=EditDataModule(true, edits=2, controls=100)) == 7
    assert kept(module, data=EditDataModule(true, edits=2, controls=true)) == 8
    answering = {
        "protocols": ["probability", "generation"],
        "generation": GenerationSettings(prompt="chat", max_new_tokens=2),
    }
    changed = EditModule(copy.deepcopy(module.model), copy.deepcopy(module.tokenizer), **found)
    for n, start in enumerate(("user: ", "Q: ")):
        changed.tokenizer.chat_template = (
            "{{ eos_token }}" + start + "{{ messages[0].content }}{{ eos_token }}"
        )
        assert kept(changed, **answering) == 9 + n
    changed.model.generation_config.eos_token_id = [5]
    assert kept(changed, **answering) == 11
    facts.write_text(facts.read_text().replace("Rome", "Ulm"))
    assert kept(module) == 12


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_epochs": 2}, "edited again"),
        ({"max_epochs": 0}, "nothing would be edited"),
        ({"max_epochs": -1}, "edited again"),
        ({"max_steps": 0}, "nothing would be edited"),
        ({"limit_train_batches": 0}, "nothing would be edited"),
        ({"overfit_batches": 1}, "a part of the requests"),
        ({"check_val_every_n_epoch": 0}, "never time to validate"),
        ({"val_check_interval": 0}, "never time to validate"),
    ],
)
def test_trainer_settings_that_would_edit_wrongly_are_refused(module, facts, flags, message):
    before = weights(module)
    with pytest.raises(InputError, match=message) as raised:
        trainer_of(**flags).fit(module, datamodule=data_of(facts))
    assert f"trainer.{next(iter(flags))}" in str(raised.value)
    assert all(torch.equal(old, new) for old, new in zip(before, weights(module), strict=True))


@pytest.mark.parametrize(
    ("flags", "what", "hint"),
    [
        ({"max_epochs": 2}, "every batch would be edited again and again", "max_epochs=1: one"),
        ({"max_steps": 0}, "nothing would be edited", "leave it out, or give the number"),
        ({"limit_train_batches": 0}, "nothing would be edited", "leave it out"),
        ({"gradient_clip_val": 0.5}, "nothing would be clipped", "leave it out"),
        ({"accumulate_grad_batches": 2}, "nothing would be accumulated", "leave it out; data."),
    ],
)
def test_a_refusal_says_what_is_set_what_it_would_do_and_what_to_do(flags, what, hint):
    ((name, value),) = flags.items()
    with pytest.raises(InputError) as raised:
        check_trainer(trainer_of(**flags))
    said, where, todo = str(raised.value).splitlines()
    assert said.startswith(f"with {name}={value}, {what}")
    assert where == f"  where: trainer.{name}"
    assert todo.startswith(f"  hint:  {hint}")


def test_strategies_that_shard_weights_are_refused(module, facts):
    trainer, update = trainer_of(), ClosedFormUpdate([0])
    trainer._accelerator_connector.strategy = FSDPStrategy()
    said = r"(?s)strategy=FSDPStrategy, the closed form.*trainer\.strategy.*one device, or ddp"
    with pytest.raises(InputError, match=said):
        update.setup(trainer, module, "fit")


def test_a_run_without_an_update_is_refused(module, facts):
    trainer = trainer_of()
    trainer.callbacks.remove(trainer.callbacks[0])
    with pytest.raises(InputError, match="no callback of the trainer edits"):
        trainer.fit(module, datamodule=data_of(facts))


@pytest.mark.parametrize("flags", [{"max_steps": 1}, {"limit_train_batches": 1}])
def test_a_run_that_applies_a_part_says_so_and_measures_that_part(module, facts, flags):
    trainer = trainer_of(**flags)
    trainer.fit(module, datamodule=data_of(facts))
    history = trainer.callbacks[1].history
    assert history.applied == 2
    assert next(iter(flags)) in history.ended_early
    assert set(history.after) == {0, 1}


def test_sixteen_bit_mixed_precision_edits(module, facts):
    """Its gradient scaler looks for gradients that an edit step does not have.

    On the CPU Lightning turns ``16-mixed`` into bfloat16 without a scaler, hence the plugin itself.
    """
    twin = copy.deepcopy(module)
    plugin = MixedPrecision("16-mixed", "cpu", GradScaler("cpu"))
    trainer_of(precision="32-true").fit(module, datamodule=data_of(facts))
    trainer_of(plugins=[plugin]).fit(twin, datamodule=data_of(facts))
    for exact, half in zip(weights(module), weights(twin), strict=True):
        assert half.dtype == torch.float32
        # float16 keeps 11 bits: a few tenths of a percent a pass, a few percent of a target
        assert 0 < float((half - exact).norm() / exact.norm()) < 0.15


def test_a_second_fit_goes_on_with_the_same_callback_and_with_no_other(module, facts):
    """Two fits of three and three requests are one fit of six."""
    twin, update = copy.deepcopy(module), ClosedFormUpdate([0, 1, 2], "boundary", 1.0)
    trainer_of().fit(twin, datamodule=data_of(facts, 3))
    halves = [EditDataModule(str(facts), batch_size=3, edits=3, offset=o) for o in (0, 3)]
    trainer_of(update=update).fit(module, datamodule=halves[0])
    with pytest.raises(InputError, match=r"holds 1 edit batches(.|\n)*anew"):
        trainer_of().fit(module, datamodule=halves[1])
    trainer_of(update=update).fit(module, datamodule=halves[1])
    for ours, reference in zip(weights(module), weights(twin), strict=True):
        torch.testing.assert_close(ours, reference)


def test_a_perplexity_that_explodes_does_not_end_the_run(module, facts, corpus, monkeypatch):
    """The metric leaves out a value that is not finite; a callback that monitors it gets NaN."""
    exploded = {"count": 16, "tokens": 8192}
    monkeypatch.setattr("lightning_blue.metrics.instruments.perplexity", lambda *_, **__: exploded)
    trainer = trainer_of(MeasureEdits(text=str(corpus), generate=False))
    trainer.fit(module, datamodule=data_of(facts))
    assert trainer.callback_metrics["cumulative/perplexity"].isnan()
    history = trainer.callbacks[1].history
    assert history.applied == 6
    assert [m.metrics["perplexity"] for m in history.of("post")] == [exploded]


def test_the_order_of_callbacks_does_not_matter(module, facts, tmp_path):
    """PRUNE transforms the weights before anything is measured or saved."""

    def run(folder: str, *order: int) -> dict[str, Any]:
        update = ClosedFormUpdate([0, 2], "boundary", 1.0, post_edit_transform="prune")
        record = RunRecord(folder, str(tmp_path), wandb="off", checkpoint_every=0)
        callbacks = [update, measuring(), record]
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=CSVLogger(str(tmp_path)),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callbacks[place] for place in order],
        )
        trainer.fit(copy.deepcopy(module), datamodule=data_of(facts))
        summary: dict[str, Any] = json.loads((tmp_path / folder / "summary.json").read_text())
        return {k: v for k, v in summary.items() if not k.startswith("seconds")}

    assert run("a", 0, 1, 2) == run("b", 2, 1, 0)


def test_a_record_without_measurements_says_what_is_missing(module, facts, tmp_path):
    record = RunRecord("x", str(tmp_path), wandb="off")
    trainer = trainer_of(record)
    trainer.callbacks.remove(trainer.callbacks[1])
    with pytest.raises(InputError, match="MeasureEdits"):
        trainer.fit(module, datamodule=data_of(facts))


def written(seed: int, gpt2: LanguageModel) -> list[str]:
    seed_everything(seed)
    return EditModule(*gpt2, context_tokens=6).templates


def test_one_seed_decides_everything_random(gpt2):
    assert written(1, gpt2) == written(1, gpt2) != written(2, gpt2)
    assert EditModule(*gpt2, context_tokens=6, seed=5).templates != written(1, gpt2)


@pytest.fixture
def run(small_run, capsys, tmp_path):  # noqa: F811
    """Run the command line; return exit code, summary and what was printed."""
    base = f"--config={ROOT / 'conf' / 'llama3_memit_blue.yaml'}"

    def go(name: str, *more: str) -> tuple[int, dict[str, Any], str]:
        own = [f"--run.name={name}", f"--run.root={tmp_path}", "--run.export=false"]
        code = main(["fit", base, *flags(small_run, "llama3"), *own, *more])
        captured = capsys.readouterr()
        path = tmp_path / name / "summary.json"
        return code, json.loads(path.read_text()) if path.exists() else {}, captured.err

    return go


def comparable(summary: dict[str, Any]) -> dict[str, Any]:
    left_out = ("seconds/", "settings/seed")
    return {key: value for key, value in summary.items() if not key.startswith(left_out)}


def test_two_seeds_differ_and_the_same_seed_gives_the_same_figures(run, tmp_path):
    """Rates of two requests may agree by chance; nats after other contexts do not."""
    figures = []
    for number, seed in enumerate((1, 1, 2)):
        summary = run(f"run{number}", f"--seed_everything={seed}")[1]
        lines = (tmp_path / f"run{number}" / "edits.jsonl").read_text().splitlines()
        figures.append((comparable(summary), [json.loads(x)["after"]["nll_new"] for x in lines]))
    first, again, other = figures
    assert first == again
    assert first[1] != other[1]


@pytest.fixture
def own_process_group(monkeypatch):
    """Take back what Lightning leaves in this process: addresses for children, and a group."""
    with monkeypatch.context() as patch:
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.setenv(name, "")
            patch.delenv(name)
        yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.mark.parametrize("strategy", ["ddp", "auto"])
def test_ddp_on_one_device_edits(run, own_process_group, strategy):
    code, summary, err = run("one", f"--trainer.strategy={strategy}", "--trainer.devices=1")
    assert code == 0, err
    assert summary["edits/applied"] == 2


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--trainer.accumulate_grad_batches=2", "nothing would be accumulated"),
        ("--trainer.gradient_clip_val=1.0", "nothing would be clipped"),
        ("--trainer.max_epochs=2", "edited again"),
        ("--trainer.max_steps=0", "nothing would be edited"),
        ("--run.name=../elsewhere", "not the name of a run"),
        ("--run.name=/tmp/elsewhere", "not the name of a run"),
        ("--run.name=", "not the name of a run"),
        ("--ckpt_path=nowhere.ckpt", "no such checkpoint"),
    ],
)
def test_flags_that_cannot_be_right_end_with_one_message(run, flag, message):
    code, summary, err = run("refused", flag)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not summary


def test_numbers_that_are_not_finite_end_a_run_with_a_report_and_the_model(run, tmp_path, capsys):
    """The second of two batches fails: the first is measured, saved, and marked as partial."""
    real = EditModule.edit_targets

    def targets(self, batch, layer):
        values = real(self, batch, layer)
        return values * (torch.nan if self.edit_batches_held == 1 else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EditModule, "edit_targets", targets)
        code, summary, err = run("partial", "--data.batch_size=1", "--run.export=true")
    assert code == 1
    assert "not finite" in err
    assert summary["edits/applied"] == 1
    assert summary["post/efficacy/count"] == 1
    assert "not finite" in summary["edits/ended_early"]
    assert (tmp_path / "partial" / "model" / "model.safetensors").exists()
    assert "**Partial:**" in (tmp_path / "partial" / "report.md").read_text()


def test_evaluate_shows_what_it_measured(run, small_run, tmp_path, capsys):  # noqa: F811
    """The exported model of a run: what the run has measured at its end."""
    _, summary, _ = run("edited", "--run.export=true")
    base = f"--config={ROOT / 'conf' / 'llama3_memit_blue.yaml'}"
    model = f"--model.name_or_path={tmp_path / 'edited' / 'model'}"
    own = [model, f"--run.root={tmp_path}", "--run.name=measured"]
    assert main(["evaluate", base, *flags(small_run, "llama3"), *own]) == 0
    printed = capsys.readouterr().out
    assert "| efficacy" in printed
    assert "measured" in printed
    found = json.loads((tmp_path / "measured" / "summary.json").read_text())
    for name in ("efficacy", "specificity", "efficacy_top1"):
        assert found[f"test/{name}"] == summary[f"post/{name}"]
    assert found["edits/applied"] == 0
    assert "without editing" in (tmp_path / "measured" / "report.md").read_text()


def test_evaluate_goes_on_with_no_run(run, small_run, capsys):  # noqa: F811
    base = f"--config={ROOT / 'conf' / 'llama3_memit_blue.yaml'}"
    assert main(["evaluate", base, *flags(small_run, "llama3"), "--ckpt_path=last"]) == 2
    assert "evaluate goes on with no run" in capsys.readouterr().err


def test_a_finished_run_without_checkpoints_keeps_its_records(run, tmp_path):
    own = ("--run.checkpoint_every=0", "--data.batch_size=1")
    assert run("kept", *own)[0] == 0
    records = sorted((tmp_path / "kept" / "records").iterdir())
    assert len(records) == 3
    assert run("kept", *own, "--ckpt_path=last")[0] == 0
    assert sorted((tmp_path / "kept" / "records").iterdir()) == records


def test_a_refused_resume_leaves_the_configuration_alone(run, tmp_path):
    """Stopped after one of two batches, then asked to go on with another plan."""
    flags = ("--data.batch_size=1", "--trainer.max_steps=1")
    assert run("kept", *flags)[0] == 0
    before = (tmp_path / "kept" / "config.yaml").read_text()
    code, _, err = run("kept", "--data.batch_size=1", "--ckpt_path=last", "--update.plan=even")
    assert code == 2
    assert "started with plan boundary, not even" in err
    assert (tmp_path / "kept" / "config.yaml").read_text() == before
    assert json.loads((tmp_path / "kept" / "run.json").read_text())["status"] == "ended early"
    assert run("kept", "--data.batch_size=1", "--ckpt_path=last")[1]["edits/applied"] == 2
