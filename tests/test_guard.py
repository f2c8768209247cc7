"""The guard: what it reads, when it acts, and that a batch it rolls back has never been."""

from __future__ import annotations

import json
import math
import re
from collections import deque
from typing import Any

import pytest
import torch

from blue_callbacks import ClosedFormUpdate, EditGuard, EditRejected, InputError, WeightId
from blue_callbacks.guard import spectral_norm
from conftest import ROOT
from helpers import fit, load_model
from histories import small_history
from lightning_blue.__main__ import main
from lightning_blue.data import EditDataModule
from lightning_blue.data.requests import Probe
from lightning_blue.editing import edit_module, health
from lightning_blue.language_model.scoring import score_targets
from lightning_blue.reporting import files
from lightning_blue.reporting.report import report
from test_transforms import SaveAfter
from test_update_callback import Chain, Mixture, batches

LAYERS = [0, 1, 2]
HIGH = {"weight_ratio": 1e6, "change_ratio": 1e6, "loss_increase": 1e6, "retained_drop": 100}


class Watched(Chain):
    """A chain whose loss on ordinary inputs, and whose knowledge, are numbers of its weights."""

    def ordinary_loss(self) -> float:
        return float(self.run(self.ordinary, 3)[1].detach().square().mean())

    def retained_knowledge(self) -> float:
        return 100 / (1 + float(self.run(self.ordinary, 3)[1].detach().norm()))


def networks(n: int, kind: type[Chain] = Watched, seed: int = 0) -> list[Any]:
    """Return n equal networks, whose covariances are the unedited one's for good."""
    made = []
    for _ in range(n):
        torch.manual_seed(seed)
        network = kind()
        fixed = {WeightId(n): network.key_covariance(WeightId(n)).detach() for n in LAYERS}
        network.key_covariance = fixed.__getitem__
        made.append(network)
    return made


def data(n: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return batches(n)


def update(**settings: Any) -> ClosedFormUpdate:
    return ClosedFormUpdate(LAYERS, "boundary", **{"covariance_weight": 0.5, **settings})


def weights(network: Chain) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in network.weights]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Readings(EditGuard):
    """A guard that keeps what it read of every batch."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.all: list[dict[str, float]] = []

    def on_edit_written(self, trainer, module, record):
        try:
            super().on_edit_written(trainer, module, record)
        finally:
            self.all.append(self.readings)


def readings(batch_data: list[Any], **settings: Any) -> list[dict[str, float]]:
    """Return each batch's readings of a run that nothing stops."""
    guard = Readings(**HIGH)
    fit(networks(1)[0], update(**settings), batch_data, callbacks=[guard])
    return guard.all


# What it reads


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (3, 2), (60, 60), (1, 7)])
def test_spectral_norm_of_a_matrix_and_of_a_product(shape):
    torch.manual_seed(0)
    matrix, other = torch.randn(shape), torch.randn(shape[1], 9)
    for factors, whole in (((matrix,), matrix), ((matrix, other), matrix @ other)):
        exact = float(torch.linalg.svdvals(whole)[0])
        assert 0.99 * exact <= spectral_norm(*factors) <= exact * (1 + 1e-5)


def test_spectral_norm_draws_nothing_from_the_global_generator():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = spectral_norm(torch.ones(20, 30))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == spectral_norm(torch.ones(20, 30)) == pytest.approx(math.sqrt(600))


@pytest.mark.parametrize("rect_keep", [None, 0.4])
def test_readings_against_the_weights_before_and_after(rect_keep):
    (network,) = networks(1)
    original, seen = weights(network), [weights(network)]
    loss, known = network.ordinary_loss(), network.retained_knowledge()
    losses, knows = [], []

    class Look(EditGuard):
        def on_edit_committed(self, trainer, module, record):
            seen.append(weights(network))
            losses.append(network.ordinary_loss() - loss)
            knows.append(known - network.retained_knowledge())

    guard, look = Readings(**HIGH), Look("off")
    fit(network, update(rect_keep=rect_keep), data(2), callbacks=[guard, look])
    for n, found in enumerate(guard.all):
        expected = {"loss_increase": losses[n], "retained_drop": knows[n]}
        for layer in (0, 2):
            before, after = (side[layer].double() for side in seen[n : n + 2])
            first = original[layer].double()
            change = torch.linalg.svdvals(after - before)[0] / torch.linalg.svdvals(first)[0]
            expected[f"layer{layer}/change_ratio"] = float(change)
            expected[f"layer{layer}/weight_ratio"] = float(after.norm() / first.norm())
        assert found == pytest.approx(expected, rel=1e-3)


def test_each_weight_of_a_layer_is_watched():
    torch.manual_seed(0)
    guard = EditGuard(**HIGH)
    fit(
        Mixture(),
        ClosedFormUpdate([0], covariance_weight=0.01),
        [(torch.randn(3, 6), torch.randn(3, 5))],
        callbacks=[guard],
    )
    assert set(guard.readings) == {
        f"layer0.{name}/{what}"
        for name in ("first", "second")
        for what in ("weight_ratio", "change_ratio")
    }


def test_a_module_without_text_and_facts_is_judged_by_its_weights():
    plain, silent = networks(2, Chain)
    silent.ordinary_loss = silent.retained_knowledge = lambda: None
    for network in (plain, silent):
        guard = EditGuard(**HIGH)
        fit(network, update(), data(1), callbacks=[guard])
        assert set(guard.readings) == {
            f"layer{n}/{what}" for n in (0, 2) for what in ("weight_ratio", "change_ratio")
        }


def test_a_weight_of_zeros_has_no_ratio():
    (network,) = networks(1, Chain)
    network.weights[2].data.zero_()
    guard = EditGuard()
    fit(network, update(), data(1), callbacks=[guard])
    assert set(guard.readings) == {"layer0/weight_ratio", "layer0/change_ratio"}


def test_for_a_limit_of_none_nothing_is_computed(monkeypatch):
    (network,) = networks(1)
    network.ordinary_loss = network.retained_knowledge = None  # would fail if called
    monkeypatch.setattr("blue_callbacks.guard.spectral_norm", None)
    guard = EditGuard(change_ratio=None, loss_increase=None, retained_drop=None)
    fit(network, update(), data(1), callbacks=[guard])
    assert set(guard.readings) == {"layer0/weight_ratio", "layer2/weight_ratio"}


def test_off_measures_nothing():
    (network,) = networks(1)
    network.ordinary_loss = network.retained_knowledge = None
    guard = EditGuard("off", weight_ratio=1.0001)
    fit(network, update(), data(2), callbacks=[guard])
    assert (guard.events, guard.readings, guard.notes) == ([], {}, [])


# When it acts


@pytest.mark.parametrize("name", list(HIGH))
def test_each_limit_is_crossed_just_below_the_reading_and_not_just_above(name):
    course = readings(data(2))
    reading, value = max(
        ((key, value) for key, value in course[0].items() if key.endswith(name)), key=lambda p: p[1]
    )
    for factor, n_events in ((0.999, 1), (1.001, 0)):
        guard = EditGuard(**{**HIGH, name: value * factor})
        fit(networks(1)[0], update(), data(1), callbacks=[guard])
        assert len(guard.events) == n_events
        if n_events:
            (crossed,) = guard.events[0]["crossed"]
            assert crossed == {"reading": reading, "value": value, "limit": value * factor}


def test_a_number_that_is_none_crosses_every_limit():
    (network,) = networks(1)
    values = iter([1.0, math.nan])
    network.ordinary_loss, network.retained_knowledge = lambda: next(values), lambda: None
    before = weights(network)
    guard = EditGuard(**HIGH)
    fit(network, update(), data(1), callbacks=[guard])
    assert guard.events[0]["crossed"][0]["reading"] == "loss_increase"
    assert equal(weights(network), before)


def growing(n: int) -> float:
    """Return a limit of the weights' growth that the batch with that number is first to cross."""
    course = [
        max(v for k, v in read.items() if k.endswith("weight_ratio")) for read in readings(data())
    ]
    assert course == sorted(course)
    return (course[n - 1] + course[n]) / 2


def limits(n: int) -> dict[str, Any]:
    return {**HIGH, "weight_ratio": growing(n)}


def test_warn_warns_of_each_batch_and_changes_nothing():
    guarded, plain = networks(2)
    guard = EditGuard("warn", **limits(2))
    with pytest.warns(UserWarning, match=r"batch 2 crossed layer0/weight_ratio .* it stays"):
        trainer = fit(guarded, update(), data(), callbacks=[guard])
    fit(plain, update(), data())
    assert equal(weights(guarded), weights(plain))
    assert trainer.global_step == 4
    assert [event["batch"] for event in guard.events] == [2, 3]


def test_stop_leaves_the_weights_of_the_batches_before():
    guarded, plain = networks(2)
    guard, callback = EditGuard("stop", **limits(2)), update()
    guarded.request_ids = lambda batch: ["a", "b", "c"]
    with pytest.warns(UserWarning, match="the run ends"):
        trainer = fit(guarded, callback, data(), callbacks=[guard])
    fit(plain, update(), data(2))
    assert equal(weights(guarded), weights(plain))
    assert (trainer.global_step, callback.committed) == (3, 2)
    (event,) = guard.events
    assert (event["batch"], event["requests"], event["action"]) == (2, ["a", "b", "c"], "stop")
    assert guard.notes[0].startswith("guard: batch 2 crossed layer0/weight_ratio")


def loud(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of which one asks for far more than the others."""
    return [(x, y * (30 if place == n else 1)) for place, (x, y) in enumerate(data())]


METHODS: list[dict[str, Any]] = [
    {},
    {"past_keys": False},
    {"rect_keep": 0.4},
    {"rect_keep": 0.4, "past_keys": False},
    {"solver": "null_space", "energy": 0.5, "ridge": 0.1},
    {"solver": "null_space", "energy": 0.5, "ridge": 0.1, "rect_keep": 0.4},
]


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_after_a_rollback_the_run_goes_on_as_if_the_batch_had_never_been(method, place):
    guarded, plain = networks(2)
    others = [batch for n, batch in enumerate(loud(place)) if n != place]
    limit = 3 * max(v for r in readings(others, **method) for k, v in r.items() if "change" in k)
    guard, ours, theirs = (
        EditGuard("rollback", **{**HIGH, "change_ratio": limit}),
        update(**method),
        update(**method),
    )
    with pytest.warns(UserWarning, match=f"batch {place} crossed"):
        trainer = fit(guarded, ours, loud(place), callbacks=[guard])
    fit(plain, theirs, others)
    assert [event["batch"] for event in guard.events] == [place]
    assert (trainer.global_step, ours.committed) == (4, 3)
    assert equal(weights(guarded), weights(plain))
    kept, reference = ours.past_keys_by_weight, theirs.past_keys_by_weight
    assert kept.keys() == reference.keys()
    assert all(torch.equal(keys, reference[weight]) for weight, keys in kept.items())


def test_events_name_batches_by_their_places_in_the_data():
    """After a rollback these are no longer the numbers of committed batches."""
    course = [(x, y * (30 if place in (0, 2) else 1)) for place, (x, y) in enumerate(data())]
    limit = 3 * max(v for r in readings(course[1::2]) for k, v in r.items() if "change" in k)
    guard = EditGuard("rollback", **{**HIGH, "change_ratio": limit})
    with pytest.warns(UserWarning, match="batch 2 crossed"):
        fit(networks(1)[0], update(), course, callbacks=[guard])
    assert [event["batch"] for event in guard.events] == [0, 2]


# Settings, state


def test_limits_are_those_of_the_documentation_unless_others_are_given():
    page = (ROOT / "docs" / "methods.md").read_text()
    rows = dict(re.findall(r"^\| `guard\.(\w+)` \|.*\| (\d+) \|$", page, flags=re.MULTILINE))
    assert {name: getattr(EditGuard(), name) for name in HIGH} == {
        k: int(v) for k, v in rows.items()
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_ratio": 1.0}, "weight_ratio is 1.0(.|\n)*a finite number above 1"),
        ({"weight_ratio": math.nan}, "weight_ratio is nan"),
        ({"change_ratio": 0.0}, "change_ratio is 0.0"),
        ({"change_ratio": math.inf}, "change_ratio is inf"),
        ({"loss_increase": -0.5}, "loss_increase is -0.5"),
        ({"loss_increase": math.nan}, "loss_increase"),
        ({"retained_drop": 100.5}, "above 0 and at most 100"),
        ({"retained_drop": math.nan}, "retained_drop"),
        ({"action": "halt"}, "warn, stop, rollback or off"),
    ],
)
def test_limits_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EditGuard(**settings)


def test_without_edits_to_watch_it_says_so():
    class Nothing(EditGuard):
        def on_edit_batch(self, trainer, module, batch):
            """Stand in for another editing callback."""

    with pytest.raises(InputError, match="no edits to watch"):
        fit(networks(1)[0], Nothing(), data(1))


@pytest.mark.parametrize("guard_first", [False, True])
def test_a_resumed_run_compares_with_the_unedited_model(guard_first, tmp_path):
    whole, first, second = networks(3)
    everything = Readings(**limits(3), action="warn")
    fit(whole, update(), data(), callbacks=[everything])
    early, late = Readings(**limits(3), action="warn"), Readings(**limits(3), action="warn")
    early.events = [{"batch": 0, "requests": [], "crossed": [], "action": "warn"}]
    saved = tmp_path / "two.ckpt"
    fit(first, update(), data(), callbacks=[early, SaveAfter(2, saved)])
    second.ordinary_loss, calls = counted(second.ordinary_loss)
    callbacks = [update(), late]
    main, other = reversed(callbacks) if guard_first else callbacks
    fit(second, main, data(), callbacks=[other], ckpt_path=saved)
    assert late.all == [pytest.approx(read, rel=1e-5) for read in everything.all[2:]]
    assert [event["batch"] for event in late.events] == [0, 3]
    kept = EditGuard()
    kept.load_state_dict(early.state_dict())
    assert kept.readings == early.readings != {}
    assert len(calls) == 2  # once a batch: the unedited model's loss came with the checkpoint


def counted(function):
    calls: list[None] = []

    def wrapper():
        calls.append(None)
        return function()

    return wrapper, calls


def test_a_model_that_was_edited_before_is_not_taken_for_the_unedited_one_in_silence():
    (network,) = networks(1)
    callback = update()
    fit(network, callback, data()[:1])
    with pytest.warns(UserWarning, match="holds 1 edit batches"):
        fit(network, callback, data()[1:2], callbacks=[EditGuard()])


def test_another_callback_may_reject_as_well():
    """Lightning goes on, or stops, whoever refuses."""

    class Refuse(EditGuard):
        def on_edit_written(self, trainer, module, record):
            raise EditRejected("not today", stop=False)

    (network,) = networks(1)
    before = weights(network)
    fit(network, update(), data(2), callbacks=[Refuse("off")])
    assert equal(weights(network), before)


# A language model


class Facts(EditDataModule):
    """A data module that offers control facts and nothing else."""

    def __init__(self, controls: list[Any]) -> None:
        super().__init__()
        self._controls = controls


def test_ordinary_loss_is_the_mean_over_the_first_tokens_of_the_corpus():
    """Against one pass over each window, by hand."""
    module = edit_module("almanac")
    text = (ROOT / "src/lightning_blue/assets/almanac/corpus.txt").read_text()
    tokenizer = module.tokenizer
    ids = tokenizer(text[:20000], add_special_tokens=False)["input_ids"][:1024]
    start = tokenizer("")["input_ids"]
    length = min(512, module.model.config.max_position_embeddings)
    step = length - len(start) if start else length - 1
    losses = []
    for begin in range(0, len(ids) - (not start), step):
        window = torch.tensor([start + ids[begin : begin + length - len(start)]])
        scores = module.model(window).logits[0].log_softmax(-1)
        first = max(len(start), 1)
        losses.append(-scores[first - 1 : -1].gather(1, window[0, first:, None]))
    assert module.ordinary_loss() == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_what_is_not_finite_has_no_norm():
    assert math.isnan(spectral_norm(torch.tensor([[math.nan, 1.0]])))


def test_only_the_beginning_of_a_corpus_is_read(gpt2, monkeypatch):
    read: list[str] = []

    def rows(corpus, split):
        for n in range(10**9):
            read.append(f"The river runs through town {n}. ")
            yield read[-1]

    monkeypatch.setattr(health, "corpus_texts", rows)
    text = health.first_texts(gpt2.tokenizer, "hub/corpus", "train", 100)
    assert text == "".join(read)
    assert 100 <= len(gpt2.tokenizer(text)["input_ids"]) < 130


def test_a_corpus_that_cannot_be_read_is_told_and_not_watched(gpt2, tmp_path):
    with pytest.warns(UserWarning, match="not watched"):
        assert health.first_texts(gpt2.tokenizer, str(tmp_path / "no.txt"), "train") is None


def test_retained_knowledge_counts_the_first_hundred_control_facts(monkeypatch):
    module = edit_module("almanac")
    data = EditDataModule("almanac", edits=5, controls=120)
    data.prepare()
    wrong = Probe(data.controls[0].prompt, "nowhere")
    facts = [wrong, *data.controls]
    known = score_targets(
        module.model, module.tokenizer, [f.prompt for f in facts], [f.answer for f in facts]
    )
    expected = sum(all(score.correct) for score in known[:100])
    assert 50 < expected < 100
    assert health.percent_known(module.model, module.tokenizer, facts) == expected
    assert health.percent_known(module.model, module.tokenizer, []) is None


COLLAPSE = (  # the classic plan, hardly any weight on ordinary text, and targets far away
    "--update.plan=even",
    "--update.past_keys=false",
    "--update.covariance_weight=1",
    "--model.target.steps=4",
    "--model.target.learning_rate=80",
    "--model.target.clamp=1000",
    "--model.target.weight_decay=0",
    "--data.batch_size=10",
    "--data.edits=100",
    "--data.controls=100",
)


def test_a_run_that_collapses_ends_with_the_last_healthy_weights(tmp_path, monkeypatch, capsys):
    committed: deque[list[torch.Tensor]] = deque(maxlen=1)

    def keep(self, trainer, module, record):
        weights = [module.editable_weights.read(change.weight) for change in record.changes]
        committed.append([weight.clone() for weight in weights])

    monkeypatch.setattr(EditGuard, "on_edit_committed", keep, raising=False)
    quiet = ["--measure.generate=false", "--measure.text=null", "--run.wandb=off"]
    args = [*COLLAPSE, *quiet, f"--run.root={tmp_path}", "--run.checkpoint_every=0"]
    with pytest.warns(UserWarning, match="the run ends with the batches before it"):
        assert main(["fit", f"--config={ROOT / 'conf' / 'quickstart.yaml'}", *args]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "quickstart"
    summary = json.loads((folder / "summary.json").read_text())
    batch = int(re.search(r"guard: batch (\d+) crossed", out)[1])
    assert summary["guard/events"] == 1
    assert 3 <= batch <= 8
    assert summary["edits/applied"] == 10 * batch
    text = (folder / "report.md").read_text()
    assert "## Guard" in text
    assert f"| {batch} " in text
    model, _ = load_model(folder / "model")
    exported = [model.model.layers[n].mlp.down_proj.weight for n in range(4)]
    assert equal(exported, committed[0])


def test_off_on_the_command_line_and_in_a_file(tmp_path, capsys):
    (tmp_path / "off.yaml").write_text("guard:\n  action: 'off'\n")
    for flag in ("--guard.action=off", f"--config={tmp_path / 'off.yaml'}"):
        with pytest.raises(SystemExit):
            main(["fit", f"--config={ROOT / 'conf' / 'quickstart.yaml'}", flag, "--print_config"])
        assert re.search(r"guard:\n  action: ['\"]?off", capsys.readouterr().out)


# Files


def test_report_and_summary_tell_of_events():
    history = small_history()
    crossed = [{"reading": "loss_increase", "value": math.nan, "limit": 1.0}]
    event = {"batch": 1, "requests": ["c2", "c3"], "crossed": crossed, "action": "rollback"}
    assert "guard/events" not in files.summary(history)
    history.guard_events = []
    assert files.summary(history)["guard/events"] == 0
    assert "## Guard" not in report(history, [], None)
    history.guard_events = [event] * 25
    assert files.summary(history)["guard/events"] == 25
    section = report(history, [], None).split("## Guard")[1].split("##")[0]
    assert "c2, c3" in section
    assert "loss\\_increase nan (limit 1)" in section
    assert "and 5 more" in section
