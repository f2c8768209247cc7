"""Checks of requests: lengths, objects without tokens, duplicates, contradictions, policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from string import ascii_letters

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from conftest import LanguageModel
from lightning_blue.data import (
    apply_policy,
    check_tokens,
    count_by_kind,
    pick_control_facts,
    read_requests,
    superseded,
    take_distinct,
    without_unmet_premises,
)
from lightning_blue.data.requests import EditRequest, Probe, Rejected
from lightning_blue.language_model.tokens import encode_with_subject
from lightning_blue.support.errors import InputError
from test_subjects import lookup_by_bytes

LYON = EditRequest("1", "The twin city of {} is", "Lyon", "Manila", "Beirut", source="a.csv:2")


def needed(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> int:
    """Positions that a prompt and an object take."""
    return len(tokenizer(f"{prompt} {target}")["input_ids"])


def test_length_counts_prompt_context_and_object(language_model: LanguageModel) -> None:
    tokenizer = language_model.tokenizer
    longest = max(needed(tokenizer, LYON.text, x) for x in ("Manila", "Beirut"))
    assert check_tokens([LYON], tokenizer, longest) == ([LYON], [])
    assert check_tokens([LYON], tokenizer, longest + 7, contexts_length=7) == ([LYON], [])
    for limit, context in ((longest - 1, 0), (longest + 6, 7)):
        usable, [fault] = check_tokens([LYON], tokenizer, limit, contexts_length=context)
        assert usable == []
        assert (fault.kind, fault.source, fault.case_id) == ("too long", "a.csv:2", "1")
        assert f"the model reads {limit}" in fault.reason
        assert "shorten" in fault.hint
    assert check_tokens([LYON], tokenizer, None) == ([LYON], [])


@pytest.mark.parametrize(
    "added",
    [
        {"subject": "Lyon " * 40},
        {"target_new": "Manila " * 40},
        {"paraphrases": ("word " * 40,)},
        {"neighborhood": (Probe("word " * 40, "Beirut"),)},
        {"neighborhood": (Probe("word", "Beirut " * 40),)},
        {"generation_prompts": ("word " * 40,)},
    ],
)
def test_each_part_of_a_request_has_to_fit(gpt2: LanguageModel, added: dict[str, object]) -> None:
    long = replace(LYON, **added)  # type: ignore[arg-type]
    usable, rejected = check_tokens([LYON, long], gpt2.tokenizer, 32)
    assert usable == [LYON]
    assert count_by_kind(rejected) == {"too long": 1}


def test_object_without_tokens() -> None:
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate("abc")}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    request = EditRequest("7", "a{}b", "c", "a", source="x.jsonl:3")
    assert check_tokens([request], tokenizer, 16) == ([request], [])
    _, [fault] = check_tokens([replace(request, target_new="ß")], tokenizer, 16)
    assert fault.kind == "object without tokens"
    assert fault.source == "x.jsonl:3"
    assert "'ß'" in fault.reason


def test_duplicates_are_named_and_passed_over() -> None:
    other = replace(LYON, case_id="2", subject="Basel", source="a.csv:3")
    again = replace(LYON, case_id="3", source="a.csv:4")
    last = replace(LYON, case_id="4", subject="Oslo", source="a.csv:5")
    taken, rest, [fault] = take_distinct([LYON, other, again, last])
    assert (taken, rest) == ([LYON, other, last], [])
    assert (fault.kind, fault.source) == ("duplicate", "a.csv:4")
    assert "a.csv:2" in fault.reason
    assert take_distinct([LYON, other, again, last], 2) == ([LYON, other], [again, last], [])
    assert take_distinct([LYON, again, other, last], 2)[0] == [LYON, other]
    assert take_distinct([LYON, again, other, last], 2)[1] == [last]


def test_contradictions_name_both() -> None:
    other = replace(LYON, case_id="9", target_new="Karachi", source="a.csv:12")
    elsewhere = [replace(other, subject="Basel"), replace(other, prompt="{} in")]
    taken, _, (fault,) = take_distinct([LYON, other, *elsewhere])
    assert taken == [other, *elsewhere]  # the later one wins
    assert (fault.kind, fault.source) == ("contradiction", "a.csv:2")
    for part in ("'Manila'", "contradicted by a.csv:12", "'Karachi'"):
        assert part in fault.reason


def test_a_later_batch_may_edit_the_same_prompt_again() -> None:
    basel = replace(LYON, subject="Basel")
    there, back = (replace(LYON, target_new=new) for new in ("Karachi", LYON.target_new))
    oslo = replace(LYON, subject="Oslo")
    requests = [LYON, basel, there, basel, oslo, back]
    taken, _, (repeated,) = take_distinct(requests, batch_size=2)
    assert taken == [LYON, basel, there, oslo, back]
    assert repeated.kind == "duplicate"
    assert superseded(taken) == [0, 2]
    assert superseded([LYON, basel]) == []


def test_questions_are_left_out_where_an_edit_that_they_count_on_is_not_in_force() -> None:
    ask = (Probe("P", "A"),)
    basel = replace(LYON, subject="Basel")
    hop = replace(basel, portability=ask, premises=((LYON.text, LYON.target_new),))
    other = replace(LYON, target_new="Karachi")
    for applied, kept in (
        ([LYON, hop], ask),
        ([LYON, hop, other], ()),
        ([LYON, hop, other, LYON], ask),  # edited back
        ([LYON, other, hop], ()),
        ([hop], ()),  # never applied, or not yet
    ):
        asked = without_unmet_premises([LYON, hop], applied)
        assert asked == [LYON, replace(hop, portability=kept)]
    wrapped = replace(LYON, prompt="<user> {} </user>", question=LYON.text)
    assert without_unmet_premises([hop], [wrapped, hop]) == [hop]


def test_policy() -> None:
    faults = [Rejected(f"f.csv:{i}", str(i), "empty target", "it is empty", "fill") for i in "2345"]
    faults += [Rejected(f"f.csv:{i}", str(i), "too long", "it is long", "cut") for i in range(6, 9)]
    apply_policy(faults, 20, "skip")
    apply_policy([], 20, "stop")
    with pytest.raises(InputError) as caught:
        apply_policy(faults, 20, "stop")
    message = str(caught.value)
    assert "7 of 20 requests cannot be used (4 empty target, 3 too long)" in message
    assert "f.csv:2: it is empty; fill" in message
    assert "f.csv:6" in message
    assert "f.csv:7" not in message
    assert "and 2 more" in message
    assert "--data.on_unusable=skip" in message
    with pytest.raises(InputError, match=r"(?s)'drop'.*choose one of: stop, skip"):
        apply_policy([], 20, "drop")


def test_control_facts_are_known_facts_on_other_subjects() -> None:
    basel = replace(LYON, subject="Basel")
    candidates = [
        replace(LYON, prompt="{} lies in", target_true="France"),  # an edited subject
        replace(basel, target_true=None),  # not known
        replace(basel, target_new="Oslo"),
        basel,  # the same prompt again
        replace(LYON, subject="Oslo", target_true="Rome"),
        replace(LYON, subject="Madrid"),
    ]
    assert pick_control_facts(candidates, [LYON], 2) == [
        Probe("The twin city of Basel is", "Beirut"),
        Probe("The twin city of Oslo is", "Rome"),
    ]
    assert len(pick_control_facts(candidates, [LYON], 10)) == 3
    assert pick_control_facts(candidates, [LYON], 0) == []


@pytest.mark.parametrize(
    ("path", "total", "contradictions", "duplicates"),
    [
        ("counterfact/counterfact-edit.json", 10_000, 80, 3),
        ("zsre/zsre_mend_train_1k.json", 1_000, 0, 0),
    ],
)
def test_every_record_of_the_reference_data(
    real_tokenizer: PreTrainedTokenizerBase,
    shared: Path,
    path: str,
    total: int,
    contradictions: int,
    duplicates: int,
) -> None:
    requests, rejected = read_requests(shared / "data" / path)
    fitting, long = check_tokens(requests, real_tokenizer, 1024, contexts_length=20)
    distinct, _, repeated = take_distinct(fitting)
    rejected = rejected + long + repeated
    assert len(distinct) + len(rejected) == total
    assert all(x.reason and x.hint and x.source for x in rejected)
    # The counts above were taken from the files by grouping their raw fields: 79 and 4, where one
    # text is edited to an object, to another, and back: the third contradicts the second.
    counts = count_by_kind(rejected)
    assert counts.get("duplicate", 0) == duplicates
    assert counts.get("contradiction", 0) == contradictions
    assert sum(counts.values()) == duplicates + contradictions
    encoded = encode_with_subject(
        real_tokenizer, [r.prompt for r in distinct], [r.subject for r in distinct]
    )
    for request, one in zip(distinct, encoded, strict=True):
        text = request.prompt.partition("{}")[0] + request.subject
        assert one.lookup == lookup_by_bytes(real_tokenizer, one.ids, text), request


def test_a_subject_without_tokens_is_rejected_with_its_line() -> None:
    """By a tokenizer of single characters that knows small and capital Latin letters alone."""
    letters = {letter: i for i, letter in enumerate(ascii_letters)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(letters, [])))
    tokyo = replace(LYON, subject="東京", source="facts.csv:3")
    usable, [rejected] = check_tokens([LYON, tokyo, LYON], tokenizer, 64)
    assert usable == [LYON, LYON]
    assert (rejected.source, rejected.kind) == ("facts.csv:3", "subject without tokens")
    assert "does not encode the subject '東京'" in rejected.reason
