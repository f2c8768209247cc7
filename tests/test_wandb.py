"""What a W&B run is told, and that no server can cost a run: without a network it is offline."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.loggers import Logger, WandbLogger

from conftest import ROOT
from lightning_blue.__main__ import main
from lightning_blue.reporting import RunRecord, wandb_logger, wandb_run
from lightning_blue.reporting.guarded import guarded, has_failed
from lightning_blue.reporting.wandb_logger import make_logger, require_key
from lightning_blue.support.errors import InputError
from test_conf import flags, small_run  # noqa: F401  (a fixture)

NOWHERE = "http://127.0.0.1:9"  # no server listens there
KEY = "0123456789" * 4


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """A server that cannot be reached, and a user without a key."""
    wandb.teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_GROUP", "WANDB_TAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")  # restored afterwards; the logger changes it
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    yield monkeypatch
    wandb.teardown()


def test_without_a_network_the_run_is_logged_offline(server, tmp_path, recwarn):
    server.setenv("WANDB_API_KEY", KEY)
    server.setenv("WANDB_INIT_TIMEOUT", "2")
    server.chdir(tmp_path)
    started = time.monotonic()
    require_key()  # asks no server
    logger = guarded(make_logger(Path("runs/r"), "test", "online", run_id="abcd1234"))
    _ = logger.experiment
    assert time.monotonic() - started < 20
    logger.log_metrics({"batch/efficacy": 1.0, "edits/applied": 2}, 2)
    wandb_run.finish([logger])
    (folder,) = Path("runs/r/wandb").glob("*run-*-abcd1234")  # nothing of the failed one
    assert folder.name.startswith("offline-run-")
    assert list(folder.glob("run-abcd1234.wandb"))
    assert not has_failed(logger)
    (warning,) = [str(w.message) for w in recwarn if "W&B did not answer" in str(w.message)]
    assert f"`wandb sync {folder}`" in warning


def test_a_run_waits_well_under_a_minute_for_a_server():
    assert wandb_logger.START_SECONDS <= 20
    assert wandb_logger.quiet_settings().init_timeout == wandb_logger.START_SECONDS
    assert wandb_logger.quiet_settings().finish_timeout == wandb_logger.FINISH_SECONDS


@pytest.mark.parametrize(("key", "message"), [(None, "No API key"), ("abc", "40+ characters")])
def test_without_a_key_a_run_is_refused_before_the_model_is_loaded(
    server, tmp_path, capsys, key, message
):
    if key:
        server.setenv("WANDB_API_KEY", key)
    base = f"--config={ROOT / 'conf' / 'quickstart.yaml'}"
    root = tmp_path / "runs"
    args = [f"--run.root={root}", "--run.wandb=online", "--model.name_or_path=/nowhere"]
    assert main(["fit", base, *args]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "wandb login" in err
    assert "--run.wandb=offline" in err
    assert not root.exists()


def test_a_key_that_the_server_refuses_is_a_user_error(server, tmp_path, monkeypatch):
    def refuse(**settings: Any) -> None:
        raise wandb.errors.AuthenticationError("401: unknown key")

    monkeypatch.setattr(wandb, "init", refuse)
    logger = guarded(make_logger(tmp_path / "r", "test", "online"))
    with pytest.raises(InputError, match="unknown key"):
        _ = logger.experiment


def test_a_server_that_is_lost_leaves_a_hint(tmp_path, monkeypatch, recwarn):
    class Lost:
        dir = str(tmp_path / "run-1" / "files")

        def finish(self, exit_code: int) -> None:
            raise TimeoutError

    monkeypatch.setattr(WandbLogger, "experiment", Lost())
    logger = guarded(WandbLogger(offline=True))
    wandb_run.finish([logger])
    (warning,) = recwarn
    assert f"send the rest: `wandb sync {tmp_path / 'run-1'}`" in str(warning.message)


def test_wandb_is_imported_when_it_is_used(small_run, tmp_path):  # noqa: F811
    base = f"--config={ROOT / 'conf' / 'llama3_memit_blue.yaml'}"
    args = ["fit", base, *flags(small_run, "llama3"), f"--run.root={tmp_path}"]
    code = f"import sys; from lightning_blue.__main__ import main; assert main({args!r}) == 0; "
    code += "assert 'wandb' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert list(tmp_path.glob("*/summary.json"))


class Recorded:
    """Stands for a W&B run, and keeps what it is told."""

    def __init__(self) -> None:
        self.summary: dict[str, float] = {}
        self.rows: list[dict[str, float]] = []

    def log(self, values: dict[str, float]) -> None:
        self.rows.append(values)


def test_what_is_measured_once_is_no_curve(tmp_path, monkeypatch):
    run = Recorded()
    monkeypatch.setattr(wandb_logger.RunWandbLogger, "experiment", run)
    logger = make_logger(tmp_path / "r", "test", "offline")
    for stage in ("pre", "post", "first_batch", "test"):
        logger.log_metrics({f"{stage}/efficacy": 1.0, "edits/applied": 4}, 4)
    assert run.rows == []
    assert set(run.summary) == {f"{s}/efficacy" for s in ("pre", "post", "first_batch", "test")}
    for stage in ("batch", "cumulative"):
        values = {f"{stage}/efficacy": 1.0, f"{stage}/efficacy/standard_error": 0.5}
        logger.log_metrics({**values, f"{stage}/efficacy/prompts": 9, "edits/applied": 4}, 4)
    logger.log_metrics({"update/layer0/null_space": 7, "edits/applied": 4}, 4)
    assert [set(row) - {"edits/applied", "trainer/global_step"} for row in run.rows] == [
        {"batch/efficacy", "batch/efficacy/standard_error"},
        {"cumulative/efficacy", "cumulative/efficacy/standard_error"},
    ]
    assert run.summary["batch/efficacy/prompts"] == 9
    assert run.summary["update/layer0/null_space"] == 7


def test_a_run_of_one_batch_has_no_curves_of_one_point(tmp_path, monkeypatch):
    run = Recorded()
    monkeypatch.setattr(wandb_logger.RunWandbLogger, "experiment", run)
    logger = make_logger(tmp_path / "r", "test", "offline")
    wandb_run.expect_curves([logger], 1)
    logger.log_metrics({"batch/efficacy": 1.0, "edits/applied": 4}, 4)
    assert run.rows == []
    assert run.summary == {"batch/efficacy": 1.0}
    wandb_run.expect_curves([logger], 2)
    logger.log_metrics({"batch/efficacy": 1.0, "edits/applied": 4}, 4)
    assert len(run.rows) == 1


CONFIG = """
seed_everything: 3
model: {name_or_path: /models/llama, target: {steps: 5}}
update: {plan: even, layers: [1, 2], rect_keep: null}
"""


def loggers_of(record: RunRecord) -> list[Logger]:
    record.config = CONFIG
    record.settings = {"method": "MEMIT", "model": "/models/llama", "data": "facts.json"}
    record.settings |= {"plan": "even"}
    return record.loggers()


def test_a_run_has_a_name_a_configuration_a_group_and_tags(server, tmp_path):
    (tmp_path / "edit").mkdir()
    record = RunRecord("edit", str(tmp_path))
    csv, logger = loggers_of(record)
    for each in (csv, logger):
        each.log_hyperparams(record._hyper_parameters())
    run = logger.experiment
    assert run.name == "edit-2"  # as its folder
    assert run.group == "edit"  # with the other runs of the name
    assert run.tags == ("MEMIT", "llama", "facts.json", "even")
    expected = {
        "method": "MEMIT",
        "seed_everything": 3,
        "model/name_or_path": "/models/llama",
        "model/target/steps": 5,
        "update/plan": "even",
        "update/layers": [1, 2],
        "update/rect_keep": None,
    }
    assert {key: run.config[key] for key in expected} == expected
    assert {"method: MEMIT", "update/plan: even"} <= set(
        (tmp_path / "edit-2" / "hparams.yaml").read_text().splitlines()
    )
    wandb_run.finish([logger])


def test_a_run_that_goes_on_keeps_its_id(server, tmp_path):
    record = RunRecord("edit", str(tmp_path))
    _, logger = loggers_of(record)
    record._write_status("running")
    again = RunRecord("edit", str(tmp_path))
    again.resume(record.folder)
    assert loggers_of(again)[1].version == logger.version


def test_the_environment_names_group_and_tags(server, tmp_path):
    server.setenv("WANDB_RUN_GROUP", "mine")
    server.setenv("WANDB_TAGS", "a,b")
    (_, logger) = loggers_of(RunRecord("edit", str(tmp_path)))
    run = logger.experiment
    assert (run.group, run.tags) == ("mine", ("a", "b"))
    wandb_run.finish([logger])


# what `wandb sync` reads


def records(path: Path) -> Iterator[Any]:
    """Read the records of an offline run: a log in LevelDB's format behind a header of 7 bytes.

    Blocks of 32 kB hold pieces of a checksum, a length and a type: 1 a whole record, 2 to 4 the
    beginning, the middle and the end of one.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def values(items: Any) -> dict[str, Any]:
    """Return values by key; W&B nests what a table or a picture is made of."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.fixture(scope="module")
def offline(small_run, tmp_path_factory) -> Path:  # noqa: F811
    """The folder of a run of two batches that was logged offline, with answers and a matrix."""
    root = tmp_path_factory.mktemp("runs")
    base = f"--config={ROOT / 'conf' / 'llama3_memit_blue.yaml'}"
    measured = [
        "--measure.protocols=[probability,generation]",
        "--measure.generation.max_new_tokens=3",
        "--measure.retention.prompts=20",
        "--measure.negation=true",
    ]
    args = [*flags(small_run, "llama3"), *measured, "--data.batch_size=1", f"--run.root={root}"]
    assert main(["fit", base, *args, "--run.name=seen", "--run.wandb=offline"]) == 0
    return root / "seen"


def test_an_offline_run_brings_name_configuration_and_summary(offline):
    (log,) = offline.glob("wandb/offline-run-*/run-*.wandb")
    read = list(records(log))
    (run,) = [record.run for record in read if record.WhichOneof("record_type") == "run"]
    assert (run.display_name, run.run_group) == ("seen", "seen")
    config = values(run.config.update)
    for record in read:
        if record.WhichOneof("record_type") == "config":
            config |= values(record.config.update)
    assert config["measure/protocols"] == ["probability", "generation"]
    assert config["method"] == "MEMIT + BLUE"
    told: dict[str, Any] = {}
    for record in read:
        if record.WhichOneof("record_type") == "summary":
            told |= values(record.summary.update)
    summary = json.loads((offline / "summary.json").read_text())
    assert {key: told.get(key) for key in summary} == summary


def test_an_offline_run_brings_tables_and_pictures(offline):
    (log,) = offline.glob("wandb/offline-run-*/run-*.wandb")
    logged: dict[str, Any] = {}
    for record in records(log):
        if record.WhichOneof("record_type") == "history":
            logged |= values(record.history.item)
    pictures = {path.stem: path for path in (offline / "plots").glob("*.png")}
    assert {"before_after", "losses", "metrics", "retention"} <= set(pictures)
    files = log.parent / "files"
    for name, path in pictures.items():
        assert logged[f"report/{name}/_type"] == "image-file"
        assert (files / logged[f"report/{name}/path"]).read_bytes() == path.read_bytes()
    lines = [json.loads(line) for line in (offline / "answers.jsonl").open()]
    for name, rows in (("answers", len(lines)), ("edits", 2)):
        assert logged[f"{name}/_type"] == "table-file"
        content = json.loads((files / logged[f"{name}/path"]).read_text())
        assert len(content["data"]) == rows
    content = json.loads((files / logged["answers/path"]).read_text())
    assert content["columns"] == list(wandb_run.ANSWER_COLUMNS)
    for line, row in zip(lines, content["data"], strict=True):
        given = dict(zip(content["columns"], row, strict=True))
        assert given["aliases"] == ", ".join(line["aliases"])
        assert all(given[key] == line[key] for key in given if key != "aliases")


def test_an_offline_logger_needs_no_key_whatever_the_process_did_before(tmp_path, monkeypatch):
    """W&B reads the environment, in which Lightning says that it is offline, once a process."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()
    with wandb.init(mode="offline", dir=tmp_path, settings=wandb_logger.quiet_settings()):
        pass
    monkeypatch.setenv("WANDB_MODE", "online")  # restored afterwards; the logger changes it
    logger = make_logger(tmp_path / "run", "test", "offline")
    assert logger.experiment.offline
    wandb.finish()
