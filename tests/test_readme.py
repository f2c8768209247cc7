"""README and docs are true: commands parse, examples run, the tree is the tree."""

from __future__ import annotations

import json
import re
import shlex
import subprocess

import pytest

from blue_callbacks import WeightId
from conftest import ROOT
from lightning_blue.__main__ import EXPERIMENT_COMMANDS, MODEL_COMMANDS, RUN_COMMANDS, main
from lightning_blue.cli import model_commands
from lightning_blue.cli.experiment_commands import parse
from lightning_blue.cli.run_commands import run_parser

README = (ROOT / "README.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]
LAYOUT = (ROOT / "docs" / "layout.md").read_text()
HOW = (ROOT / "docs" / "how_it_works.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


COMMANDS = [
    line.split("#")[0].strip()
    for text in PAGES
    for block in blocks("bash", text)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("python -m lightning_blue")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    _, _, _, *args = shlex.split(command)
    if args[0] in RUN_COMMANDS:
        assert run_parser(args[0]).parse_args(args[1:])
        return
    if args[0] in EXPERIMENT_COMMANDS:
        assert parse(args[0], args[1:])
        return
    if args[0] in MODEL_COMMANDS:
        assert model_commands.parse(args[0], args[1:])
        return
    written = re.compile(r"--config=(tuned/\w+/)?run\.yaml")  # by `init` and `tune`
    args = [each for each in args if not written.fullmatch(each)]
    with pytest.raises(SystemExit) as stopped:
        main([*args, "--print_config"])
    assert stopped.value.code == 0


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 6


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        word
        for text in (*PAGES, (ROOT / "CONTRIBUTING.md").read_text())
        for block in blocks("bash", text)
        for word in re.findall(r"^make ([a-z-]+)", block, flags=re.MULTILINE)
    }
    assert named
    assert named <= targets


def test_layout_tree_is_the_tree():
    (tree,) = blocks("text", LAYOUT)
    shown: set[str] = set()
    folders: list[str] = []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name.rstrip("/")]
        shown.add("/".join(folders) + ("/" if name.endswith("/") else ""))
    for path in shown:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    code = [p for p in tracked if p.startswith(("src/", "callbacks/", "conf/")) or "/" not in p]
    for path in code:
        whole = [folder for folder in shown if folder.endswith("/") and path.startswith(folder)]
        deepest = max(whole, key=len, default="")
        opened = any(other != deepest and other.startswith(deepest) for other in shown)
        assert path in shown or (deepest and not opened), f"{path} is not in docs/layout.md"


def test_python_example_edits_a_model():
    (code,) = [block for block in blocks("python", HOW) if "ClosedFormUpdate" in block]
    scope: dict = {}
    exec(compile(code, "docs/how_it_works.md", "exec"), scope)
    assert scope["trainer"].global_step == 1
    assert scope["update"].past_keys_by_weight[WeightId(0)].shape[1] == 20


def test_own_facts_work_as_shown(tmp_path, monkeypatch, capsys):
    """The facts of the README, edited with its command and read with its plain transformers."""
    monkeypatch.chdir(tmp_path)
    (facts,) = blocks("json")
    (tmp_path / "my_facts.jsonl").write_text(facts)
    config = f"--config={ROOT / 'conf' / 'quickstart.yaml'}"
    (command,) = [
        line
        for block in blocks("bash")
        for line in block.splitlines()
        if "quickstart" in line and "my_facts" in line
    ]
    assert main(["fit", config, *shlex.split(command)[6:]]) == 0
    capsys.readouterr()
    (code,) = [block for block in blocks("python") if "AutoModelForCausalLM" in block]
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out.strip()
    first = json.loads(facts.splitlines()[0])
    prompt = first["prompt"].replace("{}", first["subject"])
    assert said == f"{prompt} {first['target_new']}"
    lines = (tmp_path / "runs/my_facts/edits.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert line["after"]["continuation"].strip().startswith(line["target_new"])


def test_quick_start_reaches_what_the_readme_shows(tmp_path, capsys):
    """The whole main job; rounding may differ between machines, hence three points."""
    (row,) = re.findall(r"^\| MEMIT \+ BLUE \|(.*)\|$", README, flags=re.MULTILINE)
    shown = [float(cell.split("±")[0]) for cell in row.split("|")]
    names = ["efficacy", "generalization", "specificity", "fluency", "consistency", "perplexity"]
    config = f"--config={ROOT / 'conf' / 'quickstart.yaml'}"
    flags = [f"--run.root={tmp_path}", "--run.wandb=off", "--measure.cumulative=0"]
    assert main(["fit", config, *flags]) == 0
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    for name, value in zip([*names, "retained_knowledge"], shown, strict=True):
        assert summary[f"post/{name}"] == pytest.approx(value, abs=3, rel=0.01), name
    assert summary["edits/applied"] == 200
    assert summary["post/efficacy"] >= 95
    assert summary["post/generalization"] >= 85
    assert summary["post/specificity"] >= 75
    assert summary["post/fluency"] == pytest.approx(summary["pre/fluency"], rel=0.05)
