from __future__ import annotations

import errno
import json
import math
import os
import platform
import struct
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import transformers
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from histories import estimate, losses, outcome, small_history
from lightning_blue.data.checks import CONTRADICTION
from lightning_blue.data.requests import Rejected
from lightning_blue.language_model.joining import Joint
from lightning_blue.metrics import ProbabilitySuccess, table
from lightning_blue.metrics.history import LossCurve, Measurement, RunHistory
from lightning_blue.metrics.table import COMPARISON, METRICS, Measure, MetricSpec
from lightning_blue.reporting import files, plots, tables, views, wandb_run
from lightning_blue.reporting.export import caution, model_card
from lightning_blue.reporting.report import report, write_report
from lightning_blue.reporting.text import definitions, inline
from lightning_blue.reporting.wandb_logger import make_logger
from lightning_blue.support import storage
from lightning_blue.support.errors import InputError

# views


def test_mean_losses_carry_a_finished_edit_forward() -> None:
    curve = LossCurve(0, 1, losses([4.0, 2.0, 1.0], [2.0, 1.0, math.nan]))
    total = [3.0, 1.5, 1.0]  # (4+2)/2, (2+1)/2, (1+1)/2
    expected = torch.tensor([[t, t / 2, t / 4, t / 4] for t in total], dtype=torch.float64)
    torch.testing.assert_close(views.mean_losses(curve), expected)


def test_final_losses_belong_to_the_request_in_the_batch() -> None:
    assert views.final_losses(small_history()) == {
        0: {1: (1.0, 3), 3: (1.0, 2)},
        1: {1: (2.0, 1), 3: (0.25, 3)},
        2: {1: (2.0, 3), 3: (1.5, 3)},
    }


def test_batches_end_with_what_was_applied() -> None:
    history = small_history()
    assert [views.batch_of(history, i) for i in range(4)] == [0, 0, 1, None]
    assert len(history.batches) == 2


def test_series_joins_stages_and_keeps_the_newest() -> None:
    history = small_history()
    stages = ["pre", "batch", "cumulative", "post"]
    expected = [(0, 98.0, 0.9), (2, 97.5, 0.0), (3, 97.0, 1.1)]  # no error of the sample is known
    assert views.series(history, stages, "retained_knowledge") == expected
    assert views.series(history, ["batch"], "efficacy") == [(2, 100.0, 0.0), (3, 90.0, 0.0)]
    assert views.series(history, ["batch"], "fluency") == []


def test_numbers_that_are_not_finite_are_left_out_and_their_metric_is_not() -> None:
    broken = {
        "perplexity": estimate(math.inf, tokens=7),
        "retained_knowledge": estimate(1.0, math.nan, count=1),
        "fluency": estimate(math.nan, count=0),
    }
    history = RunHistory(measurements=[Measurement("post", 1, broken)])
    metrics = views.metrics_at(history, "post")
    assert metrics == {
        "perplexity": {"tokens": 7},
        "retained_knowledge": {"value": 1.0, "count": 1},
    }
    assert list(views.finite(metrics)) == ["retained_knowledge"]
    assert [spec.name for spec in views.measured(history)] == ["perplexity", "retained_knowledge"]


@pytest.mark.parametrize(
    ("efficacy", "top1", "expected"),
    [
        (1.0, 0.0, False),
        (0.5, 1.0, True),
        (None, 0.0, True),
        (None, 1.0, False),
        (None, None, False),
    ],
)
def test_failed(efficacy: float | None, top1: float | None, expected: bool) -> None:
    values = {"efficacy": efficacy, "efficacy_top1": top1}
    measured = {name: value for name, value in values.items() if value is not None}
    assert views.failed(replace(outcome("c", 1.0, ""), values=measured)) is expected
    assert not views.failed(None)


# tables


def test_markdown_table() -> None:
    rows = [["plain", "1.0", "a|b"], ["two\nlines", "-12.5 ± 1", "-"]]
    assert tables.markdown_table(rows, ["", "n", "text"]) == (
        "|           |         n | text |\n"
        "| --------- | --------: | ---- |\n"
        "| plain     |       1.0 | a\\|b |\n"
        "| two lines | -12.5 ± 1 | -    |"
    )


def test_markdown_table_refuses_a_short_row() -> None:
    with pytest.raises(ValueError, match="3 cells"):
        tables.markdown_table([["a", "b"]], ["1", "2", "3"])


def test_score_table() -> None:
    assert tables.score_table(small_history()) == (
        "| metric             |     unedited |       edited |\n"
        "| ------------------ | -----------: | -----------: |\n"
        "| efficacy           |    4.5 ± 1.5 |  100.0 ± 0.0 |\n"
        "| specificity        |   93.2 ± 0.6 |   80.0 ± 1.2 |\n"
        "| perplexity         | 12.35 ± 0.04 | 15.00 ± 0.05 |\n"
        "| retained knowledge |   98.0 ± 0.9 |   97.0 ± 1.1 |\n"
        "\n"
        "| metric              |   unedited |     edited |\n"
        "| ------------------- | ---------: | ---------: |\n"
        "| specificity (top-1) | 61.0 ± 2.0 | 50.0 ± 2.0 |\n"
        "\n"
        "Value ± standard error, in percent except perplexity. Lower is better:\nperplexity.\n"
        "Measured on 4 prompts: efficacy; 40 prompts: specificity, specificity (top-1);\n"
        "8,192 tokens: perplexity; 200 prompts: retained knowledge."
    )


def history_of(*names: str, **more: dict[str, float]) -> RunHistory:
    """Return a run that measured these metrics, before and after."""
    metrics = {name: estimate(123456.7, 1234.5, count=9, prompts=12345) for name in names} | more
    return RunHistory(measurements=[Measurement(s, 1, metrics) for s in ("pre", "post")])


def test_the_widest_score_table_fits_a_terminal() -> None:
    text = tables.score_table(history_of(*(spec.name for spec in METRICS)))
    assert max(map(len, text.splitlines())) <= 80
    for spec in METRICS:
        assert f"| {spec.title} " in text


def test_stages_without_a_metric_have_no_column() -> None:
    stages = {"then": {"score": estimate(1.0)}, "never": {}, "now": {"fluency": estimate(2.0)}}
    assert tables.stages_table(stages, METRICS) == (
        "| metric  | then | now |\n"
        "| ------- | ---: | --: |\n"
        "| score   |  1.0 |   - |\n"
        "| fluency |    - | 2.0 |"
    )
    assert tables.stages_table({"never": {}}, METRICS) == ""


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["efficacy"], "Value ± standard error, in percent."),
        (["fluency"], "Value ± standard error: fluency (bits × 100)."),
        (
            ["score", "consistency", "perplexity"],
            "Value ± standard error, in percent except consistency (× 100), perplexity. "
            "Lower is better: perplexity.",
        ),
    ],
)
def test_the_legend_names_only_what_was_measured(names: list[str], expected: str) -> None:
    assert tables.legend({"now": {name: estimate(1.0) for name in names}}) == expected


def test_definitions_name_only_what_was_measured() -> None:
    history = history_of("efficacy", "efficacy_top1")
    assert definitions(views.measured(history), "counterfact") == (
        "- efficacy: the new object is more probable than the true one after the request's own "
        "prompt.\n"
        "- efficacy (top-1): every token of the new object is the most probable one after the "
        "request's own\n  prompt.\n"
        "- Standard errors take the request as the unit."
    )
    history.protocol = "zsre"
    text = report(history, [], None)
    assert "- efficacy: fraction of the new object's tokens" in text
    assert "perplexity" not in text
    assert "paraphrase" not in text
    history = history_of("perplexity")
    assert "of ordinary text the window" in definitions(views.measured(history), "zsre")
    assert definitions([], "counterfact") == ""


@pytest.mark.parametrize("value", [{}, {"value": math.inf}, {"value": math.nan}])
def test_a_perplexity_that_is_not_finite_is_shown_as_such(
    tmp_path: Path, value: dict[str, float]
) -> None:
    """As it comes from the metric (no value), and as other callbacks may give it."""
    history = with_perplexity(13.0, 14.0, 15.0)
    exploded = {**value, "standard_error": math.nan, "count": 16, "tokens": 8192}
    for measurement in history.measurements[1:]:  # the unedited model's is finite
        measurement.metrics["perplexity"] = exploded
    text = write_report(tmp_path, history).read_text()
    rows = [line for line in text.splitlines() if line.startswith("| perplexity")]
    assert [[cell.strip() for cell in row.split("|")[2:4]] for row in rows] == [
        ["12.35 ± 0.04", "not finite"],  # all requests
        ["not finite", "not finite"],  # the first batch
    ]
    assert "Not finite: infinite or undefined." in " ".join(text.split())
    assert "perplexity went from 12.35 ± 0.04 to not finite" in caution(history)
    numbers = files.summary(history)
    assert "post/perplexity" not in numbers
    assert numbers["post/perplexity/tokens"] == 8192
    assert len(plots.before_after_figure(history).axes) == 1  # no bar of it
    assert len(plots.metrics_figure(history).axes) == 2  # no panel of it
    history.measurements[0].metrics["perplexity"] = exploded
    assert write_report(tmp_path, history).exists()


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        (
            "counterfact",
            "compare the probabilities of two objects (protocol counterfact): 3 of 4 requests name "
            "their current object; the other one counts in the top-1 metrics alone",
        ),
        (
            "zsre",
            "count right tokens (protocol zsre) of all requests: 3 of 4 requests name their "
            "current object",
        ),
    ],
)
def test_the_report_says_by_which_protocol(protocol: str, expected: str) -> None:
    history = small_history()
    history.protocol = protocol
    history.requests = [replace(r, target_true="x") for r in history.requests]
    history.requests[1] = replace(history.requests[1], target_true=None)
    assert expected in " ".join(report(history, [], None).split())
    assert files.summary(history)["protocol/known_objects"] == 3


def test_the_report_says_how_prompts_and_objects_were_joined(tmp_path: Path) -> None:
    history = small_history()
    history.joints = [Joint(" ", "words")] * 3 + [Joint("", "script without spaces")]
    text = report(history, [], None)
    _, _, section = text.partition("## Between prompt and object\n")
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in section.splitlines()[3:5]]
    assert rows == [["a space", "words", "3"], ["nothing", "script without spaces", "1"]]
    files.write_edits(tmp_path / "edits.jsonl", history)
    lines = [json.loads(line) for line in (tmp_path / "edits.jsonl").read_text().splitlines()]
    assert [(line["target_prefix"], line["joined_by"]) for line in lines] == [
        *[(" ", "words")] * 3,
        ("", "script without spaces"),
    ]


def test_score_table_of_a_run_that_measured_nothing() -> None:
    assert tables.score_table(RunHistory()) == "Nothing was measured."


@pytest.mark.parametrize(
    ("value", "error", "unit", "expected"),
    [
        (98.54, 0.62, table.PERCENT, "98.5 ± 0.6"),
        (98.54, 12.3, table.PERCENT, "98.5 ± 12.3"),
        (23.4567, 0.0312, "", "23.46 ± 0.03"),
        (1.0, 1e-9, "", "1.000 ± 0.000"),
        (1234567.0, 45678.0, "", "1.23e+06 ± 5e+04"),
        (98.54, None, table.PERCENT, "98.5"),
        (0.2634, None, table.PERCENT, "0.3"),  # of a hundred
        (0.2634, None, "", "0.263"),  # of one
        (-0.01234, None, "", "-0.0123"),
        (0.0, None, "", "0.0"),
        (1.0, None, "", "1.00"),
        (0.25, 0.0, "", "0.250 ± 0.000"),
        (98.54, None, "", "98.5"),
        (1234.5, None, "", "1234.5"),
    ],
)
def test_value_and_error(value: float, error: float | None, unit: str, expected: str) -> None:
    assert tables.value_and_error(value, error, unit) == expected


def test_a_new_row_is_shown_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measure = Measure(COMPARISON, ProbabilitySuccess, "what the test says")
    spec = MetricSpec(
        "reach",
        "reach of edits",
        measure,
        unit="miles",
        direction="lower",
        panel="side effects",
        per_request=True,
        side_effect=True,
    )
    monkeypatch.setattr(table, "METRICS", (*METRICS, spec))
    history = history_of("efficacy", reach=estimate(20.0, 2.0, count=4, prompts=4))
    for edits in (1, 2):
        history.measurements.insert(edits, Measurement("batch", edits, {"reach": estimate(30.0)}))
    history.requests = small_history().requests[:1]
    history.after = {0: replace(outcome("c0", 1.0, ""), values={"reach": 7.0})}
    text = report(history, [], None)
    plain = " ".join(text.split())  # on one line, whatever the padding of cells
    assert "| reach of edits | 20.0 ± 2.0 | 20.0 ± 2.0 |" in plain
    assert "in percent except reach of edits (miles). Lower is better: reach of edits." in plain
    assert "4 prompts: reach of edits" in plain
    assert "- reach of edits: what the test says." in text
    assert "reach of edits went from 20.0 ± 2.0 to 20.0 ± 2.0" in model_card(history)
    bars, over_edits = plots.before_after_figure(history), plots.metrics_figure(history)
    assert bars.axes[-1].get_ylabel() == "reach of edits (miles)\nlower is better"
    assert over_edits.axes[-1].get_title() == "reach of edits (miles)\nlower is better"
    files.write_edits(tmp_path / "edits.jsonl", history)
    (line,) = read_lines(tmp_path / "edits.jsonl")
    assert (line["after"]["reach"], line["after"]["efficacy"]) == (7.0, None)
    assert files.summary(history)["post/reach"] == 20.0


def test_each_metric_has_a_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [replace(METRICS[0], name=f"m{i}", title=f"metric {i}") for i in range(8)]
    monkeypatch.setattr(table, "METRICS", tuple(rows))
    metrics = {row.name: estimate(float(i)) for i, row in enumerate(rows)}
    history = RunHistory(measurements=[Measurement("cumulative", n, metrics) for n in (1, 2)])
    axes = plots.metrics_figure(history).axes
    assert [axis_lines(axis) for axis in axes] == [[[float(i), float(i)]] for i in range(8)]
    assert [axis.get_title().splitlines()[0] for axis in axes] == [f"{r.title} (%)" for r in rows]


# files


def read_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_edits_are_read_back_whatever_their_texts_hold(tmp_path: Path) -> None:
    """Python's splitlines ends a line at characters that JSON may hold as they are."""
    path, history = tmp_path / "edits.jsonl", small_history()
    target = "Paris\u2028\u2029\x85\x0b\x1c\n"
    history.requests[0] = replace(history.requests[0], target_new=target)
    files.write_edits(path, history)
    edits = files.read_edits(tmp_path)
    assert [edit["case_id"] for edit in edits] == ["c0", "c1", "c2", "c3"]
    assert edits[0]["target_new"] == target
    good = path.read_text()
    for damage in ('{"case_id": "c0"}', "[]", good[:-20]):
        path.write_text(damage)
        with pytest.raises(InputError, match="what the run edited cannot be read"):
            files.read_edits(tmp_path)


def test_write_edits(tmp_path: Path) -> None:
    history = small_history()
    files.write_edits(tmp_path / "edits.jsonl", history)
    lines = read_lines(tmp_path / "edits.jsonl")
    assert [line["case_id"] for line in lines] == ["c0", "c1", "c2", "c3"]
    third = {
        "case_id": "c2",
        **table.per_request({}),
        "efficacy": 0.0,
        "generalization": None,  # no paraphrases
        "specificity": 0.5,
        "efficacy_top1": 0.0,
        "generalization_top1": None,
        "specificity_top1": 0.25,
        "nll_new": math.log(2),
        "nll_true": math.log(4),
        "probability_new": 0.5,
        "probability_true": 0.25,
        "correct": [False, False],
    }
    assert lines[2] == {
        "case_id": "c2",
        "subject": "Tower 2",
        "prompt": "Tower 2 lies in",
        "target_prefix": None,  # nothing was asked
        "joined_by": None,
        "target_new": "Bern",
        "target_true": "Paris",
        "batch": 1,
        "before": {**third, "continuation": " Paris,\nthe city"},
        "after": {**third, "continuation": " Bern"},
        "target_optimization": {"1": {"loss": 2.0, "steps": 3}, "3": {"loss": 1.5, "steps": 3}},
    }
    assert lines[3]["batch"] is None
    assert lines[3]["target_optimization"] == {}


def test_write_edits_of_a_run_that_stopped_early(tmp_path: Path) -> None:
    history = small_history()
    history.after = {}
    history.before[0] = replace(history.before[0], nll_new=math.inf)
    files.write_edits(tmp_path / "edits.jsonl", history)
    lines = read_lines(tmp_path / "edits.jsonl")
    assert [line["after"] for line in lines] == [None] * 4
    assert lines[0]["before"]["nll_new"] is None  # JSON has no infinity


def test_write_rejected(tmp_path: Path) -> None:
    history = small_history()
    files.write_rejected(tmp_path / "rejected.jsonl", history)
    assert read_lines(tmp_path / "rejected.jsonl") == [asdict(history.rejected[0])]
    history.rejected = []
    files.write_rejected(tmp_path / "none.jsonl", history)
    assert not (tmp_path / "none.jsonl").exists()


def test_write_summary(tmp_path: Path) -> None:
    history = small_history()
    history.settings["target"] = {"steps": 25}
    history.measurements[-1].metrics["fluency"] = estimate(math.nan, math.nan, count=0)
    files.write_summary(tmp_path / "summary.json", history)
    written = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert written["pre/efficacy"] == 4.5
    assert written["pre/efficacy/standard_error"] == 1.52
    assert written["pre/efficacy/prompts"] == 4
    assert written["post/perplexity/tokens"] == 8192
    assert written["first_batch/efficacy"] == 50.0
    assert written["edits/applied"] == 3
    assert written["edits/requested"] == 4
    assert written["edits/rejected"] == 1
    assert written["seconds/edit"] == 2.0  # of one of the three
    assert (written["seconds/editing"], written["seconds/total"]) == (6.0, 10.5)
    assert written["settings/layers"] == [1, 3]
    assert written["settings/target/steps"] == 25
    assert written["versions/torch"] == torch.__version__
    assert written["versions/transformers"] == transformers.__version__
    assert written["versions/python"] == platform.python_version()
    assert not any(key.startswith(("batch/", "cumulative/")) or "fluency" in key for key in written)


def test_the_earlier_of_two_that_contradict_in_a_batch_counts_as_superseded():
    history = small_history()
    before = files.summary(history)["edits/superseded"]
    history.rejected.append(Rejected("f.csv:2", "0", CONTRADICTION, "another object", "keep one"))
    assert files.summary(history)["edits/superseded"] == before + 1


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    for text in ("old", "Zoë\n"):
        storage.write_atomic(path, text)
    assert path.read_text(encoding="utf-8") == "Zoë\n"
    assert os.listdir(path.parent) == ["file.txt"]  # noqa: PTH208


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    path.write_text("before")

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError) as caught:
        files.write_summary(path, small_history())
    assert "summary.json could not be written: No space left on device" in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_make_folder_where_a_file_stands(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(InputError, match="could not be written"):
        storage.make_folder(tmp_path / "runs" / "edit")


# plots and report


def axis_lines(axis: object) -> list[list[float]]:
    return [list(line.get_ydata()) for line in axis.get_lines()]


def band(axis: object, place: int) -> list[tuple[float, float]]:
    """Lower and upper end of a filled band, by its corners from left to right."""
    corners = axis.collections[place].get_paths()[0].vertices
    ends: dict[float, list[float]] = {}
    for x, y in corners:
        ends.setdefault(float(x), []).append(float(y))
    return [(min(ys), max(ys)) for _, ys in sorted(ends.items())]


def with_perplexity(*values: float) -> RunHistory:
    """The small run with a perplexity after each batch and at the end."""
    history = small_history()
    cumulative = history.of("cumulative")
    for taken, value in zip([*cumulative, *history.of("post")], values, strict=True):
        taken.metrics["perplexity"] = estimate(value, 0.5, tokens=8192)
    return history


def test_metrics_figure_draws_what_was_measured() -> None:
    figure = plots.metrics_figure(with_perplexity(13.0, 14.0, 15.0))
    efficacy, perplexity, retained = figure.axes
    assert axis_lines(efficacy) == [[100.0, 90.0], [100.0, 95.0]]  # a batch, all so far
    assert band(efficacy, 1) == [(100.0, 100.0), (90.0, 100.0)]
    assert axis_lines(perplexity) == [[12.345, 13.0, 15.0], [12.345, 12.345]]
    expected = [(12.345 - 0.0412, 12.345 + 0.0412), (12.5, 13.5), (14.5, 15.5)]
    assert band(perplexity, 0) == [pytest.approx(pair) for pair in expected]
    assert axis_lines(retained) == [[98.0, 97.5, 97.0], [98.0, 98.0]]
    assert [axis.get_title() for axis in figure.axes] == [
        "efficacy (%)\nhigher is better",
        "perplexity\nlower is better",
        "retained knowledge (%)\nhigher is better",
    ]
    assert {axis.get_xlabel() for axis in figure.axes} == {"edits applied"}


def test_axes_are_fitted_to_the_data() -> None:
    efficacy, retained = plots.metrics_figure(small_history()).axes
    low, high = efficacy.get_ylim()
    assert 88 < low < 90 < 100 < high < 102  # not down to the unedited 4.5
    assert [text.get_text() for text in efficacy.texts] == ["unedited: 4.5 ↓"]
    low, high = retained.get_ylim()
    assert low < 97 - 1.1 < 98.9 < high < 102
    assert not retained.texts  # the unedited 98 is a line


def test_one_batch_has_no_course() -> None:
    history = small_history()
    history.measurements = [taken for taken in history.measurements if taken.edits in (0, 2)]
    assert history.of("batch")
    assert history.of("cumulative")
    assert plots.metrics_figure(history) is None
    assert "metrics" not in plots.plots(history)


def test_losses_figure_draws_median_and_band_of_all_edits() -> None:
    figure = plots.losses_figure(small_history())
    assert [axis.get_title() for axis in figure.axes] == ["target layer 1", "target layer 3"]
    total = np.array([[4.0, 2.0, 1.0], [2.0, 2.0, 2.0], [8.0, 4.0, 2.0]])  # the second was done
    low, median, high = np.quantile(total, (0.1, 0.5, 0.9), axis=0)
    first = figure.axes[0]
    np.testing.assert_allclose(axis_lines(first), [median, median / 2])
    np.testing.assert_allclose(band(first, 0), np.stack([low, high], axis=1))
    (legend,) = figure.legends
    handles = {
        text.get_text(): handle
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }
    for line, name in zip(first.get_lines(), ("total", "nll of the new object"), strict=True):
        assert handles[f"{name}, median"].get_color() == line.get_color()


def test_loss_curves_of_unlike_lengths() -> None:
    curves = [LossCurve(0, 1, losses([4.0, 2.0, 1.0])), LossCurve(1, 1, losses([3.0]))]
    (median,) = views.loss_quantiles(curves, (0.5,))
    assert median[:, 0].tolist() == [3.5, 2.5, 2.0]


def test_before_after_figure_draws_bars_with_errors() -> None:
    figure = plots.before_after_figure(small_history())
    percent, perplexity = figure.axes
    heights = [bar.get_height() for bar in percent.patches]
    assert heights == [4.5, 93.21, 98.0, 100.0, 80.0, 97.0]
    assert [label.get_text() for label in percent.get_xticklabels()] == [
        "efficacy",
        "specificity",
        "retained\nknowledge",
    ]
    assert percent.get_ylabel() == "percent\nhigher is better"
    assert perplexity.get_ylabel() == "perplexity\nlower is better"
    assert [bar.get_height() for bar in perplexity.patches] == [12.345, 15.0]
    spans = [bar.errorbar[2][0].get_segments()[0][:, 1] for bar in perplexity.containers[1::2]]
    assert [float(high - low) for low, high in spans] == pytest.approx([0.0824, 0.1])


def test_perplexity_that_explodes_gets_a_logarithmic_axis() -> None:
    history = with_perplexity(14.0, 20.0, 1e6)
    assert plots.metrics_figure(history).axes[1].get_yscale() == "log"
    assert plots.before_after_figure(history).axes[-1].get_yscale() == "log"
    history = with_perplexity(14.0, 20.0, 25.0)
    assert plots.metrics_figure(history).axes[1].get_yscale() == "linear"


def test_report_shows_everything_and_its_pictures_exist(tmp_path: Path) -> None:
    history = small_history()
    backend = matplotlib.rcParams._get("backend")
    path = write_report(tmp_path, history)
    text = path.read_text()
    assert path == tmp_path / "report.md"
    assert text.splitlines()[2] == (
        "3 of 4 requested facts of facts.jsonl were edited in almanac, in 2 batches of up to 2, "
        "with the plan boundary; 1 more could not be used."
    )
    assert tables.score_table(history) in text
    assert "1 missed their own prompt" in text
    failed = text.split("missed their own prompt")[1]
    assert "| Tower 2 lies in | Bern       | Paris, the city | Bern  | " in failed
    assert "Tower 3" not in text  # never applied
    assert "| facts.jsonl:5 | c9   | no subject | add one       |" in text
    assert "2 seconds per edit" in text
    assert 'from_pretrained("model")' in text
    for name in ("metrics", "losses", "before_after"):
        assert f"](plots/{name}.png)" in text
        png = (tmp_path / "plots" / f"{name}.png").read_bytes()
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", png[16:24])) > 400
    assert matplotlib.rcParams._get("backend") == backend


def test_report_of_an_empty_run(tmp_path: Path) -> None:
    text = write_report(tmp_path, RunHistory(), model_folder=None).read_text()
    assert "0 of 0 requested facts were edited." in text
    assert "Nothing was measured." in text
    assert "plots/" not in text
    assert "from_pretrained" not in text
    assert not (tmp_path / "plots").exists()


def test_inline_leaves_no_markup() -> None:
    assert inline("a\n <b>*c*_d_`e`[f](g) # $") == r"a \<b\>\*c\*\_d\_\`e\`\[f\](g) \# \$"
    assert inline("word " * 9, limit=10) == "word word…"
    assert inline("&lt; &#60; AT&T R&D;") == r"\&lt; \&\#60; AT&T R\&D;"


# W&B


@pytest.fixture
def logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbLogger]:
    monkeypatch.setenv("WANDB_MODE", "offline")  # restored afterwards; the logger changes it
    made = make_logger(tmp_path / "run", "test", "offline")
    yield made
    wandb.finish()


def test_wandb_run(logger: WandbLogger, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    history = small_history()
    loggers = [CSVLogger(tmp_path), logger]
    wandb_run.define_axes(loggers)
    logger.log_metrics({"batch/efficacy": 97.0, "edits/applied": 2}, step=2)
    for curve in history.loss_curves:
        wandb_run.log_loss_curve(loggers, curve)
    wandb_run.log_edits_table(loggers, history)
    wandb_run.log_summary(loggers, history)

    run = logger.experiment
    assert run.summary["batch/efficacy"] == 97.0
    assert run.summary["inner/layer_1/total"] == 2.0  # the last step of batch 1
    assert run.summary["inner/layer_3/nll"] == 0.75
    assert run.summary["inner/step"] == 5  # 2 batches of 3 steps, from 0
    expected = json.loads(json.dumps(files.summary(history)))
    assert {key: run.summary[key] for key in expected} == expected

    folder = Path(run.dir).parent
    wandb_run.finish(loggers)
    assert folder.is_relative_to(tmp_path / "run")
    (table,) = folder.glob("files/media/table/edits*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == list(wandb_run.COLUMNS)
    assert content["data"][2] == [
        *["c2", 1, "Tower 2", "Tower 2 lies in", "Bern", "Paris"],
        *[" Paris,\nthe city", " Bern", 0.5, 0.5, 0.25, 0.25],
    ]
    assert capfd.readouterr() == ("", "")


class RecordedRun:
    """Stands for a run, and keeps what it is told."""

    def __init__(self) -> None:
        self.defined: dict[str, dict[str, object]] = {}
        self.logged: list[dict[str, float]] = []

    def define_metric(self, name: str, **settings: object) -> None:
        self.defined[name] = settings

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)


def test_inner_losses_have_an_axis_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RecordedRun()
    monkeypatch.setattr(WandbLogger, "experiment", run)
    loggers = [WandbLogger(offline=True)]
    wandb_run.define_axes(loggers)
    wandb_run.log_loss_curve(loggers, small_history().loss_curves[2])
    assert run.defined["*"] == {
        "step_metric": "edits/applied",
        "step_sync": True,
        "overwrite": True,
    }
    names = [f"inner/layer_1/{term}" for term in ("total", "nll", "kl", "weight_decay")]
    assert all(run.defined[name] == {"step_metric": "inner/step"} for name in names)
    assert [row["inner/step"] for row in run.logged] == [3, 4, 5]  # after batch 0's three
    assert [row["inner/layer_1/total"] for row in run.logged] == [8.0, 4.0, 2.0]


def test_other_loggers_are_passed_over(tmp_path: Path) -> None:
    history = small_history()
    loggers = [CSVLogger(tmp_path / "csv")]
    wandb_run.define_axes(loggers)
    wandb_run.log_loss_curve(loggers, history.loss_curves[0])
    wandb_run.log_edits_table(loggers, history)
    wandb_run.log_summary(loggers, history)
    assert not (tmp_path / "csv").exists()
