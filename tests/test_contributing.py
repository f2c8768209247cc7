"""The examples in CONTRIBUTING.md are changes that still apply to the code as it is."""

from __future__ import annotations

import re
import subprocess

import pytest

from conftest import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLES = {
    title: re.search(r"```diff\n(.*?)```", section, re.DOTALL)
    for title, section in re.findall(r"^### (.*?)\n(.*?)(?=^##)", TEXT, re.DOTALL | re.MULTILINE)
}


def test_shows_how_to_add_everything():
    assert list(EXAMPLES) == [
        "A method",
        "A plan",
        "A transform",
        "An architecture",
        "A data format",
        "A metric",
    ]


@pytest.mark.parametrize("title", EXAMPLES)
def test_example_applies(title):
    diff = EXAMPLES[title]
    assert diff is not None
    command = ["git", "apply", "--check", "--verbose", "-"]
    done = subprocess.run(command, cwd=ROOT, input=diff[1], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
