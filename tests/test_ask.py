"""``ask``: what models and runs say, against plain passes and the runs' own weights."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from tokenizers import decoders

from conftest import LanguageModel
from lightning_blue.__main__ import main
from lightning_blue.language_model.tokens import encode_prompts, token_texts, written_texts
from runs_made import Made, made, save, small_module  # noqa: F401
from test_chat import LINES, asked, chat_tokenizer
from test_check import greedy
from test_subjects import metaspace_tokenizer

PROMPT = "The mother tongue of Danielle Darrieux is"
OTHER = "Where is the Eiffel Tower? It is in"


def answer(capsys, *args: str) -> list[dict]:
    assert main(["ask", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@torch.no_grad()
def distribution(model, tokenizer, prompt: str) -> torch.Tensor:
    ids = tokenizer(prompt)["input_ids"]
    return model(torch.tensor([ids])).logits[0, -1].float().softmax(-1)


def check(rows: list[dict], name: str, model, tokenizer, prompt: str) -> None:
    expected = distribution(model, tokenizer, prompt)
    for row in rows:
        assert row[name] == pytest.approx(float(expected[row["id"]]), rel=1e-4)
        alone = tokenizer.decode([row["id"]])
        assert "\ufffd" in alone or row["token"] == alone  # or a part of a character


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_is_asked_as_a_user_would(name, request, tmp_path, capsys):
    model, tokenizer = language_model = request.getfixturevalue(name)
    folder = save(language_model, tmp_path)
    first, second = answer(capsys, str(folder), PROMPT, OTHER, "--tokens=6", "--top=4")
    for given, found in ((PROMPT, first), (OTHER, second)):
        assert found["prompt"] == found["read_as"] == given
        rows = found["next_tokens"]
        assert len(rows) == 4
        best = distribution(model, tokenizer, given).topk(4).values.tolist()
        assert [row["model"] for row in rows] == pytest.approx(best, rel=1e-4)
        check(rows, "model", model, tokenizer, given)
        ids = torch.tensor([tokenizer(given)["input_ids"]])
        assert greedy(model, tokenizer, ids, 6) == given + found["continuation"]["model"]


def test_a_run_says_one_thing_before_and_another_after(made, capsys):  # noqa: F811
    """The run has saved no model: its records are applied to the unedited one."""
    run: Made = made("llama", "memit")
    (found,) = answer(capsys, str(run.folder), PROMPT, "--before", "--top=3")
    assert set(found["continuation"]) == {"unedited", "edited"}
    rows = found["next_tokens"]
    assert 3 <= len(rows) <= 6  # the three of each
    base = small_module(run.base)
    check(rows, "unedited", base.model, base.tokenizer, PROMPT)
    check(rows, "edited", run.module.model, run.module.tokenizer, PROMPT)
    assert any(row["edited"] > 2 * row["unedited"] for row in rows)
    assert [max(row["edited"], row["unedited"]) for row in rows] == sorted(
        (max(row["edited"], row["unedited"]) for row in rows), reverse=True
    )
    (alone,) = answer(capsys, str(run.folder), PROMPT, "--top=3")
    assert alone["continuation"] == {"edited": found["continuation"]["edited"]}


@pytest.mark.parametrize("kind", ["half", "prune"])
def test_the_saved_model_and_the_records_say_the_same(made, kind, tmp_path, capsys):  # noqa: F811
    run: Made = made("gpt2", kind)
    folder = shutil.copytree(run.folder, tmp_path / "run")
    by_records = answer(capsys, str(folder), PROMPT, OTHER, "--before")
    assert main(["export", str(folder), "--as=model"]) == 0
    assert (folder / "model" / "config.json").is_file()
    capsys.readouterr()
    assert answer(capsys, str(folder), PROMPT, OTHER, "--before") == by_records
    (folder / "summary.json").write_text("{}")
    shutil.rmtree(folder / "records")  # what was saved is enough for the edited model alone
    assert main(["ask", str(folder), PROMPT, "--before"]) == 2
    assert "no records" in capsys.readouterr().err
    (alone, _) = answer(capsys, str(folder), PROMPT, OTHER)
    assert alone["continuation"]["edited"] == by_records[0]["continuation"]["edited"]


def test_the_table_stands_side_by_side(made, capsys):  # noqa: F811
    run: Made = made("llama", "memit")
    assert main(["ask", str(run.folder), PROMPT, OTHER + " ", "--before", "--tokens=60"]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert out.count("| next token") == 2
    heads = [line.split("|")[2:4] for line in out.splitlines() if "next token" in line]
    assert [[head.strip() for head in pair] for pair in heads] == 2 * [["unedited", "edited"]]
    assert out.count("  unedited  ") == out.count("  edited    ") == 2
    assert out.count("ends with white space, which is kept") == 1
    assert "%" in out


def test_the_unedited_model_may_have_moved(made, tmp_path, capsys):  # noqa: F811
    run: Made = made("llama", "memit")
    expected = answer(capsys, str(run.folder), PROMPT, "--before")
    folder = shutil.copytree(run.folder, tmp_path / "run")
    header = folder / "records" / "journal.json"
    header.write_text(header.read_text().replace(str(run.base), str(tmp_path / "gone")))
    assert main(["ask", str(folder), PROMPT]) == 2
    assert "--model PATH" in capsys.readouterr().err
    assert answer(capsys, str(folder), PROMPT, "--before", f"--model={run.base}") == expected


def test_a_chat_model_is_asked_by_its_template(llama, tmp_path, capsys):
    tokenizer = chat_tokenizer(LINES)
    grown = copy.deepcopy(llama.model)
    grown.resize_token_embeddings(len(tokenizer))
    folder = save(LanguageModel(grown, tokenizer), tmp_path / "chat")
    (plain,) = answer(capsys, str(folder), "Where is Lyon?")
    assert plain["read_as"] == "Where is Lyon?"
    (found,) = answer(capsys, str(folder), "Where is Lyon?", "--chat", "--system=Be brief.")
    assert found["prompt"] == "Where is Lyon?"
    expected = asked(tokenizer, "Where is Lyon?", "Be brief.", tokenize=False)
    assert found["read_as"] == expected
    assert encode_prompts(tokenizer, [expected])[0] == list(
        asked(tokenizer, "Where is Lyon?", "Be brief.", return_dict=False)
    )


def test_a_run_is_asked_as_it_was_edited(made, tmp_path, capsys):  # noqa: F811
    """With the chat template where the run used it, unless told otherwise."""
    run: Made = made("llama", "memit")
    folder = shutil.copytree(run.folder, tmp_path / "run")
    (folder / "config.yaml").write_text("data: {chat: true, system: null}\n")
    assert main(["ask", str(folder), PROMPT]) == 2
    assert "no chat template" in capsys.readouterr().err
    (found,) = answer(capsys, str(folder), PROMPT, "--no-chat")
    assert found["read_as"] == PROMPT
    (folder / "config.yaml").write_text("data: [")
    assert main(["ask", str(folder), PROMPT]) == 2
    assert "configuration is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["almanac"], "PROMPT"),
        (["almanac", "x", "--before"], "--before is for a run"),
        (["almanac", "x", "--model=almanac"], "--model is for a run"),
        (["almanac", ""], "a prompt is empty"),
        (["almanac", "x", "caf\udce9"], "holds the byte 0xe9, which is not UTF-8"),
        (["almanac", "x", "--chat", "--system=caf\udce9"], "where: --system"),
        (["almanac", "river " * 200], "context holds 128"),
        (["almanac", "x", "--dtype=int8"], "choose one of"),
        (["almanac", "x", "--top=0"], "--top"),
        (["almanac", "x", "--chat"], "no chat template"),
        (["almanac", "x", "--system=Be brief."], "add --chat"),
        (["nothing/at/all/here", "x"], "no folder"),
    ],
)
def test_bad_input_is_one_message(args, said, capsys):
    assert main(["ask", *args]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("error: ") == 1
    assert "Traceback" not in err


def test_a_run_without_edits_is_refused(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("data: {}\n")
    assert main(["ask", str(tmp_path), "x"]) == 2
    assert "no records" in capsys.readouterr().err
    assert main(["ask", str(tmp_path), "x", "--dtype=bfloat16"]) == 2
    assert "the dtype that it was edited in" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["José is", "  two towns\n", "a", "Zoë 🙂!", "法国的"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_texts_of_tokens_make_up_the_text(name, text, request):
    """One for each token; those of one character are the same, and count once."""
    tokenizer = request.getfixturevalue(name).tokenizer
    parts = token_texts(tokenizer, text)
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert len(parts) == len(encoded["input_ids"])
    pairs = zip(encoded["offset_mapping"], parts, strict=True)
    distinct = dict(pair for pair in pairs if pair[0] != (0, 0))
    assert "".join(distinct.values()) == text
    assert (parts[0] == "<|begin|>") == (name == "llama")


def test_a_token_is_written_with_its_space():
    """A tokenizer like Llama-2's writes a first token without it; behind a prompt it has one."""
    tokenizer = metaspace_tokenizer()
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(steps)
    assert token_texts(tokenizer, "English is Rome.") == ["Eng", "lish", " is", " Rome", "."]
    before, whole = (tokenizer(text)["input_ids"] for text in ("English is", "English is Rome?"))
    assert tokenizer.decode(whole[len(before) :]) == "Rome?"
    assert written_texts(tokenizer, before, whole[len(before) :]) == [" Rome", "?"]
