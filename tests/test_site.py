"""The documentation's site: its menu, and the parts that are made from the code."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT

sys.path.append(str(ROOT / "tools" / "docs"))

from messages import Module, messages
from parts import AREAS, PARTS, SOURCES, all_messages, command_line, metrics, python

from lightning_blue.__main__ import COMMANDS
from lightning_blue.cli.help import sections_of
from lightning_blue.metrics.table import METRICS

DOCS = ROOT / "docs"
MENU = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]


def texts(code: str) -> tuple[list[str], list[str]]:
    """What the first message of a module is, and its hints."""
    module = Module(ast.parse(code))
    call = next(call for call in module.calls if call.args and module.raises(call))
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    hints = module.texts(given["hint"], call) if "hint" in given else []
    return module.texts(call.args[0], call), hints


@pytest.mark.parametrize(
    ("code", "what", "hint"),
    [
        ("raise InputError(f'no {name!r} of {self.count:,}', hint=HINT)\nHINT = 'a' + 'b'",
         ["no ‹name› of ‹count›"], ["ab"]),
        ("def f(x):\n  what = 'one' if x else 'two'\n  raise InputError(what, hint='h')",
         ["one", "two"], ["h"]),
        ("def f(text):\n  raise InputError(text)\ndef g():\n  f('given')\n  f(text='named')",
         ["given", "named"], []),
        ("def f():\n  a, b = g()\n  raise InputError(a, hint=b)\ndef g():\n  return 'x', 'y'",
         ["x"], ["y"]),
        ("class E(InputError):\n  def __init__(self, p):\n    super().__init__(f'lost {p}')",
         ["lost ‹p›"], []),
    ],
)  # fmt: skip
def test_a_message_is_read_from_the_code_that_raises_it(code, what, hint):
    assert texts(code) == (what, hint)


def test_every_message_has_a_hint_and_stands_on_the_page():
    """But those that hand on what another program says, which only it can know."""
    page = all_messages()
    found = [message for source in SOURCES for message in messages(source)]
    in_code = sum(
        len(re.findall(r"(?<!class )\bInputError\($", line))
        for source in SOURCES
        for file in source.rglob("*.py")
        for line in file.read_text().splitlines()
    )
    assert len(found) >= in_code > 100
    told = [message for message in found if message.texts != ["…"]]
    assert (len(found) - len(told)) * 20 < len(found)
    lacking = [message for message in told if not message.hints]
    assert len(lacking) * 50 < len(found), lacking
    for message in told:
        for text in message.texts:
            assert text in page or not re.search(r"[a-z]{2}", re.sub("‹.*?›", "", text)), text
    for name in AREAS.values():
        assert page.count(f"## {name}\n") <= 1


def test_commands_are_all_of_them_with_all_keys():
    page = command_line()
    for command in COMMANDS:
        assert f"\n## {command}\n" in page
        assert f"usage: lightning-blue {command}" in page
    for section in [*sections_of("fit"), *sections_of("analyze")]:
        assert f"\n### {section}\n" in page
    assert "--update.covariance_weight" in page
    assert "/" not in re.findall(r"usage: (\S+)", page)[0]


def test_metrics_are_the_table():
    page = metrics()
    for spec in METRICS:
        assert f"[`{spec.name}`](#{spec.name})" in page
        assert f"{{ #{spec.name} }}" in page
        assert spec.measure("zsre").definition.lower() in page.lower()


def test_python_names_what_packages_offer():
    page = python()
    for name in ("lightning_blue.data.EditDataModule", "blue_callbacks.ClosedFormUpdate"):
        assert f"\n::: {name}\n" in page


def test_parts_are_asked_for_by_the_names_they_have():
    asked = [
        name
        for page in DOCS.glob("*.md")
        for name in re.findall(r"<!-- made: ([a-z ]+) -->", page.read_text())
    ]
    assert sorted(asked) == sorted(PARTS)


def pages(menu: object) -> list[str]:
    if isinstance(menu, str):
        return [menu]
    parts = menu.values() if isinstance(menu, dict) else menu
    return [page for part in parts for page in pages(part)]  # type: ignore[attr-defined]


def test_menu_leads_to_pages():
    for page in pages(MENU):
        path = page.removeprefix("repository/")
        assert (DOCS / page if path == page else ROOT / path).is_file(), page


def test_no_page_is_made_twice():
    assert len(pages(MENU)) == len(set(pages(MENU)))


def test_docs_are_built_on_a_clean_machine():
    assert "make docs" in Path(ROOT / ".ci" / "run").read_text()
    assert "--strict" in (ROOT / "Makefile").read_text()
