"""The paper's studies: their maths against naive versions, their edits against those of a run."""

from __future__ import annotations

import copy
import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.linalg
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from blue_callbacks import ClosedFormUpdate, KeyMemory, WeightId
from blue_callbacks.closed_form import least_squares
from blue_callbacks.plans import PLANS, LayerUpdate
from conftest import CORPUS, LanguageModel
from helpers import fit
from lightning_blue.__main__ import main
from lightning_blue.cli import analyze as command
from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.editing.covariance import CovarianceSource
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.optimization import TargetOptimization
from lightning_blue.editing.targets import TargetFinder
from lightning_blue.language_model.tokens import encode_targets, encode_with_subject
from lightning_blue.studies import contribution, residuals, similarity, steps
from lightning_blue.studies.bench import Bench, StudySettings
from lightning_blue.studies.bounds import spectral_norm, update_operator, weight_shift
from lightning_blue.studies.confound import combinations, confound
from lightning_blue.studies.distances import frechet_distance, linear_cka, relative_shift
from lightning_blue.studies.residual_figure import residual_figure
from lightning_blue.studies.results import csv_text, estimate
from lightning_blue.studies.shift import edits_of, factual_prompts
from lightning_blue.studies.table import STUDIES
from lightning_blue.support.errors import InputError
from random_models import random_model, tokenizer
from runs_made import FACTS, save

LAYERS = [0, 1, 2]
EPS = torch.finfo(torch.float64).eps
REQUESTS = [
    EditRequest(f"r{i}", prompt, who, new, "Paris", neighborhood=(Probe(f"{who} is near", "Rome"),))
    for i, (who, prompt, new) in enumerate(FACTS)
]


def module_of(language_model: LanguageModel, folder: Path, **settings) -> EditModule:
    text = folder / "text.txt"
    text.write_text("\n".join(CORPUS * 12))
    source = CovarianceSource(str(text), tokens_per_dim=8, cache=str(folder / "stats"))
    target = TargetOptimization(**{"steps": 6, "learning_rate": 0.5, "clamp": 4.0} | settings)
    made = copy.deepcopy(language_model)
    return EditModule(*made, target=target, contexts=["It is said."], covariance=source)


def bench_of(module: EditModule, **update) -> Bench:
    closed_form = ClosedFormUpdate(LAYERS, "boundary", 0.1, **update)
    return Bench(module, closed_form, REQUESTS, batch_size=2, trainer={"accelerator": "cpu"})


@pytest.fixture(scope="module")
def bench(llama, tmp_path_factory) -> Bench:
    return bench_of(module_of(llama, tmp_path_factory.mktemp("bench")))


def weights_of(module: EditModule) -> list[Tensor]:
    return [module.editable_weights.read(WeightId(layer)).clone() for layer in LAYERS]


# Theorem 4.1 and Lemma 4.2


@pytest.mark.parametrize("seed", range(40))
def test_bounds_hold_on_random_tensors(seed):
    """Q and both updates by dense inverses; shapes, scales and ranks are drawn."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        scale = 10 ** (2 * torch.rand(1, generator=draw, dtype=torch.float64) - 1)
        return scale * torch.randn(*shape, generator=draw, dtype=torch.float64)

    d, d_in, n, past = (int(torch.randint(1, 12, (1,), generator=draw)) for _ in range(4))
    after = int(torch.randint(0, 6, (1,), generator=draw))
    spread = normal(d_in, d_in + 2)
    covariance = spread @ spread.T
    keys, old = normal(d_in, n), normal(d_in, past)
    last = normal(d, n)
    computed = last + normal(d, n) if seed % 3 else normal(d, 1).expand(d, n)  # rank 1, too
    distributed = last / (after + 1)
    memory = KeyMemory(least_squares(covariance, weight=2.0))
    for past_keys in (torch.zeros(d_in, 0, dtype=torch.float64), old):  # the theorem, the lemma
        if past_keys.numel():
            memory.remember(past_keys)
        q = update_operator(memory, keys)
        system = 2 * covariance + past_keys @ past_keys.T + keys @ keys.T
        naive = torch.linalg.solve(system, keys).T
        # The naive system, and both factors of the dual form: C0, and I + W^T W of n edits.
        dual = 1 + torch.linalg.svdvals(keys.T @ torch.linalg.solve(2 * covariance, keys))[0]
        worst = float(sum(map(torch.linalg.cond, (covariance, system))) + dual)
        rounding = 100 * d_in * EPS * worst
        assert (q - naive).norm() <= rounding * naive.norm()
        found = weight_shift(computed, distributed, last, after, q)
        whole = torch.linalg.svdvals(computed @ naive - distributed @ naive)[0]
        scale = found.bound + float(whole)
        assert found.error == pytest.approx(float(whole), abs=rounding * scale)
        apart = torch.linalg.svdvals(computed - last)[0]
        more = after * torch.linalg.svdvals(distributed)[0]
        assert found.bound == pytest.approx(
            float((apart + more) * torch.linalg.svdvals(naive)[0]), abs=rounding * scale
        )
        assert found.error <= found.bound * (1 + 10 * EPS)


def test_the_bound_is_reached_and_can_fail_for_a_residual_that_was_not_distributed():
    q, last = torch.eye(3), torch.diag(torch.tensor([4.0, 1, 1]))
    tight = weight_shift(-last, last / 4, last, 3, q)  # opposite residuals: 2 |R| + 3/4 |R|
    assert tight.bound == pytest.approx(2 * 4 + 3 * 1)
    assert tight.error == pytest.approx(5.0)
    same = weight_shift(3 * last, last / 4, last, 3, q)
    assert same.error == pytest.approx(same.bound) == pytest.approx(11.0)
    shrunk = weight_shift(last, last * 0.1 / 4, last, 3, q)  # a tenth was left to be distributed
    assert shrunk.error > shrunk.bound


def test_past_keys_shrink_what_q_does_to_its_keys_but_not_always_its_norm():
    """``Q K1`` falls as Kp is added, since inverses are ordered; their squares are not."""
    covariance = torch.diag(torch.tensor([1.0, 0.01], dtype=torch.float64))
    keys = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    past = torch.tensor([[1.0], [-0.1]], dtype=torch.float64)
    memory = KeyMemory(least_squares(covariance, 1.0))
    alone = update_operator(memory, keys)
    memory.remember(past)
    then = update_operator(memory, keys)
    assert spectral_norm(then @ keys) < spectral_norm(alone @ keys)
    assert spectral_norm(then) > spectral_norm(alone)


def test_bounds_on_a_models_tensors_are_those_of_dense_inverses(bench):
    bench.prepare()
    layer, weight = 1, WeightId(1)
    keys = bench.module.edit_keys(REQUESTS, weight).double()
    c0 = 0.1 * bench.module.key_covariance(weight).double()
    own, last = bench.residual(layer).double(), bench.residual(2).double()
    for row in residuals._theorem(bench, layer):
        size = row["batch_size"]
        k1 = keys[:, :size]
        q = torch.linalg.solve(c0 + k1 @ k1.T, k1).T
        error = torch.linalg.svdvals((own - last / 2)[:, :size] @ q)[0]
        assert row["error"] == pytest.approx(float(error), rel=1e-6)
        assert row["q_norm"] == pytest.approx(float(torch.linalg.svdvals(q)[0]), rel=1e-6)
    lemma = residuals._lemma(bench, layer)
    assert [row["past_keys"] for row in lemma] == [0, 1, 2, 3, 4, 5]
    cases = {"q_norm": (keys[:, 5:], keys[:, :5]), "q_norm_first_batch": (keys[:, :1], keys[:, 1:])}
    for name, (now, past) in cases.items():
        q = torch.linalg.solve(c0 + past @ past.T + now @ now.T, now).T
        assert lemma[-1][name] == pytest.approx(float(torch.linalg.svdvals(q)[0]), rel=1e-6)


def test_written_batches_are_compared_with_what_was_written(bench):
    """The first layer of the first batch, from its weight before and after."""
    rows = residuals._written(bench)
    assert len(rows) == len(LAYERS) * (6 + 1)
    assert not residuals.violations(rows)
    with bench.edited(PLANS["even"](LAYERS)):
        delta = bench.module.changes[WeightId(0)].double()
    keys = bench.module.edit_keys(REQUESTS, WeightId(0)).double()
    system = 0.1 * bench.module.key_covariance(WeightId(0)).double() + keys @ keys.T
    wanted = bench.residual(0).double() @ torch.linalg.solve(system, keys).T
    (row,) = [row for row in rows if row["batch_size"] == 6 and row["layer"] == 0]
    assert row["error"] == pytest.approx(spectral_norm(wanted - delta), rel=1e-4)
    assert row["bound"] == pytest.approx(row["bound_assumed"], rel=1e-5)  # nothing written before
    assert not bench.module.watching
    assert not bench.module.keep_known


# Known targets, edits that are taken back


def test_targets_are_read_back_and_refused_when_damaged(llama, tmp_path, monkeypatch):
    first = bench_of(module_of(llama, tmp_path)).targets
    monkeypatch.setattr(TargetFinder, "find", None)  # nothing is optimised again
    again = bench_of(module_of(llama, tmp_path))
    for layer in LAYERS:
        assert torch.equal(again.targets[layer].values, first[layer].values)
        assert torch.equal(
            again.targets[layer].losses.nan_to_num(-1), first[layer].losses.nan_to_num(-1)
        )
    with pytest.raises(TypeError):  # other settings need other targets
        _ = bench_of(module_of(llama, tmp_path, clamp=2.0)).targets
    files = sorted((tmp_path / "stats").glob("targets-layer1-*"))
    with safe_open(files[0], "pt") as file:
        said, tensors = file.metadata(), load_file(files[0])
    save_file(tensors, files[0], metadata={**said, "layer": "2"})
    with pytest.raises(InputError, match="belongs to something else"):
        _ = bench_of(module_of(llama, tmp_path)).targets
    tensors["values"].view(torch.int32)[0, 0, 0] ^= 1
    save_file(tensors, files[0], metadata=said)
    with pytest.raises(InputError, match="not those that were written"):
        _ = bench_of(module_of(llama, tmp_path)).targets
    files[0].write_bytes(b"cut")
    with pytest.raises(InputError, match="delete it"):
        _ = bench_of(module_of(llama, tmp_path)).targets


def test_without_a_cache_no_target_is_kept(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = module_of(llama, tmp_path)
    module.covariance = replace(module.covariance, cache=None)
    assert set(bench_of(module).targets) == set(LAYERS)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["text.txt"]


@pytest.mark.parametrize("plan", ["boundary", "even", "computed"])
def test_edits_are_those_of_a_run_and_leave_nothing(language_model, tmp_path, plan):
    module = module_of(language_model, tmp_path)
    bench = bench_of(module)
    before = weights_of(module)
    _ = bench.targets
    with bench.edited(PLANS[plan](LAYERS), batch_size=3):
        edited = weights_of(module)
    assert all(map(torch.equal, weights_of(module), before))
    run = module_of(language_model, tmp_path)
    fit(run, ClosedFormUpdate(LAYERS, plan, 0.1), [REQUESTS[:3], REQUESTS[3:]])
    moved = False
    for ours, theirs, old in zip(edited, weights_of(run), before, strict=True):
        moved = moved or not torch.equal(ours, old)
        # known targets were optimised for six edits at once, the run's for three
        assert (ours - theirs).norm() <= 1e-3 * (theirs - old).norm()
    assert moved


def test_edits_are_taken_back_after_an_error_and_can_be_rescaled(bench):
    before = weights_of(bench.module)
    with bench.edited(PLANS["last"](LAYERS)):
        norm = bench.update_norm()
        change = bench.module.changes[WeightId(2)]
        assert norm == pytest.approx(float(change.norm()), rel=1e-6)
        bench.module.rescale(0.5)
        assert bench.update_norm() == pytest.approx(norm / 2, rel=1e-5)
    with pytest.raises(RuntimeError, match="on purpose"), bench.edited(PLANS["first"](LAYERS)):
        raise RuntimeError("on purpose")
    assert all(map(torch.equal, weights_of(bench.module), before))


# Simulated editing


def naive_probabilities(bench: Bench, layer: int, change: Tensor, replaced: bool) -> list[float]:
    """One forward pass a record: the block's output gets ``change``, or takes the FFN's place."""
    model, tokenizer = bench.module.model, bench.module.tokenizer
    block = bench.module.blocks[layer]
    ffn = block.mlp if hasattr(block, "mlp") else None
    found = []
    for index, request in enumerate(REQUESTS):
        (target,) = encode_targets(tokenizer, [request.target_new])
        (row,) = encode_with_subject(tokenizer, [request.prompt], [request.subject])
        ids = torch.tensor([row.ids + target[:-1]])

        def hook(_module, _args, output, at=row.lookup, index=index):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            old = 0 if replaced else hidden[0, at]
            hidden[0, at] = old + change[:, index]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = (ffn if replaced else block).register_forward_hook(hook)
        try:
            with torch.no_grad():
                logits = model(ids).logits[0, -len(target) :].double()
        finally:
            handle.remove()
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(target))
        found.append(float((-nll).exp()))
    return found


def test_simulated_editing_is_a_changed_output_at_the_subject(language_model, tmp_path):
    bench = bench_of(module_of(language_model, tmp_path))
    for layer in LAYERS:
        changes = contribution.simulated_changes(bench, layer)
        for change in (torch.zeros_like(bench.output(layer)), changes["distributed"]):
            got = contribution.probabilities(bench, layer, change).tolist()
            assert got == pytest.approx(naive_probabilities(bench, layer, change, False), rel=1e-4)
        memory = bench.ffn_output(2) + bench.target(2) - bench.output(2)
        literal = contribution.probabilities(bench, layer, changes["literal"]).tolist()
        share = memory / (3 - layer)  # m^L / (L - l + 1) in place of what the FFN gives out
        assert literal == pytest.approx(naive_probabilities(bench, layer, share, True), rel=1e-4)


def test_what_an_ffn_writes_is_seen_as_it_arrives(tmp_path):
    """Granite adds 0.22 of its FFN's output: replaced is what arrives."""
    bench = bench_of(module_of(LanguageModel(random_model("granite"), tokenizer(True)), tmp_path))
    assert bench.multiple(1) == pytest.approx(0.22)
    change = contribution.simulated_changes(bench, 1)["literal"]
    got = contribution.probabilities(bench, 1, change).tolist()
    memory = bench.ffn_output(2) + bench.target(2) - bench.output(2)
    wanted = naive_probabilities(bench, 1, memory / 2 / 0.22, True)
    assert got == pytest.approx(wanted, rel=1e-4)
    (row,) = (r for r in residuals._written(bench) if r["batch_size"] == 6 and r["layer"] == 2)
    assert row["error"] <= 1e-4 * row["q_norm"] * spectral_norm(bench.residual(2) / 0.22)


def test_contribution_and_similarity_by_hand(bench):
    rows = {(r["layer"], r["kind"]): r for r in contribution.contribution(bench).rows}
    zero = torch.zeros_like(bench.output(0))
    before = torch.tensor(naive_probabilities(bench, 0, zero, False))
    own = bench.target(1) - bench.output(1)
    after = torch.tensor(naive_probabilities(bench, 1, own, False))
    assert rows[1, "computed"]["score"] == pytest.approx(float((after - before).mean()), rel=1e-4)
    assert rows[2, "distributed"] == {**rows[2, "computed"], "kind": "distributed"}
    assert rows[2, "literal"]["score"] == pytest.approx(rows[2, "computed"]["score"], rel=1e-4)

    cosines = {(r["layer"], r["kind"]): r["cosine"] for r in similarity.similarity(bench).rows}
    one, other = bench.residual(2).double(), own.double()
    by_hand = (one * other).sum(0) / (one.norm(dim=0) * other.norm(dim=0))
    assert cosines[1, "residuals"] == pytest.approx(float(by_hand.mean()), rel=1e-5)
    ffn = bench.ffn_output(1).double()
    one, other = ffn + one / 2, ffn + other
    by_hand = (one * other).sum(0) / (one.norm(dim=0) * other.norm(dim=0))
    assert cosines[1, "memories"] == pytest.approx(float(by_hand.mean()), rel=1e-5)
    assert all(cosines[2, kind] == pytest.approx(1, rel=1e-5) for kind in similarity.STYLES)


def test_steps_are_counted_on_a_run_that_computes_every_layer(llama, tmp_path):
    easy = {"stop_loss": 6.18, "steps": 8}
    rows = steps.steps(bench_of(module_of(llama, tmp_path, **easy))).rows
    run = module_of(llama, tmp_path, **easy)
    fit(run, ClosedFormUpdate(LAYERS, "computed", 0.1), [REQUESTS])
    for row in rows:
        counts = []
        for course in run.target_losses[row["layer"]][..., 0].tolist():
            counts.append(sum(1 for loss in course if loss >= 6.18))  # NaN is not
        assert row["steps"] == pytest.approx(sum(counts) / len(counts))
    assert 0 < rows[0]["steps"] < 8


# Distances


def test_distances_against_other_ways_to_compute_them():
    draw = torch.Generator().manual_seed(0)
    one = torch.randn(50, 6, generator=draw, dtype=torch.float64)
    mixed = torch.randn(6, 6, generator=draw, dtype=torch.float64)
    other = one @ mixed + 0.3 * torch.randn(50, 6, generator=draw, dtype=torch.float64) + 1

    centre = torch.eye(50, dtype=torch.float64) - 1 / 50

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        return ((a @ a.T) @ centre @ (b @ b.T) @ centre).trace()

    kernel = hsic(one, other) / (hsic(one, one) * hsic(other, other)).sqrt()
    assert linear_cka(one, other) == pytest.approx(float(kernel), rel=1e-9)
    rotation = torch.linalg.qr(mixed).Q
    assert linear_cka(one, 3 * one @ rotation + 2) == pytest.approx(1, abs=1e-9)

    first, second = torch.cov(one.T), torch.cov(other.T)
    root = scipy.linalg.sqrtm((first @ second).numpy()).real
    gap = ((one.mean(0) - other.mean(0)) ** 2).sum()
    wanted = float(gap + first.trace() + second.trace()) - 2 * root.trace()
    assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(one, one + 2) == pytest.approx(4 * 6, rel=1e-9)

    shifted = relative_shift(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 1.0]]))
    assert shifted.tolist() == pytest.approx([0.6])


# Combinations and files


def test_combinations_hold_every_plan_once():
    layers = [4, 5, 6, 7, 8]
    found = combinations(layers)
    by_plan = {each.plan: list(each.updates) for each in found if each.plan}
    assert by_plan == {name: plan(layers) for name, plan in PLANS.items() if name != "none"}
    assert len({each.updates for each in found}) == len(found) == 16
    assert all(update.target_layer >= update.layer for each in found for update in each.updates)
    assert (LayerUpdate(4, 8, 0.2),) in [each.updates for each in found]
    boundary_of_last = (LayerUpdate(4, 8, 0.5), LayerUpdate(8, 8, 1.0))
    assert boundary_of_last in [each.updates for each in found]


def test_csv_leaves_out_what_is_not_finite():
    assert csv_text([{"a": 1.5, "b": float("nan"), "c": "x"}]) == "a,b,c\n1.5,,x\n"
    mean, error = estimate(torch.tensor([2.0]))
    assert (mean, error) == (2.0, pytest.approx(float("nan"), nan_ok=True))


@pytest.fixture(scope="module")
def flags(llama, tmp_path_factory) -> list[str]:
    """A run file's worth of flags for a small random model."""
    folder = tmp_path_factory.mktemp("analyze")
    save(llama, folder / "base")
    (folder / "text.txt").write_text("\n".join(CORPUS * 12))
    facts = [
        {
            "subject": who,
            "prompt": prompt,
            "target_new": new,
            "target_true": "Paris",
            "paraphrases": [f"{who} has"],
            "neighborhood_prompts": [{"prompt": f"The town near {new} is", "answer": "Rome"}],
            "generation_prompts": [f"{who} was"],
            "reference_texts": [f"{who} was in {new}."],
        }
        for who, prompt, new in FACTS
    ]
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    return [
        f"--model.name_or_path={folder / 'base'}",
        "--model.context_tokens=4",
        "--model.target.steps=4",
        f"--model.covariance.corpus={folder / 'text.txt'}",
        "--model.covariance.tokens_per_dim=8",
        f"--model.covariance.cache={folder / 'stats'}",
        f"--data.path={folder / 'facts.jsonl'}",
        "--data.batch_size=2",
        "--update.layers=[0,2]",
        "--update.covariance_weight=0.1",
        f"--run.root={folder / 'runs'}",
        "--run.wandb=off",
        "--trainer.accelerator=cpu",
    ]


TWO = {name: STUDIES[name] for name in ("contribution", "similarity")}


@pytest.fixture
def analyze(flags, tmp_path, capsys):
    def go(study: str, *more: str) -> tuple[int, str, str]:
        root = f"--study.root={tmp_path / 'analyses'}"
        code = main(["analyze", study, *flags, "--study.records=4", root, *more])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return go


def test_all_studies_are_made_once_and_told_in_one_report(analyze, tmp_path, monkeypatch):
    code, out, err = analyze("all")
    assert code == 0, err
    folder = tmp_path / "analyses" / "edit"
    assert out.splitlines()[-1] == f"report: {folder / 'report.md'}"
    report = (folder / "report.md").read_text()
    for name, study in STUDIES.items():
        assert study.title in report
        assert f"({name}.png)" in report
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        rows = list(csv.DictReader((folder / f"{name}.csv").open()))
        assert rows, name
    again, out, _ = analyze("all")
    assert again == 0
    assert out.count("made before") == len(STUDIES)
    monkeypatch.setattr(command, "STUDIES", TWO)  # one alone is always made
    more: list[str] = []
    for changed in (
        "--model.target.clamp=2",
        "--model.covariance.tokens_per_dim=4",
        "--data.protocol=zsre",
        "--measure.generate=false",
        "--seed_everything=7",
        "--study.records=3",
    ):
        more.append(changed)  # each differs from the one before in a single setting
        code, out, err = analyze("all", *more)
        assert code == 0, err
        assert "made before" not in out
        assert analyze("all", *more)[1].count("made before") == len(TWO)


def test_shift_compares_runs_of_the_model_and_refuses_others(analyze, flags, tmp_path, capsys):
    runs = [f"--run.root={tmp_path}", "--measure.generate=false", "--data.edits=4"]
    runs.append("--run.checkpoint_every=0")
    assert main(["fit", *flags, *runs, "--run.name=blue"]) == 0
    shutil.copytree(tmp_path / "blue", tmp_path / "records")
    shutil.rmtree(tmp_path / "records" / "model")
    folders = f"--study.runs=[{tmp_path / 'blue'},{tmp_path / 'records'}]"
    code, _, err = analyze("shift", folders)
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "analyses/edit/shift.csv").open()))
    assert [row["run"] for row in rows] == ["blue", "records"]
    assert rows[0] | {"run": ""} == rows[1] | {"run": ""}  # exported, and put together again
    assert float(rows[0]["relative_shift"]) > 0
    code, _, err = analyze("shift", folders, "--model.dtype=bfloat16")
    assert code == 2
    assert "edited another model" in err
    code, _, err = analyze("shift", f"--study.runs=[{tmp_path / 'nothing'}]")
    assert code == 2
    assert "neither a model nor records" in err


def test_results_are_made_again_with_other_probes(analyze, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "STUDIES", TWO)  # one alone is always made
    (given,) = (flag.split("=", 1)[1] for flag in flags if flag.startswith("--data.path="))
    facts = [json.loads(line) for line in Path(given).read_text().splitlines()]
    for answer in ("Rome", "Oslo"):
        for fact in facts:
            fact["neighborhood_prompts"][0]["answer"] = answer
        (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
        code, out, err = analyze("all", f"--data.path={tmp_path / 'facts.jsonl'}")
        assert code == 0, err
        assert "made before" not in out


def test_shift_leaves_out_what_a_compared_run_edited(llama, tmp_path):
    """A control fact whose prompt a run edits, and one about a subject that it edits."""
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    edits = [("Lyon is in", "Lyon"), ("The river of Porto is", "Porto")]
    lines = [
        json.dumps({"case_id": who, "subject": who, "prompt": prompt, "target_new": "Rome"})
        for prompt, who in edits
    ]
    (run / "edits.jsonl").write_text("\n".join(lines))
    texts = ["Lyon is in", "The bridges of Porto are", *(f"Town {n} is near" for n in range(5))]
    known = [Probe(text, "Rome") for text in texts]
    bench = bench_of(module_of(llama, tmp_path))
    requests = [replace(request, neighborhood=()) for request in REQUESTS]
    found = []
    for runs in ([], [str(run)]):
        settings = StudySettings(runs=runs, prompts=6)
        made = Bench(
            bench.module, bench.update, requests, batch_size=2, controls=known, settings=settings
        )
        found.append(factual_prompts(made))
    assert found == [texts[:6], texts[2:]]
    (run / "edits.jsonl").unlink()
    with pytest.raises(InputError, match="what the run edited cannot be read"):
        edits_of(run)


def test_a_confound_of_one_layer_is_drawn(llama, tmp_path):
    """All plans are one there, and none is called BLUE's."""
    module = module_of(llama, tmp_path)
    update = ClosedFormUpdate([1], "boundary", 0.1)
    result = confound(Bench(module, update, REQUESTS, batch_size=2, trainer={"accelerator": "cpu"}))
    assert [row["combination"] for row in result.rows] == ["unedited", "even"]
    assert [len(axis.containers) for axis in result.figure.axes] == [1, 1]  # a point with its error


def test_the_picture_of_residuals_shows_every_layer():
    layers = list(range(8))
    norms = [{"apart": 1.0, "standard_error": 0.1} for _ in layers]
    rows = [
        {"layer": n, "batch_size": 2, "past_keys": 2, "bound": 2.0, "error": 1.0}
        | {"q_norm": 1.0 + n, "q_norm_first_batch": 2.0 + n}
        for n in layers
    ]
    figure = residual_figure(norms, rows, rows, layers, 2)
    assert [len(axis.lines) for axis in figure.axes[2:]] == [8, 16]
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said[:-1] == [f"|Q|, layer {n}" for n in layers]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["contribution", "--study.records=0"], "study.records must be positive"),
        (["contribution", "--trainer.devices=2"], "analyze runs in one process"),
        (["contribution", "--update.layers=[0,9]"], "no layer 9"),
        (["similarly"], "did you mean similarity"),
    ],
)
def test_what_cannot_be_analysed(analyze, args, said):
    code, _, err = analyze(*args)
    assert code == 2
    assert said in err
    assert "Traceback" not in err
