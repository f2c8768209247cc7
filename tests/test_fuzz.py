"""Whatever is given, the answer is a sane run or one message; never a traceback.

Records, files and configurations are made by hypothesis. ``make fuzz`` makes 1,000 of each, other
ones each time; the suite makes fewer, the same each time.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from conftest import ROOT, LanguageModel
from lightning_blue.__main__ import main
from lightning_blue.data import EditDataModule, parse_record
from lightning_blue.data.checks import check_tokens
from lightning_blue.data.formats import FORMATS
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.prompts import edit_prompts
from lightning_blue.metrics.history import RunHistory
from lightning_blue.reporting.files import write_rejected
from lightning_blue.support.errors import InputError
from test_conf import flags, resolved, small_run  # noqa: F401  (a fixture)
from test_formats import FACT, FLAT, ROME, ZSRE

EXAMPLES = int(os.environ.get("FUZZ", "0"))
RUN = ROOT / "conf" / "llama3_memit_blue.yaml"


def fuzz(in_the_suite: int) -> settings:
    """How many examples there are, and whether they are the same each time."""
    return settings(
        max_examples=EXAMPLES or in_the_suite,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,  # a machine may be busy
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],  # a few minutes of shrinking save few of reading
    )


# Records

CHARACTERS = st.characters() | st.sampled_from("{}\"'|,[]\n\0\ufeff\ud83d\udcff\u200b ")
TEXTS = st.text(CHARACTERS, max_size=30) | st.sampled_from(["", "{}", "Lyon", "{} is", "x" * 9999])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS | st.just(10**4200),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
GOOD = {"facts": FACT, "counterfact": ROME, "counterfact-flat": FLAT, "zsre": ZSRE}


def places(value: Any) -> list[tuple[Any, ...]]:
    """Where something can be put into a record: the paths to all of its values."""
    if not isinstance(value, dict | list):
        return [()]
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    return [(), *((key, *rest) for key, part in inside for rest in places(part))]


def replaced(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a record with another value at a path."""
    if not path:
        return value
    copy = record.copy()
    copy[path[0]] = replaced(record[path[0]], path[1:], value)
    return copy


@st.composite
def records(draw: Any) -> tuple[str, Any]:
    """A record of a format with up to three values replaced."""
    name = draw(st.sampled_from(sorted(GOOD)))
    record: Any = GOOD[name]
    for _ in range(draw(st.integers(0, 3))):
        record = replaced(record, draw(st.sampled_from(places(record))), draw(VALUES))
    return name, record


def is_text(value: str) -> bool:
    return bool(value.strip()) and "\0" not in value and value.encode() is not None


@fuzz(150)
@given(records())
@example(("facts", FACT | {"subject": "\ud83d", "prompt": "\ud83d is"}))
@example(("facts", FACT | {"case_id": 10**5000}))
@example(("zsre", ZSRE | {"answers": [[[["a"] * 1000] * 3]]}))
def test_records(gpt2: LanguageModel, named: tuple[str, Any]) -> None:
    name, record = named
    parsed = parse_record(record, FORMATS[name], source="facts.jsonl:3", index=2)
    if isinstance(parsed, EditRequest):
        texts = [parsed.subject, parsed.text, parsed.target_new, *parsed.paraphrases]
        assert all(map(is_text, texts))
        assert parsed.prompt.count("{}") == 1
        usable, rejected = check_tokens([parsed], gpt2.tokenizer, 64, 8)
        for prompts in edit_prompts(gpt2.tokenizer, usable, ["{}", "So it is. {}"]):
            assert prompts.target
        assert len(usable) + len(rejected) == 1
        rejects = rejected
    else:
        rejects = [parsed]
    for reject in rejects:
        assert "facts.jsonl:3" in str(reject)
        assert len(str(reject)) < 1000
        assert str(reject).encode()


# Files

LINES = [json.dumps(FACT | {"subject": f"Town{i}", "prompt": f"Town{i} is in"}) for i in range(6)]
PIECES = [
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"[" * 3000,
    b"9" * 5000,
    b'"\\ud83d"',
    b"\r",
    b'"',
    b",",
    b"{}",
]
BYTES = st.binary(max_size=6) | st.sampled_from(PIECES)


@st.composite
def mutations(draw: Any) -> Callable[[bytes], bytes]:
    """What puts bytes into others, over some of them, at up to three places."""
    cuts = draw(
        st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), BYTES), min_size=1, max_size=3)
    )

    def mutate(content: bytes) -> bytes:
        for at, length, new in cuts:
            start = int(at * len(content))
            content = content[:start] + new + content[start + length :]
        return content

    return mutate


CSV = """subject,prompt,target_new,paraphrases
Lyon,{} is in,Italy,"[""A {}"", ""B {}""]"
Bern,Bern is in,Peru,C | D
Oslo,"{}, as
all know, is in",Rome,
"""


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Whole files of each kind, by their ending."""
    folder = tmp_path_factory.mktemp("originals")
    datasets.Dataset.from_list([FACT, FACT | {"subject": "Bern"}]).to_parquet(folder / "f.parquet")
    return {
        ".json": json.dumps([FACT, ROME]).encode(),
        ".jsonl": "\n".join(LINES).encode(),
        ".csv": CSV.encode(),
        ".parquet": (folder / "f.parquet").read_bytes(),
        ".yaml": RUN.read_bytes(),
    }


def prepared(path: Path, policy: str, gpt2: LanguageModel) -> EditDataModule | str:
    """The data module of a file, or the message that it gets."""
    data = EditDataModule(str(path), on_unusable=policy)
    try:
        data.prepare(gpt2.tokenizer, 64, 8)
    except InputError as error:
        return str(error)
    return data


def read(folder: Path, name: str, content: bytes, gpt2: LanguageModel) -> EditDataModule | str:
    """Read a file with both policies; they may differ only in how they take what is unusable."""
    path = folder / name
    path.write_bytes(content)
    skipped, stopped = (prepared(path, policy, gpt2) for policy in ("skip", "stop"))
    for message in (skipped, stopped):
        assert not isinstance(message, str) or ("hint:" in message and message.encode())
    if isinstance(skipped, str):
        assert isinstance(stopped, str)
        return skipped
    assert isinstance(stopped, str) == bool(skipped.rejected)
    for reject in skipped.rejected:
        assert reject.source.startswith(path.name)
        assert reject.source in str(stopped) or len(skipped.rejected) > 5
    write_rejected(folder / "rejected.jsonl", RunHistory(rejected=skipped.rejected))
    return skipped


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
@fuzz(60)
@given(mutate=mutations())
def test_files(
    tmp_path_factory: pytest.TempPathFactory,
    originals: dict[str, bytes],
    gpt2: LanguageModel,
    ending: str,
    mutate: Callable[[bytes], bytes],
) -> None:
    read(tmp_path_factory.getbasetemp(), f"fuzzed{ending}", mutate(originals[ending]), gpt2)


@fuzz(15)
@given(mutate=mutations())
def test_parquet_files(
    tmp_path_factory: pytest.TempPathFactory,
    originals: dict[str, bytes],
    gpt2: LanguageModel,
    mutate: Callable[[bytes], bytes],
) -> None:
    folder = tmp_path_factory.getbasetemp()
    read(folder, "fuzzed.parquet", mutate(originals[".parquet"]), gpt2)


@fuzz(60)
@given(place=st.integers(0, 5), mutate=mutations())
def test_a_broken_line_takes_no_other_with_it(
    tmp_path_factory: pytest.TempPathFactory,
    gpt2: LanguageModel,
    place: int,
    mutate: Callable[[bytes], bytes],
) -> None:
    broken = mutate(LINES[place].encode()).replace(b"\n", b" ")
    lines = [line.encode() for line in LINES]
    lines[place] = broken
    name = "lines.jsonl"
    data = read(tmp_path_factory.getbasetemp(), name, b"\n".join(lines), gpt2)
    if isinstance(data, str):  # what begins the file may make all of it another encoding
        assert "The file is UTF-" in data
        return
    whole = {f"{name}:{i + 1}" for i in range(len(LINES)) if i != place}
    assert {request.source for request in data.requests} >= whole
    assert {reject.source for reject in data.rejected} <= {f"{name}:{place + 1}"}


# Configuration


class Started(Exception):
    """A run got as far as its first step of work."""


def answer(args: list[str]) -> int:
    """Give arguments in; return the exit code, and check how it is explained."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(args)
        except Started:
            code = 0
        except SystemExit as stopped:  # --help, --print_config
            code = stopped.code
    said = err.getvalue()
    assert said == said.encode(errors="replace").decode()
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) in [(0, 0), (2, 1)], said
    return int(code)


@pytest.fixture(scope="module")
def command(
    small_run: Path,  # noqa: F811
    gpt2: LanguageModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """Flags of a small run that ends where it would begin to work."""

    def start(*_args: Any, **_kwargs: Any) -> None:
        raise Started

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))  # what a fuzzed path is relative to
        patch.setattr("lightning.Trainer.fit", start)
        patch.setattr("lightning_blue.editing.module.load_language_model", lambda *_: gpt2)
        yield [f"--config={RUN}", *flags(small_run, "llama3"), "--update.layers=[1,2]"]


def test_what_is_fuzzed_starts_without_it(command: list[str]) -> None:
    assert answer(["fit", *command]) == 0


KEYS = sorted(
    {key for key in resolved("llama3_memit_blue.yaml") if key not in ("base", "config")}
    | {f"model.architecture.{key}" for key in ("block", "down_projection", "norm_after_ffn")}
)
NASTY = [
    *(
        "",
        " ",
        "null",
        "true",
        "[]",
        "[null]",
        "{}",
        "{a: 1}",
        "[1,2",
        "'",
        "- a",
        "a: b: c",
        "auto",
    ),
    *("-1", "0", "0.5", "nan", ".nan", "inf", "-.inf", "1e300", "1e-300", str(10**12), "9" * 5000),
    *("${nothing.there}", "${update}", "${update.plan}", "${", "${oc.env:NOTHING}", "$", "0x_"),
    *("../x", ".", "a\tb", "é" * 300, "\udce9", "\ud83d", "x\0y", "[" * 900, "&a [*a]"),
    *("2001-99-99", "!!python/name:os.system", "{class_path: torch.nn.Linear}"),
]
# no slash: tests write into their own folders only
GIVEN = st.sampled_from(NASTY) | TEXTS.map(lambda text: text[:300].replace("/", "|"))
OVERRIDES = st.lists(st.tuples(st.sampled_from(KEYS), GIVEN), min_size=1, max_size=2)


@fuzz(50)
@given(overrides=OVERRIDES)
@example(overrides=[("update.plan", "${update.plan}")])
def test_configurations(command: list[str], overrides: list[tuple[str, str]]) -> None:
    answer(["fit", *command, *(f"--{key}={value}" for key, value in overrides)])


@fuzz(30)
@given(mutate=mutations())
def test_run_files(
    command: list[str],
    originals: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
    mutate: Callable[[bytes], bytes],
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(mutate(originals[".yaml"]))
    answer(["fit", *command[1:], f"--config={path}", "--print_config"])
