"""Nothing of a run is lost to a disk: full, read-only, shared, or left in the middle."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from blue_callbacks import ClosedFormUpdate
from conftest import ROOT
from disks import failing
from lightning_blue.__main__ import main
from lightning_blue.reporting import RunRecord
from lightning_blue.reporting.disk_space import Estimate, check_room, estimate
from lightning_blue.reporting.guarded import guarded, has_failed
from lightning_blue.reporting.run_folders import claim_folder, read_status
from lightning_blue.runs.journal import RECORDS, EditJournal, Journal
from lightning_blue.support import leftovers, space
from lightning_blue.support.checkpoints import (
    FOLDER,
    BatchCheckpoints,
    WholeCheckpointIO,
    checkpoints,
)
from lightning_blue.support.errors import InputError
from lightning_blue.support.leftovers import hidden_name, sweep
from lightning_blue.support.storage import whole_file, whole_folder
from test_conf import flags, small_run  # noqa: F401  (a fixture)
from test_lightning import corpus, data_of, facts, measuring, module, weights  # noqa: F401

BATCHES = 2


# a full disk and a read-only folder at every write of a run


class Run:
    """A run of two edit batches in a folder, as the command line puts it together."""

    def __init__(self, root: Path, module: Any, facts: Path, **settings: Any) -> None:  # noqa: F811
        self.module, self.facts, self.root = copy.deepcopy(module), facts, root
        self.settings = {"wandb": "off", **settings}
        self.applied = 0

    def fit(self, *, resumed: bool = False) -> None:
        module = copy.deepcopy(self.module)  # noqa: F811
        record = RunRecord("run", str(self.root), **self.settings)
        saved: list[Path] = []
        if resumed and (self.root / "run").exists():
            record.resume(self.root / "run")
            saved = checkpoints(self.root / "run" / FOLDER)
            if not saved:
                shutil.rmtree(self.root / "run" / RECORDS, ignore_errors=True)
        saving = BatchCheckpoints()
        saving.folder = record.folder / FOLDER
        update = ClosedFormUpdate([0, 1, 2], "boundary", 1.0)
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            val_check_interval=1,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            logger=record.loggers(),
            plugins=[WholeCheckpointIO()],
            callbacks=[saving, EditJournal(record.folder), update, measuring(), record],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self.edited = module
        try:
            trainer.fit(
                module,
                datamodule=data_of(self.facts, 3),
                ckpt_path=saved[-1] if saved else None,
                weights_only=True if saved else None,
            )
        finally:
            self.applied = trainer.global_step

    def outcome(self, code: int) -> str:
        """Run; an error must name what is wrong, where, and how to fix it."""
        try:
            self.fit()
        except InputError as error:
            message = str(error)
        else:
            return "finished"
        assert os.strerror(code) in message
        assert "where:" in message
        assert "hint:" in message
        return "edited, and not all written" if self.applied else "refused"


@pytest.fixture
def plain_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_blue.reporting.report.plots", lambda history: {"metrics": b"x"})


def half_written(root: Path) -> list[Path]:
    return [path for path in root.rglob(".*") if path.suffix in (".partial", ".replaced")]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.filterwarnings("ignore:.*could not be written", "ignore:.*has failed")
def test_a_disk_that_fails_at_any_write_loses_nothing(
    module,  # noqa: F811
    facts,  # noqa: F811
    tmp_path,
    plain_plots,
    code,
):
    """Refused before the first edit, or all edits are applied; and the run can be gone on with.

    The disk fails where a file is written first (full), or where it takes its place (forbidden).
    """
    whole = Run(tmp_path / "whole", module, facts)
    with failing(tmp_path, None, code) as disk:
        whole.fit()
    wanted = weights(whole.edited)
    places = {}
    for number, path in enumerate(disk.written):
        if code == errno.EACCES or path not in places:
            places[path] = number
    assert len(places) > 15
    numbers = sorted(places.values())[:: 1 if code == errno.ENOSPC else 2]
    outcomes = set()
    for number in numbers:
        where = f"write {number}: {disk.written[number]}"
        run = Run(tmp_path / f"at{number}", module, facts)
        with failing(tmp_path, number, code):
            outcomes.add(run.outcome(code))
        assert run.applied in (0, BATCHES), where
        assert half_written(tmp_path) == [], where
        if number % 3 == 0:
            run.fit(resumed=True)
            left = {path.name for path in (run.root / "run").iterdir()}
            assert left >= {"model", "report.md", "summary.json", "edits.jsonl", "metrics.csv"}
            assert read_status(run.root / "run")["status"] == "finished", where
            assert half_written(tmp_path) == [], where
            assert len(Journal(run.root / "run").files) == BATCHES, where
        if run.applied:
            assert all(map(torch.equal, weights(run.edited), wanted)), where
    assert outcomes >= {"refused", "edited, and not all written"}


@pytest.fixture
def small_disk(tmp_path):
    """A disk of a few megabytes of its own, where this machine lets tests mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # W&B may hold a log open


@pytest.fixture
def run(small_run, capsys):  # noqa: F811
    """Run a command on the small model; return exit code and what was printed as an error."""
    base = f"--config={ROOT / 'conf' / 'llama3_memit_blue.yaml'}"

    def go(*more: str, command: str = "fit") -> tuple[int, str]:
        code = main([command, base, *flags(small_run, "llama3"), *more])
        return code, capsys.readouterr().err

    return go


def fill(folder: Path) -> Path:
    """Take all that is left of a disk."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"0" * 4096)
        except OSError:
            return filler


@pytest.mark.filterwarnings("ignore:.*could not be written", "ignore:.*has failed")
def test_a_disk_that_is_really_full(run, small_disk, monkeypatch):
    """It fills up behind the first of two batches, with a W&B run open."""
    real = BatchCheckpoints._save

    def save(self: BatchCheckpoints, trainer: Trainer) -> None:
        real(self, trainer)
        if trainer.global_step == 1:
            fill(small_disk)

    monkeypatch.setattr(BatchCheckpoints, "_save", save)
    monkeypatch.setenv("WANDB_MODE", "offline")  # restored afterwards; the logger changes it
    args = [f"--run.root={small_disk}", "--run.name=r", "--data.batch_size=1"]
    code, err = run(*args, "--run.wandb=offline")
    assert code == 2
    assert wandb.run is None
    assert "model" in err
    assert "could not be written: No space left on device" in err
    assert "--ckpt_path=last" in err
    folder = small_disk / "r"
    assert [path.name for path in checkpoints(folder / FOLDER)] == ["batch-00001.ckpt"]
    assert half_written(folder) == []
    assert not (folder / "model").exists()
    table = folder / "metrics.csv"
    assert not table.exists() or table.read_bytes()[-1:] in (b"", b"\n")  # whole lines
    monkeypatch.setattr(BatchCheckpoints, "_save", real)
    (small_disk / "filler").unlink()
    code, err = run(*args, "--ckpt_path=last")
    assert code == 0, err
    assert json.loads((folder / "summary.json").read_text())["edits/applied"] == 2
    assert (folder / "model" / "model.safetensors").exists()


# before any work


def test_a_root_that_is_a_file_is_refused_before_the_model_is_loaded(run, tmp_path):
    file = tmp_path / "runs"
    file.write_text("")
    for root in (file, file / "below"):
        code, err = run(f"--run.root={root}", "--model.name_or_path=/nowhere")
        assert code == 2
        assert f"{root.name} could not be written: Not a directory" in err
        assert f"where: {root}" in err
        assert "hint:" in err


def test_a_root_that_may_not_be_written_is_refused(run, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, err = run(f"--run.root={small_disk / 'runs'}", "--model.name_or_path=/nowhere")
    assert code == 2
    assert "runs could not be written: Read-only file system" in err
    assert list(small_disk.iterdir()) == []


def test_a_model_that_cannot_be_written_is_not_trained(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    config = f"--config={ROOT / 'conf' / 'pretrain_almanac.yaml'}"
    assert main(["pretrain", config, f"--model.output={tmp_path / 'file' / 'out'}"]) == 2
    assert "out could not be written: Not a directory" in capsys.readouterr().err


def test_nothing_stays_of_the_check(tmp_path):
    space.check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def free(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    usage = SimpleNamespace(total=2 * n_bytes, used=n_bytes, free=n_bytes)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)


def test_a_run_that_does_not_fit_is_refused_before_work_is_spent(run, tmp_path, monkeypatch):
    free(monkeypatch, 10_000)
    monkeypatch.setattr("lightning_blue.editing.covariance.collect_covariance", None)
    code, err = run(f"--run.root={tmp_path}")
    assert code == 2
    assert "are needed for the edited model and a checkpoint, and 10.0 kB are free" in err
    assert "--run.export=false" in err


def test_covariances_that_do_not_fit_are_not_collected(run, tmp_path, monkeypatch):
    free(monkeypatch, 10_000)
    monkeypatch.setattr("lightning_blue.editing.covariance.collect_covariance", None)
    code, err = run(f"--model.covariance.cache={tmp_path / 'stats'}", command="stats")
    assert code == 2
    # 2 layers, the upper triangle of 48 x 48 in float64
    assert "18.8 kB are needed for covariances of the keys" in err
    assert "--model.covariance.cache" in err


@pytest.mark.filterwarnings("ignore:.*could not be written")
def test_covariances_that_cannot_be_kept_do_not_cost_the_run(run, tmp_path, monkeypatch):
    cache = tmp_path / "stats"
    for command, expected in (("fit", 0), ("stats", 2)):
        with failing(cache, 1, errno.ENOSPC):
            code, err = run(
                f"--model.covariance.cache={cache}", f"--run.root={tmp_path}", command=command
            )
        assert code == expected, err
        assert not list(cache.glob("*"))


def test_the_estimate_is_what_is_written(run, tmp_path):
    code, err = run(f"--run.root={tmp_path}", "--run.name=r", "--data.batch_size=1")
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if "this run will write" in line]
    number, unit = line.split("about ")[1].split()[:2]
    estimated = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    large = [
        path for kind in ("safetensors", "ckpt") for path in (tmp_path / "r").rglob(f"*.{kind}")
    ]
    assert estimated == pytest.approx(sum(path.stat().st_size for path in large), rel=0.4)
    assert f"to {tmp_path / 'r'}" in line
    assert "are free" in line


def test_the_estimate_by_hand(module, facts):  # noqa: F811
    data = data_of(facts)
    data.prepare()
    saving = BatchCheckpoints()
    saving.folder = Path("somewhere")
    update = ClosedFormUpdate([0, 1, 2], "boundary", 1.0, post_edit_transform="prune")
    trainer: Any = SimpleNamespace(callbacks=[update, saving], datamodule=data)
    found = estimate(trainer, module, export=True)
    parameters = sum(weight.numel() for weight in module.model.parameters())
    weight, n = 32 * 96, 6
    assert found == Estimate(
        model=4 * parameters, weights=2 * 2 * 4 * weight, keys=2 * 4 * n * 96, kept=2
    )
    assert found.total == found.model + 2 * (found.weights + found.keys)
    trainer.callbacks.append(EditJournal("somewhere"))
    assert estimate(trainer, module, export=True).records == 2 * 4 * n * (32 + 2 * 96)
    update.rect_keep = 0.4
    kept_bits = 2 * 3 * weight // 8
    assert estimate(trainer, module, export=True).records == 2 * 4 * n * 224 + kept_bits
    saving.every = 4  # more than the three batches there are
    last = estimate(trainer, module, export=False)
    assert (last.model, last.weights, last.kept) == (0, 0, 0)


def test_only_what_is_certain_is_refused(tmp_path, monkeypatch):
    needed = Estimate(model=1000, weights=500, keys=10_000, kept=2)
    free(monkeypatch, 1500)
    check_room(tmp_path, needed)
    free(monkeypatch, 1499)
    with pytest.raises(InputError, match="are needed for the edited model"):
        check_room(tmp_path, needed)


# loggers


class Failing(CSVLogger):
    def save(self) -> None:
        raise RuntimeError("the server is on fire")


def test_a_logger_that_fails_costs_one_warning(tmp_path, recwarn):
    logger = guarded(Failing(tmp_path, flush_logs_every_n_steps=1))
    assert isinstance(logger, Failing)
    assert guarded(logger) is logger
    for step in range(3):
        logger.log_metrics({"a": 1.0}, step)
        assert has_failed(logger)
    logger.save()
    logger.finalize("success")
    logger.log_hyperparams({"a": 1})
    logger.experiment.anything(1, two=3)
    (warning,) = recwarn
    assert "Failing has failed, the run goes on without it: the server is on fire" in str(
        warning.message
    )


def test_a_logger_that_a_user_can_fix_is_not_silenced(tmp_path):
    class Wrong(CSVLogger):
        def log_metrics(self, *args: Any, **kwargs: Any) -> None:
            raise InputError("no such project")

    with pytest.raises(InputError, match="no such project"):
        guarded(Wrong(tmp_path)).log_metrics({}, 0)


# checkpoints


def test_a_checkpoint_that_fails_leaves_those_before_it(tmp_path, recwarn):
    plugin = WholeCheckpointIO()
    old = tmp_path / "old.ckpt"
    plugin.save_checkpoint({"a": torch.zeros(3)}, old)
    with failing(tmp_path, 0, errno.ENOSPC):
        for name in ("new.ckpt", "newer.ckpt"):
            plugin.save_checkpoint({"a": torch.zeros(3)}, tmp_path / name)
    plugin.remove_checkpoint(old)  # as ModelCheckpoint does behind each new one
    assert list(tmp_path.iterdir()) == [old]
    (warning,) = [w for w in recwarn if "could not be written" in str(w.message)]
    assert "make room" in str(warning.message).lower()
    plugin.save_checkpoint({"a": torch.zeros(3)}, tmp_path / "new.ckpt")
    plugin.remove_checkpoint(old)
    assert [path.name for path in tmp_path.iterdir()] == ["new.ckpt"]


# what a process that was killed leaves


def write_and_die(target: Path) -> None:
    """Be killed in the middle of a folder and a file, in another process."""
    pid = os.fork()
    if pid == 0:
        with whole_folder(target / "model") as folder, whole_file(target / "a.ckpt") as file:
            (folder / "half").write_text("half")
            file.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


def dead_process() -> int:
    """Return the id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_is_cleared_by_a_later_run(run, tmp_path):
    left = tmp_path / "killed"
    write_and_die(left)
    assert len(half_written(tmp_path)) == 2
    with whole_file(tmp_path / "mine") as mine:
        code, err = run(f"--run.root={tmp_path}", "--run.export=false")
        assert code == 0, err
        assert half_written(tmp_path) == [mine]  # this process is alive
    assert list(left.iterdir()) == []


def test_a_folder_in_which_another_process_is_at_work_is_refused(run, tmp_path, capsys):
    """With the same name and --ckpt_path=last a second process would take its records from it."""
    arguments = (f"--run.root={tmp_path}", "--run.export=false", "--run.checkpoint_every=1")
    code, err = run(*arguments)
    assert code == 0, err
    [folder] = [path.parent for path in tmp_path.glob("*/run.json")]
    status = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(status | {"status": "running"}))

    def content() -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
        return {str(path): path.read_bytes() for path in files}

    before = content()
    assert not (folder / ".lock").exists()  # a run that has ended leaves none
    hold = "import pathlib, sys; from lightning_blue.support.locks import take; "
    hold += "print(take(pathlib.Path(sys.argv[1])), flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "True\n"
        code, err = run(*arguments, "--ckpt_path=last")
        assert (code, "another process is making this run" in err) == (2, True)
        assert before == content()
        other.kill()  # the system frees what a process held
        other.wait()
    code, err = run(*arguments, "--ckpt_path=last")
    assert code == 0, err
    (folder / ".lock").touch()  # of a run that goes on, or was killed
    show = main(["show", str(folder)])
    assert (show, ".lock" in capsys.readouterr().out) == (0, False)


@pytest.mark.parametrize("command", ["show", "undo", "export", "compare"])
def test_what_the_system_refuses_is_said_in_one_message(command, capsys):
    form = ["--as", "patch"] if command == "export" else []
    assert main([command, "x" * 300, *form]) == 2
    assert "File name too long" in capsys.readouterr().err


def test_what_others_may_still_write_stays(tmp_path, monkeypatch):
    dead = dead_process()
    names = {}
    for owner, machine, pid in [
        ("dead", leftovers._MACHINE, dead),
        ("alive", leftovers._MACHINE, os.getppid()),
        ("elsewhere", "another-machine", dead),
    ]:
        monkeypatch.setattr(leftovers, "_MACHINE", machine)
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        names[owner] = hidden_name(tmp_path / "x.y")
        names[owner].write_text("")
        monkeypatch.undo()
    users = [tmp_path / ".x.partial", tmp_path / ".bashrc"]
    for path in users:
        path.write_text("")
    sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {names["alive"], names["elsewhere"], *users}


def test_a_folder_that_was_put_aside_comes_back(tmp_path, monkeypatch):
    """The process died between the two moves of a replacement."""
    dead = dead_process()
    monkeypatch.setattr("os.getpid", lambda: dead)
    old, new = hidden_name(tmp_path / "model", "replaced"), hidden_name(tmp_path / "model")
    monkeypatch.undo()
    for folder in (old, new):
        folder.mkdir()
    (old / "old").write_text("")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


# who may read it


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_files_are_readable_like_their_neighbours(tmp_path, mask, file, folder):
    before = os.umask(mask)
    try:
        with whole_file(tmp_path / "a") as partial:
            partial.write_text("")
            partial.chmod(0o600)  # as safetensors does
        with whole_folder(tmp_path / "b") as building:
            (building / "c").write_text("")
            (building / "c").chmod(0o600)
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "b/c", "b")]
    assert modes == [file, file, folder]


def test_everything_of_a_run_is_readable(run, tmp_path):
    cache = f"--model.covariance.cache={tmp_path / 'stats'}"
    code, err = run(f"--run.root={tmp_path}", "--run.name=r", cache)
    assert code == 0, err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".ckpt", ".safetensors", ".csv", ".json", ".md"}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}


# several runs at once


def test_runs_that_start_together_never_share_a_folder(tmp_path):
    claimed: list[Path] = []
    start = threading.Barrier(16)

    def claim() -> None:
        start.wait()
        claimed.append(claim_folder(tmp_path / "runs", "edit"))

    threads = [threading.Thread(target=claim) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(claimed)) == 16
    assert {path.name for path in claimed} == {"edit", *(f"edit-{n}" for n in range(2, 17))}


def test_processes_that_start_together_never_share_a_folder(tmp_path):
    readers = []
    begin = time.monotonic() + 0.2
    for _ in range(8):
        reader, writer = os.pipe()
        if os.fork() == 0:
            time.sleep(max(0.0, begin - time.monotonic()))
            os.write(writer, claim_folder(tmp_path, "edit").name.encode())
            os._exit(0)
        os.close(writer)
        readers.append(reader)
    names = [os.read(reader, 100).decode() for reader in readers]
    for reader in readers:
        os.close(reader)
        os.wait()
    assert len(set(names)) == 8


def test_stats_claims_no_folder(run, tmp_path):
    cache = f"--model.covariance.cache={tmp_path / 'stats'}"
    code, err = run(f"--run.root={tmp_path / 'runs'}", cache, command="stats")
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["stats"]
