"""A stream in which a fact is edited again, A to B and then B to C: the last one is in force."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_blue.data import EditDataModule
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.metrics.evaluation import evaluate
from lightning_blue.metrics.generated import GenerationSettings
from lightning_blue.metrics.retention import RetentionSettings
from lightning_blue.reporting.files import summary
from test_benchmark_formats import MQUAKE, rewrite
from test_lightning import corpus, module, trainer_of  # noqa: F401  (fixtures)

VERSIONS = ("Rome", "Oslo", "Bern")


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
    trainer = trainer_of(answering)
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
    wanted = [data.requests[place] for place in (1, 3, 4, 5)]
    again = evaluate(module.model, module.tokenizer, wanted, generate=False, continuation_tokens=0)
    (post,) = history.of("post")
    for name in ("efficacy", "efficacy_top1"):
        assert post.metrics[name]["value"] == again.metrics[name]["value"]
    assert [history.after[place].values["efficacy"] for place in (1, 3, 4, 5)] == [
        outcome.values["efficacy"] for outcome in again.outcomes
    ]
    assert history.after[4].values["efficacy"] > 0  # more probable than the version before it


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
