"""Negation probes: what is asked, what counts, and that a run asks for them only if it should."""

from __future__ import annotations

import copy
import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import LanguageModel
from helpers import write_jsonl
from lightning_blue.__main__ import main
from lightning_blue.data.requests import EditRequest
from lightning_blue.language_model.chat import Markers, markers
from lightning_blue.language_model.scoring import score_targets
from lightning_blue.metrics import table
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.metrics.evaluation import evaluate
from lightning_blue.metrics.generated import GenerationSettings, with_answers
from lightning_blue.metrics.history import RunHistory
from lightning_blue.metrics.negation import TEXT, negated, negated_prompts, negation_text
from lightning_blue.metrics.retention import RetentionSettings
from lightning_blue.reporting import RunRecord
from lightning_blue.reporting.retention import matrices
from lightning_blue.support.errors import InputError
from test_judge import CHAT
from test_lightning import FACTS, corpus, data_of, module, trainer_of  # noqa: F401  (fixtures)

PLAIN = Markers()


def request(prompt: str, subject: str = "Lyon", **fields: Any) -> EditRequest:
    return EditRequest("0", prompt, subject, "Rome", **fields)


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("The mayor of {} is", "Lyon", "It is not true that the mayor of Lyon is"),
        ("In {}, they speak", "Lyon", "It is not true that in Lyon, they speak"),
        ("{} lies in", "The Hague", "It is not true that The Hague lies in"),
        ("Apple A5 is made by {}, in", "Lyon", "It is not true that Apple A5 is made by Lyon, in"),
        ("Theo met {} in", "Lyon", "It is not true that Theo met Lyon in"),
        ("{} is in", "{} and the", "It is not true that {} and the is in"),
        ("Where is {}?", "Lyon", None),
        ("{}在哪里？", "Lyon", None),
        ("ما هي عاصمة {}؟", "فرنسا", None),
        ("Πού είναι η {};", "Λυών", None),
        ("Ո՞վ է {}ի քաղաքապետը", "Lyon", None),
        ("{} is in Gaul; it", "Lyon", "It is not true that Lyon is in Gaul; it"),
    ],
)
def test_how_prompts_are_negated(prompt: str, subject: str, expected: str | None) -> None:
    assert negated(request(prompt, subject), TEXT, PLAIN) == expected


def test_other_words_are_kept_as_they_are() -> None:
    assert negated(request("The mayor of {} is"), "{} not", PLAIN) == "The mayor of Lyon is not"
    assert negated(request("{}位于"), "不对的是{}", PLAIN) == "不对的是Lyon位于"


def test_the_words_in_a_chat_template_are_negated(gpt2: LanguageModel) -> None:
    tokenizer = copy.deepcopy(gpt2.tokenizer)
    tokenizer.chat_template = CHAT
    asked = [request(f"<|end|>user: {p}\n<|end|>assistant:") for p in ("The {} is", "Is {} big?")]
    assert negated_prompts(tokenizer, asked, TEXT) == [
        "<|end|>user: It is not true that the Lyon is\n<|end|>assistant:",
        None,
    ]
    assert markers(tokenizer).parts("Lyon is") == ("", "Lyon is", "")


@pytest.mark.parametrize("text", ["", "not true", "{} is not {}"])
def test_words_without_one_place_for_the_prompt_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"measure\.negation"):
        negation_text(text)


def test_the_command_line_takes_yes_no_and_words(tmp_path: Path, capsys: Any) -> None:
    flags = ["fit", "--update.layers=[0]", f"--run.root={tmp_path}"]
    for given, printed in (("true", "true"), ("false", "false"), ("Never {}", "Never {}")):
        with pytest.raises(SystemExit):
            main([*flags, f"--measure.negation={given}", "--print_config"])
        assert f"  negation: {printed}\n" in capsys.readouterr().out
    assert main([*flags, "--measure.negation=Never"]) == 2
    assert "where the prompt belongs" in capsys.readouterr().err


REQUESTS = [
    request("{} lies in", "Basel", target_true="Paris"),
    request("The river runs through {} and", "Lyon", target_true="Oslo"),
    request("{} is a twin city of", "Berlin"),  # names no true object
    request("Where is {}?", "Oslo", target_true="Paris"),  # a question
]


def test_metrics_once_more_by_hand(gpt2: LanguageModel) -> None:
    plain = evaluate(*gpt2, REQUESTS, generate=False)
    assert not [name for name in plain.metrics if name.startswith("negation")]
    evaluation = evaluate(*gpt2, REQUESTS, generate=False, negation=TEXT)
    prompts = [negated(each, TEXT, PLAIN) for each in REQUESTS[:3]]
    new = score_targets(*gpt2, prompts, ["Rome"] * 3)
    true = score_targets(*gpt2, prompts[:2], ["Paris", "Oslo"])
    avoided = [float(n.nll > t.nll) for n, t in zip(new, true, strict=False)]
    not_said = [float(not all(score.correct)) for score in new]
    values = [outcome.values for outcome in evaluation.outcomes]
    assert [each.get("negation") for each in values] == [*avoided, None, None]
    assert [each.get("negation_top1") for each in values] == [*not_said, None]
    assert evaluation.metrics["negation"]["value"] == 50 * sum(avoided)
    assert evaluation.metrics["negation_top1"]["count"] == 3
    assert evaluation.metrics.items() >= plain.metrics.items()  # the others stay what they are
    # the other way round with the objects exchanged: one of the two is less probable
    exchanged = [
        EditRequest(r.case_id, r.prompt, r.subject, r.target_true, target_true=r.target_new)
        for r in REQUESTS[:2]
    ]
    other = evaluate(*gpt2, exchanged, generate=False, negation=TEXT)
    assert [o.values["negation"] for o in other.outcomes] == [1 - a for a in avoided]


def test_top1_and_answers_fail_where_the_object_follows(gpt2: LanguageModel) -> None:
    """The object is made what the model says after the negated prompt, and once something else."""
    model, tokenizer = gpt2
    settings = GenerationSettings(max_new_tokens=2, stops=("never said",))
    blank = evaluate(model, tokenizer, REQUESTS[:1], generate=False, negation=TEXT)
    found = with_answers(blank, model, tokenizer, REQUESTS[:1], settings, negation=TEXT)
    (said,) = [each for each in found.answers if each.prompts == table.NEGATED]
    assert said.prompt == "It is not true that Basel lies in"
    assert not said.compared
    word = said.answer.strip()
    assert word
    for wanted, value in ((word, 0.0), ("Rome", 100.0)):
        asked = [EditRequest("0", "{} lies in", "Basel", wanted)]
        scored = evaluate(model, tokenizer, asked, generate=False, negation=TEXT)
        answered = with_answers(scored, model, tokenizer, asked, settings, negation=TEXT)
        assert answered.metrics["negation_generation"]["value"] == value
        assert answered.metrics["empty_generation"]["prompts"] == 1  # of the own prompt's alone


def test_a_run_measures_them_if_asked(module, tmp_path, recwarn) -> None:  # noqa: F811
    path = tmp_path / "facts.jsonl"
    facts = [{**fact, "prompt": "Where is {}?"} if i == 3 else fact for i, fact in enumerate(FACTS)]
    write_jsonl(path, facts[:4])
    unedited = copy.deepcopy(module)
    measure = MeasureEdits(
        generate=False,
        negation=True,
        retention=RetentionSettings(prompts=20),
        protocols=["probability", "generation"],
        generation=GenerationSettings(max_new_tokens=3),
    )
    record = RunRecord("run", str(tmp_path), wandb="off", export=False)
    trainer_of(measure, record).fit(module, datamodule=data_of(path))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name in ("negation", "negation_top1", "negation_generation"):
        assert summary[f"pre/{name}/prompts"] == summary[f"post/{name}/prompts"] == 3
    stages = ("batch", "cumulative")
    assert all("negation" in measure.history.of(stage)[0].metrics for stage in stages)
    measure.history.generation = replace(measure.history.generation, each_batch=True)
    # the retention matrix is measured without them, though the evaluation of a batch is not
    after = measure.history.retention.after
    assert "negation_top1" in after[1][2]
    assert "negation_top1" not in after[1][0]
    lines = csv.DictReader((tmp_path / "run" / "retention.csv").open())
    assert (
        {"efficacy", "efficacy_top1"}
        <= {line["metric"] for line in lines}
        == set(matrices(measure.history))
    )
    assert not [name for name in matrices(measure.history) if "negation" in name]
    for asked in (True, False):
        found = measure.instruments.evaluate(module, measure.history.requests, negation=asked)
        assert any(each.prompts == table.NEGATED for each in found.answers) == asked
        assert ("negation_generation" in found.metrics) == asked
    said = [str(w.message) for w in recwarn if "cannot be negated" in str(w.message)]
    assert said == [
        "1 of 4 prompts are questions, which cannot be negated: measure.negation leaves them out"
    ]
    report = " ".join((tmp_path / "run" / "report.md").read_text().split())
    assert "| negation (top-1)" in report
    assert "less probable than the true one after the negated prompt" in report
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").open()]
    (first, *_) = [each for each in answers if each["prompts"] == table.NEGATED]
    assert first["exact_match"] is None
    assert first["containment"] is not None
    # without them nothing changes
    alone = MeasureEdits(
        generate=False,
        retention=RetentionSettings(prompts=20),
        protocols=["probability", "generation"],
        generation=GenerationSettings(max_new_tokens=3),
    )
    trainer_of(alone).fit(unedited, datamodule=data_of(path))
    (ours,), (theirs,) = (m.history.of("post") for m in (measure, alone))
    assert set(ours.metrics) - set(theirs.metrics) == {
        "negation",
        "negation_top1",
        "negation_generation",
    }
    assert ours.metrics.items() >= theirs.metrics.items()


def test_a_run_is_resumed_with_the_same_words() -> None:
    state = RunHistory(negation=TEXT).state_dict()
    RunHistory(negation=TEXT).load_state_dict(state)
    with pytest.raises(InputError, match="was started with negation: It is not true"):
        RunHistory().load_state_dict(state)
