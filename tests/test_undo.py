"""Undo: back to a batch to the bit; the rest against dense formulas and a run without the edits."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from blue_callbacks import WeightId
from blue_callbacks.transforms import prune
from conftest import LanguageModel
from helpers import fit
from lightning_blue.__main__ import main
from lightning_blue.runs.base import UneditedModel
from lightning_blue.runs.journal import Journal
from lightning_blue.runs.undo import all_from, one_batch, requests, statistics, write_without
from lightning_blue.runs.weights import leave_out, relative_distance
from runs_made import (  # noqa: F401
    BATCHES,
    KINDS,
    WEIGHTS,
    Made,
    Watch,
    made,
    make,
    rounded,
    same,
    save,
    small_module,
    small_update,
    weights_in,
)


def base_of(run: Made) -> UneditedModel:
    header = Journal(run.folder).header
    return UneditedModel(header.model, header.weights)


def without(run: Made, removed, replay: bool) -> dict[WeightId, Tensor]:
    journal, base = Journal(run.folder), base_of(run)
    covariance = statistics(journal.header) if replay else None
    write_without(journal, removed, base, covariance)
    return {weight: base.weights.read(weight).clone() for weight in WEIGHTS}


def dense(run: Made, weight: WeightId, removed: dict[int, list[int]], whole=False) -> Tensor:
    """Eq. 8 as it is written, in float64, from stored keys and residuals.

    With ``whole`` the removed edits stay among the keys and only ask for nothing.
    """
    journal = Journal(run.folder)
    update = journal.header.update
    covariance = statistics(journal.header).read({weight.layer: 96})[weight.layer]
    system = update["covariance_weight"] * covariance
    current = run.watch.states[0][weight].double()
    for batch, change in journal.changes(weight):
        n = change.keys.shape[1]
        kept = [i for i in range(n) if i not in removed.get(batch, [])]
        keys, residual = change.keys.double(), change.residual.double()
        if whole:
            residual = torch.where(torch.tensor([i in kept for i in range(n)]), residual, 0)
        else:
            keys, residual = keys[:, kept], residual[:, kept]
        system_now = system + keys @ keys.T
        current = current + torch.linalg.solve(system_now, keys @ residual.T).T
        system = system_now if update["past_keys"] else system
    return current


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_back_to_a_batch_is_what_the_run_had_then(made, model, kind, tmp_path, capsys):  # noqa: F811
    """To the bit, also in half precision, under RECT, and under PRUNE, whose transform is last."""
    run = made(model, kind)
    states = run.watch.states
    for kept in range(len(BATCHES) + 1):
        output = tmp_path / f"to-{kept}"
        assert main(["undo", str(run.folder), "--to", str(kept), f"--output={output}"]) == 0
        said = capsys.readouterr().out
        expected = states[kept]
        if kind == "prune":
            assert "prune was applied" in said
            expected = {weight: prune(states[0][weight], expected[weight]) for weight in WEIGHTS}
        assert "exact" in said
        assert same(weights_in(output, run), rounded(expected, run))
    assert same(rounded(run.watch.final, run), weights_in(output, run))
    assert not same(states[0], states[1])


@pytest.mark.parametrize("kind", ["memit", "rect", "alphaedit", "half"])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_solving_everything_again_is_the_run(made, model, kind):  # noqa: F811
    """Nothing is removed, but batches are solved from what was stored: the same bits."""
    run = made(model, kind)
    for first in range(len(BATCHES)):
        assert same(without(run, {first: []}, replay=True), run.watch.states[-1])


@pytest.mark.parametrize("removed", [{0: [0, 1]}, {1: [0, 1]}, {0: [1]}, {1: [0], 2: [1]}])
def test_replay_is_the_closed_form_without_the_edits(made, removed):  # noqa: F811
    run = made("llama", "memit")
    found = without(run, removed, replay=True)
    for weight in WEIGHTS:
        expected = dense(run, weight, removed)
        error = relative_distance(expected, found[weight].double(), run.watch.states[0][weight])
        assert error < 1e-5  # float32 sums of a weight that moved by a fraction of itself


def test_leaving_an_edit_out_leaves_its_residual_out(made):  # noqa: F811
    """The others are solved as if it had asked for nothing at its key."""
    run = made("llama", "memit")
    found = without(run, {2: [0]}, replay=False)
    for weight in WEIGHTS:
        expected = dense(run, weight, {2: [0]}, whole=True)
        error = relative_distance(expected, found[weight].double(), run.watch.states[0][weight])
        assert error < 1e-5


def test_the_terms_of_all_edits_are_the_batch(made):  # noqa: F811
    """And one left out changes the outputs of the others less than a column of the factors does."""
    run = made("llama", "memit")
    for _, change in Journal(run.folder).changes(WeightId(2)):
        whole = change.left.double() @ change.right.double()
        terms = leave_out(change, [])
        assert torch.dist(terms.left.double() @ terms.right.double(), whole) < 1e-5 * whole.norm()
        left = leave_out(change, [1])
        other = change.keys[:, :1].double()
        moved = (left.left.double() @ left.right.double() - whole) @ other
        column = change.left[:, 1:].double() @ (change.right[1:].double() @ other)
        assert moved.norm() < column.norm()


def test_replay_is_the_run_that_measures_the_same_without_the_batch(made):  # noqa: F811
    """Given the run's keys and residuals, a run without batch 0 writes the same bits."""
    run = made("gpt2", "memit")
    journal, module = Journal(run.folder), small_module(run.base)
    stored = {
        (str(batch), change.weight.layer): change
        for batch, file in zip(BATCHES, journal.files, strict=True)
        for change in file.changes()
    }
    module.edit_keys = lambda batch, weight: stored[str(batch), weight.layer].keys
    module.edit_targets = lambda batch, layer: stored[str(batch), layer].residual
    module.edit_outputs = lambda batch, layer: 0.0
    fit(module, small_update("memit"), BATCHES[1:])
    removed = one_batch(journal, 0)
    plain, again = without(run, removed, False), without(run, removed, True)
    assert same(again, Watch.read(module))
    for weight in WEIGHTS:
        assert relative_distance(plain[weight], again[weight], run.watch.states[0][weight]) > 0.05


def test_replay_is_not_a_run_that_never_had_the_batch(made, gpt2, tmp_path):  # noqa: F811
    """Targets, keys and residuals of later batches were found on other weights: replay takes back
    only what past keys did (here 1.11 of the change to 1.07), and only a new run does the rest.
    """
    run = made("gpt2", "memit")
    never = make(tmp_path, gpt2, "memit", BATCHES[1:]).watch.states[-1]
    removed = one_batch(Journal(run.folder), 0)
    plain, again = without(run, removed, False), without(run, removed, True)
    originals = run.watch.states[0]
    far = {w: relative_distance(never[w], plain[w], originals[w]) for w in WEIGHTS}
    near = {w: relative_distance(never[w], again[w], originals[w]) for w in WEIGHTS}
    assert near[WeightId(0)] < far[WeightId(0)]
    assert min(near.values()) > 0.1


def test_undo_says_how_far_replay_is_from_subtracting(made, tmp_path, capsys):  # noqa: F811
    run = made("gpt2", "memit")
    args = ["undo", str(run.folder), "--batch=0"]
    assert main([*args, f"--output={tmp_path / 'plain'}"]) == 0
    assert "stay as they were solved" in capsys.readouterr().out
    assert main([*args, "--replay", f"--output={tmp_path / 'again'}"]) == 0
    said = capsys.readouterr().out
    plain, again = (weights_in(tmp_path / name, run) for name in ("plain", "again"))
    assert not same(plain, again)
    for weight in WEIGHTS:
        expected = relative_distance(plain[weight], again[weight], run.watch.states[0][weight])
        assert f"{weight}: {expected:.2g} of the run's change" in said
    readme = (tmp_path / "again" / "README.md").read_text()
    assert "r2, r3, r4, r5" in readme
    assert "r0" not in readme.split("Requests")[1]


def test_without_past_keys_replay_only_repeats_the_rounding(made):  # noqa: F811
    """Eq. 5: a batch was solved without the ones before it."""
    run = made("gpt2", "prune")
    removed = one_batch(Journal(run.folder), 0)
    plain, again = without(run, removed, False), without(run, removed, True)
    assert same(plain, again)


def test_rect_is_cut_again_by_replay(made):  # noqa: F811
    run = made("llama", "rect")
    plain, again = (without(run, {0: [0, 1]}, replay) for replay in (False, True))
    for weight in WEIGHTS:
        original = run.watch.states[0][weight]
        changed = [(found[weight] != original).float().mean() for found in (plain, again)]
        assert all(0.4 < share < 0.8 for share in changed)  # two batches, each 40% of the entries
        assert 0 < relative_distance(plain[weight], again[weight], original) < 0.5


def test_the_last_batch_is_left_out_by_default(made, tmp_path):  # noqa: F811
    run = made("llama", "memit")
    for option in ([], ["--batch=2"], ["--requests=r4,r5"], ["--to=2", "--replay"]):
        assert main(["undo", str(run.folder), *option, f"--output={tmp_path}/m", "--force"]) == 0
        assert same(weights_in(tmp_path / "m", run), run.watch.states[2])


def test_selections(made):  # noqa: F811
    journal = Journal(made("llama", "memit").folder)
    assert all_from(journal, 1) == {1: [0, 1], 2: [0, 1]}
    assert all_from(journal, 3) == {}
    assert one_batch(journal, 1) == {1: [0, 1]}
    assert requests(journal, ["r1", "r4", "r5"]) == {0: [1], 2: [0, 1]}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--to=4"], "3 batches"),
        (["--batch=3"], "no batch 3: they are 0 to 2"),
        (["--batch=-1"], "no batch -1"),
        (["--requests=r1,r9"], "no request r9"),
        (["--requests=,"], "no request is named"),
        (["--batch=x"], "invalid int value"),
        (["--batch=1", "--to=1"], "not allowed with"),
        (["--batch=1", "--replay", "--covariance=nothing.safetensors"], "--covariance FILE"),
        (["--batch=1", "--model=nowhere"], "--model PATH"),
        (["--output=TAKEN"], "--force"),
        (["--output=OTHER", "--force"], "not replaced"),
    ],
)
def test_what_cannot_be_undone(made, tmp_path, capsys, args, said):  # noqa: F811
    run = made("llama", "memit")
    (tmp_path / "other").mkdir()
    save(LanguageModel(run.module.model, run.module.tokenizer), tmp_path)
    places = {"TAKEN": str(tmp_path), "OTHER": str(tmp_path / "other")}
    for name, place in places.items():
        args = [arg.replace(name, place) for arg in args]
    assert main(["undo", str(run.folder), *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert "Traceback" not in error
    assert {path.name for path in run.folder.iterdir()} == {"records"}


def test_another_base_and_another_covariance_are_refused(made, tmp_path, capsys):  # noqa: F811
    run, other = made("llama", "memit"), made("llama", "rect")
    save(LanguageModel(run.module.model, run.module.tokenizer), tmp_path / "e")
    assert main(["undo", str(run.folder), f"--model={tmp_path / 'e'}"]) == 2
    assert "not the unedited model" in capsys.readouterr().err
    (statistics_of,) = made("gpt2", "memit").folder.parent.glob("stats/*")
    args = ["undo", str(other.folder), "--batch=0", "--replay", f"--covariance={statistics_of}"]
    assert main(args) == 2
    assert "another model" in capsys.readouterr().err


def test_the_base_and_the_covariance_may_have_moved(made, tmp_path):  # noqa: F811
    run = made("llama", "memit")
    moved = shutil.copytree(run.folder.parent, tmp_path / "moved")
    (covariance,) = moved.glob("stats/*")
    args = [f"--model={moved / 'base'}", f"--covariance={covariance}", f"--output={tmp_path / 'm'}"]
    assert main(["undo", str(moved / "run"), "--batch=0", "--replay", *args]) == 0
    assert same(weights_in(tmp_path / "m", run), without(run, {0: [0, 1]}, replay=True))
