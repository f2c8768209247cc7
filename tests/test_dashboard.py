"""The W&B dashboard shows what runs log, all of it, and is checked without a network."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from conftest import ROOT
from histories import small_history
from lightning_blue.__main__ import main
from lightning_blue.metrics import MeanOverRequests, table
from lightning_blue.metrics.history import LossCurve, RunHistory
from lightning_blue.metrics.matching import GeneratedAnswer
from lightning_blue.metrics.table import METRICS, Measure, MetricSpec
from lightning_blue.reporting import dashboard, wandb_logger, wandb_run, workspace
from lightning_blue.reporting.dashboard import Panel, described, sections
from lightning_blue.support.errors import InputError
from test_conf import flags, small_run  # noqa: F401  (a fixture)
from test_wandb import KEY, server  # noqa: F401  (a fixture)


def panels() -> Iterator[Panel]:
    return (panel for section in sections() for panel in section.panels)


def specified() -> dict[str, list[dict[str, Any]]]:
    """Panels by section, as W&B reads them."""
    spec = json.loads(workspace.as_json("edits", "me", "x"))
    parts = spec["section"]["panelBankConfig"]["sections"]
    return {part["name"]: part["panels"] for part in parts}


def test_each_metric_is_shown_at_the_end_and_as_the_run_goes_on():
    shown = {key for panel in panels() for key in panel.keys}
    for spec in METRICS:
        assert f"post/{spec.name}" in shown
    for name in ("efficacy", "generalization", "specificity", "score"):
        assert {f"batch/{name}", f"cumulative/{name}"} <= shown


@pytest.mark.parametrize(
    ("group", "reads", "keys"),
    [
        ("scores", table.TEACHER_FORCED, {"batch/new", "cumulative/new", "pre/new", "post/new"}),
        ("retention", "a matrix", {"post/new"}),
        ("scores", "another way", {"pre/new", "post/new"}),
    ],
)
def test_a_metric_that_is_added_to_the_table_is_shown(monkeypatch, group, reads, keys):
    before = {key for panel in panels() for key in panel.keys}
    row = MetricSpec("new", "new", Measure(reads, MeanOverRequests, "new"), group=group)
    monkeypatch.setattr(dashboard, "METRICS", (*METRICS, row))
    assert {key for panel in panels() for key in panel.keys} - before == keys


def test_the_specification_has_every_section_and_panel_with_its_keys():
    spec = specified()
    assert list(spec) == [section.title for section in sections()]
    for section in sections():
        for panel, sent in zip(section.panels, spec[section.title], strict=True):
            config = sent["config"]
            if panel.kind == "table":
                assert json.dumps(panel.keys[0]) in json.dumps(config)
                continue
            assert config["chartTitle"] == panel.title
            assert tuple(config["metrics"]) == panel.keys
            assert config.get("xAxis") == (panel.axis if panel.kind == "lines" else None)
            assert config.get("metricRegex", "") == (f"^{panel.pattern}$" if panel.pattern else "")


def test_runs_are_grouped_by_keys_of_their_configuration():
    spec = json.loads(workspace.as_json("edits", "me", "x"))
    (runs,) = spec["section"]["runSets"]
    assert [key["section"] for key in runs["grouping"]] == ["config", "config"]
    names = [key["name"].removesuffix(".value") for key in runs["grouping"]]
    assert names == ["method", "update/plan"]  # test_wandb: what a run's configuration holds


class Told:
    """Stands for a W&B run, and keeps the keys that it is told."""

    def __init__(self) -> None:
        self.keys: set[str] = set()

    def define_metric(self, *_: object, **__: object) -> None: ...

    def log(self, values: dict[str, object]) -> None:
        self.keys |= set(values)


@pytest.fixture(scope="module")
def logged(small_run, tmp_path_factory) -> set[str]:  # noqa: F811
    """The keys that a run of two batches gives its loggers, and those for W&B alone."""
    root = tmp_path_factory.mktemp("runs")
    base = f"--config={ROOT / 'conf' / 'llama3_memit_blue.yaml'}"
    args = [*flags(small_run, "llama3"), "--data.batch_size=1", f"--run.root={root}"]
    assert main(["fit", base, *args, "--run.name=logged"]) == 0
    keys = set((root / "logged" / "metrics.csv").read_text().splitlines()[0].split(","))
    keys |= set(json.loads((root / "logged" / "summary.json").read_text()))
    told = Told()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb_logger.RunWandbLogger, "experiment", told)
        loggers = [wandb_logger.make_logger(root / "told", "test", "offline")]
        wandb_run.log_loss_curve(loggers, LossCurve(0, 3, torch.ones(1, 2, 4)))
        wandb_run.log_edits_table(loggers, RunHistory())
        said = GeneratedAnswer(0, table.OWN_PROMPT, "", "Rome", (), "", "", (), "end")
        asked = RunHistory(requests=small_history().requests, answers_after=[said])
        wandb_run.log_answers_table(loggers, asked)
    return keys | told.keys


def test_each_value_that_a_run_logs_over_edits_is_shown(logged):
    first = re.compile(r"(batch|cumulative|update|guard|inner)/")
    apart = re.compile(r".*/(standard_error|count|prompts|tokens|null_space)|inner/step")
    values = {key for key in logged if first.match(key) and not apart.fullmatch(key)}
    assert len(values) > 12
    assert {key for key in values if not any(panel.shows(key) for panel in panels())} == set()


def test_each_panel_shows_something_that_runs_log(logged):
    """But metrics that this run, of two facts and no control facts, does not measure."""
    measured = {key.split("/")[1] for key in logged if "/" in key}
    unmeasured = {spec.name for spec in METRICS} - measured | {"retained_drop"}
    logged = logged | {f"cumulative/{table.ABILITY}boolq/acc"}
    for panel in panels():
        found = any(panel.shows(key) for key in logged)
        assert found or {key.split("/")[1] for key in panel.keys} <= unmeasured, panel.title


def test_dry_run_says_what_it_would_do_and_sends_nothing(server, tmp_path, capsys):  # noqa: F811
    assert main(["dashboard", "--dry-run", "--project", "edits"]) == 0
    said = capsys.readouterr().out
    assert "your entity/edits" in said
    for section in sections():
        assert section.title in said
    file = tmp_path / "spec.json"
    assert main(["dashboard", "--dry-run", "--spec", str(file)]) == 0
    assert [
        part["name"]
        for part in json.loads(file.read_text())["section"]["panelBankConfig"]["sections"]
    ] == list(specified())


def test_without_a_key_nothing_is_made_and_one_message_says_so(server, capsys):  # noqa: F811
    assert main(["dashboard"]) == 2
    err = capsys.readouterr().err
    assert "No API key" in err
    assert "wandb login" in err
    assert "--dry-run" in err


def test_a_server_that_does_not_take_it_is_one_message(server, capsys):  # noqa: F811
    from wandb_workspaces.workspaces import Workspace

    def lost(self: Workspace) -> None:
        raise ConnectionError("no route to host\nand more")

    server.setattr(Workspace, "save", lost)  # by itself it tries for half a minute
    server.setenv("WANDB_API_KEY", KEY)
    assert main(["dashboard", "--entity", "me", "--project", "edits"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: W&B did not take the workspace: no route to host\n")
    assert "project edits of me" in err
    assert "hint:  check the network" in err


def test_the_address_of_the_workspace_is_told(server, capsys):  # noqa: F811
    from wandb_workspaces.workspaces import Workspace

    sent = []

    def saved(self: Workspace) -> Workspace:
        sent.append(self)
        return self

    server.setattr(Workspace, "save", saved)
    server.setattr(Workspace, "url", "https://wandb.example/team/edits?nw=abc")
    server.setenv("WANDB_API_KEY", KEY)
    server.setenv("WANDB_ENTITY", "team")
    assert main(["dashboard", "--project", "edits", "--name", "mine"]) == 0
    said = capsys.readouterr().out
    assert said == "dashboard: https://wandb.example/team/edits?nw=abc\n"
    assert [(w.entity, w.project, w.name) for w in sent] == [("team", "edits", "mine")]
    assert [section.name for section in sent[0].sections] == [s.title for s in sections()]


def test_without_the_package_the_message_is_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(InputError, match=r"pip install 'lightning-blue\[dashboard\]'"):
        workspace.as_json("edits", "me", "x")
    assert described()  # needs no package
