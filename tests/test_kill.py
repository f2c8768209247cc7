"""Runs of the command line that are killed or stopped by a signal, and gone on with.

``make kill`` kills 50 runs instead of a few.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from helpers import write_jsonl
from test_conf import flags, small_run  # noqa: F401  (a fixture)
from test_lightning import FACTS

KILLS = int(os.environ.get("KILLS", "3"))
BASE = f"--config={ROOT / 'conf' / 'llama3_memit_blue.yaml'}"
LIMIT = 300  # seconds for a run of a few; a machine may be busy


@pytest.fixture(scope="module")
def command(small_run, tmp_path_factory):  # noqa: F811
    """The command of a run of three batches, without a name."""
    facts = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    write_jsonl(facts, FACTS)
    text = "\n".join(f"The river {number} runs through Basel." for number in range(60))
    (ordinary := facts.with_name("ordinary.txt")).write_text(text)
    return [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "lightning_blue",
        "fit",
        BASE,
        *flags(small_run, "llama3"),
        f"--data.path={facts}",
        "--data.edits=6",
        "--data.batch_size=2",
        f"--measure.text={ordinary}",
        "--model.target.steps=8",
    ]


def start(command: list[str], root: Path, *more: str) -> subprocess.Popen[str]:
    """Start a run with statistics of its own."""
    own = [f"--run.root={root}", f"--model.covariance.cache={root / 'stats'}"]
    return subprocess.Popen(
        [*command, *own, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, err


def result(root: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights that a run has saved, and its summary without seconds and paths."""
    summary = json.loads((root / name / "summary.json").read_text())
    left_out = ("seconds/", "settings/covariance_file")
    kept = {key: value for key, value in summary.items() if not key.startswith(left_out)}
    return load_file(root / name / "model" / "model.safetensors"), kept


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The uninterrupted run: its result, and how long it took."""
    root = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    code, _, err = finish(start(command, root, "--run.name=edit"))
    assert code == 0, err
    return *result(root, "edit"), time.monotonic() - began


def hidden(root: Path) -> list[Path]:
    """Files and folders that were being written."""
    return [path for path in root.rglob(".*") if path.name != ".gitignore"]


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_goes_on_to_the_same_end(command, whole, tmp_path, number):
    """Killed at a random moment of its whole time, loading and saving included."""
    weights, summary, seconds = whole
    moment = random.Random(number).uniform(0.2, 1.0) * seconds
    process = start(command, tmp_path, "--run.name=edit")
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    finish(process)
    code, _, err = finish(start(command, tmp_path, "--run.name=edit", "--ckpt_path=last"))
    assert code == 0, err
    ours, figures = result(tmp_path, "edit")
    assert all(torch.equal(ours[name], weights[name]) for name in weights), moment
    assert figures == summary, moment
    assert not hidden(tmp_path), moment


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_its_exit_code_and_a_report(command, tmp_path, number, code):
    """After the first checkpoint: what was applied is reported, and the run can go on."""
    process = start(command, tmp_path, "--run.name=edit", "--model.target.steps=3000")
    first = tmp_path / "edit" / "checkpoints" / "batch-00001.ckpt"
    for _ in range(LIMIT * 10):
        if first.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    time.sleep(0.5)  # into the next batch
    process.send_signal(number)
    returned, _, err = finish(process)
    assert returned == code, err
    assert "Traceback" not in err
    assert f"stopped by {number.name}" in err
    report = tmp_path / "edit" / "report.md"
    assert report.exists(), err
    assert "**Partial:**" in report.read_text()
    assert json.loads((tmp_path / "edit" / "run.json").read_text())["status"] == "failed"
    assert first.exists()


def test_a_signal_while_loading_ends_without_a_traceback(command, tmp_path):
    process = start(command, tmp_path, "--run.name=edit")
    time.sleep(1.5)  # while torch is imported
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert "Traceback" not in err


def test_last_starts_from_the_beginning_where_there_is_nothing(command, whole, tmp_path):
    code, _, err = finish(start(command, tmp_path, "--run.name=edit", "--ckpt_path=last"))
    assert code == 0, err
    assert result(tmp_path, "edit")[1] == whole[1]
    code, out, _ = finish(start(command, tmp_path, "--run.name=edit", "--ckpt_path=last"))
    assert code == 0
    assert "the run is finished" in out
