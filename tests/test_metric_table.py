"""The table of metrics: every row is whole, and says what its metric class does."""

from __future__ import annotations

import pytest

from lightning_blue.metrics import functional as F
from lightning_blue.metrics import table
from lightning_blue.metrics.table import METRICS, MetricSpec

IDS = [spec.name for spec in METRICS]
DATA_PROTOCOLS = ("counterfact", "zsre")


def test_names_and_titles_are_unique() -> None:
    assert len(set(IDS)) == len(METRICS)
    assert len({spec.title for spec in METRICS}) == len(METRICS)
    assert table.by_name("score").combines == ("efficacy", "generalization", "specificity")
    with pytest.raises(KeyError):
        table.by_name("recall")


@pytest.mark.parametrize("protocol", DATA_PROTOCOLS)
@pytest.mark.parametrize("spec", METRICS, ids=IDS)
def test_rows_are_whole(spec: MetricSpec, protocol: str) -> None:
    measure = spec.measure(protocol)
    assert measure.definition
    assert not measure.definition.endswith(".")
    texts = table.REFERENCE_TEXTS in spec.needs
    metric = measure.metric(F.fit_tfidf(["a text"])) if texts else measure.metric()
    assert metric.__class__.__module__ == "lightning_blue.metrics.classes"
    assert (measure.protocol == table.COMBINATION) == bool(spec.combines)
    assert all(IDS.index(name) < IDS.index(spec.name) for name in spec.combines)
    if spec.panel == "success":
        assert spec.unit == table.PERCENT


def test_prompts_follow_from_needs() -> None:
    names = ("efficacy", "generalization", "specificity")
    for suffix in ("", "_top1"):
        prompts = [table.by_name(name + suffix).prompts for name in names]
        assert prompts == [table.OWN_PROMPT, table.PARAPHRASES, table.NEIGHBOURS]


def test_labels_have_units() -> None:
    labels = [table.by_name(name).label for name in ("score", "fluency", "perplexity")]
    assert labels == ["score (%)", "fluency (bits × 100)", "perplexity"]


@pytest.mark.parametrize("protocol", DATA_PROTOCOLS)
def test_metrics_by_what_they_read(protocol: str) -> None:
    """Each metric is filled from one source."""
    sources = (
        table.COMPARISON,
        table.TEACHER_FORCED,
        table.COMBINATION,
        table.GENERATED_TEXT,
        table.ORDINARY_TEXT,
        table.CONTROL_FACTS,
        table.RETENTION,
    )
    read = {each: [spec.name for spec, _ in table.of_protocol(protocol, each)] for each in sources}
    assert sorted(name for names in read.values() for name in names) == sorted(IDS)
    assert ("efficacy" in read[table.COMPARISON]) == (protocol == "counterfact")
    assert "efficacy_top1" in read[table.TEACHER_FORCED]
    assert {"fluency", "consistency"} <= set(read[table.GENERATED_TEXT])
    both = [spec.name for spec, _ in table.of_protocol(protocol, *sources[:2])]
    assert set(both) == {*read[table.COMPARISON], *read[table.TEACHER_FORCED]}


def test_outcomes_have_the_same_keys_whatever_was_measured() -> None:
    values = table.per_request({"efficacy": 1.0, "fluency": 3.0})
    assert (values["efficacy"], values["generalization"]) == (1.0, None)
    assert "fluency" not in values
    assert list(values) == list(table.per_request({}))
