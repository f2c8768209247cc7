"""Chat models: prompts by the tokenizer's own template, and prompts that carry it already."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from chinese import Knowing, edit
from conftest import LanguageModel, byte_level_tokenizer
from helpers import load_model
from lightning_blue.data import EditDataModule
from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.editing.prompts import context_templates, edit_prompts
from lightning_blue.language_model.chat import markers, wrap
from lightning_blue.language_model.joining import Joint, joint
from lightning_blue.language_model.tokens import encode_prompts, encode_with_subject
from lightning_blue.support.errors import InputError

# With a BOS of its own and a last newline, as Llama-3's; without a BOS, as Qwen's; in words of
# plain text, and white space before the answer, as Llama-2's.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|role|>{{ m.role }}<|/role|>\n\n{{ m.content | trim }}"
    "<|turn|>{% endfor %}{% if add_generation_prompt %}<|role|>assistant<|/role|>\n\n{% endif %}"
)
LINES = (
    "{% for m in messages %}<|role|>{{ m.role }}\n{{ m.content }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
)
WORDS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
)
TEMPLATES = {"headers": HEADERS, "lines": LINES, "words": WORDS}


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Return a tokenizer that prepends BOS, with control tokens and a chat template."""
    tokenizer = byte_level_tokenizer(bos=True)
    controls = ["<|role|>", "<|/role|>", "<|turn|>"]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(each, special=True) for each in controls]}
    )
    tokenizer.chat_template = template
    return tokenizer


def asked(
    tokenizer: PreTrainedTokenizerFast, question: str, system: str | None = None, **kwargs: Any
) -> Any:
    """What a user of transformers gets from the template."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": question})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **kwargs)


def asked_ids(
    tokenizer: PreTrainedTokenizerFast, question: str, system: str | None = None
) -> list[int]:
    return list(asked(tokenizer, question, system, tokenize=True, return_dict=False))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Answer in one word."])
def test_ids_are_those_of_the_template(name: str, system: str | None) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[name])
    if name == "words" and system:
        with pytest.raises(InputError, match=r"(?s)no system here.*--data.system"):
            wrap(tokenizer, "Where is Lyon?", system)
        return
    text = wrap(tokenizer, "Where is {}?", system)
    expected = asked_ids(tokenizer, "Where is Lyon?", system)
    assert encode_prompts(tokenizer, [text.format("Lyon")]) == [expected]
    [encoded] = encode_with_subject(tokenizer, [text], ["Lyon"])
    assert encoded.ids == expected
    assert "Lyon".endswith(tokenizer.decode(encoded.ids[encoded.lookup]).strip())
    assert encode_prompts(tokenizer, ["Lyon is"])[0][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_that_carries_its_template_is_left_as_it_is(name: str) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[name])
    text = asked(tokenizer, "Where is Lyon?", tokenize=False)
    assert wrap(tokenizer, text) == text
    assert encode_prompts(tokenizer, [text]) == [asked_ids(tokenizer, "Where is Lyon?")]
    known = joint(text, markers=markers(tokenizer))
    assert known == Joint(" " if name == "words" else "", "chat template")
    assert joint(text, ": ", markers(tokenizer)).prefix == ": "


def test_a_prompt_with_control_tokens_needs_no_template() -> None:
    """Tokenizers of chat models come without their template, and prompts are written by hand."""
    tokenizer = chat_tokenizer(None)
    text = asked(chat_tokenizer(HEADERS), "Where is Lyon?", tokenize=False)
    assert encode_prompts(tokenizer, [text]) == [
        asked_ids(chat_tokenizer(HEADERS), "Where is Lyon?")
    ]
    assert joint(text.rstrip("\n"), markers=markers(tokenizer)) == Joint("", "control token")


def write(folder: Path, **fields: Any) -> str:
    fact = {"subject": "Lyon", "prompt": "Where is {}?", "target_new": "Rome"} | fields
    (folder / "facts.jsonl").write_text(json.dumps(fact))
    return str(folder / "facts.jsonl")


def test_a_run_puts_the_template_around_all_prompts(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(HEADERS)
    path = write(
        tmp_path,
        target_true="France",
        paraphrases=["In which country is Lyon?"],
        neighborhood_prompts=["Where is Nice?"],
        generation_prompts=["Tell me about Lyon."],
    )
    data = EditDataModule(path, chat=True, system="Be brief.")
    data.prepare(tokenizer)
    [request] = data.requests

    def expected(text: str) -> Any:
        return asked(tokenizer, text, "Be brief.", tokenize=False)

    assert request.text == expected("Where is Lyon?")
    assert request.paraphrases == (expected("In which country is Lyon?"),)
    assert request.neighborhood == (Probe(expected("Where is Nice?"), "France"),)
    assert request.generation_prompts == (expected("Tell me about Lyon."),)
    assert request.shown == "Where is Lyon?"


def test_a_file_with_rendered_prompts_keeps_their_last_newline(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(HEADERS)
    text = asked(tokenizer, "Where is {}?", tokenize=False)
    for chat in (False, True):
        data = EditDataModule(write(tmp_path, prompt=text), chat=chat)
        data.prepare(tokenizer)
        assert data.requests[0].prompt == text


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", ["headers", "lines"])
def test_contexts_stand_in_the_users_own_words(name: str, system: str | None) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[name])
    request = EditRequest("0", wrap(tokenizer, "Where is {}?", system), "Lyon", "Rome")
    [prompts] = edit_prompts(tokenizer, [request], context_templates(["So it is."]))
    questions = ("Where is Lyon?", "So it is. Where is Lyon?")
    rome = tokenizer("Rome", add_special_tokens=False)["input_ids"]
    for row, question in zip(prompts.rewriting, questions, strict=True):
        assert row.ids == asked_ids(tokenizer, question, system) + rome[:-1]
    assert prompts.target == rome


def test_what_cannot_be_wrapped_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(InputError, match=r"(?s)no chat template.*data.chat.*leave out"):
        EditDataModule(path, chat=True).prepare(chat_tokenizer(None))
    with pytest.raises(InputError, match=r"(?s)system text.*--data.chat=true"):
        EditDataModule(path, system="Be brief.")
    shouting = "<|role|>{{ messages[-1].content | upper }}"
    with pytest.raises(InputError, match="does not keep the question"):
        wrap(chat_tokenizer(shouting), "Where is {}?")
    with pytest.raises(InputError, match="nothing that tells its prompts from plain ones"):
        wrap(chat_tokenizer("{{ messages[-1].content }}\nA:"), "Where is {}?")


def test_an_edited_chat_model_says_the_new_object_to_its_template(
    knowing: Knowing, tmp_path: Path
) -> None:
    """Edited by a plain question; asked with ``apply_chat_template``, from the exported folder."""

    def answer(folder: Path) -> str:
        model, tokenizer = load_model(folder)
        ids = asked_ids(tokenizer, "法国的首都是什么？")
        written = model.generate(torch.tensor([ids]), max_new_tokens=1, do_sample=False)
        return tokenizer.decode(written[0, len(ids) :])

    assert answer(knowing.model) == "巴黎"
    fact = {"subject": "法国", "prompt": "{}的首都是什么？", "target_new": "东京"}
    run = edit(knowing, tmp_path, [fact], "--data.chat=true")
    assert answer(run / "model") == "东京"
    [line] = [json.loads(line) for line in (run / "edits.jsonl").read_text().splitlines()]
    assert (line["target_prefix"], line["joined_by"]) == ("", "chat template")
    assert line["after"]["continuation"].startswith("东京")
    assert "法国的首都是什么？" in (run / "report.md").read_text()


def test_a_plain_model_reads_as_before(gpt2: LanguageModel) -> None:
    known = markers(gpt2.tokenizer)
    assert known.controls == ("<|end|>",)
    assert (known.head, known.tail, known.opening("Lyon is in")) == ("", "", 0)
    assert not known.carried_by("Lyon is in")


def test_braces_in_the_system_text_are_refused_by_name_where_a_subject_has_a_place(
    tmp_path: Path,
) -> None:
    tokenizer, system = chat_tokenizer(LINES), "Answer as JSON: {}"
    with pytest.raises(InputError, match=r"(?s)the system text holds \{\}.*--data.system"):
        EditDataModule(write(tmp_path), chat=True, system=system)
    with pytest.raises(InputError, match=r"the system text holds \{\}"):
        wrap(tokenizer, "Where is {}?", system)
    hinted = "Answer as JSON: { }"
    expected = asked(tokenizer, "Where is {}?", hinted, tokenize=False)
    assert wrap(tokenizer, "Where is {}?", hinted) == expected
    plain = asked(tokenizer, "Where is Lyon?", system, tokenize=False)
    assert wrap(tokenizer, "Where is Lyon?", system) == plain  # as `ask` does


def test_a_template_that_fails_without_a_word_is_refused() -> None:
    silent = "<|role|>{{ raise_exception('') }}"
    with pytest.raises(InputError, match="the chat template refuses the prompt: TemplateError"):
        wrap(chat_tokenizer(silent), "Where is {}?")


DATED = (  # as Llama-3.2's
    "{% if date_string is not defined %}{% if strftime_now is defined %}"
    '{% set date_string = strftime_now("%d %b %Y") %}{% else %}{% set date_string = "never" %}'
    "{% endif %}{% endif %}\n\n<|role|>system<|/role|>Today: {{ date_string }}, "
    "{%- macro iso(form) %}{{ strftime_now(form) }}{% endmacro %}{{ iso(' %A %Y-%m-%-d') }}<|turn|>"
    + HEADERS
)


def test_a_prompt_is_the_same_on_every_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run is known by, when it is resumed or compared, depends on its prompts."""
    tokenizer = chat_tokenizer(DATED)
    found = []
    for day in (3, 4):

        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None, day: int = day) -> datetime:
                return datetime(2031, 5, day)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        assert f"Today: 0{day} May 2031" in asked(tokenizer, "Where is Lyon?", tokenize=False)
        data = EditDataModule(write(tmp_path), chat=True)
        data.prepare(tokenizer)
        found.append((wrap(tokenizer, "Where is {}?"), markers(tokenizer), data.state_dict()))
    assert found[0] == found[1]
    assert found[0][0].startswith("\n<|role|>system<|/role|>Today: 26 Jul 2024, Friday 2024-07-26<")
