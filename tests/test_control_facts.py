"""Control facts from a file: those that the unedited model answers, in a resumed run too."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import LanguageModel
from helpers import write_jsonl
from lightning_blue.data import EditDataModule
from lightning_blue.reporting.files import summary
from lightning_blue.reporting.text import protocol_sentence
from lightning_blue.support.errors import InputError
from test_lightning import corpus, facts, module, trainer_of  # noqa: F401  (fixtures)
from test_resume import Crash, run


@pytest.fixture(scope="module")
def asked(gpt2: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Facts in the form of ROME's known facts; the first, third and fifth are what it says."""
    tokenizer, rows = gpt2.tokenizer, []
    prompts = (f"Bo{number} is the {word} of" for number in range(60) for word in ("son", "cat"))
    for text in prompts:
        with torch.no_grad():
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            said = tokenizer.decode([int(gpt2.model(ids).logits[0, -1].argmax())])
        if len(rows) == 6 or len(tokenizer(f" {said.strip()}")["input_ids"]) != 1:
            continue
        if said != f" {said.strip()}" or len(said) < 2:
            continue
        object = said if len(rows) % 2 == 0 else "quite another answer"
        fact = {"subject": text.split()[0], "prompt": text, "attribute": object}
        rows.append({"known_id": len(rows), **fact})
    assert len(rows) == 6
    path = tmp_path_factory.mktemp("known") / "known.json"
    path.write_text(json.dumps(rows))
    return path


def data(facts: Path, asked: Path | str, **more: Any) -> EditDataModule:  # noqa: F811
    return EditDataModule(str(facts), batch_size=2, controls=str(asked), **more)


def test_those_that_the_unedited_model_answers_are_kept(module, facts, asked, caplog):  # noqa: F811
    rows = json.loads(asked.read_text())
    spoken = data(facts, asked)
    trainer = trainer_of()
    with caplog.at_level(logging.INFO):
        trainer.fit(module, datamodule=spoken)
    assert [fact.prompt for fact in spoken.controls] == [row["prompt"] for row in rows[::2]]
    assert "of 6 facts in" in caplog.text
    assert "the unedited model answers 3" in caplog.text
    history = trainer.callbacks[1].history
    (before,) = history.of("pre")
    retained = before.metrics["retained_knowledge"]
    assert (retained["value"], retained["count"]) == (100.0, 3)
    assert (summary(history)["controls/kept"], summary(history)["controls/asked"]) == (3, 6)
    assert "of 6 facts the unedited model answers 3" in protocol_sentence(history)


def test_a_resumed_run_has_the_same(module, facts, asked, tmp_path, monkeypatch):  # noqa: F811
    """And asks nobody: the edited weights could answer otherwise."""
    untouched = copy.deepcopy(module)
    first = data(facts, asked)
    with pytest.raises(ZeroDivisionError):
        run(module, facts, tmp_path / "run", Crash(2), data=first)
    monkeypatch.setattr("lightning_blue.editing.module.known", lambda *_: pytest.fail("asked"))
    again = data(facts, asked)
    trainer = run(untouched, facts, tmp_path / "run", resume=True, data=again)
    assert again.controls == first.controls
    assert trainer.callbacks[1].history.controls_kept == again.controls_kept == (3, 6)


def test_a_run_is_not_resumed_with_facts_of_the_other_kind(tmp_path):
    """The same facts, once as the rest of the data, once from a file: of these the known count."""
    path = tmp_path / "facts.jsonl"
    fact = {"prompt": "{} is in", "target_new": "Chile", "target_true": "Ulm"}
    write_jsonl(path, [{**fact, "subject": name} for name in ("Bern", "Lyon", "Basel")])
    ways: tuple[int | str, str] = (10, str(path))
    modules = [EditDataModule(str(path), edits=1, controls=wanted) for wanted in ways]
    for each in modules:
        each.prepare()
    of_the_data, of_its_own = modules
    assert of_the_data.controls == of_its_own.controls != []
    for first, second, said in (
        (of_the_data, of_its_own, "from the data itself"),
        (of_its_own, of_the_data, "from a source of their own"),
    ):
        first.load_state_dict(first.state_dict())
        with pytest.raises(InputError, match=said):
            second.load_state_dict(first.state_dict())


def test_facts_about_edited_subjects_and_repeated_prompts_are_no_controls(tmp_path, caplog):
    fact = {"subject": "Lyon", "prompt": "{} is in", "target_new": "Italy"}
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([fact]))
    known = tmp_path / "known.json"
    bern = {"subject": "Bern", "prompt": "{} is in", "target_new": "Chile", "target_true": "Bern"}
    known.write_text(json.dumps([fact, bern, bern | {"target_true": "Peru"}]))
    both = EditDataModule(str(path), controls=str(known))
    with caplog.at_level(logging.INFO):
        both.prepare()
    assert [(fact.prompt, fact.answer) for fact in both.controls] == [("Bern is in", "Bern")]
    assert "2 facts on edited subjects or repeated prompts are left out" in caplog.text
    known.write_text(json.dumps([fact]))
    with pytest.raises(InputError, match=r"(?s)no fact can serve.*data\.controls.*other subjects"):
        both.prepare()


def test_bad_control_facts_are_refused_with_line_and_mend(tmp_path):
    path = tmp_path / "known.jsonl"
    good = {"subject": "Bern", "prompt": "{} is in", "attribute": "Switzerland"}
    path.write_text(f"{json.dumps(good)}\n{json.dumps(good | {'attribute': ''})}\n")
    with pytest.raises(InputError, match=r"(?s)known\.jsonl:2.*'attribute' is empty.*skip"):
        EditDataModule("almanac", edits=2, controls=str(path)).prepare()
    skipping = EditDataModule("almanac", edits=2, controls=str(path), on_unusable="skip")
    skipping.prepare()
    assert len(skipping.controls) == 1
    assert skipping.controls_at_most == 1
    with pytest.raises(InputError, match=r"known2\.json"):
        EditDataModule("almanac", edits=2, controls=str(tmp_path / "known2.json")).prepare()
    with pytest.raises(InputError, match=r"data\.controls"):
        EditDataModule("almanac", controls=" ")


def test_the_command_line_takes_a_number_or_a_file(asked):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(EditDataModule, "data")
    assert parser.parse_args(["--data.controls=20"]).data.controls == 20
    assert parser.parse_args([f"--data.controls={asked}"]).data.controls == str(asked)
