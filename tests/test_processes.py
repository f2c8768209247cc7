"""Several processes at one run: the same numbers as one, and no process left waiting."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from helpers import load_model
from lightning_blue.cli.parser import process_count
from lightning_blue.support.errors import InputError
from lightning_blue.support.processes import EditStrategy, distribute, n_processes, share_work
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


TESTS = str(Path(__file__).parent)
LIMIT = 60  # seconds within which all processes have ended; most of them for a busy machine


def two(small_run: Path, root: Path, *more: str, devices: int = 2) -> subprocess.Popen[str]:  # noqa: F811
    """Start two batches of one request each, in as many processes."""
    args = [BASE, *flags(small_run, "llama3"), f"--trainer.devices={devices}"]
    args += ["--data.batch_size=1", f"--run.root={root}", "--run.name=r", *more]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "lightning_blue", "fit", *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **pipes)


def sabotaged(small_run: Path, folder: Path, **settings: object) -> tuple[int, str, float]:  # noqa: F811
    """Run with a `Saboteur`; return exit code, messages and how many seconds the others took."""
    chosen = [f"--trainer.callbacks.{name}={value}" for name, value in settings.items()]
    sabotage = ["--trainer.callbacks+=saboteur.Saboteur", f"--trainer.callbacks.folder={folder}"]
    strategy = "--trainer.strategy=lightning_blue.support.processes.EditStrategy"
    watched = [strategy, "--trainer.strategy.lost_after=4"] if settings["how"] == "frozen" else []
    run = two(small_run, folder / "runs", *sabotage, *chosen, *watched)
    try:
        _, err = run.communicate(timeout=300)  # ends when no process holds the pipe
    finally:
        for name in ("process0", "process1"):
            with contextlib.suppress(OSError):
                os.kill(int((folder / name).read_text()), signal.SIGKILL)
    return run.returncode, err, time.time() - (folder / "when").stat().st_mtime


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        ({"rank": 1, "how": "killed", "others": 500}, 1, "process 1 of 2 was lost: killed by SIGK"),
        ({"rank": 1, "how": "killed", "where": "start"}, 1, "process 1 of 2 was lost: killed by "),
        ({"rank": 0, "how": "killed"}, -9, "process 0 of 2 was lost: it has ended"),
        ({"rank": 0, "how": "killed", "others": 500}, -9, "process 0 of 2 was lost: it has ended"),
        ({"rank": 1, "how": "frozen"}, 1, "process 1 of 2 was lost: no sign of life for 4 seconds"),
        ({"rank": 0, "how": "refused", "where": "end"}, 2, "sabotage"),
        ({"rank": 1, "how": "refused"}, 2, "process 1 of 2 failed: sabotage"),
        ({"rank": 1, "how": "broken"}, 1, "process 1 of 2 failed: RuntimeError: sabotage"),
        ({"rank": 1, "how": "stopped"}, 143, "stopped by SIGTERM"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_no_process_outlives_another(small_run, tmp_path, settings, code, message):  # noqa: F811
    """Not when it waits, not when it is busy alone; one message, and no word of torch's own."""
    returned, err, seconds = sabotaged(small_run, tmp_path, **settings)
    assert (returned, err.count(message)) == (code, 1), err
    assert seconds < LIMIT
    broken = settings["how"] == "broken"
    assert err.count("Traceback") == broken  # where the error is
    if not broken:
        progress = ("  ", "this run", "covar", "about ", "2 requests", "batch ", "editing is done")
        told = [line for line in err.splitlines() if not line.startswith(progress)]
        assert len(told) == 1, err
    went_on = settings.get("where", "batch") == "batch" and "process" in message
    assert ("batch-00001.ckpt; --ckpt_path last" in err) == went_on


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")
def test_a_run_whose_process_was_killed_goes_on(small_run, tmp_path):  # noqa: F811
    """By two processes to the same bits as without a break, by one but for rounding."""

    def weights(root: Path) -> dict[str, torch.Tensor]:
        return load_model(root / "r" / "model")[0].state_dict()

    assert sabotaged(small_run, tmp_path, rank=1, how="killed")[0] == 1
    shutil.copytree(tmp_path / "runs", tmp_path / "alone")
    runs = [
        two(small_run, tmp_path / "whole"),
        two(small_run, tmp_path / "runs", "--ckpt_path=last"),
        two(small_run, tmp_path / "alone", "--ckpt_path=last", devices=1),
    ]
    for run in runs:
        _, err = run.communicate(timeout=300)
        assert run.returncode == 0, err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["r"]
    whole, again, alone = (weights(tmp_path / name) for name in ("whole", "runs", "alone"))
    unedited = load_model(small_run / "llama3")[0].state_dict()
    assert any(not torch.equal(whole[name], unedited[name]) for name in whole)
    for name, weight in whole.items():
        assert torch.equal(weight, again[name]), name
        assert (weight - alone[name]).norm() <= 1e-3 * (weight - unedited[name]).norm(), name


@pytest.mark.parametrize(
    ("devices", "accelerator", "count"),
    [
        (1, "cpu", 1),
        ("2", "cpu", 2),
        ("auto", "cpu", 1),
        ("auto", "gpu", 4),
        (-1, "cuda", 4),
        ("0,1", "gpu", 2),
        ("3,", "auto", 1),
        ([0, 2, 3], "gpu", 3),
        (2, "auto", 2),
    ],
)
def test_how_many_processes_are_asked_for(monkeypatch, devices, accelerator, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert process_count(devices, accelerator) == count


@pytest.mark.parametrize("devices", ["0,1", [0, 1], -1, 0, "two"])
def test_processors_have_no_numbers(devices):
    with pytest.raises(InputError, match=r"number of processes(.|\n)*trainer\.devices"):
        process_count(devices, "cpu")


def test_lost_after_is_positive():
    with pytest.raises(ValueError, match="lost_after is 0"):
        EditStrategy(lost_after=0)
