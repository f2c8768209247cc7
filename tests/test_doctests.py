"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib

import pytest

from conftest import ROOT

MODULES = [
    ".".join(path.relative_to(source).with_suffix("").parts)
    for source in (ROOT / "callbacks", ROOT / "src")
    for path in sorted(source.rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    results = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert results.attempted > 0
    assert results.failed == 0


def test_there_are_examples():
    assert {name.partition(".")[0] for name in MODULES} == {"blue_callbacks", "lightning_blue"}
    assert len(MODULES) >= 8
