"""Which runs share a row of a comparison: replicates do, and nothing else.

Runs are folders written here, as in test_compare.py.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from statistics import fmean

import pytest
from scipy import stats

from lightning_blue.__main__ import main
from lightning_blue.comparison.differences import differences
from lightning_blue.comparison.identity import compared
from lightning_blue.comparison.runs import read_runs
from lightning_blue.comparison.scores import Column, score_tables
from lightning_blue.reporting.files import flat
from lightning_blue.sweeps.planned import resolved
from test_compare import REQUESTS, make_run, values


def rows_of(folder: Path) -> dict[tuple[str, str, str], int]:
    """The rows of edited models, with the data, and the runs behind each."""
    (table,) = score_tables(read_runs([folder])[0])
    return {(row.model, row.plan, data): len(runs) for (row, data), runs in table.runs.items()}


@pytest.mark.parametrize(
    ("replicates", "said"),
    [
        ([(0, 0), (0, 1), (0, 2)], "orders"),
        ([(0, 3), (1, 3), (2, 3)], "seeds"),
        ([(0, 0), (0, 1), (4, 0)], "seeds and orders"),
    ],
)
def test_orders_are_replicates_as_seeds_are(tmp_path, capsys, replicates, said):
    drawn = {}
    for plan in ("even", "boundary"):
        for place, (seed, order) in enumerate(replicates):
            each = values(10 * place + len(plan), 0.5)
            drawn[plan, place] = 100 * fmean(each["efficacy"])
            changed = {"seed_everything": seed, "data__shuffle": order, "update__plan": plan}
            make_run(tmp_path, f"{plan}-{place}", each, **changed)
    assert rows_of(tmp_path) == {("tiny", plan, "facts"): 3 for plan in ("even", "boundary")}
    assert main(["compare", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"means over 3 {said}; in brackets the standard error over {said}" in shown
    assert f"over the {said} that both rows have" in shown
    assert re.search(rf"adjusted p \| +{said} \| +over {said} \| +p over {said} \|", shown)
    with (tmp_path / "comparison" / "differences.csv").open() as file:
        found = {line["metric"]: line for line in csv.DictReader(file)}["efficacy"]
    pairs = [[drawn[plan, place] for place in range(3)] for plan in ("boundary", "even")]
    assert (found["replicates"], found["replicated"]) == ("3", said)
    assert float(found["replicate_p"]) == pytest.approx(stats.ttest_rel(*pairs).pvalue)


# Keys that change no number of a finished run.
SAME_NUMBERS = """
    run/name run/root run/wandb run/project run/checkpoint_every base ckpt_path for_model
    trainer/logger trainer/default_root_dir trainer/enable_progress_bar
    trainer/enable_model_summary trainer/enable_checkpointing trainer/enable_autolog_hparams
    trainer/profiler trainer/log_every_n_steps trainer/max_time trainer/model_registry
    model/cache_targets model/covariance/cache model/covariance/trust
    model/covariance/report_change measure/unedited_cache measure/judge/timeout
    measure/judge/retries measure/judge/concurrency measure/judge/replies
"""
# Keys that stand for what runs record: their model, requests and protocols, and a table's setting.
RECORDED = """
    model/name_or_path measure/protocols data/path data/split data/batch_size data/edits
    data/offset data/on_unusable data/protocol
"""
REPLICATES = "seed_everything data/shuffle"


def test_every_key_that_can_change_a_number_gives_a_row():
    config = flat(resolved(["--model.name_or_path=tiny"]))
    # the settings of a judge that is asked, and of a guard that takes batches back, count
    config |= {"measure/judge/url": "http://localhost", "guard/action": "rollback"}
    first = compared(config, {})
    unseen = [key for key in config if compared({**config, key: "another"}, {}) == first]
    assert sorted(unseen) == sorted(f"{SAME_NUMBERS} {RECORDED} {REPLICATES}".split())


@pytest.mark.parametrize(
    ("key", "pair", "shown"),
    [
        ("trainer__precision", ("32-true", "bf16-true"), "precision={}"),
        ("data__target_prefix", (" ", ""), "target_prefix={}"),
        ("data__chat", (False, True), "chat={}"),
        ("run__export", (False, True), "export={}"),
        ("guard__action", (None, "rollback"), "action={}"),
        ("measure__text_tokens", (1024, 4096), "text_tokens={}"),
        ("measure__ability", ({"tasks": None}, {"tasks": ["paper"]}), "tasks={[tasks]}"),
        ("measure__seed", (None, 0), "seed={}"),
    ],
)
def test_what_differs_in_what_is_computed_or_measured_has_its_own_row(tmp_path, key, pair, shown):
    """Whether or not the runs have the same seed, none is dropped and none is averaged."""
    for seeds in ((0, 0), (0, 1)):
        folder = tmp_path / str(seeds)
        for seed, value in zip(seeds, pair, strict=True):
            make_run(folder, f"run-{value}", values(1, 0.5), seed_everything=seed, **{key: value})
        assert rows_of(folder) == {
            ("tiny", f"even, {shown.format(value)}", "facts"): 1 for value in pair
        }
        (table,) = score_tables(read_runs([folder])[0])
        unedited = [row.plan for row in table.rows if row.method == "unedited"]
        if key in ("run__export", "guard__action"):  # what comes after the first measurement
            assert unedited == ["unedited"]
        else:
            assert sorted(unedited) == sorted(f"unedited, {shown.format(each)}" for each in pair)


def test_what_changes_no_number_is_the_same_run(tmp_path):
    one = {"guard__action": "warn", "trainer__logger": False, "data__edits": None}
    other = {"guard__action": "stop", "trainer__logger": True, "data__edits": REQUESTS}
    other |= {"guard__weight_ratio": 2.0, "measure__judge": {"url": None, "max_tokens": 16}}
    make_run(tmp_path, "one", values(1, 0.5), **one)
    make_run(tmp_path, "other", values(1, 0.5), **other, data__protocol="counterfact")
    runs, left_out = read_runs([tmp_path])
    assert [run.folder.name for run in runs] == ["one"]
    assert [(left.folder.name, left.reason) for left in left_out] == [("other", "it repeats one")]


def test_the_same_files_in_other_folders_are_the_same(tmp_path):
    """Seeds of one sweep on two machines."""
    for seed, root in enumerate(("/data", "/home/me", "relative")):
        places = {
            "model__name_or_path": f"{root}/tiny",
            "data__path": f"{root}/facts.json",
            "data__controls": f"{root}/known.json",
            "measure__text": f"{root}/text.txt",
            "measure__ability": {"tasks": ["paper", f"{root}/mine.yaml"], "data": f"{root}/glue"},
        }
        changed = {"seed_everything": seed, "fingerprint": "abc", **places}
        make_run(tmp_path / "runs", root.replace("/", ""), values(seed, 0.5), **changed)
    assert rows_of(tmp_path / "runs") == {("tiny", "even", "facts"): 3}


def test_models_in_folders_of_one_name_are_told_apart(tmp_path):
    for name, numbers in (("a", {"perplexity": 2.0}), ("b", {"perplexity": 7.0})):
        places = {"model__name_or_path": f"runs/{name}/model", "post": numbers, "pre": numbers}
        make_run(tmp_path / "paths", name, values(1, 0.5), seed_everything=ord(name), **places)
    runs = rows_of(tmp_path / "paths")
    assert runs == {(f"{name}/model", "even", "facts"): 1 for name in "ab"}
    (table,) = score_tables(read_runs([tmp_path / "paths"])[0])
    unedited = {
        row.model: table.cells[row, Column("facts", "perplexity")].value
        for row in table.rows
        if row.method == "unedited"
    }
    assert unedited == {"a/model": 2.0, "b/model": 7.0}


def test_models_are_known_by_their_recorded_weights(tmp_path):
    """The same folder held another model later; a run that recorded nothing goes by the path."""
    for place, fingerprint in enumerate(("0123456789", "abcdef0123", "abcdef0123")):
        changed = {"seed_everything": place, "fingerprint": fingerprint}
        make_run(tmp_path / "hashes", str(place), values(1, 0.5), **changed)
    found = rows_of(tmp_path / "hashes")
    assert found == {("tiny, 01234567", "even", "facts"): 1, ("tiny, abcdef01", "even", "facts"): 2}
    make_run(tmp_path / "one", "0", values(1, 0.5), fingerprint="0123")
    make_run(tmp_path / "one", "1", values(1, 0.5), seed_everything=1)
    assert rows_of(tmp_path / "one") == {("tiny", "even", "facts"): 2}
    for dtype, fingerprint in (("float32", "0123"), ("bfloat16", "4567")):
        changed = {"model__dtype": dtype, "fingerprint": fingerprint}
        make_run(tmp_path / "dtypes", dtype, values(1, 0.5), **changed)
    models = {model for model, _, _ in rows_of(tmp_path / "dtypes")}
    assert models == {"tiny, float32", "tiny, bfloat16"}


def test_metrics_of_another_protocol_have_columns_of_their_own(tmp_path):
    for plan in ("even", "boundary"):
        for protocol in ("counterfact", "zsre"):
            changed = {"update__plan": plan, "data__protocol": protocol, "protocol": protocol}
            make_run(tmp_path, f"{plan}-{protocol}", values(len(plan), 0.5), **changed)
    named = {f"facts, protocol {protocol}" for protocol in ("counterfact", "zsre")}
    assert rows_of(tmp_path) == {
        ("tiny", plan, data): 1 for plan in ("even", "boundary") for data in named
    }
    (table,) = score_tables(read_runs([tmp_path])[0])
    assert {column.data for column in table.columns} == named
    assert {each.data for each in differences(table, table.pairs())} == named


def test_two_runs_are_compared_by_what_both_protocols_measure_alike(tmp_path, capsys):
    """Efficacy is a comparison of objects under one, a fraction of tokens under the other."""
    pair = []
    for place, protocol in enumerate(("counterfact", "zsre")):
        metrics = {**values(place, 0.5), "efficacy_top1": values(place, 0.5)["efficacy"]}
        pair.append(make_run(tmp_path, protocol, metrics, protocol=protocol))
    assert main(["compare", *map(str, pair)]) == 0
    folder = tmp_path / "comparison" / "counterfact-and-zsre"
    with (folder / "differences.csv").open() as file:
        assert [line["metric"] for line in csv.DictReader(file)] == ["efficacy_top1"]
    assert not (folder / "changed.csv").exists()
