"""Records of every format to requests, and every message that bad data gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_blue.data import FORMATS, parse_record, read_requests
from lightning_blue.data.formats import template
from lightning_blue.data.requests import EditRequest, Probe, Rejected
from lightning_blue.data.subjects import find_subject

FACT: dict[str, Any] = {"subject": "Lyon", "prompt": "{} is in", "target_new": "Italy"}
ROME: dict[str, Any] = {
    "case_id": 4,
    "pararel_idx": 7,
    "requested_rewrite": {
        "prompt": "The twin city of {} is",
        "subject": "Lyon",
        "target_new": {"str": "Manila", "id": "Q1461"},
        "target_true": {"str": "Beirut", "id": "Q3820"},
    },
    "paraphrase_prompts": ["Lyon is twinned with", "A twin of Lyon is"],
    "neighborhood_prompts": ["The twin city of Trieste is", "Oran is twinned with"],
    "attribute_prompts": ["Manila is"],
    "generation_prompts": ["Lyon is known for"],
}
FLAT: dict[str, Any] = {
    "case_id": 4,
    "prompt": "What is the twin city of Lyon? It is",
    "target_new": "Manila",
    "subject": "Lyon",
    "ground_truth": "Beirut",
    "rephrase_prompt": "People in Lyon's twin city speak",
    "locality_prompt": "The twin city of Trieste is",
    "locality_ground_truth": "Oslo",
}
ZSRE: dict[str, Any] = {
    "subject": "WEFS",
    "src": "When was WEFS established?",
    "pred": "1998",
    "rephrase": "When has WEFS been established?",
    "alt": "1997",
    "answers": ["1987", "the year 1987"],
    "loc": "nq question: who voiced gaston",
    "loc_ans": "Richard White",
    "cond": "1998 >> 1997 || When was WEFS established?",
}


def parse(record: Any, name: str = "facts") -> EditRequest | Rejected:
    return parse_record(record, FORMATS[name], source="here", index=5)


def fault(record: Any, name: str = "facts") -> Rejected:
    parsed = parse(record, name)
    assert isinstance(parsed, Rejected)
    assert parsed.source == "here"
    assert parsed.hint
    return parsed


def good(record: Any, name: str = "facts") -> EditRequest:
    parsed = parse(record, name)
    assert isinstance(parsed, EditRequest), parsed
    return parsed


# --- formats ------------------------------------------------------------


def test_nested_counterfact() -> None:
    assert good(ROME, "counterfact") == EditRequest(
        case_id="4",
        prompt="The twin city of {} is",
        subject="Lyon",
        target_new="Manila",
        target_true="Beirut",
        paraphrases=("Lyon is twinned with", "A twin of Lyon is"),
        neighborhood=(
            Probe("The twin city of Trieste is", "Beirut"),
            Probe("Oran is twinned with", "Beirut"),
        ),
        generation_prompts=("Lyon is known for",),
        source="here",
    )


def test_flat_counterfact() -> None:
    assert good(FLAT, "counterfact-flat") == EditRequest(
        case_id="4",
        prompt="What is the twin city of {}? It is",
        subject="Lyon",
        target_new="Manila",
        target_true="Beirut",
        paraphrases=("People in Lyon's twin city speak",),
        neighborhood=(Probe("The twin city of Trieste is", "Oslo"),),
        source="here",
    )


def test_zsre() -> None:
    assert good(ZSRE, "zsre") == EditRequest(
        case_id="5",
        prompt="When was {} established?",
        subject="WEFS",
        target_new="1987",
        paraphrases=("When has WEFS been established?",),
        neighborhood=(Probe("nq question: who voiced gaston?", "Richard White"),),
        source="here",
        aliases=("the year 1987",),
    )
    asked = good(ZSRE | {"loc": "nq question: who?"}, "zsre")
    assert asked.neighborhood[0].prompt == "nq question: who?"


def test_zsre_with_the_wanted_answer_in_alt() -> None:
    """``answers`` first, as MEMIT reads these files; ``zsre-alt`` as MEND and EasyEdit do."""
    assert good(ZSRE | {"answers": None}, "zsre").target_new == "1997"
    assert good(ZSRE | {"answers": []}, "zsre").target_new == "1997"
    alt = good(ZSRE, "zsre-alt")
    assert (alt.target_new, alt.target_true) == ("1997", "1987")
    assert (alt.prompt, alt.neighborhood) == (
        "When was {} established?",
        good(ZSRE, "zsre").neighborhood,
    )
    assert good(ZSRE | {"answers": None}, "zsre-alt").target_true is None
    assert "'alt' is empty" in fault(ZSRE | {"answers": None, "alt": " "}, "zsre").reason
    without = {key: value for key, value in ZSRE.items() if key != "alt"}
    assert "'answers.0' is missing" in fault(without | {"answers": []}, "zsre").reason
    assert "'alt' is missing" in fault(without, "zsre-alt").reason


def test_prompts_are_taken_to_the_letter() -> None:
    """White space that a prompt ends or begins with is the user's; that around an object is not."""
    request = good(
        FACT
        | {
            "prompt": "Q: Where is {}?\nA:\n",
            "target_new": " Italy ",
            "target_true": "France",
            "target_prefix": "\n ",
            "paraphrases": ["  Lyon is in "],
            "neighborhood_prompts": ["Nice is in\t", {"prompt": "Bern? ", "answer": " Bern"}],
            "generation_prompts": ["Lyon is "],
        }
    )
    assert request == EditRequest(
        "5",
        "Q: Where is {}?\nA:\n",
        "Lyon",
        "Italy",
        "France",
        paraphrases=("  Lyon is in ",),
        neighborhood=(Probe("Nice is in\t", "France", "\n "), Probe("Bern? ", "Bern", "\n ")),
        generation_prompts=("Lyon is ",),
        source="here",
        target_prefix="\n ",
    )
    assert good(FACT | {"target_prefix": ""}).target_prefix == ""
    assert fault(FACT | {"target_prefix": 1}).kind == "wrong type"
    assert fault(FACT | {"prompt": " "}).kind == "empty field"


def test_own_facts_with_everything() -> None:
    request = good(
        FACT
        | {
            "case_id": "a1",
            "target_new": " Italy ",
            "target_true": "France",
            "paraphrases": ["Lyon lies in"],
            "neighbourhood_prompts": ["Nice is in", {"prompt": "Bern is in", "answer": "Bern"}],
            "generation_prompts": ["Lyon is"],
            "reference_texts": ["Lyon is a town."],
        }
    )
    assert request == EditRequest(
        case_id="a1",
        prompt="{} is in",
        subject="Lyon",
        target_new="Italy",
        target_true="France",
        paraphrases=("Lyon lies in",),
        neighborhood=(Probe("Nice is in", "France"), Probe("Bern is in", "Bern")),
        generation_prompts=("Lyon is",),
        reference_texts=("Lyon is a town.",),
        source="here",
    )


def test_own_facts_with_the_least() -> None:
    blank: dict[str, Any] = {
        "target_true": None,
        "paraphrases": None,
        "neighborhood_prompts": [],
        "case_id": None,
    }
    assert good(FACT | blank) == good(FACT)
    assert good(FACT) == EditRequest("5", "{} is in", "Lyon", "Italy", source="here")


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("Lyon is in", "Lyon", "{} is in"),
        ("The town is Lyon", "Lyon", "The town is {}"),
        ("Is Lyon near Lyon", "Lyon", "Is {} near Lyon"),  # the first of two
        ("Lyonnais food of Lyon is", "Lyon", "Lyonnais food of {} is"),  # a whole word
        ("Lyonnais food is", "Lyon", "{}nais food is"),  # else any place
        ("Lyon's_x Lyon_y", "Lyon", "{}'s_x Lyon_y"),
        ("日本の首都は", "日本", "{}の首都は"),
        ("The A+B (C) firm", "A+B (C)", "The {} firm"),
        ("Lyon near {}", "Lyon", "Lyon near {}"),  # a slot goes before a mention
        ("He\u0301 and e are", "e", "He\u0301 and {} are"),
    ],
)
def test_subject_becomes_a_slot(prompt: str, subject: str, expected: str) -> None:
    assert template(prompt, subject) == expected


def test_a_subject_never_ends_inside_a_combined_character() -> None:
    assert find_subject("Jose\u0301 lives", "Jose") is None
    assert find_subject("Jose\u0301 lives", "Jose\u0301") == 0


# --- records that cannot be used ------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "parts"),
    [
        ({"subject": None}, "missing field", ["'subject' is missing", "add 'subject'"]),
        ({"prompt": None}, "missing field", ["'prompt' is missing"]),
        ({"target_new": None}, "missing field", ["'target_new' is missing"]),
        ({"target_new": "  "}, "empty target", ["'target_new' is empty", "write something"]),
        ({"subject": ""}, "empty field", ["'subject' is empty"]),
        ({"target_new": 1987}, "wrong type", ["'target_new' is a number (1987)", "a string"]),
        ({"paraphrases": 3}, "wrong type", ["'paraphrases' is a number", "a list of strings"]),
        ({"paraphrases": ["a", 3]}, "wrong type", ["'paraphrases' is a number (3)"]),
        ({"paraphrases": ["a", " "]}, "empty field", ["item of 'paraphrases'", "remove"]),
        ({"case_id": [1]}, "wrong type", ["'case_id' is a list"]),
        ({"target_true": "Italy "}, "target is the current object", ["'Italy' equals the current"]),
        ({"prompt": "{} or {}"}, "several slots", ["'{} or {}'", "keep one {}"]),
        ({"subject": "a {}"}, "several slots", ["'a {}'"]),
        ({"prompt": "It is"}, "subject not in prompt", ["'It is'", "'Lyon'", "write {} in"]),
        ({"prompt": "LYON is"}, "subject not in prompt", ["as the prompt does, 'LYON'"]),
        ({"neighborhood_prompts": ["x"]}, "missing field", ["'x' has no answer", "'target_true'"]),
        (
            {"neighborhood_prompts": [{"prompt": "x"}], "target_true": "y"},
            "missing field",
            ["'x' has no answer"],
        ),
        (
            {"neighborhood_prompts": ["x"], "neighbourhood_prompts": ["y"], "target_true": "z"},
            "wrong type",
            ["both neighborhood_prompts and neighbourhood_prompts", "keep one"],
        ),
    ],
)
def test_unusable_facts(change: dict[str, Any], kind: str, parts: list[str]) -> None:
    rejected = fault(FACT | change)
    assert rejected.kind == kind
    for part in parts:
        assert part in str(rejected)


def test_another_unicode_form_is_named() -> None:
    rejected = fault(FACT | {"subject": "José", "prompt": "Jose\u0301 lives in"})
    assert "same Unicode form" in rejected.hint


def test_unusable_records_of_other_formats() -> None:
    nested = ROME | {"requested_rewrite": ROME["requested_rewrite"] | {"target_new": {"id": "Q1"}}}
    assert "'requested_rewrite.target_new.str' is missing" in fault(nested, "counterfact").reason
    nested = ROME | {"requested_rewrite": ROME["requested_rewrite"] | {"target_true": "Beirut"}}
    assert "target_true.str' is a string ('Beirut')" in fault(nested, "counterfact").reason
    flat = {key: value for key, value in FLAT.items() if key != "locality_ground_truth"}
    assert "'locality_ground_truth'" in fault(flat, "counterfact-flat").hint
    assert fault(FLAT | {"ground_truth": None}, "counterfact-flat").kind == "missing field"
    assert fault(FLAT | {"target_new": "Beirut"}, "counterfact-flat").case_id == "4"
    assert "'answers.0' is a string ('1987')" in fault(ZSRE | {"answers": "1987"}, "zsre").reason
    assert "the record is a list" in fault([1, 2]).reason


# --- reference data ------------------------------------------------------------


def test_zsre_as_the_recorded_evaluation_read_it(shared: Path) -> None:
    path = shared / "golden" / "metrics" / "model_metrics.json"
    zsre = json.loads(path.read_text())["zsre"]["tiny-gpt2"]
    for index, (raw, read) in enumerate(zip(zsre["raw_records"], zsre["records"], strict=True)):
        request = parse_record(raw, FORMATS["zsre"], source="", index=index)
        assert isinstance(request, EditRequest)
        rewrite = read["requested_rewrite"]
        assert (request.case_id, request.prompt) == (str(read["case_id"]), rewrite["prompt"])
        assert (request.subject, request.target_new) == (
            rewrite["subject"],
            rewrite["target_new"]["str"],
        )
        assert list(request.paraphrases) == read["paraphrase_prompts"]
        [probe] = request.neighborhood
        first = read["neighborhood_prompts"][0]
        assert probe.prompt == first["prompt"]
        spelled = "".join(step["target"] for step in read["neighborhood_prompts"])
        assert f" {probe.answer}" == spelled


def test_all_reference_records_are_usable(shared: Path) -> None:
    for path, total in (
        ("counterfact/counterfact-edit.json", 10_000),
        ("zsre/zsre_mend_train_1k.json", 1_000),
    ):
        raw = json.loads((shared / "data" / path).read_text())
        requests, rejected = read_requests(shared / "data" / path)
        assert (len(requests), rejected) == (total, [])
        for request, record in zip(requests, raw, strict=True):
            assert request.text == record.get("prompt", record.get("src"))


def test_the_relation_is_read_and_is_no_part_of_the_fact() -> None:
    record = {"subject": "Lyon", "prompt": "{} is a twin of", "target_new": "Rome"}
    plain = parse_record(record, FORMATS["facts"], source="here", index=0)
    assert isinstance(plain, EditRequest)
    assert plain.relation == ""
    for given, read in ((" twin ", "twin"), (190, "190"), (None, "")):
        request = parse_record(
            {**record, "relation": given}, FORMATS["facts"], source="here", index=0
        )
        assert isinstance(request, EditRequest)
        assert request.relation == read
        assert request == plain
        assert repr(request) == repr(plain)  # by which a checkpoint knows its requests
    refused = parse_record({**record, "relation": []}, FORMATS["facts"], source="here", index=0)
    assert isinstance(refused, Rejected)
    assert refused.reason == "the field 'relation' is a list ([]), not a number or a string"
    rewrite = {
        "subject": "Lyon",
        "prompt": "{} is a twin of",
        "target_new": {"str": "Rome"},
        "target_true": {"str": "Beirut"},
        "relation_id": "P190",
    }
    nested = parse_record(
        {"case_id": 1, "requested_rewrite": rewrite}, FORMATS["counterfact"], source="", index=0
    )
    assert isinstance(nested, EditRequest)
    assert nested.relation == "P190"
