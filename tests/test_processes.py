"""Several processes at one run: the same numbers as one, and no process left waiting."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from helpers import load_model
from lightning_blue.support.errors import InputError
from lightning_blue.support.processes import distribute, n_processes, share_work
from test_cli import BASE
from test_conf import flags, small_run  # noqa: F401  (a fixture)


def test_alone_a_process_does_everything():
    assert n_processes() == 1
    assert distribute("abc", lambda some: [letter * 2 for letter in some]) == ["aa", "bb", "cc"]


def shares_of(rank: int, folder: Path) -> None:
    """Spread work in one of two processes; note what came of it."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    alone = distribute([0, 1, 2], list)
    share_work(True)
    done: list[int] = []

    def work(some: list[int]) -> list[torch.Tensor]:
        done.extend(some)
        return [torch.tensor(item**2) for item in some]

    def refuse(some: list[str]) -> list[str]:
        if "bad" in some:
            raise InputError("a bad one", hint="leave it out")
        return some

    said = {
        "alone": alone,
        "world": n_processes(),
        "squares": [int(square) for square in distribute([0, 1, 2, 3, 4], work)],
        "one": [int(square) for square in distribute([7], work)],
        "none": distribute([], work),
        "done": done,
    }
    for name, items in (("error", ["good", "bad"]), ("differ", ["good"] * (1 + rank))):
        try:
            distribute(items, refuse)
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps(said))
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")
def test_processes_share_the_work_and_its_failure(tmp_path):
    multiprocessing.spawn(shares_of, args=(tmp_path,), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for said in (first, second):
        assert (said["alone"], said["world"]) == ([0, 1, 2], 2)
        assert (said["squares"], said["one"], said["none"]) == ([0, 1, 4, 9, 16], [49], [])
    assert (first["done"], second["done"]) == ([0, 1], [2, 3, 4, 7])
    for said in (first, second):
        assert said["error"] == "InputError: a bad one\n  hint:  leave it out"
        assert said["differ"].startswith("RuntimeError: processes")


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_write_what_one_does(small_run, tmp_path):  # noqa: F811
    """The command line with --trainer.devices; nothing but rounding may differ."""
    found = []
    for devices in (1, 2):
        root = tmp_path / str(devices)
        args = [BASE, *flags(small_run, "llama3"), f"--trainer.devices={devices}"]
        args.append("--trainer.use_distributed_sampler=true")  # Lightning's own default
        args += [f"--run.root={root}", "--run.name=r", "--run.wandb=offline"]
        command = [sys.executable, "-m", "lightning_blue", "fit", *args]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.count("report: ") == 1
        assert [path.name for path in root.iterdir()] == ["r"]
        assert len(list((root / "r" / "wandb").glob("offline-run-*"))) == 1
        weights = load_model(root / "r" / "model")[0].state_dict()
        summary = json.loads((root / "r" / "summary.json").read_text())
        edits = map(json.loads, (root / "r" / "edits.jsonl").read_text().splitlines())
        found.append((weights, summary, list(edits)))
    (weights, summary, edits), (others, other, also) = found
    unedited = load_model(small_run / "llama3")[0].state_dict()
    changes = {name: weight - unedited[name] for name, weight in weights.items()}
    assert sum(bool(change.any()) for change in changes.values()) == 2  # both boundary layers
    for name, change in changes.items():
        assert (weights[name] - others[name]).norm() <= 1e-3 * change.norm(), name
    scores = {name for name in summary if name.startswith(("pre/", "post/", "batch/"))}
    assert len(scores) > 10
    for name in scores:
        assert other[name] == pytest.approx(summary[name], rel=1e-3, abs=1e-3), name
    for edit, twin in zip(edits, also, strict=True):
        assert edit["after"]["continuation"] == twin["after"]["continuation"] != ""
