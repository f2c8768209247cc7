"""The retention matrix: whose sample, at what cost, and that other measurements agree with it."""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from lightning import Callback, Trainer

from blue_callbacks import EditRecord, EditRejected
from histories import outcome, small_history
from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.metrics import table
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.metrics.evaluation import evaluate
from lightning_blue.metrics.history import RunHistory
from lightning_blue.metrics.retention import Retention, RetentionSettings, choose_sample
from lightning_blue.metrics.retention_matrix import retention_matrix, three_numbers
from lightning_blue.reporting.report import write_report
from lightning_blue.reporting.retention import matrices, retention_figure, write_retention
from lightning_blue.support.errors import InputError
from test_lightning import corpus, data_of, facts, module, trainer_of  # noqa: F401  (fixtures)
from test_resume import Crash, run

PROMPTS = 4  # of each request below


def requests(n: int) -> list[EditRequest]:
    """Requests on four prompts each."""
    return [
        EditRequest(
            f"c{i}",
            "{} lies in",
            f"Tower {i}",
            "Rome",
            paraphrases=(f"You find Tower {i} in",),
            neighborhood=(Probe("The Louvre lies in", "Paris"), Probe("Big Ben is in", "London")),
        )
        for i in range(n)
    ]


def spent(sample: dict[int, list[int]]) -> int:
    """Count, batch after batch, the prompts that are scored for the matrix alone."""
    total = 0
    for now in sample:
        for earlier, places in sample.items():
            total += PROMPTS * len(places) if earlier < now else 0
    return total


@pytest.mark.parametrize(
    ("budget", "batches", "each"),
    [
        (4, [0, 9], 1),  # one request of the first batch, after the last
        (11, [0, 9], 2),
        (12, [0, 4, 9], 1),  # 2 * 4 of the first, 4 of the middle one
        (45 * 4 - 1, [0, 1, 2, 3, 5, 6, 7, 9], None),
        (45 * 4, list(range(10)), 1),  # 9 + 8 + ... + 1 samples
        (45 * 4 * 3, list(range(10)), 3),
        (10**6, list(range(10)), 5),  # all there are
    ],
)
def test_the_budget_holds_and_is_used(budget, batches, each):
    sample = choose_sample(requests(50), 5, budget, seed=0)
    if each is not None:
        assert list(sample) == batches
        assert {len(places) for places in sample.values()} == {each}
    assert spent(sample) <= budget
    assert min(sample) == 0
    assert max(sample) == 9
    for batch, places in sample.items():
        assert all(place // 5 == batch for place in places)
        assert places == sorted(set(places))


@pytest.mark.parametrize("budget", [40, 100, 200, 400, 800, 1600, 3200])
def test_the_budget_holds_where_batches_have_prompts_of_different_number(budget):
    """Batches 3 to 6 of ten have ten times as many prompts as the others."""
    each = [
        replace(request, neighborhood=request.neighborhood * (20 if 15 <= place < 35 else 1))
        for place, request in enumerate(requests(50))
    ]
    sample = choose_sample(each, 5, budget, seed=0)

    def cost(followed: dict[int, list[int]]) -> int:
        return sum(
            2 + len(each[place].neighborhood)
            for now in followed
            for earlier, places in followed.items()
            for place in places
            if earlier < now
        )

    assert 0 < cost(sample) <= budget
    more = len(sample)  # steps between one batch more, at equal distances
    if more < 10:
        assert cost({b: [5 * b] for b in (round(9 * i / more) for i in range(more + 1))}) > budget


def test_the_sample_is_a_draw_that_the_seed_decides():
    first, again, other = (choose_sample(requests(50), 5, 45 * 4, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_larger_budget_adds_requests_and_takes_none_away():
    small, large = (choose_sample(requests(50), 5, n * 45 * 4, seed=0) for n in (1, 3))
    assert all(set(small[batch]) < set(large[batch]) for batch in small)


def test_no_budget_follows_nothing_and_one_batch_costs_nothing():
    assert choose_sample(requests(50), 5, 0, seed=0) == {}
    assert choose_sample(requests(5), 5, 1, seed=0) == {0: [0, 1, 2, 3, 4]}


def test_too_small_a_budget_is_refused_with_one_that_is_enough():
    with pytest.raises(InputError, match="give at least 4, or 0") as caught:
        choose_sample(requests(50), 5, 3, seed=0)
    assert "measure.retention.prompts" in str(caught.value)
    with pytest.raises(InputError, match=r"measure\.retention\.prompts"):
        RetentionSettings(prompts=-1)


def test_what_a_later_request_replaces_is_not_followed():
    """Tower 0 is edited again in the last batch: that the first edit is gone is no forgetting."""
    twice = [*requests(6), replace(requests(1)[0], target_new="Oslo")]
    sample = choose_sample(twice, 2, 10**6, seed=0)
    assert sample == {0: [1], 1: [2, 3], 2: [4, 5], 3: [6]}
    replaced = [*requests(2), *(replace(each, target_new="Oslo") for each in requests(2))]
    assert choose_sample(replaced, 2, 10**6, seed=0) == {1: [2, 3]}


# efficacy of two requests each in three batches: unedited, after each batch, at the end
VALUES: dict[int, list[list[float | None]]] = {
    0: [[0, 0], [1, 1], [1, 0], [0.5, 0], [0.5, 0.25]],
    1: [[1, 0], [None, None], [1, 1], [1, 1], [1, 0]],
    2: [[0, 0], [None, None], [None, None], [0, 1], [1, 1]],
}


def followed() -> RunHistory:
    """A run that has measured `VALUES`."""
    history = small_history()
    history.requests = requests(6)
    history.batches = {0: [0, 1], 1: [2, 3], 2: [4, 5]}
    history.retention = Retention({b: [2 * b, 2 * b + 1] for b in VALUES})
    flat = {2 * b + i: [pair[i] for pair in pairs] for b, pairs in VALUES.items() for i in (0, 1)}
    history.before = [outcome(f"c{i}", float(flat[i][0] or 0), "") for i in range(6)]
    history.after = {i: outcome(f"c{i}", float(flat[i][4] or 0), "") for i in range(6)}
    for batch in VALUES:
        column = {i: row[batch + 1] for i, row in flat.items()}
        values = {i: {"efficacy": v} for i, v in column.items() if v is not None}
        history.retention.take(batch, values)
    return history


def test_the_matrix_by_hand():
    matrix = retention_matrix(followed(), "efficacy")
    assert matrix.batches == [0, 1, 2]
    assert matrix.columns == ["unedited", 0, 1, 2, "end"]
    nan = math.nan
    expected = [[0, 100, 50, 25, 37.5], [50, nan, 100, 100, 50], [0, nan, nan, 50, 100]]
    assert matrix.scores == [pytest.approx(row, nan_ok=True) for row in expected]
    assert matrix.immediate == [100, 100, 50]
    assert matrix.final == [37.5, 50, 100]


def test_numbers_that_are_no_percent_keep_their_unit():
    history = followed()
    for column in history.retention.after.values():
        for place in column:
            column[place] = {"fluency": 600.0}
    assert retention_matrix(history, "fluency").immediate == [600, 600, 600]


def test_only_earlier_batches_are_scored_again_and_only_after_followed_ones():
    retention = Retention({0: [1], 2: [4, 5], 3: [6]})
    assert [retention.earlier(batch) for batch in range(4)] == [[], [], [1], [1, 4, 5]]


def test_the_three_numbers_by_hand():
    found = three_numbers(retention_matrix(followed(), "efficacy"))
    final, lost, first = [37.5, 50, 100], [62.5, 50], [50, 25]
    for name, values in {
        "retention_mean": final,
        "forgetting": lost,  # not of the last batch, after which there is none
        "retention_first_batch": first,
    }.items():
        assert found[name]["value"] == pytest.approx(fmean(values))
        assert found[name]["standard_error"] == pytest.approx(stdev(values) / len(values) ** 0.5)
        assert found[name]["count"] == len(values)
    assert found["retention_mean"]["batches"] == 3
    assert "prompts" not in found["retention_mean"]


def test_a_batch_that_was_never_applied_has_no_row():
    history = followed()
    del history.retention.after[1]  # rejected: nothing was measured after it, or of it
    for column in history.retention.after.values():
        for place in (2, 3):
            column.pop(place, None)
    matrix = retention_matrix(history, "efficacy")
    assert matrix.batches == [0, 2]
    assert matrix.columns == ["unedited", 0, 2, "end"]
    assert three_numbers(retention_matrix(small_history(), "efficacy")) == {}


class SecondOpinion(Callback):
    """Scores the requests of all batches so far after each batch, without the matrix."""

    def __init__(self) -> None:
        self.scores: dict[tuple[int, int], dict[str, float]] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        all_requests: Sequence[EditRequest] = trainer.datamodule.requests  # type: ignore[attr-defined]
        for earlier in range(batch_idx + 1):
            own = all_requests[2 * earlier : 2 * earlier + 2]
            found = evaluate(pl_module.model, pl_module.tokenizer, own, generate=False)
            values = {name: estimate["value"] for name, estimate in found.metrics.items()}
            self.scores[earlier, batch_idx] = values


def following(prompts: int = 10**6) -> MeasureEdits:
    return MeasureEdits(generate=False, retention=RetentionSettings(prompts))


def test_a_run_agrees_with_its_immediate_and_final_scores(module, facts, tmp_path):  # noqa: F811
    """With the whole of each batch in the sample, the matrix holds the scores of the paper."""
    second = SecondOpinion()
    trainer = trainer_of(following(), second)
    trainer.fit(module, datamodule=data_of(facts))
    history = trainer.callbacks[1].history
    (pre,), (post,), (first,) = (history.of(s) for s in ("pre", "post", "first_batch"))
    varied = set()
    for name in ("efficacy", "generalization", "specificity", "efficacy_top1"):
        matrix = retention_matrix(history, name)
        immediate = [taken.metrics[name]["value"] for taken in history.of("batch")]
        assert matrix.immediate == pytest.approx(immediate)
        assert fmean(matrix.final) == pytest.approx(post.metrics[name]["value"])
        assert matrix.final[0] == pytest.approx(first.metrics[name]["value"])
        assert fmean(row[0] for row in matrix.scores) == pytest.approx(pre.metrics[name]["value"])
        for (batch, after), scores in second.scores.items():
            assert matrix.scores[batch][1 + after] == pytest.approx(scores[name])
        varied |= {score for row in matrix.scores for score in row if not math.isnan(score)}
    assert len(varied) > 2
    summed = three_numbers(retention_matrix(history, "efficacy"))
    assert {name: post.metrics[name] for name in summed} == summed
    assert list(summed) == ["retention_mean", "retention_first_batch", "forgetting"]


class Refuse(Callback):
    """Reject the batch at a place of the data."""

    def __init__(self, place: int) -> None:
        self.place = place

    def on_edit_written(self, trainer: Trainer, pl_module: Any, record: EditRecord) -> None:
        if trainer.global_step == self.place:
            raise EditRejected("refused", stop=False)


def test_a_rejected_batch_is_neither_measured_nor_followed(module, facts):  # noqa: F811
    """Batches are numbered as they are committed; their requests are those of their place."""
    measure = following()
    trainer_of(measure, Refuse(1)).fit(module, datamodule=data_of(facts))
    history = measure.history
    assert history.batches == {0: [0, 1], 1: [4, 5]}
    assert [taken.edits for taken in history.of("batch")] == [2, 4]
    followed = {after: sorted(values) for after, values in history.retention.after.items()}
    assert followed == {0: [0, 1], 2: [0, 1, 4, 5]}
    assert retention_matrix(history, "efficacy").batches == [0, 2]
    assert history.ended_early == "batches were rejected"


def test_a_resumed_run_has_the_same_matrix(module, facts, tmp_path):  # noqa: F811
    whole, unedited = copy.deepcopy(module), copy.deepcopy(module)
    expected = run(whole, facts, tmp_path / "whole", following(12))
    with pytest.raises(ZeroDivisionError):
        run(module, facts, tmp_path / "halves", following(12), Crash(2))
    resumed = run(unedited, facts, tmp_path / "halves", following(12), resume=True)
    histories = [
        next(c for c in trainer.callbacks if isinstance(c, MeasureEdits)).history
        for trainer in (expected, resumed)
    ]
    assert histories[0].retention.after
    assert histories[1].retention == histories[0].retention
    assert histories[1].measurements == histories[0].measurements


def test_the_report_shows_the_matrix_and_the_csv_holds_it(tmp_path: Path):
    history = followed()
    history.measurements.append(
        history.measurements[-1]._replace(
            metrics=three_numbers(retention_matrix(history, "efficacy"))
        )
    )
    text = write_report(tmp_path, history).read_text()
    assert "](plots/retention.png)" in text
    assert (tmp_path / "plots" / "retention.png").read_bytes().startswith(b"\x89PNG")
    assert "| efficacy | 62.5 ± 19.1" in " ".join(text.split())
    assert "3 batches: retention (mean)" in " ".join(text.split())
    figure = retention_figure(history)
    assert figure is not None
    axis = figure.axes[0]
    drawn = axis.images[0].get_array()
    assert drawn[0].tolist() == [0, 100, 50, 25, 37.5]
    assert drawn.shape == (3, 5)
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == ["unedited", "1", "2", "3", "end"]

    write_retention(tmp_path / "retention.csv", history)
    lines = list(csv.DictReader((tmp_path / "retention.csv").open()))
    cells = {(row["batch"], row["after"]): float(row["value"]) for row in lines}
    assert cells["1", "end"] == 37.5
    assert cells["2", "2"] == 100
    assert ("2", "1") not in cells
    assert len(lines) == 12


def test_many_matrices_stand_in_rows_of_three():
    """In one row their numbers could not be read on a page."""
    names = ("efficacy", "generalization", "specificity", "efficacy_teacher_forced")
    history = small_history()
    history.retention = Retention({0: [0], 1: [2]})
    history.retention.take(0, {0: dict.fromkeys(names, 1.0)})
    history.retention.take(1, dict.fromkeys((0, 2), dict.fromkeys(names, 0.5)))
    figure = retention_figure(history)
    *panels, _bar = figure.axes
    assert [panel.get_title() for panel in panels] == [table.by_name(n).title for n in names]
    rows = [panel.get_subplotspec().rowspan.start for panel in panels]
    assert rows == [0, 0, 0, 1]
    assert [bool(panel.get_ylabel()) for panel in panels] == [True, False, False, True]


def test_negation_probes_have_no_matrix():
    """A batch's own evaluation has them, and those after later batches have not."""
    probes = [spec.name for spec in table.METRICS if table.NEGATED in spec.needs]
    assert {"negation", "negation_generation"} <= set(probes)
    history = followed()
    for batch, column in history.retention.after.items():
        for place in history.retention.sample[batch]:
            column[place] = column[place] | dict.fromkeys(probes, 1.0)
    assert list(matrices(history)) == ["efficacy"]


def test_a_run_without_it_says_nothing_of_it(tmp_path: Path):
    history = small_history()
    assert "retention.png" not in write_report(tmp_path, history).read_text()
    write_retention(tmp_path / "retention.csv", history)
    assert not (tmp_path / "retention.csv").exists()
