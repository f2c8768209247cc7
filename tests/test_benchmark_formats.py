"""Records in the forms of KnowEdit, RippleEdits, MQuAKE, QAEdit and known facts."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_blue.data import FORMATS, parse_record, read_requests, to_dataset
from lightning_blue.data.formats import choose_format
from lightning_blue.data.requests import EditRequest, Probe
from test_formats import FACT, FLAT, ROME, ZSRE, fault, good

KNOWEDIT: dict[str, Any] = {
    "subject": "Lyon",
    "prompt": "The twin city of Lyon is",
    "target_new": "Manila",
    "ground_truth": ["Beirut", "Bayrut"],
    "rephrase_prompt": "Lyon is twinned with",
    "portability": {
        "Logical_Generalization": [
            {"prompt": "Manila is twinned with", "ground_truth": [["Lyon", "Lugdunum"]]},
            {"prompt": "Nobody knows", "ground_truth": [[""]]},
        ],
        "Reasoning": [{"prompt": "Lyon's twin lies in", "ground_truth": "the Philippines"}],
        "Subject_Aliasing": None,
    },
    "locality": {"Relation_Specificity": [{"prompt": "Lyon lies in", "ground_truth": ["France"]}]},
}
QAEDIT: dict[str, Any] = {
    "id": 1104,
    "source": "NQ",
    "prompt": "who won the cup of Lyon?",
    "target": "Ann Lee",
    "subject": "cup of Lyon",
    "rephrase": "Whose is the cup of Lyon?",
    "locality": [{"loc": "where is Oslo", "loc_ans": "Norway"}, {"loc": "who?", "loc_ans": "Bo"}],
}
KNOWN: dict[str, Any] = {
    "known_id": 3,
    "subject": "Lyon",
    "attribute": "France",
    "template": "{} lies in",
    "prediction": " France",
    "prompt": "Lyon lies in",
    "relation_id": "P17",
}


def asked(prompt: str, *answers: tuple[str, list[str]]) -> dict[str, Any]:
    """One test of RippleEdits."""
    named = [{"value": value, "aliases": aliases} for value, aliases in answers]
    query = {"prompt": prompt, "answers": named, "query_type": "regular"}
    return {"test_queries": [query], "test_condition": "OR", "condition_queries": []}


RIPPLE: dict[str, Any] = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the head of government of Lyon is Ann Lee.",
        "subject_id": "Q456",
        "relation": "HEAD_OF_GOVERNMENT",
        "target_id": "Q1",
        "original_fact": {
            "prompt": "The name of the head of government of Lyon is Bo Day.",
            "relation": "HEAD_OF_GOVERNMENT",
        },
    },
    "Relation_Specificity": [asked("The name of the country of Lyon is", ("France", ["FR"]))],
    "Logical_Generalization": [asked("Ann Lee holds", ("mayor", ["Mayor of Lyon"]), ("maire", []))],
    "Compositionality_I": [asked("The gender of Lyon's head is", ("female", []))],
    "Compositionality_II": [],
    "Subject_Aliasing": [asked("Lugdunum's head is", ("Ann Lee", [])), asked("Nothing?")],
    "Forgetfulness": [],
}


def rewrite(subject: str, new: str, true: str) -> dict[str, Any]:
    """One edit of MQuAKE."""
    return {
        "prompt": "{} is a citizen of",
        "relation_id": "P27",
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": true, "id": "Q2"},
        "subject": subject,
        "question": f"What is the country of citizenship of {subject}?",
    }


MQUAKE: dict[str, Any] = {
    "case_id": 7,
    "requested_rewrite": [rewrite("Ann", "Chile", "Peru"), rewrite("Bo", "Mali", "Niger")],
    "questions": ["Where is the wife of Bo from?", "Bo's wife is a citizen of which land?"],
    "answer": "Peru",
    "answer_alias": [],
    "new_answer": "Chile",
    "new_answer_alias": ["Republic of Chile", "Chile"],
    "single_hops": [{"question": "?", "cloze": "", "answer": "Peru", "answer_alias": []}],
    "new_single_hops": [],
    "orig": {},
}
EXAMPLES = {
    "counterfact": ROME,
    "zsre": ZSRE,
    "counterfact-flat": FLAT,
    "facts": FACT,
    "knowedit": KNOWEDIT,
    "qaedit": QAEDIT,
    "known": KNOWN,
    "ripple-edits": RIPPLE,
    "mquake": MQUAKE,
}


def read(tmp_path: Path, *records: dict[str, Any]) -> tuple[list[EditRequest], list[Any]]:
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    return read_requests(path)


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_form_is_told_by_its_columns_and_read_whole(name: str, tmp_path: Path, caplog) -> None:
    """In any order of the formats: no other one's required columns would do without its own."""
    columns = list(EXAMPLES[name])
    assert choose_format("auto", columns, columns, where="here").name == name
    with caplog.at_level(logging.WARNING):
        requests, rejected = read(tmp_path, EXAMPLES[name])
    assert requests
    assert not rejected
    assert "columns not used" not in caplog.text


def test_knowedit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert good(KNOWEDIT, "knowedit") == EditRequest(
        "5",
        "The twin city of {} is",
        "Lyon",
        "Manila",
        "Beirut",
        paraphrases=("Lyon is twinned with",),
        neighborhood=(Probe("Lyon lies in", "France"),),
        portability=(
            Probe("Manila is twinned with", "Lyon", aliases=("Lugdunum",)),
            Probe("Lyon's twin lies in", "the Philippines"),
        ),
        source="here",
    )
    with caplog.at_level(logging.INFO):
        read(tmp_path, KNOWEDIT)
    assert "records.json: 1 prompts without an answer are left out" in caplog.text
    recent = {key: value for key, value in KNOWEDIT.items() if key != "ground_truth"}
    assert good(recent | {"locality": {}}, "knowedit").target_true is None


def test_qaedit_and_known_facts() -> None:
    assert good(QAEDIT, "qaedit") == EditRequest(
        "1104",
        "who won the {}?",
        "cup of Lyon",
        "Ann Lee",
        paraphrases=("Whose is the cup of Lyon?",),
        neighborhood=(Probe("where is Oslo", "Norway"), Probe("who?", "Bo")),
        source="here",
    )
    assert good(KNOWN, "known") == EditRequest(
        "3", "{} lies in", "Lyon", "France", source="here", relation="P17"
    )


def test_ripple_edits() -> None:
    assert good(RIPPLE, "ripple-edits") == EditRequest(
        "5",
        "The name of the head of government of {} is",
        "Lyon",
        "Ann Lee",
        "Bo Day",
        neighborhood=(Probe("The name of the country of Lyon is", "France", aliases=("FR",)),),
        portability=(
            Probe("Ann Lee holds", "mayor", aliases=("Mayor of Lyon", "maire")),
            Probe("The gender of Lyon's head is", "female"),
            Probe("Lugdunum's head is", "Ann Lee"),
        ),
        source="here",
        relation="HEAD_OF_GOVERNMENT",
    )


@pytest.mark.parametrize(
    ("relation", "sentence", "read"),
    [
        ("SIBLING", "The names of the siblings of Ann are Bo.", ("Ann", "Bo")),
        ("PLACE_OF_BIRTH", "The place of birth of Ann of Kiev is St. Ives.", ("Ann of Kiev",)),
        ("CAPITAL_OF", "The name of the country which Lyon is the capital of is Gaul.", ("Lyon",)),
        ("POSITION_HELD", "The name of the position held by Ann is mayor of Lyon.", ("Ann",)),
        (
            "HEADQUARTERS",
            "The headquarters of Ann & Co. is located in Lyon.",
            ("Ann & Co.", "Lyon"),
        ),
        (
            "LIKELY_ANTHEM",
            "The name of the anthem that is most likely to be performed in Lyon is La.",
            ("Lyon", "La"),
        ),
        ("FOLLOWED_BY", "Help! is followed by Rubber Soul.", ("Help!", "Rubber Soul")),
    ],
)
def test_sentences_of_ripple_edits(relation: str, sentence: str, read: tuple[str, ...]) -> None:
    edit = {"prompt": sentence, "relation": relation}
    request = good({"edit": edit, "Relation_Specificity": []}, "ripple-edits")
    assert (request.subject, request.target_new)[: len(read)] == read
    assert f"{request.text} {request.target_new}." == sentence


def test_an_ambiguous_sentence_is_decided_by_the_original_or_refused() -> None:
    edit = {"prompt": "The name of the author of Love is Blind is Bo.", "relation": "AUTHOR"}
    refused = fault({"edit": edit}, "ripple-edits")
    assert "several subjects" in refused.reason
    edit["original_fact"] = {"prompt": "The name of the author of Love is Blind is Ann."} | {  # type: ignore[assignment]
        "relation": "AUTHOR"
    }
    # "Love" / "Blind is ..." fits both sentences too
    assert "several subjects" in fault({"edit": edit}, "ripple-edits").reason
    edit["prompt"] = "The name of the author of Love is Bo is Ann."
    edit["original_fact"]["prompt"] = "The name of the author of Love is Jo."  # type: ignore[index]
    assert good({"edit": edit}, "ripple-edits").subject == "Love"


def test_what_holds_before_an_edit_of_ripple_edits_has_two_names() -> None:
    edit = dict(RIPPLE["edit"])
    edit["previous_fact"] = edit.pop("original_fact")
    assert good(RIPPLE | {"edit": edit}, "ripple-edits").target_true == "Bo Day"
    del edit["previous_fact"]
    assert good(RIPPLE | {"edit": edit}, "ripple-edits").target_true is None


def test_mquake_makes_one_request_for_each_edit(tmp_path: Path) -> None:
    requests, rejected = read(tmp_path, MQUAKE)
    assert not rejected
    assert [(r.case_id, r.subject, r.target_new, r.target_true) for r in requests] == [
        ("7.1", "Ann", "Chile", "Peru"),
        ("7.2", "Bo", "Mali", "Niger"),
    ]
    assert requests[0].paraphrases == ("What is the country of citizenship of Ann?",)
    assert requests[0].portability == requests[0].premises == ()
    assert requests[1].premises == ((requests[0].text, "Chile"),)
    named = ("Republic of Chile",)
    assert requests[1].portability == tuple(
        Probe(question, "Chile", aliases=named) for question in MQUAKE["questions"]
    )
    single = MQUAKE | {"requested_rewrite": MQUAKE["requested_rewrite"][:1]}
    [request] = read(tmp_path, single)[0]
    assert (request.case_id, len(request.portability)) == ("7", 2)


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("knowedit", {"locality": "none"}, ["'locality.*.*' is a string", "write 'locality.*.*'"]),
        ("knowedit", {"portability": {"a": [{"ground_truth": "x"}]}}, ["portability.*.*.prompt"]),
        ("qaedit", {"locality": [{"loc": "who?"}]}, ["'who?' has no answer", '{"loc": ']),
        ("qaedit", {"target": " "}, ["'target' is empty"]),
        ("known", {"attribute": None}, ["'attribute' is missing"]),
        ("ripple-edits", {"edit": None}, ["'edit' is no object"]),
        ("ripple-edits", {"edit": {"prompt": "x"}}, ["'edit.relation' is missing"]),
        (
            "ripple-edits",
            {"edit": {"prompt": "Ann likes Bo.", "relation": "SPOUSE"}},
            ["does not word the relation 'SPOUSE'", "'The name of the spouse of {} is'", "facts"],
        ),
        ("mquake", {"requested_rewrite": []}, ["'requested_rewrite.subject' is missing"]),
        ("mquake", {"new_answer": None, "new_answer_alias": None}, ["has no answer", "new_answer"]),
    ],
)
def test_bad_records_name_line_and_mend(
    name: str, change: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    requests, rejected = read(tmp_path, EXAMPLES[name], EXAMPLES[name] | change)
    assert len(requests) == (2 if name == "mquake" else 1)
    [refused] = rejected
    for part in ("records.json record 2", *parts):
        assert part in str(refused)


def test_a_record_with_several_edits_is_used_whole_or_not_at_all(tmp_path: Path) -> None:
    bad = rewrite("Bo", "Mali", "Mali")
    requests, rejected = read(
        tmp_path, MQUAKE | {"requested_rewrite": [rewrite("Ann", "Chile", "Peru"), bad]}
    )
    assert requests == []
    assert [r.kind for r in rejected] == ["target is the current object"]


def test_the_real_files_are_read_without_a_loss(shared: Path) -> None:
    for path, total in (("qaedit/qaedit_inter_1k.json", 1000), ("known/known_1000.json", 1209)):
        requests, rejected = read_requests(shared / "data" / path)
        assert (len(requests), rejected) == (total, [])
    raw = json.loads((shared / "data" / "zsre/zsre_mend_train_1k.json").read_text())
    several = next(record for record in raw if len(set(record["answers"])) > 1)
    request = parse_record(several, FORMATS["zsre"], source="", index=0)
    assert isinstance(request, EditRequest)
    assert {request.target_new, *request.aliases} == {name.strip() for name in several["answers"]}


def test_what_was_read_survives_a_dataset() -> None:
    requests = [good(EXAMPLES[name], name) for name in ("knowedit", "ripple-edits", "qaedit")]
    neighbours = [
        replace(r, neighborhood=tuple(replace(p, aliases=()) for p in r.neighborhood))
        for r in requests
    ]
    again, rejected = read_requests(to_dataset(requests))
    assert not rejected
    assert [replace(r, source="here") for r in again] == neighbours
