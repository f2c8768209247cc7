"""A stream in which a fact is edited again, A to B and then B to C: the last one is in force."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from histories import small_history
from lightning_blue.data import EditDataModule
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.metrics.evaluation import Metrics, evaluate, over_requests
from lightning_blue.metrics.generated import GenerationSettings
from lightning_blue.metrics.retention import RetentionSettings
from lightning_blue.reporting.files import summary
from lightning_blue.reporting.report import report, sections
from test_benchmark_formats import MQUAKE, rewrite
from test_lightning import corpus, module, trainer_of  # noqa: F401  (fixtures)

VERSIONS = ("Rome", "Oslo", "Bern")


class Then(Callback):
    """Score one request of the data right after the first batch, by itself."""

    def __init__(self, place: int) -> None:
        self.place, self.metrics = place, {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not batch_idx:
            asked = [trainer.datamodule.requests[self.place]]  # type: ignore[attr-defined]
            model, tokenizer = pl_module.model, pl_module.tokenizer
            self.metrics = evaluate(model, tokenizer, asked, generate=False).metrics


def without_prompts(metrics: Metrics) -> Metrics:
    return {
        name: {field: number for field, number in each.items() if field != "prompts"}
        for name, each in metrics.items()
    }


def version(number: int) -> list[dict[str, Any]]:
    """The batch of a version: the fact that changes, from what it was, and one that stays."""
    true = ("Paris", *VERSIONS)[number]
    tower = {"subject": "Tower 0", "prompt": "{} lies in", "target_true": true}
    other = {"subject": f"Mill {number}", "prompt": "{} belongs to", "target_true": "Ann"}
    return [tower | {"target_new": VERSIONS[number]}, other | {"target_new": "Bo"}]


def test_scores_at_the_end_are_over_the_last_version_only(module, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "stream.json"
    path.write_text(json.dumps([fact for number in range(3) for fact in version(number)]))
    data = EditDataModule(str(path), batch_size=2)
    answering = MeasureEdits(
        generate=False,
        protocols=["probability", "generation"],
        generation=GenerationSettings(max_new_tokens=1),
    )
    then = Then(1)
    trainer = trainer_of(answering, then)
    trainer.fit(module, datamodule=data)
    history = trainer.callbacks[1].history
    assert (history.applied, history.in_force) == (6, [1, 3, 4, 5])
    assert sorted(history.after) == [1, 3, 4, 5]
    answered = [(answer.request, answer.prompt) for answer in history.answers_after]
    assert answered == [(place, data.requests[place].text) for place in (1, 3, 4, 5)]
    numbers = summary(history)
    assert (numbers["edits/superseded"], numbers["post/efficacy/count"]) == (2, 4)
    counts = [taken.metrics["efficacy"]["count"] for taken in history.of("cumulative")]
    assert counts == [2, 3, 4]  # the fact that changes counts once, as it is wanted by then
    (first,) = history.of("first_batch")
    assert first.metrics["efficacy"]["count"] == 1  # its first version is no longer wanted
    known = history.first_values  # of those of the first batch that count at the end as well
    assert sorted(known) == [0, 1]
    assert over_requests([known[1]], "counterfact") == without_prompts(then.metrics)
    text = " ".join(report(history, [], None).split())
    assert "Over the 1 of its 2 requests that no later one replaces." in text
    wanted = [data.requests[place] for place in (1, 3, 4, 5)]
    again = evaluate(module.model, module.tokenizer, wanted, generate=False, continuation_tokens=0)
    (post,) = history.of("post")
    for name in ("efficacy", "efficacy_top1"):
        assert post.metrics[name]["value"] == again.metrics[name]["value"]
    assert [history.after[place].values["efficacy"] for place in (1, 3, 4, 5)] == [
        outcome.values["efficacy"] for outcome in again.outcomes
    ]
    assert history.after[4].values["efficacy"] > 0  # more probable than the version before it


def test_the_first_batch_is_compared_over_what_counts_then_and_at_the_end() -> None:
    """Of two requests one is replaced: that its value was another is no change of the other."""
    history = small_history()
    history.requests[2] = replace(history.requests[0], target_new="Bern")
    assert (history.batches, history.in_force) == ({0: [0, 1], 1: [2]}, [1, 2])
    first = {"efficacy": 1.0, "generalization": 0.5, "specificity": 0.25}
    history.first_values = {0: dict.fromkeys(first, 0.0), 1: first}
    names, heading = (*first, "score"), "The first batch, right after it was applied and at the end"
    at_end = {name: {"value": 40.0, "count": 1} for name in names}
    history.measurements[5] = history.measurements[5]._replace(metrics=at_end)
    text = sections(history, [], None)[heading]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n")[2:6]]
    score = 3 / (1 / 100 + 1 / 50 + 1 / 25)
    then = ["100.0", "50.0", "25.0", f"{score:.1f}"]
    assert rows == [[n, v, "40.0"] for n, v in zip(names, then, strict=True)]
    history.first_values = {}  # of a run that goes on from a checkpoint without them
    text = " ".join(sections(history, [], None)[heading].split())
    assert "over the 1 of its 2 requests that no later one replaces: the two are not to be" in text
    history.requests[2] = replace(history.requests[2], subject="Tower 2")  # nothing is replaced
    assert "replaces" not in sections(history, [], None)[heading]


def test_questions_go_with_the_edits_that_they_count_on(module, tmp_path: Path, caplog) -> None:  # noqa: F811
    """A later record edits a fact again that an earlier one's multi-hop questions need."""
    again = {
        "case_id": 8,
        "requested_rewrite": [rewrite("Ann", "Japan", "Chile"), rewrite("Cy", "Cuba", "Oman")],
        "questions": ["Where is the wife of Cy from?"],
        "new_answer": "Japan",
        "new_answer_alias": [],
    }
    data = EditDataModule([MQUAKE, MQUAKE | again], batch_size=2)
    asking = MeasureEdits(
        generate=False,
        retention=RetentionSettings(100),
        protocols=["probability", "generation"],
        generation=GenerationSettings(max_new_tokens=1, each_batch=True),
    )
    trainer_of(asking).fit(module, datamodule=data)
    history = asking.history
    assert [request.case_id for request in history.requests] == ["7.1", "7.2", "8.1", "8.2"]
    assert history.in_force == [1, 2, 3]
    name = "portability_generation"
    counts = {
        stage: [taken.metrics.get(name, {}).get("count", 0) for taken in history.of(stage)]
        for stage in ("pre", "batch", "cumulative", "first_batch", "post")
    }
    assert counts == {
        "pre": [2],
        "batch": [1, 1],
        "cumulative": [1, 1],
        "first_batch": [0],
        "post": [1],
    }
    (followed,) = (values[1] for batch, values in history.retention.after.items() if batch == 1)
    assert name not in followed
    assert name in history.retention.after[0][1]
    asked = [a.prompt for a in history.answers_after if a.prompts == "portability prompts"]
    assert asked == again["questions"]
    assert "portability prompts of 1 request count on another edit" in caplog.text
