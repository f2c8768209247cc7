"""``tune``: trials are what `edit` does, leave nothing, and are made once; the run file says it."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from blue_callbacks import NonFiniteError
from conftest import CORPUS, LanguageModel
from helpers import brief_run
from lightning_blue import edit
from lightning_blue.__main__ import main
from lightning_blue.cli.found import of_tuning
from lightning_blue.cli.written import flat
from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.editing import covariance
from lightning_blue.editing.covariance import CovarianceSource
from lightning_blue.editing.health import known
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.optimization import TargetOptimization
from lightning_blue.editing.targets import TargetFinder
from lightning_blue.language_model.next_tokens import ask
from lightning_blue.language_model.scoring import TargetScore
from lightning_blue.metrics import table
from lightning_blue.metrics.ratings import Answer
from lightning_blue.preflight.timing import Rates
from lightning_blue.tuning import estimate, space
from lightning_blue.tuning.halving import Trial, best, halve, ranked, rounds, without_tuning
from lightning_blue.tuning.objective import Measured, components, soft
from lightning_blue.tuning.space import Choice, Space, draw, laid_out, windows
from lightning_blue.tuning.workbench import Facts, Workbench

NAMES = [
    "Lyon",
    "Zoë",
    "José",
    "Basel",
    "Paris",
    "Rome",
    "Berlin",
    "Madrid",
    "London",
    "Tokyo",
    "Oslo",
    "Kraków",
]
FACTS = [
    {
        "subject": name,
        "prompt": "{} is near",
        "target_new": NAMES[(place + 3) % 12],
        "target_true": NAMES[(place + 5) % 12],
        "paraphrases": [f"They say {name} is close to"],
        "neighborhood_prompts": [
            {"prompt": f"{NAMES[(place + 1) % 12]} is near", "answer": NAMES[(place + 6) % 12]}
        ],
    }
    for place, name in enumerate(NAMES)
]
WHOLE = Space(
    tuple(windows(30, range(30))),
    (0.5, 0.125, 0.25, 1.0),
    (0.75, 0.5, 1.5, 3.0),
    (1.0, 0.1, 0.3, 3.0, 10.0),
)


# What is tried


def test_layers_are_windows_that_can_be_written():
    for n_layers in range(1, 100):
        found = windows(n_layers, range(n_layers))
        assert found == list(dict.fromkeys(found))
        for each in found:
            assert list(each) == list(range(each[0], each[-1] + 1))
            assert each[0] >= 0
            assert each[-1] <= max(0, n_layers - 2)  # a block above reads what was written
    assert windows(8, [2, 4]) == [(2, 4), (4,), (2,)]
    assert (12, 13, 14, 15, 16) in windows(48, range(48))  # GPT2-XL's 13 to 17, but for one
    for plan in ("boundary", "even", "computed"):
        assert len(laid_out(plan, WHOLE.layers)) == len(WHOLE.layers)
    assert laid_out("last", WHOLE.layers) == [(8,), (6,), (10,), (12,)]


@pytest.mark.parametrize("seed", range(5))
def test_combinations_are_spread_and_the_same_for_all_plans(seed):
    drawn = draw(WHOLE, 24, seed)
    assert len(set(drawn)) == 24
    assert drawn[0] == WHOLE.untuned
    groups = [key for key, _ in itertools.groupby(drawn, lambda choice: choice.targets)]
    assert len(groups) == len(set(groups)) == 8  # those of the same targets follow each other
    for axis in ("first_step", "clamp"):
        counts = Counter(dict(zip(Choice._fields, group, strict=False))[axis] for group in groups)
        assert max(counts.values()) <= 3
        assert len(counts) == 4
    boundary = WHOLE._replace(layers=tuple(laid_out("boundary", WHOLE.layers)))
    for one, other in zip(drawn, draw(boundary, 24, seed), strict=True):
        assert other == one._replace(layers=(one.layers[0], one.layers[-1]))


def test_a_small_space_is_tried_whole():
    small = WHOLE._replace(layers=((4, 8),), first_steps=(None,), clamps=(0.75, 1.5))
    drawn = draw(small, small.size, 0)
    assert len(drawn) == len(set(drawn)) == small.size == 10
    assert drawn[0] == small.untuned


def test_halving_finds_the_best_and_keeps_what_is_untuned():
    """On a score that more facts say more exactly; the untuned choice is the worst."""
    choices = draw(WHOLE, 24, 1)
    worth = {choice: 40 + 2 * place for place, choice in enumerate(choices)}
    asked: list[tuple[int, int, Choice]] = []

    def run(number: int, facts: int, choice: Choice) -> Trial:
        asked.append((number, facts, choice))
        blurred = worth[choice] + 12 / facts * (-1) ** choices.index(choice)
        return Trial(number, facts, choice, Measured({"efficacy": blurred}))

    trials = halve(choices, 16, run)
    assert [Counter(n for n, _, _ in asked)[n] for n in range(3)] == [24, 9, 4]
    assert {(n, facts) for n, facts, _ in asked} == {(0, 4), (1, 8), (2, 16)}
    assert best(trials).choice == choices[-1]
    assert without_tuning(trials).choice == choices[0]
    assert without_tuning(trials).facts == 16


def test_equal_trials_leave_what_is_decided_without_tuning():
    trials = halve(WHOLE and draw(WHOLE, 9, 0), 8, lambda n, f, c: Trial(n, f, c, Measured({})))
    assert best(trials) == without_tuning(trials)


def test_of_equal_trials_those_nearer_to_what_is_decided_without_tuning_go_on():
    untuned = WHOLE.untuned
    far = untuned._replace(layers=WHOLE.layers[1], clamp=3.0, weight=10.0)
    near, nearer = far._replace(weight=untuned.weight), far._replace(layers=untuned.layers, clamp=3)
    nearest = untuned._replace(weight=10.0)
    worse = untuned._replace(clamp=1.5)
    scores = {untuned: 40.0, far: 50.0, near: 50.0, nearer: 50.0, nearest: 50.0, worse: 49.0}

    def tried(choices: list[Choice]) -> list[Choice]:
        made = [Trial(0, 2, each, Measured({"efficacy": scores[each]})) for each in choices]
        return [trial.choice for trial in ranked(made)]

    expected = [nearest, near, nearer, far, worse, untuned]
    assert tried([untuned, far, near, nearer, nearest, worse]) == expected
    drawn_otherwise = [nearest, nearer, near, far, worse, untuned]
    assert tried([untuned, worse, nearest, nearer, near, far]) == drawn_otherwise


@pytest.mark.parametrize(("trials", "facts"), itertools.product((1, 3, 4, 9, 24, 100), (2, 5, 16)))
def test_rounds_end_on_all_facts(trials, facts):
    laid = rounds(trials, facts)
    assert laid[0].trials == trials
    assert laid[-1].facts == facts
    assert [each.facts for each in laid] == sorted({each.facts for each in laid})


def test_the_score_is_the_harmonic_mean_of_what_was_measured():
    metrics = {
        "efficacy": {"value": 80.0},
        "generalization": {"value": 40.0},
        "specificity": {"value": 50.0},
        "retained_knowledge": {"value": 100.0},
        "perplexity": {"value": 3.0},
    }
    whole = Measured(components(metrics, 9.0))
    assert whole.score == pytest.approx(4 / (1 / 80 + 1 / 40 + 1 / 50 + 1 / 100))
    without = {name: value for name, value in metrics.items() if name != "specificity"}
    assert "ordinary_text" not in components(without, 9.0)
    del without["retained_knowledge"]
    assert components(without, 0.5)["ordinary_text"] == pytest.approx(60.653066)
    assert components(without, -0.5)["ordinary_text"] == 100  # no reward for a better text
    assert components(without, float("nan"))["ordinary_text"] == 0
    assert Measured({"efficacy": 0.0, "specificity": 50.0}).score == 0
    assert Measured({}, failure="not finite").score == 0


def test_the_estimate_adds_up():
    rates = Rates(
        target=8.0,
        key=0.5,
        covariance_token=0.01,
        factor=2.0,
        question=1.0,
        text=0,
        written=0,
        scored_token=0,
    )
    choices = [Choice((4, 8), 0.5, 0.75, weight) for weight in (1.0, 3.0)]
    choices.append(Choice((2, 6), 0.5, 0.75, 1.0))
    total = estimate.seconds(choices, 8, 12, "boundary", rates, tokens=100, covariances=4)
    # one round of three trials on eight facts, two of which share the first layer's targets
    by_hand = 100 * 0.01 * 2 + 8 * 4.0 * (2 + 3 / 4) + 3 * (8 * 0.5 + 1.0 * (8 + 2) + 2 * 2.0)
    assert total == pytest.approx(by_hand)


def test_what_is_left_is_told_from_what_was_made():
    choices = [Choice((4, 8), 0.5, 0.75, weight) for weight in (1.0, 3.0)]
    choices += [Choice((2, 6), 0.5, clamp, 1.0) for clamp in (0.5, 0.75)]
    first = Measured({}, seconds=10.0, target_seconds=8.0)  # on two facts: 4 and 1 a fact
    done = [Trial(0, 2, choices[0], first)]
    # three trials on two facts, of two further kinds of targets; two on eight facts
    assert estimate.seconds_left(done, choices, 8) == 2 * (3 * 1 + 2 * 4) + 8 * (2 * 1 + 2 * 4)
    done += [Trial(0, 2, choice, first) for choice in choices[1:]]
    done += [Trial(1, 8, choice, first) for choice in choices[:3]]
    assert estimate.seconds_left(done, choices, 8) == 0


def test_of_equal_successes_the_probabilities_decide():
    """Two requests: shares of the wanted object by hand, prompts of a request averaged first."""

    def answer(request: int, prompts: str, wanted: float, other: float | None) -> Answer:
        scores = [None if nll is None else TargetScore(nll, (True,)) for nll in (wanted, other)]
        return Answer(request, prompts, scores[0], scores[1])

    answers = [
        answer(0, table.OWN_PROMPT, -math.log(0.3), -math.log(0.1)),
        answer(1, table.OWN_PROMPT, -math.log(0.2), -math.log(0.2)),
        answer(0, table.PARAPHRASES, -math.log(0.9), -math.log(0.1)),
        answer(0, table.PARAPHRASES, -math.log(0.1), -math.log(0.3)),
        answer(1, table.PARAPHRASES, -math.log(0.6), None),
        answer(1, table.NEIGHBOURS, math.inf, 1.0),
    ]
    shares = soft(answers)
    assert shares["efficacy"] == pytest.approx(100 * (0.75 + 0.5) / 2)
    assert shares["generalization"] == pytest.approx(100 * ((0.9 + 0.25) / 2 + 0.6) / 2)
    assert shares["specificity"] == 0
    same = {"efficacy": 100.0, "retained_knowledge": 80.0}
    one, other = (Measured(same, {"efficacy": value}) for value in (60.0, 70.0))
    assert one.score == other.score
    assert other.soft_score == pytest.approx(2 / (1 / 70 + 1 / 80))
    assert other.rank > one.rank


# Trials


REQUESTS = [
    EditRequest(
        f"r{place}",
        fact["prompt"],
        fact["subject"],
        fact["target_new"],
        fact["target_true"],
        paraphrases=tuple(fact["paraphrases"]),
        neighborhood=tuple(Probe(**each) for each in fact["neighborhood_prompts"]),
    )
    for place, fact in enumerate(FACTS)
]
STEPS = 5


def answered(language_model: LanguageModel) -> list[Probe]:
    """Facts that a model answers: what it says next of all that it may be asked."""
    prompts = [f"{name} {word}" for name in NAMES for word in ("is", "in", "was", "plays the")]
    said = ask(*language_model, prompts, 1)
    facts = [Probe(p, a.continuation, "") for p, a in zip(prompts, said, strict=True)]
    usable = [fact for fact in facts if fact.answer.strip()]
    return [f for f, yes in zip(usable, known(*language_model, usable), strict=True) if yes]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(CORPUS * 12))
    return path


def bench_of(
    language_model: LanguageModel, text: Path, folder: Path, plan: str = "boundary", **more: Any
) -> Workbench:
    own = CovarianceSource(str(text), tokens_per_dim=8, cache=None)
    module = EditModule(
        *copy.deepcopy(language_model),
        target=TargetOptimization(steps=STEPS),
        contexts=["It is said."],
        covariance=more.pop("covariance", own),
        seed=0,
        export_dtype=more.pop("export_dtype", None),
    )
    facts = Facts(more.pop("requests", REQUESTS), more.pop("controls", []), "counterfact")
    bench = Workbench(
        module,
        {"plan": plan, "covariance_weight": None, **more},
        facts,
        folder,
        trainer={"accelerator": "cpu"},
    )
    bench.measure_site([0, 1, 2])
    bench.prepare([0, 1, 2])
    return bench


def bits(module: EditModule) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(("plan", "saved_in"), [("boundary", None), ("even", "bfloat16")])
def test_a_trial_is_what_edit_does_and_leaves_nothing(
    language_model, text, tmp_path, plan, saved_in, monkeypatch
):
    """The weights that are measured are those of `edit` with the same settings, to the bit."""
    bench = bench_of(language_model, text, tmp_path, plan, export_dtype=saved_in)
    before, edited = bits(bench.module), []
    measured = Workbench._measured
    monkeypatch.setattr(
        Workbench,
        "_measured",
        lambda self, count: edited.append(bits(self.module)) or measured(self, count),
    )
    layers = laid_out(plan, [(0, 1, 2)])[0]
    kind = Choice(layers, 1.0, 0.5, 3.0)
    first = bench.run(0, 6, kind)
    other = bench.run(0, 6, kind._replace(weight=0.3))  # its first targets are those of the first
    assert same(bits(bench.module), before)
    for trial, weights in zip((first, other), edited, strict=True):
        reference = edit(
            *copy.deepcopy(language_model),
            FACTS[:6],
            plan=plan,
            layers=list(layers),
            first_step=1.0,
            clamp=0.5,
            covariance_weight=trial.choice.weight * 96,
            steps=STEPS,
            contexts=["It is said."],
            tokens_per_dim=8,
            corpus=str(text),
            batch_size=6,
            action="off",
            export_dtype=saved_in,
            progress=False,
        )
        assert same(weights, dict(reference.model.state_dict()))
        assert not same(weights, before)
        scores = {name: each["after"] for name, each in reference.scores.items()}
        assert {name: scores[name] for name in trial.measured.components} == (
            trial.measured.components
        )
    assert not same(*edited)


def test_what_trials_share_is_made_once(llama, text, tmp_path, monkeypatch):
    collected, found = [], []
    collect, find = covariance.collect_covariance, TargetFinder.find
    monkeypatch.setattr(
        covariance,
        "collect_covariance",
        lambda model, places, *more: collected.extend(places) or collect(model, places, *more),
    )
    monkeypatch.setattr(TargetFinder, "find", lambda *args: found.append(args[-1]) or find(*args))
    bench = bench_of(llama, text, tmp_path)
    for layers, weight in (((0, 2), 1.0), ((0, 2), 3.0), ((1, 2), 3.0)):
        bench.run(0, 2, Choice(layers, 0.5, 0.75, weight))
    assert sorted(collected) == [0, 1, 2]
    assert found == [0, 2, 2, 1, 2]
    bench.run(0, 2, Choice((0, 1), 0.5, 0.75, 3.0))  # its first targets are known
    assert found.pop() == 1
    assert len(found) == 5
    bench.run(0, 3, Choice((1, 2), 0.5, 0.75, 3.0))  # other facts have other targets
    assert found[5:] == [1, 2]


def test_a_trial_that_fails_scores_nothing_and_leaves_nothing(llama, text, tmp_path, monkeypatch):
    bench = bench_of(llama, text, tmp_path)
    before = bits(bench.module)
    find = TargetFinder.find

    def fails(self, prompts, groups, layer):
        if layer == 2:
            raise NonFiniteError("a loss is not finite\n  hint:  none")
        return find(self, prompts, groups, layer)

    monkeypatch.setattr(TargetFinder, "find", fails)
    trial = bench.run(0, 2, Choice((0, 2), 0.5, 0.75, 1.0))
    assert trial.measured.failure == "a loss is not finite"
    assert trial.measured.score == 0
    assert same(bits(bench.module), before)


def test_finished_trials_are_known_by_all_that_they_depend_on(llama, text, tmp_path, monkeypatch):
    kind = Choice((0, 2), 0.5, 0.75, 1.0)
    first = bench_of(llama, text, tmp_path).run(0, 2, kind)
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr(Workbench, "_tried", lambda *_: Measured({"efficacy": 1.0}))
    assert bench_of(llama, text, tmp_path).run(1, 2, kind) == first._replace(round=1)
    others = [
        bench_of(llama, text, tmp_path).run(0, 3, kind),
        bench_of(llama, text, tmp_path).run(0, 2, kind._replace(clamp=0.7)),
        bench_of(llama, text, tmp_path).run(0, 2, kind._replace(first_step=0.4)),
        bench_of(llama, text, tmp_path).run(0, 2, kind._replace(weight=2.0)),
        bench_of(llama, text, tmp_path, "even").run(0, 2, kind),
        bench_of(llama, text, tmp_path, rect_keep=0.4).run(0, 2, kind),
        bench_of(llama, text, tmp_path, controls=[Probe("Lyon is", "x")]).run(0, 2, kind),
        bench_of(llama, text, tmp_path, requests=REQUESTS[1:]).run(0, 2, kind),
    ]
    assert all(other.measured.components == {"efficacy": 1.0} for other in others)
    brought = tmp_path / "brought.safetensors"
    for scale in (1.0, 2.0):  # statistics from elsewhere, by their content
        save_file({f"layer{n}": scale * torch.eye(96) for n in range(3)}, brought)
        source = CovarianceSource(path=str(brought), trust=True)
        others.append(bench_of(llama, text, tmp_path, covariance=source).run(0, 2, kind))
        trials = len(list(tmp_path.glob("*.json")))
        bench_of(llama, text, tmp_path, covariance=source).run(0, 2, kind)
        assert len(list(tmp_path.glob("*.json"))) == trials
    assert trials == 1 + len(others)
    file.write_text("{")  # damaged: made again
    assert bench_of(llama, text, tmp_path).run(0, 2, kind).measured.components == {"efficacy": 1.0}


def test_control_facts_are_a_part_of_the_score(llama, text, tmp_path):
    controls = answered(llama)
    assert len(controls) >= 3
    bench = bench_of(llama, text, tmp_path, controls=controls)
    assert bench.unedited(2).components["retained_knowledge"] == 100
    ruined = bench.run(0, 4, Choice((0, 1, 2), 1.0, 30.0, 1e-6)).measured
    assert ruined.components["retained_knowledge"] < 100


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama, text) -> Path:
    """A model, and facts of which one cannot be used and one is doubled."""
    folder = tmp_path_factory.mktemp("tune")
    model, tokenizer = llama
    model.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    (folder / "facts.json").write_text(json.dumps([FACTS[0], *FACTS]))
    (folder / "bare.json").write_text(
        json.dumps([{k: f[k] for k in ("subject", "prompt", "target_new")} for f in FACTS])
    )
    return folder


def flags(folder: Path, text: Path) -> list[str]:
    return [
        "--data.on_unusable=skip",
        *brief_run(text, folder / "stats"),
        "--run.wandb=off",
    ]


@pytest.fixture(scope="module")
def command(folder, text):
    """Run a command in the folder; return exit code, output and error."""

    def go(name: str, *args: str, data: str = "facts.json", model: str = "llama"):
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr("lightning_blue.preflight.timing.SECONDS", 0.02)
            patch.setattr("lightning_blue.preflight.timing.FEW", 2)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                given = [model, "--data", data, *flags(folder, text)]
                code = main([name, *([] if name == "fit" else given), *args])
        return code, out.getvalue(), err.getvalue()

    return go


TUNE = ("--trials=5", "--facts=4")


@pytest.fixture(scope="module")
def tuned(command):
    """Facts were tuned on once: what it said."""
    code, out, err = command("tune", *TUNE)
    assert code == 0, err
    return out


def result(folder: Path, name: str = "llama_facts_boundary") -> dict[str, Any]:
    return json.loads((folder / "tuned" / name / "tune.json").read_text())


def test_it_says_what_it_does_line_by_line(tuned, folder):
    lines = tuned.splitlines()
    assert lines[0] == (
        "tuned on 4 facts, usable ones from data.offset = 0 on; 8 are left behind data.offset = 5"
    )
    assert lines[1].startswith("control facts: 0 that the model answers, of 8 asked; retained")
    assert re.fullmatch(
        r"5 combinations of settings: 5 on 2, then 2 on 4 facts; .+ to .+", lines[2]
    )
    trials = [line for line in lines if line.startswith("trial ")]
    assert len(trials) == len(result(folder)["trials"])
    for line in trials:
        assert re.fullmatch(
            r"trial \d, \d facts: layers [\d, -]+, step [\d.]+, clamp [\d.]+, weight [\d.]+: "
            r"score [\d.]+ \(efficacy \d+, generalization \d+, specificity \d+\), [\d.]+ s"
            r"(; about .+ left)?",
            line,
        )
    assert lines[-1] == "next: lightning-blue fit --config=tuned/llama_facts_boundary/run.yaml"


def test_the_files_say_what_was_tried(tuned, folder):
    found, place = result(folder), folder / "tuned" / "llama_facts_boundary"
    with (place / "tune.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found["trials"])
    last = [row for row in rows if row["round"] == "2"]
    chosen = max(last, key=lambda row: float(row["score"]))
    assert found["score"]["tuned"]["score"] == pytest.approx(float(chosen["score"]), abs=0.01)
    assert found["score"]["tuned"]["score"] >= found["score"]["untuned"]["score"]
    assert (place / "tune.png").read_bytes().startswith(b"\x89PNG")
    head = (place / "run.yaml").read_text().partition("\nseed_everything")[0]
    assert all(line.startswith("#") for line in head.splitlines() if line)
    assert sum(line.startswith("# | ") for line in head.splitlines()) == len(rows) + 2


def test_the_run_file_edits_what_was_not_tuned_on(tuned, folder, command):
    values = flat(yaml.safe_load((folder / "tuned/llama_facts_boundary/run.yaml").read_text()))
    found = result(folder)
    for key, value in found["settings"].items():
        assert values[key] == value
    assert set(found["settings"]) == {
        "update.layers",
        "update.covariance_weight",
        "model.target.first_step",
        "model.target.clamp",
    }
    assert values["data.offset"] == 5
    assert values["update.plan"] == "boundary"
    code, out, err = command("fit", "--config=tuned/llama_facts_boundary/run.yaml")
    assert code == 0, err
    run = folder / Path(out.rpartition("report: ")[2].strip()).parent
    edits = [json.loads(line) for line in (run / "edits.jsonl").read_text().splitlines()]
    assert [edit["subject"] for edit in edits] == NAMES[4:]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["edits/applied"] == 8


class Stop(BaseException):
    """As a signal."""


def comparable(place: Path) -> tuple[Any, ...]:
    found = json.loads((place / "tune.json").read_text())
    trials = [
        {k: v for k, v in row.items() if not k.endswith("seconds")} for row in found["trials"]
    ]
    return found["settings"], found["score"], trials


def test_it_goes_on_where_it_was_stopped(tuned, folder, command, monkeypatch):
    tried, made = Workbench._tried, []

    def counted(self, choice, count):
        if len(made) == 3:
            raise Stop
        made.append(choice)
        return tried(self, choice, count)

    monkeypatch.setattr(Workbench, "_tried", counted)
    with pytest.raises(Stop):
        command("tune", *TUNE, "--output=stopped")
    assert not (folder / "stopped" / "tune.json").exists()
    more: list[Choice] = []
    monkeypatch.setattr(
        Workbench, "_tried", lambda self, *args: more.append(args[0]) or tried(self, *args)
    )
    code, out, err = command("tune", *TUNE, "--output=stopped")
    assert code == 0, err
    assert out.count("made before") == 3
    assert len(more) == len(result(folder)["trials"]) - 3
    assert comparable(folder / "stopped") == comparable(folder / "tuned/llama_facts_boundary")


def test_what_is_given_is_not_tuned(command, folder):
    given = [
        "--update.layers=[0,1]",
        "--model.target.learning_rate=0.2",
        "--model.target.clamp=0.75",
        "--update.solver=null_space",
        "--update.energy=0.5",
    ]
    code, out, err = command("tune", *TUNE, "--plan=even", "--output=given", *given)
    assert code == 0, err
    assert "layers 0, 1, step given, clamp given, weight given" in out
    text = (folder / "given" / "run.yaml").read_text()
    assert "learning_rate: 0.2  # given" in text
    assert "clamp: 0.75  # default" in text
    assert json.loads((folder / "given" / "tune.json").read_text())["settings"] == {
        "update.layers": [0, 1]
    }


def test_facts_without_neighbours_and_controls_are_weighed_against_text(command, folder):
    code, out, err = command("tune", "--trials=1", "--facts=2", "--output=bare", data="bare.json")
    assert code == 0, err
    assert "the loss on ordinary text is" in out
    assert "ordinary text 100)" in out  # unedited
    assert "note: the facts have no neighbours: ordinary text" in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--facts=12"], "none would be left to edit"),
        (["--facts=1"], "too few to tune on"),
        (["--data.offset=10"], "too few to tune on"),
        (["--trials=0"], "--trials"),
        (["--plan=blue"], "--plan"),
        (["--update.layers=[9]"], "layer"),
        (["--trainer.devices=2"], "one process"),
        (["--update.solver=fine_tuning"], "updates in closed form"),
        (["--output=mine"], "no tune.json beside it"),
        (["--from=nothing"], "neither locate.json nor tune.json"),
    ],
)
def test_bad_input_is_one_message_and_no_run_file(command, folder, args, said):
    (folder / "mine").mkdir(exist_ok=True)
    (folder / "mine" / "run.yaml").write_text("mine")
    output = [] if any("output" in arg for arg in args) else ["--output=bad"]
    code, _, err = command("tune", *args, *output)
    assert code == 2
    assert said in err
    assert err.count("error: ") == 1
    assert not (folder / "bad" / "run.yaml").exists()
    assert (folder / "mine" / "run.yaml").read_text() == "mine"


# What `init` makes of it


def init(command, folder: Path, *args: str) -> tuple[int, str, str]:
    code, out, err = command("init", "--force", "--output=init.yaml", *args)
    return code, (folder / "init.yaml").read_text() if code == 0 else out, err


def test_init_takes_what_tune_found(tuned, command, folder):
    code, text, err = init(command, folder)
    assert code == 0, err
    found, values = result(folder), flat(yaml.safe_load(text))
    for key, value in found["settings"].items():
        assert values[key] == value
    assert values["data.offset"] == 5
    assert values["model.target.learning_rate"] is None
    for source in (
        "tuned, from tuned/llama_facts_boundary/tune.json",
        "behind the 4 facts that settings were chosen on, from tuned",
        "null: first_step says it",
    ):
        assert source in re.sub(r"\s*\n\s*# ", " ", text)
    code, text, err = init(command, folder, "--model.target.clamp=2.0", "--data.offset=0")
    assert code == 0, err
    assert flat(yaml.safe_load(text))["data.offset"] == 0
    assert "clamp: 2.0  # given" in text
    code, text, err = init(command, folder, "--from", "none")
    assert code == 0, err
    assert "tuned" not in text
    assert flat(yaml.safe_load(text))["data.offset"] == 0


def test_the_offset_holds_for_every_spelling_of_the_same_facts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("facts.csv", "others.csv"):
        (tmp_path / name).write_text("")
    content = {"settings": {}, "plan": "even", "data": "facts.csv", "facts": 4, "offset": 5}
    for same in ("facts.csv", "./facts.csv", "~/facts.csv", str(tmp_path / "facts.csv")):
        assert of_tuning(content, None, same)["data.offset"].value == 5
    for other in ("others.csv", "me/facts.csv"):
        assert "data.offset" not in of_tuning(content, None, other)


def test_init_takes_layers_from_locate_unless_tune_measured_them(tuned, command, folder):
    located = folder / "found"
    located.mkdir(exist_ok=True)
    content = {"model": "llama", "layers": [1, 2], "more": "of its own"}
    (located / "locate.json").write_text(json.dumps(content))
    code, text, err = init(command, folder, "--from=found")
    assert code == 0, err
    assert "layers: [1, 2]  # located, from found/locate.json" in text
    code, text, err = init(command, folder, "--from=found", "--from=tuned/llama_facts_boundary")
    assert code == 0, err
    layers = result(folder)["layers"]
    assert flat(yaml.safe_load(text))["update.layers"] == layers


def test_tune_tries_what_locate_proposes(command, folder):
    (folder / "found2").mkdir()
    (folder / "found2" / "locate.json").write_text(json.dumps({"model": "llama", "layers": [0]}))
    quick = ("--trials=1", "--facts=2", "--output=with", "--from=found2")
    code, _, err = command("tune", *quick)
    assert code == 0, err
    found = json.loads((folder / "with" / "tune.json").read_text())
    assert found["space"]["layers"] == [[0, 2], [1, 2], [2], [0]]


@pytest.mark.parametrize(
    ("content", "args", "said"),
    [
        ({"model": "gpt2", "layers": [1]}, [], "found for the model 'gpt2'"),
        ({"model": "llama"}, [], "cannot be read"),
        ("tuned", ["--update.plan=even"], "tuned for the plan 'boundary'"),
    ],
)
def test_init_refuses_what_was_found_for_something_else(
    tuned, command, folder, tmp_path, content, args, said
):
    place = tmp_path / "x"
    place.mkdir()
    if content == "tuned":
        place = folder / "tuned/llama_facts_boundary"
    else:
        (place / "locate.json").write_text(json.dumps(content))
    code, _, err = init(command, folder, f"--from={place}", *args)
    assert code == 2
    assert said in err


def test_the_documented_space_is_the_one_that_is_tried():
    page = (Path(__file__).parents[1] / "docs" / "tune.md").read_text()
    for values in (space.FIRST_STEPS, space.CLAMPS, space.WEIGHTS):
        assert ", ".join(f"{value:g}" for value in values) in page
