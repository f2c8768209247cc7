"""What the documents name exists: paths, functions, excerpts of code, and keys of run files."""

from __future__ import annotations

import ast
import re
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import ROOT
from lightning_blue.__main__ import main
from lightning_blue.api.call import DEFAULTS
from lightning_blue.language_model.loading import load_language_model

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "src/lightning_blue/editing/fast/README.md", ROOT / "callbacks/README.md"]
PACKAGES = (ROOT / "src/lightning_blue", ROOT / "callbacks/blue_callbacks")
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
NAME_BEHIND_LINK = re.compile(r"\]\(([^)\s]+\.py)\):\s+`([A-Za-z_][\w.]*)`")
NAME_IN_TABLE = re.compile(r"`([\w/]+\.py): ([A-Za-z_][\w.]*)`")


@cache
def names_in(path: Path) -> frozenset[str]:
    """Names that a module defines, those inside classes as ``Class.name``."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        names |= _defined(node)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for inner in node.body for name in _defined(inner)}
    return frozenset(names)


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    for link in links:
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_exist_in_the_files_that_they_are_linked_with(page):
    for link, name in NAME_BEHIND_LINK.findall(page.read_text()):
        assert name in names_in(page.parent / link), f"{link}: {name}"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_names_exist_in_the_files_that_tables_name(page):
    for file, name in NAME_IN_TABLE.findall(page.read_text()):
        (path,) = [package / file for package in PACKAGES if (package / file).is_file()]
        assert name in names_in(path), f"{file}: {name}"


def test_the_path_of_an_edit_is_named():
    text = (ROOT / "docs/follow_one_edit.md").read_text()
    assert len(NAME_BEHIND_LINK.findall(text)) >= 15
    for row in ("target", "key", "residual", "update"):
        (functions,) = re.findall(rf"^\| {row},.*\|(.*)\|$", text, flags=re.MULTILINE)
        assert NAME_IN_TABLE.findall(functions), row


def test_excerpts_are_the_textbooks():
    text = (ROOT / "docs/follow_one_edit.md").read_text()
    excerpts = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    book = (ROOT / "benchmarks/textbook.py").read_text()
    evaluation = (ROOT / "benchmarks/textbook_evaluation.py").read_text()
    *editing, measuring = excerpts
    assert len(editing) >= 8
    for excerpt in editing:
        assert f"\n{excerpt}" in book, excerpt
    assert f"\n{measuring}" in evaluation


def test_the_page_on_python_runs_as_a_notebook(tmp_path, monkeypatch, capsys):
    """Its first cell is the README's example; less text, which takes most of the time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(DEFAULTS, "model.covariance.tokens_per_dim", 3.0)
    text = (ROOT / "docs/python_api.md").read_text()
    cells = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert f"```python\n{cells[0]}```" in (ROOT / "README.md").read_text()
    scope: dict[str, Any] = {}
    for cell in cells:
        exec(compile(cell, "docs/python_api.md", "exec"), scope)
    assert "10 facts edited with MEMIT + BLUE" in capsys.readouterr().out
    result = scope["result"]
    assert result.scores["efficacy"]["before"] == 0
    assert result.scores["efficacy"]["after"] >= 80
    assert not scope["second"].failed
    assert (tmp_path / "edited/model.safetensors").is_file()
    unedited, _ = load_language_model("almanac")
    for name, value in unedited.state_dict().items():
        assert torch.equal(scope["model"].state_dict()[name], value)
    assert scope["tried"].history.settings["method"] == "RECT"


KEYS = re.findall(
    r"^\|[^|]*\| `([a-z_.]+)` \| ([^|]*) \|",
    (ROOT / "docs/hyperparameters.md").read_text(),
    flags=re.MULTILINE,
)


@pytest.fixture(scope="module")
def defaults():
    """Every key of ``fit`` with its default, as ``--print_config`` shows them."""
    module = {"block": "b.{}", "down_projection": "d"}
    named = [f"--model.architecture.{key}={value}" for key, value in module.items()]
    printed = StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit) as stopped:
        main(["fit", *named, "--print_config"])
    assert stopped.value.code == 0
    return flat(yaml.safe_load(printed.getvalue())) | {
        f"model.architecture.{key}": None for key in module
    }


def flat(config: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Return a nested configuration under dotted keys."""
    keys: dict[str, Any] = {}
    for key, value in config.items():
        keys |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return keys


@pytest.mark.parametrize(("key", "default"), KEYS)
def test_hyperparameters_have_the_keys_and_defaults_that_the_table_names(key, default, defaults):
    assert key in defaults
    if default != "required":
        assert yaml.safe_load(default.strip("`")) == defaults[key]


def test_other_keys_in_remarks_exist(defaults):
    text = (ROOT / "docs/hyperparameters.md").read_text()
    named = re.findall(r"`((?:model|update|data|measure|trainer)\.[a-z_.]+)(?:=[^`]*)?`", text)
    assert len(KEYS) >= 28
    assert set(named) - {"model.architecture"} <= set(defaults)
