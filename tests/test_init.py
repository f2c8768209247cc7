"""``init``: the run file is what ``fit`` would do with the same flags, and says why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT
from helpers import brief_run, write_jsonl
from lightning_blue.__main__ import main
from lightning_blue.cli.written import comment, flat, spell
from lightning_blue.editing.depth import layers_by_depth
from random_models import random_model, saved

FACTS = [
    {"subject": "Lyon", "prompt": "{} is near", "target_new": "Rome", "target_true": "Paris"},
    {"subject": "José", "prompt": "{} works in", "target_new": "Oslo", "target_true": "São Paulo"},
    {"subject": "Zoë", "prompt": "The town of {} is", "target_new": "a river"},
]
NO_SUBJECT = {"subject": "Paris", "prompt": "Rome is\x1b[31m", "target_new": "Oslo"}
LAYERS, WIDTH = 4, 96  # of the random Llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama) -> Path:
    """A model, and facts under a name that YAML needs quotes for."""
    folder = tmp_path_factory.mktemp("init")
    model, tokenizer = llama
    model.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    assert model.config.num_hidden_layers == LAYERS
    assert model.model.layers[0].mlp.down_proj.weight.shape[1] == WIDTH
    write_jsonl(folder / "my: facts #é.jsonl", FACTS)
    write_jsonl(folder / "faulty.jsonl", [*FACTS, NO_SUBJECT])
    (folder / "text.txt").write_text("The river runs through the town of Basel. " * 80)
    return folder


def settings(folder: Path) -> list[str]:
    return [
        *brief_run(folder / "text.txt", folder / "stats"),
        f"--run.root={folder / 'runs'}",
        "--run.wandb=off",
    ]


@pytest.fixture
def run(folder, tmp_path, capsys, monkeypatch):
    """Write a run file; return exit code, output and error."""
    monkeypatch.setattr("lightning_blue.preflight.timing.SECONDS", 0.02)
    monkeypatch.chdir(tmp_path)

    def go(*more: str, model: str = "llama", data: str = "my: facts #é.jsonl"):
        given = [str(folder / model), "--data", str(folder / data)]
        code = main(["init", *given, *settings(folder), *more])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return go


def printed(capsys, *args: str) -> dict[str, Any]:
    """The whole configuration of `fit`, by dotted key."""
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *args, "--print_config"])
    assert stopped.value.code == 0
    return flat(yaml.safe_load(capsys.readouterr().out))


ODD = [
    "--run.project=1e5",  # text that is a number to other loaders
    "--data.target_prefix= ",
    "--model.target.learning_rate=0.00001",  # 1e-05 is text to PyYAML
    "--data.batch_size=2",
    "--update.threshold=0.5",
    "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping",
    "--trainer.callbacks.monitor=batch/efficacy",
]


@pytest.mark.parametrize(
    "more", [[], ODD, [f"--config={ROOT / 'conf/methods/alphaedit.yaml'}", "--update.layers=[1]"]]
)
def test_the_file_is_what_fit_would_do_with_the_same_flags(run, folder, capsys, more):
    """And what it would decide, by the rules as they are documented."""
    code, out, err = run(*more)
    assert code == 0, err
    assert out.endswith("next: lightning-blue fit --config=run.yaml\n")
    model, data = str(folder / "llama"), str(folder / "my: facts #é.jsonl")
    named = [f"--model.name_or_path={model}", f"--data.path={data}"]
    expected = printed(capsys, *settings(folder), *more, *named)
    expected |= {"for_model": model, "run.name": "llama_my_facts_é"}
    if expected["update.layers"] is None:
        expected["update.layers"] = layers_by_depth(LAYERS)
    if expected["update.solver"] == "least_squares":
        expected["update.covariance_weight"] = float(WIDTH)
    assert printed(capsys, "--config=run.yaml") == expected
    if not more:
        assert main(["check", model, "--config=run.yaml", "--facts=0"]) == 0


VALUE = re.compile(r" *\w+: [^ ]")


def comments_above(lines: list[str], number: int) -> list[str]:
    """The comments directly above a line."""
    start = number
    while lines[start - 1].strip().startswith("#"):
        start -= 1
    return lines[start:number]


def test_each_value_says_where_it_comes_from(run, folder):
    code, _, err = run("--data.batch_size=2", "--run.name=mine", "--for_model=null")
    assert code == 0, err
    text = Path("run.yaml").read_text()
    lines = text[text.index("\n\n# decides") + 2 :].splitlines()
    named = {line.split(":")[0].strip(): n for n, line in enumerate(lines) if VALUE.match(line)}
    assert len(named) == len(flat(yaml.safe_load(text)))  # no name comes twice
    for name, number in named.items():
        above = lines[number - 1].strip()
        assert above.startswith("# "), name  # what the key is
        source = lines[number].partition("  # ")[2] or "".join(comments_above(lines, number))
        assert re.search("default|given|proposed|decided: ", source), name
    said = {name: lines[number] for name, number in named.items()}
    assert said["batch_size"] == "  batch_size: 2  # given; makes 2 batches"
    assert said["edits"].endswith("# default; 3 of 3 facts will be edited")
    assert said["site"].endswith("auto  # default; measured: block")
    assert said["name"].endswith("mine  # given")
    assert said["for_model"] == "for_model: null  # default"
    assert said["tokens_per_dim"].endswith(f"{4 * WIDTH} tokens of text in all")
    assert "# decided: critical layers 0, 1, 2 of 4, by depth" in text
    assert "decided: learning rate of targets by the length of h" in text
    assert "# given" in said["path"]
    assert "# given" in said["name_or_path"]
    assert all(len(line) <= 100 for line in lines if str(folder) not in line)


def test_what_was_found_stands_in_comments(run):
    code, _, _ = run()
    head = Path("run.yaml").read_text().partition("\nseed_everything")[0]
    assert code == 0
    said = " ".join(head.replace("#", " ").split())
    for found in (
        "a known change arrives at the block's output as it is",
        "target site block",
        "<|begin|> is put before a text",
        "facts 3 of 3 will be edited",
        "verdict fit to go",
        "Next: lightning-blue fit --config=run.yaml lightning-blue ask",
    ):
        assert found in said, found
    assert "not asked about" not in said


def test_a_fault_is_written_down_and_told(run):
    code, out, _ = run("--output=sub/it.yaml", data="faulty.jsonl")
    assert code == 1
    assert "unusable: faulty.jsonl:4: " in out
    assert "to be mended first: 1 of 4 facts cannot be used" in out
    head = Path("sub/it.yaml").read_text().partition("\nseed_everything")[0]
    assert "TO BE MENDED FIRST" in head
    assert "faulty.jsonl:4" in head
    assert "\x1b" not in head
    assert yaml.safe_load(Path("sub/it.yaml").read_text())["data"]["on_unusable"] == "stop"


def test_thousands_of_unusable_facts_are_not_all_named(run, folder):
    write_jsonl(folder / "many.jsonl", [*FACTS, *[NO_SUBJECT] * 30])
    code, out, _ = run(data="many.jsonl")
    text = Path("run.yaml").read_text()
    assert code == 1
    assert len(re.findall(r"many\.jsonl:\d+", text)) == 20
    assert "10 more unusable are left out here" in text
    assert out.count("unusable: ") == 5
    assert "and 25 more: " in out


def test_a_model_that_cannot_be_edited_where_it_was_asked(run, folder):
    saved(random_model("olmo2"), folder / "olmo2")
    code, out, _ = run("--model.target.site=block", model="olmo2")
    assert code == 1
    assert "to be mended first: " in out
    text = Path("run.yaml").read_text()
    assert yaml.safe_load(text)["model"]["target"]["site"] == "block"
    assert "problem" in text


def test_no_file_is_written_over(run, folder, monkeypatch):
    """Before the model is loaded."""
    Path("run.yaml").write_text("mine")
    with monkeypatch.context() as patched:
        patched.setattr("lightning_blue.editing.module.load_language_model", None)
        for more, said in (([], "--force"), ([f"--output={folder}"], "where a folder is")):
            code, out, err = run(*more)
            assert (code, out) == (2, "")
            assert said in err
            assert err.count("error: ") == 1
    assert Path("run.yaml").read_text() == "mine"
    code, _, err = run("--force")
    assert code == 0, err
    assert yaml.safe_load(Path("run.yaml").read_text())["update"]["layers"] == [0, 1, 2]


def test_a_file_that_appears_meanwhile_is_kept(run, monkeypatch):
    from lightning_blue.cli import init

    examine = init.examine

    def slow(*args: Any, **kwargs: Any) -> Any:
        Path("run.yaml").write_text("mine")
        return examine(*args, **kwargs)

    monkeypatch.setattr(init, "examine", slow)
    assert run()[0] == 2
    assert Path("run.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["almanac"], "--data"),
        (["nothing/here/at/all", "--data=x.csv"], "no folder"),
        (["almanac", "--data=missing.csv"], "no such file"),
        (["almanac", "--data=a.csv", "--data.path=b.csv"], "the facts are given twice"),
        (["almanac", "--data=almanac", "--update.layer=[1]"], "update.layer"),
        (["almanac", "--data=almanac", "stray"], "unrecognized arguments: stray"),
        (["almanac", "--data=almanac", "--output=text/run.yaml"], "could not be written"),
    ],
)
def test_bad_input_is_one_message_and_no_file(args, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("a file")
    assert main(["init", *args]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_weights_of_several_widths_leave_the_weight_open(run, monkeypatch):
    for file in ("init", "settings_file"):
        monkeypatch.setattr(f"lightning_blue.cli.{file}.key_widths", lambda *_: [96, 128])
    assert run()[0] == 0
    text = Path("run.yaml").read_text()
    assert yaml.safe_load(text)["update"]["covariance_weight"] is None
    assert "384 or 512 tokens of text in all" in text


def test_the_file_edits(run, capsys):
    assert run()[0] == 0
    assert main(["fit", "--config=run.yaml"]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(
        (Path(out.rpartition("report: ")[2].strip()).parent / "summary.json").read_text()
    )
    assert summary["edits/applied"] == 3
    assert "decided: critical layers" not in err  # the file says them


FOUND = [1e-05, 1e22, "1e5", "0x10", "null", "", "a: b", "no", [1, "y"]]
ENDS = [f"a{end}b" for end in ("\n", "\r", "\r\n", "\n\n", "\x85", "\u2028", "\u2029", "\v", "\f")]


@pytest.mark.parametrize("value", [*FOUND, *ENDS])
def test_values_come_back_as_they_were(value):
    assert yaml.safe_load(spell(value)) == value
    assert len(spell(value).splitlines()) == 1


def test_a_comment_is_one_line():
    assert yaml.safe_load(comment("x\nkey: 1\u2028key: 2")) is None
