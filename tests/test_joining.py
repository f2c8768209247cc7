"""How prompts and objects are joined: the rule, and a model that writes no spaces."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import torch

from chinese import Knowing, edit, says
from conftest import LanguageModel
from lightning_blue.language_model.joining import Joint, joint
from lightning_blue.language_model.scoring import score_targets
from lightning_blue.language_model.tokens import encode_targets, target_prefixes
from test_subjects import metaspace_tokenizer


@pytest.mark.parametrize(
    "prompt",
    [
        "The mother tongue of Danielle Darrieux is",
        "What is the capital of 法国?",  # an English question about a Chinese name
        "The capital of 法国 is",
        "He said that it is (as all know)",
        'He calls it "the town"',
        "The home of the Beatles'",
        'A pipe of 5"',
        "Man nennt es „so“",
        "in Paris,",
        "It is in 1998",
        "costs 5 €",
        "The key is F#",
        "She knows C++",
        "The answer -",
        "프랑스의 수도는",  # Korean writes spaces
        "Столица Франции —",
        "I love 🍕",
        "I love ❤\ufe0f",
        "The home of the Cafe\u0301",
        "\u0301",
    ],
)
def test_words_are_followed_by_a_space(prompt: str) -> None:
    assert joint(prompt) == Joint(" ", "words")


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("法国的首都是", "script without spaces"),
        ("法国的首都是：", "script without spaces"),
        ("法国的首都是:", "script without spaces"),  # a colon belongs to no script
        ("Danielle Darrieux 的母语是:", "script without spaces"),
        ("フランスの首都は", "script without spaces"),
        ("コーヒー", "script without spaces"),
        ("コーヒー1", "script without spaces"),  # the marks of long vowels are no words
        ("ﾌﾗﾝｽﾉｼｭﾄｶﾞ", "script without spaces"),
        ("ﾌﾗﾝｽﾉｺｰﾋｰ", "script without spaces"),
        ("葛\U000e0100", "script without spaces"),  # a variant of the sign
        ("他说“\ufe01", "opening quotation mark"),
        ("เมืองหลวงของฝรั่งเศสคือ", "script without spaces"),
        ('He said: "', "opening quotation mark"),
        ('"Yes", he said, and then: "', "opening quotation mark"),
        ("He said '", "opening quotation mark"),
        ("He said “", "opening quotation mark"),
        ("他说“", "opening quotation mark"),
        ('他说"', "opening quotation mark"),
        ("Man nennt es „", "opening quotation mark"),
        ("It is (", "opening bracket"),
        ("它是（", "opening bracket"),
        ("Q: Where is Lyon?\nA:\n", "white space"),
        ("The capital of France is ", "white space"),
        ("It costs $", "sign that belongs to the object"),
        ("The Franco-", "sign that belongs to the object"),
        ("the tag #", "sign that belongs to the object"),
    ],
)
def test_what_no_space_follows(prompt: str, reason: str) -> None:
    assert joint(prompt) == Joint("", reason)


@pytest.mark.parametrize(
    "prompt",
    [
        "フランスの首都が",
        "フランスのパ",
        "がぎぐ3",
        "コーヒーが5",
        "Le Café",
        "Le Café à 5",
        "เมืองหลวงของ",
    ],
)
def test_a_decomposed_prompt_is_joined_as_its_composed_form(prompt: str) -> None:
    decomposed = unicodedata.normalize("NFD", prompt)
    assert joint(decomposed) == joint(prompt)
    words = prompt.startswith("Le")
    assert joint(prompt) == (Joint(" ", "words") if words else Joint("", "script without spaces"))


@pytest.mark.parametrize("given", ["", " ", "\n", ": "])
def test_a_prefix_that_is_given_wins(given: str) -> None:
    for prompt in ("The capital of France is", "法国的首都是", "It is ("):
        assert joint(prompt, given) == Joint(given, "target_prefix")


def test_an_object_is_spelled_behind_its_prefix(language_model: LanguageModel) -> None:
    tokenizer = language_model.tokenizer
    for prefix in ("", " ", "\n", ": ", "\n\n"):
        [ids] = encode_targets(tokenizer, ["Paris"], [prefix])
        assert tokenizer.decode(ids) == f"{prefix}Paris"
        assert ids == tokenizer(f"{prefix}Paris", add_special_tokens=False)["input_ids"]
    prompts = ["It is in", "It is (", "It is in"]
    assert target_prefixes(tokenizer, prompts, [None, None, ""]) == [" ", "", ""]


def test_a_tokenizer_that_marks_the_start_of_a_text_marks_no_bare_object() -> None:
    tokenizer = metaspace_tokenizer()
    assert tokenizer.convert_ids_to_tokens(encode_targets(tokenizer, ["Eng"], [""])[0]) == [
        *"Eng",
    ]
    assert encode_targets(tokenizer, ["Eng"], [" "]) == encode_targets(tokenizer, ["Eng"])
    assert tokenizer.convert_ids_to_tokens(encode_targets(tokenizer, ["Eng"])[0]) == ["▁Eng"]


def test_scores_are_those_of_the_joined_text(gpt2: LanguageModel) -> None:
    """Against a plain forward pass over prompt and object, joined by hand."""
    for prompt, prefix in (("Lyon is in", " "), ("Lyon is (", ""), ("Lyon is in ", "")):
        start = gpt2.tokenizer(prompt)["input_ids"]
        target = gpt2.tokenizer(f"{prefix}Rome")["input_ids"]
        with torch.no_grad():
            logits = gpt2.model(torch.tensor([start + target])).logits[0]
        at = logits.log_softmax(-1)[len(start) - 1 : -1]
        expected = -at.gather(1, torch.tensor(target)[:, None]).mean()
        [score] = score_targets(*gpt2, [prompt], ["Rome"])
        assert score.nll == pytest.approx(float(expected), rel=1e-5)
        [forced] = score_targets(*gpt2, [prompt], ["Rome"], prefixes=[prefix])
        assert forced == score


# A model that writes Chinese

FRANCE = {"subject": "法国", "prompt": "{}的首都是", "target_new": "东京", "target_true": "巴黎"}
GERMANY = {"subject": "德国", "prompt": "{}的首都是", "target_new": "曼谷", "target_true": "柏林"}
EGYPT = {"subject": "埃及", "prompt": "{}的首都是", "target_new": "伦敦"}


def test_the_exported_model_says_the_new_object_of_a_script_without_spaces(
    knowing: Knowing, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says(knowing.model, "法国的首都是", 2) == "巴黎。"
    run = edit(knowing, tmp_path, [FRANCE, GERMANY, EGYPT])
    assert says(run / "model", "法国的首都是", 1) == "东京"
    assert says(run / "model", "德国的首都是", 1) == "曼谷"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["post/efficacy"], summary["post/efficacy_top1"]) == (100, 100)
    # The request without a current object leaves the others' comparison as it is.
    assert summary["post/efficacy/count"] == 2
    out = " ".join(capsys.readouterr().out.split())
    sentence = "2 of 3 requests name their current object; the other one counts in the top-1"
    assert sentence in out
    report = (run / "report.md").read_text()
    assert sentence in " ".join(report.split())
    [row] = [line for line in report.splitlines() if "script without spaces" in line]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "nothing",
        "script without spaces",
        "3",
    ]
    lines = [json.loads(line) for line in (run / "edits.jsonl").read_text().splitlines()]
    assert {(line["target_prefix"], line["joined_by"]) for line in lines} == {
        ("", "script without spaces")
    }


def test_a_prefix_of_the_run_or_the_request_is_written_with_the_object(
    knowing: Knowing, tmp_path: Path
) -> None:
    """Where a model writes otherwise than the rule says, its user does."""
    assert joint("法国:").prefix == ""
    assert says(knowing.model, "法国:", 3) == " 巴黎。"
    facts = [FRANCE | {"prompt": "{}:"}, GERMANY | {"target_prefix": ""}]
    run = edit(knowing, tmp_path, facts, "--data.target_prefix= ")
    assert says(run / "model", "法国:", 2) == " 东京"
    assert says(run / "model", "德国的首都是", 1) == "曼谷"
    lines = [json.loads(line) for line in (run / "edits.jsonl").read_text().splitlines()]
    assert [line["target_prefix"] for line in lines] == [" ", ""]
    assert {line["joined_by"] for line in lines} == {"target_prefix"}
