"""The table of metrics: every row is whole, and says what its metric class does."""

from __future__ import annotations

import pytest

from conftest import ROOT
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
    given = [F.fit_tfidf(["a text"])] if texts else []
    metric = measure.metric(*given, sync_on_compute=False)
    assert metric.sync_on_compute is False  # each process holds the answers of all
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
        table.GENERATED_ANSWERS,
        table.JUDGED_ANSWERS,
    )
    every = table.PROTOCOLS
    read = {
        each: [spec.name for spec, _ in table.of_protocol(protocol, each, added=every)]
        for each in sources
    }
    assert sorted(name for names in read.values() for name in names) == sorted(IDS)
    assert ("efficacy" in read[table.COMPARISON]) == (protocol == "counterfact")
    assert "efficacy_top1" in read[table.TEACHER_FORCED]
    assert {"fluency", "consistency"} <= set(read[table.GENERATED_TEXT])
    both = [spec.name for spec, _ in table.of_protocol(protocol, *sources[:2], added=every)]
    assert set(both) == {*read[table.COMPARISON], *read[table.TEACHER_FORCED]}


def test_outcomes_have_the_same_keys_whatever_was_measured() -> None:
    values = table.per_request({"efficacy": 1.0, "fluency": 3.0})
    assert (values["efficacy"], values["generalization"]) == (1.0, None)
    assert "fluency" not in values
    assert list(values) == list(table.per_request({}))


def test_metrics_of_a_protocol_are_measured_only_where_it_is_asked_for() -> None:
    sources = (table.COMPARISON, table.TEACHER_FORCED, table.GENERATED_ANSWERS)
    plain = {spec.name for spec, _ in table.of_protocol("counterfact", *sources)}
    assert not [name for name in plain if table.by_name(name).protocol]
    more = {s.name for s, _ in table.of_protocol("counterfact", *sources, added=("generation",))}
    assert {table.by_name(name).protocol for name in more - plain} == {"generation"}
    assert "reliability_generation" not in table.per_request({})
    assert "reliability_generation" in table.per_request({}, ("generation",))


@pytest.mark.parametrize("name", ["efficacy", "generalization", "specificity", "score"])
def test_an_added_protocol_measures_as_it_does_where_it_is_the_main_one(name: str) -> None:
    for protocol, main in table.MAIN.items():
        added = table.by_name(f"{name}_{protocol}")
        assert added.measure("counterfact") == table.by_name(name).measure(main)
        assert added.measure("zsre") == table.by_name(name).measure(main)
        assert protocol.split("_")[0] in added.title
        assert all(part.endswith(protocol) for part in added.combines)


def test_the_page_on_protocols_has_their_metrics() -> None:
    page = (ROOT / "docs" / "protocols.md").read_text()
    shown = [line for line in page.splitlines() if line.startswith("| `") and "_" in line]
    rows = [
        f"| `{spec.name}` | {spec.measure('counterfact').definition} | % | {spec.direction} |"
        for spec in METRICS
        if spec.protocol is not None
    ]
    named = {spec.name for spec in METRICS if spec.protocol is not None}
    assert [line for line in shown if line.split("`")[1] in named] == rows
    probes = table.of_group("negation")
    assert probes
    for spec in probes:
        said = spec.measure("counterfact").definition
        assert f"| `{spec.name}` | {said} | % | {spec.direction} |" in page
    assert {spec.unit for spec in METRICS if spec.protocol} == {table.PERCENT}
