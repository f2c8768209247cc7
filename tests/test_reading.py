"""Files, datasets and bundled facts: what is read, and every message that bad data gets."""

from __future__ import annotations

import json
import logging
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import pytest

from lightning_blue.data import read_requests
from lightning_blue.data.requests import Probe
from lightning_blue.support.errors import InputError
from test_formats import FACT, FLAT, ROME, ZSRE, good


def save(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
    return path


def message(path: str | Path, *args: Any) -> str:
    with pytest.raises(InputError) as caught:
        read_requests(path, *args)
    assert "hint:" in str(caught.value)
    return str(caught.value)


def test_auto_tells_the_formats_apart(tmp_path: Path) -> None:
    for name, record in (
        ("counterfact", ROME),
        ("counterfact-flat", FLAT),
        ("zsre", ZSRE),
        ("facts", FACT),
    ):
        for suffix in (".json", ".jsonl"):
            content = [record] if suffix == ".json" else json.dumps(record)
            path = save(tmp_path, name + suffix, content)
            [request], [] = read_requests(path)
            assert request.subject == ("WEFS" if name == "zsre" else "Lyon")
            assert [request] == read_requests(path, name)[0]
            assert request.source == f"{path.name}{' record ' if suffix == '.json' else ':'}1"


def test_facts_with_an_attribute_are_edited_to_their_new_object(tmp_path: Path) -> None:
    """They have all columns of known facts, whose object is the attribute."""
    known = {"subject": "Lyon", "prompt": "{} is in", "attribute": "France"}
    for extra, expected in (({}, "France"), ({"target_new": "Peru"}, "Peru")):
        [request], [] = read_requests(save(tmp_path, "known.json", [known | extra]))
        assert request.target_new == expected


def test_format_is_told_by_all_records_if_the_first_lacks_a_field(tmp_path: Path) -> None:
    path = save(tmp_path, "facts.json", [{"subject": "Lyon"}, FACT])
    [request], [rejected] = read_requests(path)
    assert request.source == "facts.json record 2"
    assert (rejected.source, rejected.kind) == ("facts.json record 1", "missing field")


def test_one_record_without_answers_does_not_change_what_the_others_are_edited_to(
    tmp_path: Path,
) -> None:
    odd = {key: value for key, value in ZSRE.items() if key != "answers"}
    for records in ([odd, ZSRE, ZSRE], [ZSRE, odd, ZSRE]):
        requests, rejected = read_requests(save(tmp_path, "zsre.json", records))
        assert rejected == []
        expected = ["1997" if record is odd else "1987" for record in records]
        assert [request.target_new for request in requests] == expected
        assert {request.target_true for request in requests} == {None}
    requests, _ = read_requests(save(tmp_path, "alt.json", [odd, odd]))  # none has any
    assert [request.target_new for request in requests] == ["1997", "1997"]
    requests, _ = read_requests(save(tmp_path, "both.json", [ZSRE]), "zsre-alt")
    assert (requests[0].target_new, requests[0].target_true) == ("1997", "1987")


def test_a_prefix_in_a_csv_is_taken_to_the_letter(tmp_path: Path) -> None:
    rows = ["subject,prompt,target_new,target_prefix", 'Lyon, "{} is in ",Rome," "']
    rows += ['Bern,"{} is in\n",Rome,']
    lyon, bern = read_requests(save(tmp_path, "facts.csv", "\n".join(rows)))[0]
    assert (lyon.prompt, lyon.target_prefix) == ("{} is in", " ")  # blanks pad a table's cells
    assert (bern.prompt, bern.target_prefix) == ("{} is in\n", None)


@pytest.mark.parametrize(
    ("header", "row", "prefix"),
    [
        ("target_prefix", " -> ", " -> "),  # as Python's writer leaves it: nothing has to be quoted
        ("target_prefix", " ", " "),
        (" target_prefix", " -> ", "-> "),  # the table sets its columns apart by a blank
        (" target_prefix", "  -> ", " -> "),
        (" target_prefix", ' " -> "', " -> "),
        (" target_prefix", " ", None),
    ],
)
def test_blanks_before_a_prefix_that_is_not_quoted(
    tmp_path: Path, header: str, row: str, prefix: str | None
) -> None:
    rows = [f"subject,prompt,target_new,{header}", f"Lyon,{{}} is in,Rome,{row}"]
    [request], [] = read_requests(save(tmp_path, "facts.csv", "\n".join(rows)))
    assert (request.target_prefix, request.target_new) == (prefix, "Rome")


def test_case_ids_that_pandas_wrote_as_floats(tmp_path: Path) -> None:
    records = [FACT | {"case_id": 1104.0}, FACT | {"case_id": 1.5, "prompt": "{} lies in"}]
    requests, [rejected] = read_requests(save(tmp_path, "facts.json", records))
    assert [request.case_id for request in requests] == ["1104"]
    assert "is a number (1.5), not a number or a string" in rejected.reason


def test_format_can_be_forced(tmp_path: Path) -> None:
    path = save(tmp_path, "facts.json", [FACT | {"ground_truth": "France"}])
    assert read_requests(path)[0][0].target_true == "France"
    assert read_requests(path, "facts")[0][0].target_true is None
    assert "needs subject, src, answers" in message(path, "zsre")
    assert "choose one of: auto, mquake, counterfact" in message(path, "hint")


def test_csv_with_lists_quotes_and_lines_in_cells(tmp_path: Path) -> None:
    rows = [
        "subject, prompt,target_new,target_true,paraphrases,neighborhood_prompts",
        '"Lyon","Lyon, as\nall know, is in",Italy,,A in Lyon | B in Lyon,',
        "",
        'Bern,{} is in,"a ""b""",Bern,"[""one, two"", ""three""]",'
        '"[{""prompt"": ""x"", ""answer"": ""y""}]"',
        "Oslo,It is in,Rome,,,",
        "Rome,{} is in,Oslo",
    ]
    for newline in ("\n", "\r\n"):
        path = save(tmp_path, "facts.csv", ("\ufeff" + newline.join(rows)).encode())
        requests, [rejected] = read_requests(path)
        assert [r.source for r in requests] == ["facts.csv:2", "facts.csv:5", "facts.csv:7"]
        lyon, bern, rome = requests
        assert lyon.prompt.split() == ["{},", "as", "all", "know,", "is", "in"]
        assert (lyon.target_true, lyon.paraphrases) == (None, ("A in Lyon", "B in Lyon"))
        assert (bern.target_new, bern.paraphrases) == ('a "b"', ("one, two", "three"))
        assert bern.neighborhood == (Probe("x", "y"),)
        assert rome.paraphrases == ()
        assert (rejected.source, rejected.kind) == ("facts.csv:6", "subject not in prompt")


def test_rows_of_a_csv_that_cannot_be_read(tmp_path: Path) -> None:
    path = save(
        tmp_path,
        "facts.csv",
        'subject,prompt,target_new,paraphrases\na,{} is,b,c,d\na,{} is,b,"[""c"", d]"\n',
    )
    requests, rejected = read_requests(path)
    assert requests == []
    assert [(r.source, r.kind) for r in rejected] == [
        ("facts.csv:2", "malformed row"),
        ("facts.csv:3", "malformed row"),
    ]
    assert "5 cells, the header 4" in rejected[0].reason
    assert "'paraphrases' is not a JSON array" in rejected[1].reason


def test_broken_files(tmp_path: Path) -> None:
    head = "subject,prompt,target_new\n"
    cases: list[tuple[str, Any, list[str]]] = [
        ("a.json", "", ["no records", "a.json"]),
        ("a.jsonl", " \n", ["no records"]),
        ("b.json", "[]", ["no records"]),
        ("a.csv", head, ["no records"]),
        ("c.json", '[{"subject": "a"},\n {"subject" "b"}]', ["malformed", "c.json:2", "column 13"]),
        ("d.json", '{"a": 1}\n{"a": 2}', ["d.json:2", "column 1", ".jsonl"]),
        ("e.json", '{"a": 1}', ["a list of records", "square brackets"]),
        ("f.json", "[" * 100_000, ["nested too deeply"]),
        ("b.jsonl", '[\n{"a": 1},\n{"a": 2}\n]', ["The whole file is JSON", ".json, and"]),
        ("b.csv", 'subject,"prompt\n', ["CSV cannot be read", "b.csv:1", "quotation"]),
        ("c.csv", "subject,prompt,prompt\na,b,c", ["'prompt' comes twice", "c.csv:1"]),
        ("g.json", b'[{},\n"\xff"]', ["not UTF-8", "0xff", "g.json:2"]),
        ("h.json", json.dumps([FACT]).encode("utf-16"), ["UTF-16", "save it as UTF-8"]),
        ("d.jsonl", json.dumps(FACT).encode("utf-16-le"), ["UTF-16", "d.jsonl"]),
        ("a.txt", "x", ["'.txt' cannot be read", ".jsonl"]),
    ]
    for name, content, parts in cases:
        text = message(save(tmp_path, name, content))
        for part in parts:
            assert part in text, (name, text)


BROKEN: list[tuple[str, bytes, str]] = [
    (".jsonl", b'{"subject": "a" "b"}', "malformed JSON in column 17: Expecting ',' delimiter"),
    (".jsonl", b'{"subject": "caf\xe9"}', "the line holds the byte 0xe9, which is not UTF-8"),
    (".jsonl", b'{"subject": "a\0b"}', "the line holds a NUL character"),
    (".jsonl", b"[" * 100_000, "the JSON is nested too deeply"),
    (
        ".jsonl",
        json.dumps(FACT | {"subject": "\ud83d", "prompt": "\ud83d is"}).encode(),
        "the field 'subject' holds U+D83D, half of a character (a surrogate without the other)",
    ),
    (
        ".jsonl",
        json.dumps(FACT).encode()[:-1] + b', "target_true": ' + b"9" * 5000 + b"}",
        "the field 'target_true' is a number (inf), not a string",
    ),
    (
        ".csv",
        b'a,"{} is,b',
        "the CSV cannot be read: ',' expected after '\"'",
    ),
    (
        ".csv",
        b"a,{} is,caf\xe9",
        "the cell in 'target_new' holds the byte 0xe9, which is not UTF-8",
    ),
    (
        ".csv",
        b'a,{} is,b,"' + b"[" * 100_000 + b'"',
        "the list in 'paraphrases' is not a JSON array (the JSON is nested too deeply)",
    ),
    (".csv", b'a,{} is,b,"[' + b"9" * 5000 + b']"', "the field 'paraphrases' is a number (inf)"),
    (".csv", b'a,{} is,"' + b"x" * 200_000 + b'"', "field larger than field limit"),
]


@pytest.mark.parametrize(("ending", "line", "said"), BROKEN)
def test_one_broken_line_of_many(tmp_path: Path, ending: str, line: bytes, said: str) -> None:
    """It alone is rejected, with its number, and the message stays short."""
    good_line = json.dumps(FACT) if ending == ".jsonl" else 'Lyon,{} is in,Italy,"[""a""]"'
    lines = [good_line.encode()] * 9
    if ending == ".csv":
        lines[0] = b"subject,prompt,target_new,paraphrases"
    lines[4] = line
    requests, [rejected] = read_requests(save(tmp_path, f"facts{ending}", b"\n".join(lines)))
    assert len(requests) == 8 - (ending == ".csv")
    assert rejected.source == f"facts{ending}:5"
    assert said in rejected.reason
    assert len(str(rejected)) < 500


def test_a_quotation_mark_that_is_not_closed_takes_no_other_row_with_it(tmp_path: Path) -> None:
    rows = ["subject,prompt,target_new", *(f"Town{i},{{}} is in,Italy" for i in range(500))]
    rows[100] = 'Town99,"{} is in,Italy'
    requests, [rejected] = read_requests(save(tmp_path, "facts.csv", "\n".join(rows)))
    assert [r.subject for r in requests] == [f"Town{i}" for i in range(500) if i != 99]
    assert [r.source for r in requests[98:100]] == ["facts.csv:100", "facts.csv:102"]
    assert rejected.source == "facts.csv:101"


def test_files_put_behind_each_other_keep_their_marks(tmp_path: Path) -> None:
    line = b"\xef\xbb\xbf" + json.dumps(FACT).encode() + b"\n"
    requests, rejected = read_requests(save(tmp_path, "facts.jsonl", line * 2))
    assert (len(requests), rejected) == (2, [])


def test_a_parquet_file_that_opens_and_fails_at_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows() -> Any:
        yield FACT
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    monkeypatch.setattr("lightning_blue.data.hub._load", lambda *_: rows())
    assert "cannot be loaded: UnicodeDecodeError" in message(save(tmp_path, "f.parquet", b""))


def test_columns_that_fit_no_format(tmp_path: Path) -> None:
    path = save(tmp_path, "facts.json", [{"subject": "a", "promt": "b", "target": "c"}])
    text = message(path)
    assert "has columns subject, promt, target; needs subject, prompt, target_new" in text
    assert "rename 'promt' to 'prompt'" in text
    path = save(tmp_path, "facts.csv", "subject;prompt;target_new\na;{} is;b\n")
    assert "separate the columns by commas" in message(path)
    path = save(tmp_path, "other.json", [{"x": 1}])
    assert "formats known: mquake, counterfact, ripple-edits, zsre, " in message(path)


def test_columns_without_meaning_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, "facts.json", [FACT | {"paraphrase": ["x"], "colour": "red"}])
    with caplog.at_level(logging.WARNING):
        read_requests(path)
        read_requests(save(tmp_path, "rome.json", [ROME]))
        read_requests(save(tmp_path, "zsre.json", [ZSRE]))
    [record] = caplog.records
    assert "'paraphrase' (did you mean 'paraphrases'?), 'colour'" in record.getMessage()


def test_files_that_are_not_there(tmp_path: Path) -> None:
    save(tmp_path, "my_facts.jsonl", json.dumps(FACT))
    text = message(tmp_path / "my_fact.jsonl")
    assert "no such file" in text
    assert f"did you mean {str(tmp_path / 'my_facts.jsonl')!r}?" in text
    assert "no folder" in message(tmp_path / "nowhere" / "facts.json")
    assert "no such file" in message("nothing_like_this.csv")
    assert "no such file" in message("./nothing_like_this")


# --- datasets ------------------------------------------------------------


def test_a_dataset_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([ROME, ROME | {"case_id": 5}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("lightning_blue.support.hub._answer", lambda *_: None)  # it is there
    requests, rejected = read_requests("someone/counterfact", split="test")
    assert calls == [(("someone/counterfact",), {"split": "test"})]
    assert [r.source for r in requests] == [f"someone/counterfact record {i}" for i in (1, 2)]
    assert requests[0].neighborhood == good(ROME, "counterfact").neighborhood
    assert rejected == []


def test_a_hub_dataset_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'x/y' doesn't exist.\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("lightning_blue.support.hub._answer", lambda *_: None)  # it is there
    text = message("someone/counterfact")
    assert "DatasetNotFoundError: Dataset 'x/y' doesn't exist." in text
    assert "someone/counterfact, split 'train'" in text
    assert "more" not in text.split("hint:")[0].replace("someone", "")


def test_saved_datasets(tmp_path: Path) -> None:
    part = datasets.Dataset.from_list([FACT, FACT | {"subject": "Bern"}])
    part.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": part, "dev": part.select([1])}).save_to_disk(tmp_path / "two")
    assert [r.subject for r in read_requests(tmp_path / "one")[0]] == ["Lyon", "Bern"]
    assert [r.subject for r in read_requests(tmp_path / "two", split="dev")[0]] == ["Bern"]
    assert "split 'test'" in message(tmp_path / "two", "auto", "test")


def test_the_facts_that_ship_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "assets" / "almanac"
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    assert "ship with the package" in message("almanac")
    folder.mkdir(parents=True)
    save(folder, "facts.jsonl", json.dumps(FACT))
    [request], [] = read_requests("almanac")
    assert request.source == "almanac:1"
