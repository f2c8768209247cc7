"""How far a run is: lines in a log where there is no terminal, a bar where there is one."""

from __future__ import annotations

import csv
import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import ROOT
from lightning_blue.__main__ import main
from lightning_blue.data.requests import EditRequest
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.metrics.history import Measurement
from lightning_blue.reporting import progress
from lightning_blue.reporting.progress import EditProgressBar, ProgressLines
from test_conf import flags, small_run  # noqa: F401  (a fixture)

BASE = f"--config={ROOT / 'conf' / 'llama3_memit_blue.yaml'}"


def test_a_log_has_a_line_for_each_batch(small_run, capsys):  # noqa: F811
    assert main(["fit", BASE, *flags(small_run, "llama3"), "--data.batch_size=1"]) == 0
    out, err = capsys.readouterr()
    folder = Path(out.rpartition("report: ")[2].strip()).parent
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    batches = [float(row["batch/efficacy"]) for row in rows if row["batch/efficacy"]]
    assert len(batches) == 2
    lines = [line for line in err.splitlines() if line.startswith("batch ")]
    assert re.fullmatch(
        rf"batch 1 of 2: 1 of 2 edits, efficacy {batches[0]:.1f}, about \d+ s of editing left",
        lines[0],
    )
    assert lines[1:] == [f"batch 2 of 2: 2 of 2 edits, efficacy {batches[1]:.1f}"]
    said = [err.index(part) for part in ("come first", "batch 1", "batch 2", "measuring all edits")]
    assert said == sorted(said)


def test_a_run_that_shows_nothing_writes_no_lines(small_run, capsys):  # noqa: F811
    off = ["--trainer.enable_progress_bar=false", "--run.export=false"]
    assert main(["evaluate", BASE, *flags(small_run, "llama3"), *off]) == 0
    assert "measuring" not in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_and_no_lines(small_run, monkeypatch):  # noqa: F811
    seen: list[Any] = []
    monkeypatch.setattr("lightning.Trainer.test", lambda trainer, *_, **__: seen.append(trainer))
    monkeypatch.setattr("lightning_blue.cli.commands._say", lambda *_: None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["evaluate", BASE, *flags(small_run, "llama3")]) == 0
    kinds = {type(callback) for callback in seen[0].callbacks}
    assert EditProgressBar in kinds
    assert ProgressLines not in kinds


class Log(io.StringIO):
    """Knows how much of it was flushed."""

    flushed = ""

    def flush(self) -> None:
        self.flushed = self.getvalue()


def logging(monkeypatch: pytest.MonkeyPatch) -> Log:
    made = Log()
    monkeypatch.setattr(sys, "stderr", made)
    return made


class Clock:
    """Passes ten seconds at each look."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 10
        return self.now


def test_lines_of_a_resumed_run_with_a_rejected_batch(monkeypatch) -> None:
    """Three of five batches, from the second on; the fourth would be the last (max_steps)."""
    log = logging(monkeypatch)
    monkeypatch.setattr(progress, "time", Clock())
    measure = MeasureEdits()
    history = measure.history
    history.requests = [EditRequest(str(i), "{} is", f"s{i}", "new") for i in range(2000)]
    history.batches = {0: list(range(400))}
    lines = ProgressLines()
    trainer: Any = SimpleNamespace(
        callbacks=[lines, measure], num_training_batches=5, max_steps=4, is_global_zero=True
    )
    for batch in (1, 2, 3):
        lines.on_train_batch_start(trainer, None, None, batch)
        assert log.flushed == log.getvalue()
        if batch != 2:  # a guard rejects it
            history.batches[batch] = list(range(400 * batch, 400 * (batch + 1)))
            value = {"value": 97.46} if batch == 1 else {}  # not finite
            history.measurements.append(Measurement("batch", history.applied, {"efficacy": value}))
    lines.on_train_end(trainer, None)
    assert log.flushed.splitlines() == [
        "batch 2 of 4: 800 of 2,000 edits, efficacy 97.5, about 20 s of editing left",
        "batch 3 of 4: 800 of 2,000 edits, rejected, about 10 s of editing left",
        "batch 4 of 4: 1,200 of 2,000 edits",
        "editing is done: measuring all edits again",
    ]


def test_one_request_is_in_the_singular(monkeypatch) -> None:
    log = logging(monkeypatch)
    measure = MeasureEdits()
    measure.history.requests = [EditRequest("0", "{} is", "s", "new")]
    trainer: Any = SimpleNamespace(callbacks=[measure], is_global_zero=True)
    ProgressLines().on_fit_start(trainer, None)
    ProgressLines().on_test_start(trainer, None)
    first, second = log.flushed.splitlines()
    assert first.startswith("1 request: ")
    assert second == "measuring 1 request"


def test_one_process_speaks(monkeypatch) -> None:
    log = logging(monkeypatch)
    trainer: Any = SimpleNamespace(callbacks=[], is_global_zero=False)
    ProgressLines().on_test_start(trainer, None)
    assert log.getvalue() == ""
