"""Token positions against byte counting, tokenisation of the parts, and recorded numbers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from conftest import LanguageModel, bytes_to_unicode
from lightning_blue.data.requests import EditRequest
from lightning_blue.language_model.tokens import (
    encode_targets,
    encode_with_subject,
    fill,
    last_token,
    place_in_context,
    target_ids,
)
from lightning_blue.support.errors import InputError

CASES = [
    ("{} is the capital of", "Paris"),
    ("The mother tongue of {} is", "Danielle Darrieux"),
    ("Who founded the town of {}", "Basel"),
    ("{}", "Rome"),
    ("In {}, people of José speak", "São Paulo"),
    ("The symbol {} means", "👩‍🚀"),
    ("The river {} flows", "Nie\u0301vre\u0301"),  # combining accents, one at the end
    ("{}の首都は", "日本"),
    ("The city of {} lies in", "ירושלים"),
    ("The birthplace of {}, who", "Zoë"),
    ("Is {} near Lyon? Lyon is near", "Lyon"),
    ("Lyon, or rather {}, is near", "Lyon"),
    ("The firm {}'s headquarters are in", "Webley & Scott (UK)"),
    ('He said "{}".', "Apple A5"),
    ("Born in {}.\n\nHe", "1998"),
]


def lookup_by_bytes(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> int:
    """Index of the token with the last byte of ``text``, by adding up the bytes of each token."""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    missing = len(text.encode())
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        if ids[index] not in tokenizer.all_special_ids:
            missing -= len(bytes(byte_of[character] for character in token))
        if missing <= 0:
            return index
    raise AssertionError("the tokens end before the text does")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that marks the start of every text, as Llama-2's does."""
    words = ["▁", ".", "▁Eng", "lish", "▁is", "▁Rome", "?"]
    words += sorted(set("".join(words)) - set(words))
    merges = [("▁", "E"), ("▁E", "n"), ("▁En", "g"), ("l", "i"), ("li", "s"), ("lis", "h")]
    merges += [("▁", "i"), ("▁i", "s"), ("▁", "R"), ("▁R", "o"), ("▁Ro", "m"), ("▁Rom", "e")]
    words += [a + b for a, b in merges if a + b not in words]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(("template", "subject"), CASES)
def test_lookup_is_the_token_with_the_subjects_last_byte(
    language_model: LanguageModel, template: str, subject: str
) -> None:
    tokenizer = language_model.tokenizer
    [encoded] = encode_with_subject(tokenizer, [template], [subject])
    before, _, after = template.partition("{}")
    assert encoded.ids == tokenizer(before + subject + after)["input_ids"]
    assert encoded.lookup == lookup_by_bytes(tokenizer, encoded.ids, before + subject)


def test_real_tokenizers_agree_with_byte_counting(
    real_tokenizer: PreTrainedTokenizerBase,
) -> None:
    templates, subjects = zip(*CASES, strict=True)
    for (template, subject), encoded in zip(
        CASES, encode_with_subject(real_tokenizer, templates, subjects), strict=True
    ):
        text = template.partition("{}")[0] + subject
        assert encoded.lookup == lookup_by_bytes(real_tokenizer, encoded.ids, text), text


def test_bos_moves_ids_and_lookup_by_one(gpt2: LanguageModel, llama: LanguageModel) -> None:
    [without] = encode_with_subject(gpt2.tokenizer, ["{} is"], ["Paris"])
    [with_bos] = encode_with_subject(llama.tokenizer, ["{} is"], ["Paris"])
    assert with_bos.ids[0] == llama.tokenizer.bos_token_id
    assert without.ids[0] != gpt2.tokenizer.bos_token_id
    assert with_bos.lookup == len(llama.tokenizer("Paris")["input_ids"]) - 1
    assert without.lookup == len(gpt2.tokenizer("Paris")["input_ids"]) - 1


def test_subject_twice_takes_the_one_in_the_slot(language_model: LanguageModel) -> None:
    tokenizer = language_model.tokenizer
    first, second = encode_with_subject(
        tokenizer, ["{} and Lyon are", "Lyon and {} are"], ["Lyon", "Lyon"]
    )
    assert first.ids == second.ids
    assert first.lookup == len(tokenizer("Lyon")["input_ids"]) - 1
    assert second.lookup == len(tokenizer("Lyon and Lyon")["input_ids"]) - 1


def test_a_batch_gives_what_single_calls_give(language_model: LanguageModel) -> None:
    tokenizer = language_model.tokenizer
    templates, subjects = zip(*CASES, strict=True)
    together = encode_with_subject(tokenizer, templates, subjects)
    alone = [encode_with_subject(tokenizer, [t], [s])[0] for t, s in CASES]
    assert together == alone


def test_contexts_with_braces_of_their_own(gpt2: LanguageModel) -> None:
    template = place_in_context("A set is {} or {x}. {}", "The capital of {} is")
    assert template == "A set is {} or {x}. The capital of {} is"
    text, start = fill(template, "France")
    assert text == "A set is {} or {x}. The capital of France is"
    assert text[start:].startswith("France")
    [encoded] = encode_with_subject(gpt2.tokenizer, [template], ["France"])
    assert encoded.lookup == lookup_by_bytes(gpt2.tokenizer, encoded.ids, text[: start + 6])


def test_last_token_by_hand() -> None:
    offsets = [(0, 0), (0, 3), (3, 5), (4, 5), (4, 5), (5, 7), (7, 7)]
    assert last_token(offsets, 0, 3) == 1
    assert last_token(offsets, 0, 4) == 2
    assert last_token(offsets, 3, 5) == 4  # the character is split over three tokens
    assert last_token(offsets, 4, 6) == 5  # the token goes on after the subject
    assert last_token(offsets, 7, 9) is None
    assert last_token([(0, 3), (2, 2)], 0, 3) == 0  # the second covers no character


@pytest.mark.parametrize("target", ["English", "São Paulo", "1998", "(US)", "👩‍🚀", "a b c"])
def test_targets_are_the_tokens_after_a_space(language_model: LanguageModel, target: str) -> None:
    tokenizer = language_model.tokenizer
    ids = target_ids(tokenizer, target)
    assert ids == tokenizer(f" {target}", add_special_tokens=False)["input_ids"]
    assert tokenizer.bos_token_id not in ids
    assert tokenizer.decode(ids) == f" {target}"


def test_targets_have_no_mark_of_a_texts_start() -> None:
    tokenizer = metaspace_tokenizer()
    alone = tokenizer.convert_ids_to_tokens(tokenizer(" English")["input_ids"])
    assert alone[:2] == ["▁", "▁Eng"]  # what a lone object would begin with
    assert tokenizer.convert_ids_to_tokens(target_ids(tokenizer, "English")) == ["▁Eng", "lish"]
    whole = tokenizer("Rome is English")["input_ids"]
    assert tokenizer("Rome is")["input_ids"] + target_ids(tokenizer, "English") == whole


def test_targets_where_the_full_stop_joins_the_space() -> None:
    vocabulary = {character: i for i, character in enumerate(". EngR")} | {". ": 6, ". E": 7}
    backend = Tokenizer(models.BPE(vocabulary, [(".", " "), (". ", "E")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer(". Eng")["input_ids"] == [7, 3, 4]
    assert encode_targets(tokenizer, ["Eng", "R"]) == [[1, 2, 3, 4], [1, 5]]


def test_targets_where_the_full_stop_has_no_token() -> None:
    backend = Tokenizer(models.BPE({" ": 0, "a": 1}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert encode_targets(tokenizer, ["aa"]) == [[0, 1, 1]]


def test_nothing_to_encode(gpt2: LanguageModel) -> None:
    assert encode_with_subject(gpt2.tokenizer, [], []) == []
    assert encode_targets(gpt2.tokenizer, []) == []


def test_tokenizer_without_offsets_is_refused() -> None:
    slow: Any = SimpleNamespace(is_fast=False)
    with pytest.raises(InputError, match=r"(?s)which characters a token covers.*fast tokenizer"):
        encode_with_subject(slow, ["{} is"], ["Rome"])


def test_subject_that_the_tokenizer_leaves_out() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.normalizer = normalizers.Replace("ß", "")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(InputError, match=r"(?s)does not encode the subject 'ß'.*prompt 'aßb'"):
        encode_with_subject(tokenizer, ["a{}b"], ["ß"])


def test_template_without_a_slot_is_refused(gpt2: LanguageModel) -> None:
    with pytest.raises(ValueError, match="for the subject 'Rome'"):
        encode_with_subject(gpt2.tokenizer, ["Rome is"], ["Rome"])
    with pytest.raises(ValueError, match="context template"):
        place_in_context("So it is.", "{} is")
    with pytest.raises(ValueError, match="1 templates but 2 subjects"):
        encode_with_subject(gpt2.tokenizer, ["{} is"], ["Rome", "Oslo"])


def recorded(shared: Path, name: str) -> list[dict[str, Any]]:
    """The recorded lookups of one tokenizer."""
    path = shared / "golden" / "metrics" / "lookup_idx.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())[name]
    assert len(rows) == 60
    return rows


def check_recorded(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> None:
    """Compare ids, lookups and target ids; and prompt plus target, encoded as a whole."""
    for row in rows:
        subjects = [row["subject"]] * len(row["templates"])
        encoded = encode_with_subject(tokenizer, row["templates"], subjects)
        assert [one.ids for one in encoded] == row["ids"]
        assert [one.lookup for one in encoded] == row["idx"]["last"]
        ids = target_ids(tokenizer, row["target"].strip())
        assert ids == row["target_ids"]
        for template, one in zip(row["templates"], encoded, strict=True):
            text = template.replace("{}", row["subject"]) + row["target_prefix_decoded"]
            assert tokenizer(text)["input_ids"] == one.ids + ids[:-1]


def test_recorded_lookups_of_real_tokenizers(
    real_tokenizer: PreTrainedTokenizerBase, shared: Path
) -> None:
    name = "tok_gpt2" if real_tokenizer.vocab_size < 60_000 else "tok_llama3"
    check_recorded(real_tokenizer, recorded(shared, name))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_recorded_lookups_of_small_tokenizers(name: str, shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "golden" / "models" / f"tiny-{name}")
    check_recorded(tokenizer, recorded(shared, f"tok_small_{name}"))


def test_request_text_and_template_agree(gpt2: LanguageModel) -> None:
    request = EditRequest("0", "{}, a town near Lyon, is", "Lyon", "x")
    [encoded] = encode_with_subject(gpt2.tokenizer, [request.prompt], [request.subject])
    assert encoded.ids == gpt2.tokenizer(request.text)["input_ids"]
