"""General ability: lm-evaluation-harness's own figures, through the measurements of a run.

What needs the harness is skipped where it is missing (``pip install 'lightning-blue[ability]'``);
settings, errors and how answers are read are tested without it.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import LanguageModel
from helpers import write_jsonl
from histories import estimate, small_history
from lightning_blue import edit
from lightning_blue.ability import AbilitySettings, GeneralAbility, paper
from lightning_blue.ability import harness as harness_module
from lightning_blue.ability.group_files import read_group, tasks_named
from lightning_blue.ability.jackknife import jackknife_error
from lightning_blue.comparison import presented
from lightning_blue.comparison.curves import curves, figures
from lightning_blue.comparison.runs import read_runs
from lightning_blue.comparison.scores import Estimate, score_tables
from lightning_blue.metrics import table
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.metrics.history import Measurement, RunHistory
from lightning_blue.reporting.axes import fitted
from lightning_blue.reporting.export import caution
from lightning_blue.reporting.page.charts import course_charts
from lightning_blue.reporting.plots import metrics_figure
from lightning_blue.reporting.tables import legend, score_table
from lightning_blue.support.errors import InputError
from test_compare import make_run, values
from test_lightning import corpus, data_of, facts, module, trainer_of  # noqa: F401  (fixtures)
from test_resume import Crash, run

EPS = torch.finfo(torch.float32).eps
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{{{{town}}}} lies in"
doc_to_target: {target}
{more}
"""
OWN = {"include_defaults": False}  # an index of all tasks of the harness takes seconds
TOWNS = ["Basel", "Lyon", "Rome", "Oslo", "Paris", "Berlin", "Tokyo", "Madrid", "London", "Kraków"]


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    """The harness, with the part that it imports late."""
    pytest.importorskip("lm_eval.tasks", reason="lm-evaluation-harness: lightning-blue[ability]")
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two tasks on a local file: a choice among two, and the perplexity of a continuation."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"town": town, "label": i % 2, "rest": "Europe"} for i, town in enumerate(TOWNS)]
    write_jsonl(folder / "towns.jsonl", rows)
    choice = 'doc_to_choice: ["France", "the town of Basel"]\nmetric_list:\n'
    choice += "".join(
        f"  - metric: {metric}\n    aggregation: {aggregation}\n    higher_is_better: true\n"
        for metric, aggregation in (("acc", "mean"), ("acc_norm", "mean"), ("f1", "f1"))
    )
    words = "metric_list:\n  - metric: perplexity\n    aggregation: perplexity\n"
    words += "    higher_is_better: false\n"
    written = [
        ("towns", "multiple_choice", "label", choice),
        ("words", "loglikelihood", "rest", words),
    ]
    for name, kind, target, more in written:
        text = TASK.format(
            name=name, kind=kind, target=target, more=more, file=folder / "towns.jsonl"
        )
        (folder / f"{name}.yaml").write_text(text)
    return [str(folder / f"{name}.yaml") for name, *_ in written]


def measuring(tasks: list[str] | None, **settings: Any) -> MeasureEdits:
    return MeasureEdits(generate=False, ability=AbilitySettings(tasks, **settings))


def numbers(lm_eval: Any, folder: Path, tasks: list[str], **flags: Any) -> dict[str, float]:
    """What the harness itself makes of an exported model."""
    found = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=tasks,
        device="cpu",
        batch_size=8,
        task_manager=lm_eval.tasks.TaskManager(**OWN),
        **flags,
    )
    return {
        f"{name}/{key.removesuffix(',none')}": value
        for name, results in found["results"].items()
        for key, value in results.items()
        if key.endswith(",none") and not isinstance(value, str)
    }


def test_the_figures_are_the_harness_s_own_on_the_exported_model(
    lm_eval,
    module,  # noqa: F811
    facts,  # noqa: F811
    tasks,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # takes seconds
    trainer = trainer_of(measuring(tasks, limit=None, every=4))
    trainer.fit(module, datamodule=data_of(facts))
    module.model.save_pretrained(tmp_path / "model")
    module.tokenizer.save_pretrained(tmp_path / "model")
    expected = numbers(lm_eval, tmp_path / "model", tasks, bootstrap_iters=0)
    history = trainer.callbacks[1].history
    (pre,), (post,) = history.of("pre"), history.of("post")
    ours = {name: each for name, each in post.metrics.items() if name.startswith(table.ABILITY)}
    assert len(ours) == 4
    assert set(ours) == {f"ability/{key}" for key in expected}
    for key, value in expected.items():
        found = ours[f"ability/{key}"]
        assert found["value"] == pytest.approx(value, rel=1000 * EPS)  # of the log-likelihoods
        assert found["count"] == len(TOWNS)
    accuracy = ours["ability/towns/acc"]
    share = accuracy["value"]  # of a mean the usual standard error
    assert accuracy["standard_error"] == pytest.approx((share * (1 - share) / 9) ** 0.5)
    assert ours["ability/words/perplexity"]["standard_error"] > 0
    # over the run: before, after every fourth edit, and at the end
    courses = [m for m in history.of("cumulative") if "ability/words/perplexity" in m.metrics]
    assert [taken.edits for taken in courses] == [4]
    assert "cumulative/ability/words/perplexity" in trainer.callback_metrics
    assert pre.metrics["ability/words/perplexity"] != post.metrics["ability/words/perplexity"]
    logged = [applied for applied, v in history.logged if "cumulative/ability/towns/acc" in v]
    assert logged == [4]
    assert "lm-evaluation-harness" in history.settings["ability"]


def test_a_call_from_python_measures_ability_and_retention(
    lm_eval, llama: LanguageModel, tasks, tmp_path, capsys
):
    """Of `edit`: the harness's own reading of the model, before and after, and nothing printed."""
    edits = [("Zoë", "{} lives in", "Rome"), ("Lyon", "{} is near", "Oslo")]
    expected = [GeneralAbility(AbilitySettings(tasks)).measure(llama.model, llama.tokenizer)]
    result = edit(
        llama.model,
        llama.tokenizer,
        [(*each, "Paris") for each in edits],
        copy=True,
        batch_size=1,
        progress=False,
        settings={"measure.ability.tasks": tasks, "measure.retention.prompts": 99},
        **{"steps": 4, "clamp": 4.0, "contexts": []},
    )
    assert capsys.readouterr() == ("", "")
    expected.append(GeneralAbility(AbilitySettings(tasks)).measure(result.model, result.tokenizer))
    for at, seen in zip(("before", "after"), expected, strict=True):
        assert len(seen) == 4
        for name, found in seen.items():
            assert result.scores[name][at] == found["value"]
    assert expected[0] != expected[1]
    efficacy, kept = result.scores["efficacy"], result.scores["retention_mean"]
    assert kept["after"] == efficacy["after"]  # each batch is one request, and all are followed
    assert (kept["before"], kept["count"]) == (None, 2)
    assert {"retention_first_batch", "forgetting"} < set(result.scores)


def test_ability_is_not_read_twice(lm_eval, module, facts, tasks, tmp_path, monkeypatch):  # noqa: F811
    """At the end the weights are those that were just measured, after the last batch."""
    measure, calls = GeneralAbility.measure, []
    monkeypatch.setattr(
        GeneralAbility, "measure", lambda *args: [measure(*args), calls.append(1)][0]
    )
    run(module, facts, tmp_path / "run", measuring(tasks, every=2))
    assert len(calls) == 4  # after 0, 2, 4 and 6 edits


def test_a_resumed_run_has_the_same_ability(lm_eval, module, facts, tasks, tmp_path):  # noqa: F811
    whole, unedited = copy.deepcopy(module), copy.deepcopy(module)
    expected = run(whole, facts, tmp_path / "whole", measuring(tasks, every=2))
    with pytest.raises(ZeroDivisionError):
        run(module, facts, tmp_path / "halves", measuring(tasks, every=2), Crash(2))
    with pytest.raises(InputError, match=r"started with measure\.ability\.limit 100, not 3;"):
        run(unedited, facts, tmp_path / "halves", measuring(tasks, limit=3), resume=True)
    resumed = run(unedited, facts, tmp_path / "halves", measuring(tasks, every=2), resume=True)
    one, other = (
        next(c for c in trainer.callbacks if isinstance(c, MeasureEdits)).history.measurements
        for trainer in (expected, resumed)
    )
    assert other == one
    with_ability = [m.edits for m in one if "ability/towns/acc" in m.metrics]
    assert with_ability == [0, 2, 4, 6, 6]  # the last one after 6 edits is at the end


def state(model: Any, tokenizer: Any) -> list[Any]:
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    modes = {name: each.training for name, each in model.named_modules()}
    trained = {name: each.requires_grad for name, each in model.named_parameters()}
    words = (tokenizer.pad_token, tokenizer.padding_side, tokenizer.backend_tokenizer.to_str())
    draws = copy.deepcopy(random.getstate()), np.random.get_state()[1].tolist()
    return [weights, modes, trained, words, draws, torch.get_rng_state()]


def test_a_task_says_which_direction_is_better(lm_eval, llama: LanguageModel, tasks, tmp_path):
    """Of a measure of bias less is better, whatever is true of others with its name."""
    task = tmp_path / "bias.yaml"
    text = Path(tasks[0]).read_text()
    accuracy = "metric: acc\n    aggregation: mean\n    higher_is_better: "
    task.write_text(text.replace(f"{accuracy}true", f"{accuracy}false"))
    found = GeneralAbility(AbilitySettings([str(task)])).measure(llama.model, llama.tokenizer)
    said = {name.rpartition("/")[2]: each["direction"] for name, each in found.items()}
    assert said == {"acc": -1, "acc_norm": 1, "f1": 1}
    history = small_history()
    for place in (0, 2, 6):
        taken = history.measurements[place]
        history.measurements[place] = taken._replace(metrics={**taken.metrics, **found})
    assert "Lower is better: perplexity, towns acc." in " ".join(score_table(history).split())
    unsaid = {"post": {"ability/mine/points": estimate(3.0), "efficacy": estimate(90.0)}}
    assert legend(unsaid).endswith("Neither direction is better: mine points.")
    notes = {chart.title: chart.note for chart in course_charts(history)}
    assert (notes["towns acc"], notes["towns f1"]) == ("lower is better", "higher is better")
    resumed = RunHistory(requests=history.requests)
    resumed.load_state_dict(history.state_dict())
    assert score_table(resumed).count("towns acc.") == 1


def test_which_direction_is_better_where_nothing_or_no_one_thing_is_said(lm_eval):
    said = {"group": {"acc": None}, "task": {"acc": True}}
    of = harness_module._direction
    assert of({"higher_is_better": said}, "group", "acc") == {"direction": 0}
    assert of({"higher_is_better": said}, "task", "bias") == of({}, "task", "acc") == {}
    assert table.by_name("ability/mine/points").direction == "neither"
    registry = pytest.importorskip("lm_eval.api.registry").higher_is_better_registry
    assert all(
        registry[name] == (direction == "higher") for name, direction in table.REGISTERED.items()
    )
    two = [{"ability/t/m": {"direction": each}} for each in (1.0, -1.0, 1.0)]
    assert table.directions_in(two) == {"ability/t/m": "neither"}


def test_everything_is_left_as_it_was_found(lm_eval, llama: LanguageModel, tasks):
    model = copy.deepcopy(llama.model).train()
    model.model.layers[0].eval()
    next(model.parameters()).requires_grad_(False)
    before = state(model, llama.tokenizer)
    assert GeneralAbility(AbilitySettings(tasks)).measure(model, llama.tokenizer)
    after = state(model, llama.tokenizer)
    weights = before.pop(0), after.pop(0)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert torch.equal(before.pop(), after.pop())
    assert before == after


def test_what_an_own_task_reads_is_part_of_what_its_numbers_depend_on(lm_eval, tasks, tmp_path):
    rows = tmp_path / "rows.jsonl"
    text = Path(tasks[0]).read_text()
    task = tmp_path / "task.yaml"
    task.write_text(text.replace(str(Path(tasks[0]).parent / "towns.jsonl"), str(rows)))
    found, asked = [], []
    for label, every in ((0, 0), (1, 0), (1, 9)):
        write_jsonl(rows, [{"town": "Basel", "label": label, "rest": "Europe"}])
        ability = GeneralAbility(AbilitySettings([str(task)], every=every))
        found.append(ability.identity())
        asked.append(ability.asked())
    assert found[0] != found[1] == found[2]
    (old, new), key = asked[:2], "measure.ability.data"
    assert {name for name in old if old[name] != new[name]} == {key}
    smaller = AbilitySettings([str(task)], batch_size=1)  # it may be too much at a time
    assert asked[1] == asked[2] == GeneralAbility(smaller).asked()
    copied = tmp_path / "copied.yaml"  # is the same task
    copied.write_text(task.read_text())
    assert GeneralAbility(AbilitySettings([str(copied)])).asked() == new
    copied.write_text(task.read_text().replace("lies in", "is in"))
    other = GeneralAbility(AbilitySettings([str(copied)])).asked()
    assert {name for name in new if other[name] != new[name]} == {"measure.ability.tasks"}
    files = [[str(rows)], {"test": str(rows)}, {"test": [str(rows), "hf://elsewhere"]}, None]
    assert [harness_module._local_files(each) for each in files] == [[rows]] * 3 + [[]]


def test_a_limit_reads_the_first_records_and_evaluate_measures_too(
    lm_eval,
    module,  # noqa: F811
    facts,  # noqa: F811
    tasks,
    tmp_path,
):
    first = tmp_path / "first.jsonl"  # a file that has no other records
    rows = (Path(tasks[0]).parent / "towns.jsonl").read_text().splitlines(keepends=True)
    first.write_text("".join(rows[:3]))
    cut = [tmp_path / Path(task).name for task in tasks]
    for task, path in zip(tasks, cut, strict=True):
        path.write_text(
            Path(task).read_text().replace(f"{Path(task).parent}/towns.jsonl", f"{first}")
        )
    expected = GeneralAbility(AbilitySettings([str(path) for path in cut])).measure(
        module.model, module.tokenizer
    )
    trainer = trainer_of(measuring(tasks, limit=3))
    (results,) = trainer.test(module, datamodule=data_of(facts), verbose=False)
    assert {"ability/towns/acc", "ability/words/perplexity"} <= set(expected)
    for name, estimate_of in expected.items():
        assert estimate_of["count"] == results[f"test/{name}/count"] == 3
        assert results[f"test/{name}"] == pytest.approx(estimate_of["value"], rel=64 * EPS)


@pytest.fixture
def paper_files(tmp_path: Path) -> Path:
    """The six files in small: ten records that are kept for examples, and three others."""
    folder = tmp_path / "glue"
    folder.mkdir()
    pair = {"sentence1": "Oslo grows.", "sentence2": "Oslo is small."}
    rows: dict[str, dict[str, Any]] = {
        "sst2": {"sentence": "a fine film ", "label": 1},
        "cola": {"sentence": "They sang.", "label": 1},
        "mrpc": {**pair, "label": 0},
        "rte": {**pair, "label": 1},
        "nli": {**pair, "label": "entailment"},
        "mmlu": {"question": "2 x 2?", "choices": ["1", "2", "3", "4"], "answer": 3},
    }
    for name, row in rows.items():
        write_jsonl(folder / f"{name}.jsonl", [{**row, "idx": index} for index in range(13)])
    return folder


PROMPTS = {  # as the evaluation in the paper's code spells them
    "sst": "Review :a fine film \nSentiment :",
    "cola": "Is this sentence linguistically acceptable?\nSentence: They sang.\nAnswer: ",
    "mrpc": "Are the sentences paraphrases of each other.\nSentence 1: Oslo grows.\n"
    "Sentence 2: Oslo is small.\nAnswer:",
    "rte": "Oslo grows.\nquestion: Oslo is small. True or False?\nanswer:",
    "nli": "Oslo grows. entails the Oslo is small. True or False? Answer:",
    "mmlu": "Question: 2 x 2?\n(A) 1\n(B) 2\n(C) 3\n(D) 4\nAnswer:",
}
EXAMPLE = "Review : a fine film \nSentiment : positive\n"


def test_the_paper_s_six_tasks_ask_as_its_code_does(lm_eval, paper_files):
    settings = AbilitySettings(["paper", "paper_choice"], data=str(paper_files))
    loaded = GeneralAbility(settings)._loaded["tasks"]
    assert len(loaded) == 12
    for name, prompt in PROMPTS.items():
        for task in (loaded[f"paper_{name}"], loaded[f"paper_{name}_choice"]):
            assert len(task.eval_docs) == 3
            assert task.fewshot_context(task.eval_docs[0], 0) == prompt
    shots = AbilitySettings(["paper_sst"], data=str(paper_files), num_fewshot=2)
    task = GeneralAbility(shots)._loaded["tasks"]["paper_sst"]
    assert task.get_config("num_fewshot") == 2
    assert task.fewshot_context(task.eval_docs[0], 2) == 2 * EXAMPLE + PROMPTS["sst"]
    choices = [each.args[1] for each in loaded["paper_mmlu_choice"].construct_requests(
        loaded["paper_mmlu_choice"].eval_docs[0], PROMPTS["mmlu"], metadata=("", 0, 1)
    )]  # fmt: skip
    assert choices == [" A", " B", " C", " D"]


def test_only_a_line_feed_ends_a_record_of_the_six_files(lm_eval, tmp_path):
    """Text from the web holds U+2028, at which Python's splitlines would cut the record."""
    texts = [f"film\u2028{n}" for n in range(12)]
    (tmp_path / "sst2.jsonl").write_text(
        "\n".join(json.dumps({"sentence": text, "label": 1}, ensure_ascii=False) for text in texts)
    )
    found = paper.records("sst2.jsonl", str(tmp_path))
    assert [*found["examples"]["sentence"], *found["test"]["sentence"]] == texts


def test_the_paper_s_tasks_are_measured(lm_eval, llama: LanguageModel, paper_files):
    settings = AbilitySettings(["paper", "paper_choice", "paper_rte_entailed"], limit=2)
    settings = AbilitySettings(settings.tasks, limit=2, data=str(paper_files))
    found = GeneralAbility(settings).measure(llama.model, llama.tokenizer)
    assert len(found) == 13
    assert {each["count"] for each in found.values()} == {2}
    assert all(0 <= each["value"] <= 1 for each in found.values())


@pytest.mark.parametrize(
    ("reader", "record", "answer", "pair"),
    [
        (paper.sst, {"label": 1}, " Positive, I", (1, 1)),
        (paper.sst, {"label": 1}, " good", (1, -1)),
        (paper.sst, {"label": 0}, " negative\nSentiment : positive", (0, 1)),
        (paper.cola, {"label": 1}, "Yes", (1, 1)),
        (paper.mrpc, {"label": 0}, " I do not", (0, 0)),  # "not" holds "no", as there
        (paper.rte, {"label": 1}, " True or False", (1, 0)),
        (paper.rte_entailed, {"label": 1}, " False", (0, 0)),
        (paper.nli, {"label": "not_entailment"}, " true", (0, 1)),
        (paper.nli, {"label": "entailment"}, " true", (1, 1)),
        (paper.mmlu, {"answer": 3}, " D\n", (3, 3)),
        (paper.mmlu, {"answer": 3}, " D", (3, -1)),
    ],
)
def test_answers_are_read_as_the_paper_s_code_reads_them(reader, record, answer, pair):
    assert reader(record, [answer]) == {"f1": pair}


def test_weighted_f1_by_hand():
    """Class 1: precision 2/3, recall 1; class 0: nothing right; an answer of none is wrong."""
    items = [(1, 1), (1, 1), (0, 1), (0, paper.NO_ANSWER)]
    assert paper.weighted_f1(items) == pytest.approx(0.8 * 2 / 4)
    assert paper.weighted_f1([(1, paper.NO_ANSWER)] * 3) == 0
    assert paper.weighted_f1([(3, 3), (0, 0)]) == 1


def test_the_jackknife_of_a_mean_and_of_a_ratio():
    values = [0.5, 2.0, 3.5, 1.0, 0.25]
    mean = torch.tensor(values, dtype=torch.float64)
    usual = float(mean.std(unbiased=True)) / len(values) ** 0.5
    assert jackknife_error(np.mean, values) == pytest.approx(usual)
    assert np.isnan(jackknife_error(np.mean, values[:1]))
    # of exp(mean) the delta method's error is exp(mean) times that of the mean, to first order
    many = np.random.default_rng(0).normal(0, 0.1, 49).tolist()
    error = jackknife_error(lambda items: float(np.exp(np.mean(items))), many)
    expected = np.exp(np.mean(many)) * np.std(many, ddof=1) / 7
    assert error == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("n", [100, 1012])
def test_the_jackknife_leaves_out_groups_of_many(n):
    """51 calls of the aggregate, however many items; of a mean the variance between its groups."""
    values = np.random.default_rng(n).normal(3, 1, n)
    seen: list[Any] = []

    def mean(items: list[int]) -> float:
        seen.append(items)
        return float(np.mean(values[list(items)]))

    error = jackknife_error(mean, range(n))
    whole, *rest = seen
    assert list(whole) == list(range(n))
    groups = [sorted(set(range(n)) - set(kept)) for kept in rest]
    assert sorted(place for group in groups for place in group) == list(range(n))
    sizes = np.array([len(group) for group in groups])
    assert (len(sizes), sizes.max() - sizes.min()) == (50, 1 if n % 50 else 0)
    means = np.array([values[group].mean() for group in groups])
    variance = np.mean(sizes / (n - sizes) * (means - values.mean()) ** 2)
    assert error == pytest.approx(variance**0.5)
    if n == 100:  # of equal groups: the usual error of the mean of their means
        assert error == pytest.approx(means.std(ddof=1) / 50**0.5)


def test_the_jackknife_with_groups_is_right_on_average_and_of_sorted_records():
    """Squared, of a mean, it is s^2 / n but for chance: 0.2 of one draw, a tenth of that of 100."""
    draws, values = np.random.default_rng(0), np.arange(203.0)  # groups of 4 and of 5
    exact = values.var(ddof=1) / len(values)
    shuffled = [jackknife_error(np.mean, draws.permutation(values)) ** 2 for _ in range(100)]
    assert np.mean(shuffled) == pytest.approx(exact, rel=5 * 0.02)
    assert jackknife_error(np.mean, values) ** 2 == pytest.approx(exact, rel=5 * 0.2)
    assert jackknife_error(np.mean, values) == jackknife_error(np.mean, values)


def test_without_the_harness_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(harness_module, "find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        MeasureEdits(ability=AbilitySettings(["paper"]))
    assert str(caught.value).splitlines()[1:] == [
        "  where: measure.ability.tasks",
        "  hint:  pip install 'lightning-blue[ability]'",
    ]
    MeasureEdits()  # without tasks nothing is asked for


def test_a_misspelt_task_and_a_missing_file_are_named(lm_eval, tmp_path, monkeypatch):
    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **kw: real(**{**kw, **OWN}))
    with pytest.raises(InputError, match=r"'papr'(.|\n)*did you mean paper"):
        GeneralAbility(AbilitySettings(["papr"]))
    with pytest.raises(InputError, match=r"sst2.jsonl(.|\n)*measure.ability.data = None"):
        GeneralAbility(AbilitySettings(["paper_sst"]))
    (tmp_path / "bad.yaml").write_text("task: bad\ndataset_path: json\noutput_type: guess\n")
    with pytest.raises(InputError, match=r"the task .*bad\.yaml cannot be loaded"):
        GeneralAbility(AbilitySettings([str(tmp_path / "bad.yaml")]))


@pytest.fixture
def small_harness(lm_eval, tasks, monkeypatch) -> list[bool]:
    """Let the harness come with two tasks, and note of each manager whether it has them."""
    real, asked = lm_eval.tasks.TaskManager, []

    def manager(include_path: str, include_defaults: bool = True, **known: Any) -> Any:
        asked.append(include_defaults)
        paths = [include_path, *([str(Path(tasks[0]).parent)] if include_defaults else [])]
        return real(include_path=paths, **OWN, **known)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    return asked


GROUP = """group: mine
task:
  - towns
  - group: inner
    task:
      - task: words
        task_alias: w
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
metadata: {version: !function utils.nothing}
"""


def test_a_file_may_put_tasks_of_the_harness_together(
    small_harness, llama: LanguageModel, tasks, tmp_path
):
    path = tmp_path / "mine.yaml"
    path.write_text(GROUP.replace("metadata: {version: !function utils.nothing}\n", ""))
    found = GeneralAbility(AbilitySettings([str(path)])).measure(llama.model, llama.tokenizer)
    assert small_harness == [False, True]
    alone = GeneralAbility(AbilitySettings(tasks)).measure(llama.model, llama.tokenizer)
    assert small_harness == [False, True, False]  # a task of its own needs no others
    assert found["ability/mine/acc"]["value"] == alone["ability/towns/acc"]["value"]


def test_a_group_s_file_with_a_misspelt_task_names_it(small_harness, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GROUP.replace("- towns", "- tows"))
    with pytest.raises(InputError, match=r"no task, group or tag 'tows'(.|\n)*did you mean towns"):
        GeneralAbility(AbilitySettings([str(path)]))


def test_what_a_group_refers_to(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GROUP)
    assert tasks_named(read_group(path)) == ["towns", "words"]
    (tmp_path / "more.yaml").write_text("include: mine.yaml\ngroup: more\n")
    more = read_group(tmp_path / "more.yaml")
    assert (more["group"], tasks_named(more)) == ("more", ["towns", "words"])
    members = "task:\n- group: mmlu\n- task: own\n  dataset_path: json\n"
    path.write_text(f"include: more.yaml\n{members}")  # each includes the other
    assert tasks_named(read_group(path)) == ["mmlu"]  # what is defined there is no reference
    for text in ("task: one\ndataset_path: json\n", "- a list", "group: [", ""):
        path.write_text(text)
        assert read_group(path) is None


def test_tables_and_plots_show_tasks_beside_metrics():
    """The row of a task is made of its name, wherever metrics are shown."""
    history = small_history()
    for place, value in ((0, 0.9), (2, 0.8), (6, 0.4)):
        taken = history.measurements[place]
        metrics = {**taken.metrics, "ability/sst/f1": estimate(value, 0.05, count=100, records=100)}
        metrics["ability/mmlu/acc"] = estimate(0.3 * value - 0.0066, count=100, records=100)
        history.measurements[place] = Measurement(taken.stage, taken.edits, metrics)
    shown = " ".join(score_table(history).split())
    assert "| sst f1 | 0.90 ± 0.05 | 0.40 ± 0.05 |" in shown
    assert "| mmlu acc | 0.263 | 0.113 |" in shown  # a group, which has no error
    assert "100 records: sst f1, mmlu acc" in shown
    assert "sst f1 went from 0.90 ± 0.05 to 0.40 ± 0.05" in caution(history)
    assert "mmlu acc went from 0.263 to 0.113" in caution(history)
    (course,) = [chart for chart in course_charts(history) if chart.title == "mmlu acc"]
    assert [mark.text for mark in course.lines[0].marks][-1] == "0.113"
    figure = metrics_figure(history)
    assert figure is not None
    assert "sst f1" in " ".join(axis.get_title() for axis in figure.axes)
    nothing = table.by_name("ability/sst/f1"), [0.0, 0.0]  # of a model that says nothing sensible
    low, high = fitted(*nothing)
    assert low < 0 < high
    assert table.by_name("ability/words/perplexity").direction == "lower"
    assert table.by_name("ability/gsm8k/exact_match,strict-match").title == (
        "gsm8k exact_match,strict-match"
    )


def test_compare_has_a_table_and_curves_of_tasks(tmp_path):
    """As in the paper's Figure 6: ability over edits, with BLUE and without."""
    ends = {"even": 0.25, "boundary": 0.75}
    name, bias, own = "ability/sst/f1", "ability/crows/pct_stereotype", "ability/mine/points"
    for plan, value in ends.items():
        numbers = {"post": {name: value, bias: value, own: value}, "pre": {name: 0.875}}
        folder = make_run(tmp_path / "runs", plan, values(1, 0.5), update__plan=plan, **numbers)
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps({**summary, f"post/{bias}/direction": -1}))
        rows = [
            f"step,edits/applied,cumulative/{name},cumulative/{name}/standard_error",
            "4,4,0.8125,0.5",
            f"8,8,{value},0.5",
        ]
        (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    runs, _ = read_runs([tmp_path / "runs"])
    (scores,) = score_tables(runs)
    grid = presented.score_grid(scores, "ability")
    assert grid is not None
    assert grid.header[3:] == ["sst f1", "crows pct_stereotype", "mine points"]
    assert grid.caption.endswith(
        "Lower is better for crows pct_stereotype; neither direction is better for mine points; "
        "higher for all others."
    )
    assert [[cell.best for cell in row[4:]] for row in grid.rows[1:]] == [
        [True, False],
        [False] * 2,
    ]
    assert [cell.improved for cell in grid.rows[2][3:]] == [True, False, False]
    cells = [(row[2].text, row[3].text, row[3].best) for row in grid.rows]
    assert cells[0][1].startswith("0.9")
    of_group = Estimate(0.2634, float("nan"), None, 1, 100)  # without an error
    assert presented.estimate_text(of_group, table.by_name(name).unit) == "0.263"
    assert [best for *_, best in cells] == [False, False, True]
    found = curves(scores)
    courses = {row.plan: [point[:2] for point in points] for (*_, row), points in found.items()}
    assert courses == {plan: [(4, 0.8125), (8, value)] for plan, value in ends.items()}
    assert all(picture.startswith(b"\x89PNG") for picture in figures(found, scores).values())
    assert figures(found, scores)
