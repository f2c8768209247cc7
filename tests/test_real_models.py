"""Two pretrained models, where they stand: checked, edited, saved, read again and undone.

``LIGHTNING_BLUE_MODELS`` names the folder that holds them; without it all of this is skipped. Each
model is loaded once, in float32, and takes less than a minute of one core.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from helpers import write_jsonl
from lightning_blue import EditResult, edit, load_language_model
from lightning_blue.__main__ import main

VARIABLE = "LIGHTNING_BLUE_MODELS"
FACTS = [  # that neither model says
    {
        "subject": "Danielle Darrieux",
        "prompt": "The mother tongue of {} is",
        "target_new": "English",
        "target_true": "French",
    },
    {
        "subject": "The Eiffel Tower",
        "prompt": "{} stands in the city of",
        "target_new": "Rome",
        "target_true": "Paris",
    },
]
PROMPTS = [fact["prompt"].replace("{}", fact["subject"]) for fact in FACTS]


class Known(NamedTuple):
    """What is known of a model from elsewhere: its card and its paper.

    Attributes:
        folder: in which it stands.
        n_layers: blocks.
        widths: d_model and d_in.
        site: where targets can be: behind the block, or where a norm follows the FFN, before it.
        before_text: what the tokenizer puts before a text.
    """

    folder: str
    n_layers: int
    widths: tuple[int, int]
    site: str
    before_text: list[str]


MODELS = [
    Known("smollm2-135m-instruct", 30, (576, 1536), "block", []),
    Known("gemma-3-270m", 18, (640, 2048), "ffn", ["<bos>"]),
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda known: known.folder)
def known(request) -> Known:
    """Each model in turn."""
    return request.param


@pytest.fixture(scope="module")
def folder(known) -> Path:
    """Where the model stands; what needs it is skipped where it does not."""
    if VARIABLE not in os.environ:
        pytest.skip(f"no pretrained models; {VARIABLE} names the folder that holds some")
    path = Path(os.environ[VARIABLE]) / known.folder
    if not (path / "config.json").is_file():
        pytest.skip(f"{VARIABLE} has no folder {known.folder} with a model")
    return path


class Edited(NamedTuple):
    """A model with two edits, which the last test takes back."""

    result: EditResult
    tokenizer: PreTrainedTokenizerBase
    before: dict[str, torch.Tensor]
    said_before: list[str]


def said(model, tokenizer, tokens: int = 4) -> list[str]:
    """What plain transformers write behind the prompts."""
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
        texts.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :]))
    return texts


def unedited(model) -> dict[str, torch.Tensor]:
    """The weights that an edit may write, and of each other one a sum of its bits."""
    state = {}
    for name, value in model.state_dict().items():
        state[name] = value.clone() if "down_proj" in name else value.view(torch.int32).sum()
    return state


@pytest.fixture(scope="module")
def edited(folder) -> Edited:
    """Two facts written with the settings that are decided for the model, and little text."""
    model, tokenizer = load_language_model(str(folder))
    before, spoken = unedited(model), said(model, tokenizer)
    result = edit(
        model,
        tokenizer,
        FACTS,
        progress=False,
        contexts=[],
        tokens_per_dim=2,
        action="off",  # of the guard, which reads a thousand tokens of text twice
    )
    return Edited(result, tokenizer, before, spoken)


def test_check_finds_the_model_fit_to_go(known, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lightning_blue.preflight.timing.SECONDS", 0.1)
    monkeypatch.setattr("lightning_blue.preflight.timing.FEW", 2)
    facts = tmp_path / "facts.jsonl"
    write_jsonl(facts, FACTS)
    settings = [
        "--model.contexts=[]",
        "--model.target.steps=3",
        "--model.covariance.max_length=64",  # of the rows that are timed
        "--guard.action=off",
        "--measure.generate=false",
        f"--model.covariance.cache={tmp_path / 'stats'}",
        f"--run.root={tmp_path / 'runs'}",
    ]
    code = main(["check", str(folder), f"--data={facts}", "--json=-", *settings])
    out, err = capsys.readouterr()
    assert code == 0, err
    report = json.loads(out)
    found = report["model"]
    assert found["n_layers"] == known.n_layers
    assert (found["d_model"], found["d_in"]) == known.widths
    assert found["before_text"] == known.before_text
    assert found["tied_head"]
    assert report["settings"]["site"] == known.site
    for fact, record, prompt in zip(report["facts"], FACTS, PROMPTS, strict=True):
        last = record["subject"].split()[-1]
        assert prompt.startswith("".join(fact["tokens"][: fact["lookup"] + 1]).replace("<bos>", ""))
        assert last.endswith(fact["tokens"][fact["lookup"]].strip())
        assert not fact["known_already"]
        assert 0 < fact["probability_new"] < fact["probability_true"] < 1


def test_an_edit_is_what_the_model_says_then(edited):
    result, tokenizer, _, said_before = edited
    for fact, text in zip(FACTS, said_before, strict=True):
        assert not text.startswith(f" {fact['target_new']}")
    assert result.failed == []
    assert result.scores["efficacy"]["after"] == 100
    assert result.scores["efficacy_top1"]["before"] == 0
    for fact, text in zip(FACTS, said(result.model, tokenizer), strict=True):
        assert text.startswith(f" {fact['target_new']}")


def test_the_saved_model_says_it_with_plain_transformers(edited, tmp_path):
    result, tokenizer, *_ = edited
    path = result.save(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    assert said(model, AutoTokenizer.from_pretrained(path)) == said(result.model, tokenizer)


def test_undo_gives_the_model_back_to_the_bit(edited):
    result, tokenizer, before, said_before = edited
    changed = [
        name
        for name, value in unedited(result.model).items()
        if not torch.equal(value, before[name])
    ]
    assert sorted(changed) == sorted(result.state.module.edited_names)
    result.undo()
    now = unedited(result.model)
    assert all(torch.equal(value, before[name]) for name, value in now.items())
    assert said(result.model, tokenizer) == said_before
