"""The textbook implementation of the benchmark against the package, and the benchmark itself."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from benchmarks import textbook
from benchmarks.__main__ import main, parse
from benchmarks.floor import (
    Costs,
    EditRows,
    closed_form_operations,
    costs_of,
    distinct_tokens,
    search_operations,
)
from benchmarks.results import Row, markdown
from benchmarks.textbook_evaluation import score_record, write_texts, write_texts_of_record
from benchmarks.workload import COVARIANCE_TEXT
from torch.utils.flop_counter import FlopCounterMode

from blue_callbacks import ClosedFormUpdate, WeightId
from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.editing.collecting import collect_covariance
from lightning_blue.editing.covariance import CovarianceSource
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.optimization import TargetOptimization
from lightning_blue.language_model.scoring import generate
from lightning_blue.metrics.evaluation import evaluate

CONTEXTS = ("She plays.", "The river runs through the town.", "In Rome")
REQUESTS = [
    EditRequest("a", "The mother tongue of {} is", "Danielle Darrieux", "English", "French"),
    EditRequest("b", "{} is a twin city of", "Lyon", "São Paulo in Kraków", "Beirut"),
    EditRequest("c", "In 1998 the committee praised {}", "Apple A5", "Rome", "Oslo"),
    EditRequest("d", "{}, who plays the violin, met", "José", "Zoë in the river", "Danielle"),
]
LAYERS = (1, 2)


class Recorder(EditModule):
    """Keeps the targets that it found."""

    def edit_targets(self, batch, layer):
        found = super().edit_targets(batch, layer)
        self.__dict__.setdefault("found", []).append((layer, found.clone()))
        return found


def doubled(language_model):
    model, tokenizer = language_model
    return copy.deepcopy(model).double(), tokenizer


def relative(found, reference):
    return float((found - reference).norm() / reference.norm())


def test_targets_and_weights_equal_the_textbook_in_float64(language_model, tmp_path):
    model, tokenizer = doubled(language_model)
    settings = textbook.Settings(8, 0.3, clamp=2.0, covariance_weight=20.0, contexts=CONTEXTS)
    module = Recorder(
        copy.deepcopy(model),
        tokenizer,
        target=TargetOptimization(steps=8, learning_rate=0.3, clamp=2.0),
        contexts=list(CONTEXTS),
        covariance=CovarianceSource(COVARIANCE_TEXT, cache=str(tmp_path)),
    )
    update = ClosedFormUpdate(LAYERS, covariance_weight=20.0)
    update.on_fit_start(None, module)
    covariances = {layer: module.key_covariance(WeightId(layer)) for layer in LAYERS}
    past = {n: torch.zeros_like(c, dtype=torch.float64) for n, c in covariances.items()}
    unedited = {layer: textbook.weight_of(model, layer).clone() for layer in LAYERS}
    for batch in (REQUESTS[:2], REQUESTS[2:]):
        with torch.no_grad():
            update.on_edit_batch(SimpleNamespace(callbacks=[]), module, batch)
        targets = textbook.edit_batch(model, tokenizer, batch, LAYERS, covariances, past, settings)
        for layer, ours in module.found[-2:]:
            assert relative(ours, targets[layer]) < 1e-8
        for layer in LAYERS:
            ours, reference = (
                module.editable_weights.read(WeightId(layer)),
                textbook.weight_of(model, layer),
            )
            assert relative(ours, reference) < 1e-8
            moved = reference - unedited[layer]
            assert relative(ours - unedited[layer], moved) < 1e-7, "the update, not the weight"


@pytest.mark.parametrize("stop_loss", [0.05, 3.0])
def test_every_loss_equals_the_textbook_in_float32(language_model, stop_loss):
    model, tokenizer = language_model
    search = TargetOptimization(steps=10, learning_rate=0.3, clamp=2.0, stop_loss=stop_loss)
    module = EditModule(model, tokenizer, target=search, contexts=list(CONTEXTS))
    settings = textbook.Settings(10, 0.3, clamp=2.0, stop_loss=stop_loss, contexts=CONTEXTS)
    module.edit_targets(REQUESTS, layer=1)
    counts = []
    for column, request in enumerate(REQUESTS):
        _, losses = textbook.optimise_target(model, tokenizer, request, 1, settings)
        ours = module.target_losses[1][column, :, 0]
        assert int((~ours.isnan()).sum()) == len(losses)
        difference = ours[: len(losses)] - torch.tensor(losses).to(ours)
        assert float(difference.abs().max()) < 1e-4
        counts.append(len(losses))
    if stop_loss == 3.0:
        assert min(counts) < 10, "some edit should have stopped early"


def test_covariance_equals_the_textbook(language_model):
    model, tokenizer = language_model
    sequences = [tokenizer(r.text)["input_ids"] for r in REQUESTS]
    modules = {layer: textbook.down_projection(model, layer) for layer in LAYERS}
    found, n_tokens = collect_covariance(model, modules, sequences, sum(map(len, sequences)))
    assert n_tokens == sum(map(len, sequences))
    for layer in LAYERS:
        for stop in (False, True):
            reference = textbook.collect_covariance(model, layer, sequences, stop=stop)
            assert relative(found[layer], reference) < 1e-6


def test_scores_and_texts_equal_the_textbook(language_model):
    model, tokenizer = doubled(language_model)
    record = EditRequest(
        "a",
        "The mother tongue of {} is",
        "Danielle Darrieux",
        "English",
        "French in Paris",
        ("Danielle Darrieux speaks", "She plays. Danielle Darrieux, a native"),
        (Probe("José speaks", "French"), Probe("Zoë in Kraków is a speaker of", "French")),
    )
    outcome = evaluate(model, tokenizer, [record], generate=False).outcomes[0]
    scores = score_record(model, tokenizer, record)
    assert outcome.nll_new == pytest.approx(scores[0][0].nll, abs=1e-5)
    assert outcome.nll_true == pytest.approx(scores[0][1].nll, abs=1e-5)
    assert outcome.correct == tuple(scores[0][0].correct)
    worse = [not new.nll < true.nll for new, true in scores[3:]]
    assert outcome.values["specificity"] == pytest.approx(sum(worse) / 2)
    better = [new.nll < true.nll for new, true in scores[1:3]]
    assert outcome.values["generalization"] == pytest.approx(sum(better) / 2)
    prompts = [record.text, *record.paraphrases]
    one_by_one = write_texts(model, tokenizer, prompts, max_length=40)
    assert write_texts_of_record(model, tokenizer, prompts, max_length=40) == one_by_one
    ours = generate(model, tokenizer, prompts, max_length=40)
    assert [p + more for p, more in zip(prompts, ours, strict=True)] == one_by_one


def test_operations_of_a_forward_pass_are_those_torch_counts(language_model):
    model, _ = language_model
    costs = costs_of(model)
    n_tokens = 12
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(n_tokens)[None], use_cache=False)
    products = n_tokens * (costs.n_layers * costs.block + costs.head)
    attention = costs.n_layers * costs.attention * n_tokens**2
    assert counter.get_total_flops() in (products, products + attention)


def test_distinct_tokens_share_prefixes():
    # 1, 1 2, 1 2 3, 1 2 4, and 2: five tokens that attend to 1, 2, 3, 3 and 1 of them.
    assert distinct_tokens([[1, 2, 3], [1, 2, 4], [2], [1, 2]]) == (5, 10)


def test_operations_of_a_search_by_hand():
    costs = Costs(block=100, key_value=20, head=7, attention=1, down=40, n_layers=4, d_in=8)
    # One rewriting prompt of four tokens, lookup at 1, two read; KL prompt of three, lookup at 0.
    rows = EditRows([[5, 6, 7, 8], [6, 9, 9]], [1, 0], [2, 1])
    # Once, layers 0 and 1: tokens 5, 56, 567, 5678 and 6; above: token 5, the last layer k and v.
    once = 2 * (5 * 100 + (1 + 2 + 3 + 4 + 1)) + (1 * 100 + 1) + 1 * 20
    # A step: layer 2 whole on 3 + 1 tokens, layer 3 keys of all and the rest where it is read.
    step = (4 * 100 + (2 + 3 + 4) + 1) + 4 * 20 + 3 * 80 + (3 + 4) + 1 + 3 * 7
    assert search_operations(costs, [rows], 1, [1]) == once + step
    assert search_operations(costs, [rows], 1, [3]) == once + 5 * step


def test_operations_of_the_closed_form_grow_as_they_should():
    small, large = (closed_form_operations(d, 4, 1, 0) for d in (1000, 2000))
    assert large / small == pytest.approx(4, rel=0.02)  # d^2 for each key
    past = [closed_form_operations(100, 4, 2, n) for n in (0, 10_000, 20_000)]
    assert (past[2] - past[0]) / (past[1] - past[0]) == pytest.approx(4, rel=0.1)  # n^2


def test_a_row_says_ratio_and_distance_from_the_floor():
    row = Row("delta", "layer 3", "edit", ours=0.5, textbook=5.0, floor=0.25, ours_peak=2 * 10**9)
    assert (row.ratio, row.of_floor) == (10.0, 0.5)
    line = "| delta | layer 3 | edit | 5 | 0.5 | 10 x | 0.25 | 50% | 2.00 |"
    assert line in markdown([row])
    assert Row("growth", "x", "edit", ours=1.0).ratio is None


PARTS = ["delta", "closed_form", "covariance", "evaluation", "protocols", "run", "growth", "many"]
PARTS += ["profile", "shortcuts", "curves", "tracing"]


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No reference data: requests, tokenizer and text of the package."""
    monkeypatch.setenv("LIGHTNING_BLUE_SHARED", str(tmp_path / "nothing"))


def test_every_part_runs_at_a_tiny_size(alone, tmp_path, capsys):
    main([*PARTS, "--preset", "smoke", "--out", str(tmp_path)])
    table = capsys.readouterr().out
    for part in PARTS:
        content = json.loads((tmp_path / f"{part}.json").read_text())
        assert content["about"]["matmul_gflops"] > 0
        assert all(row["ours"] > 0 for row in content["rows"])
        assert f"| {part} |" in table
    delta = json.loads((tmp_path / "delta.json").read_text())["rows"][0]
    assert delta["details"]["worst_loss_difference"] < 1e-4
    assert 0 < delta["floor"] < delta["ours"] < delta["textbook"]
    for traced in json.loads((tmp_path / "tracing.json").read_text())["rows"]:
        assert traced["details"]["worst_ratio_of_probabilities"] < 1e-4


def test_the_gpu_preset_runs_at_a_tiny_size_on_the_cpu(alone, tmp_path):
    sizes = "--shape tiny-llama --device cpu --edits 2 --textbook-edits 1 --layers 1 2 --steps 2"
    more = "--critical 1 2 --repeats 1 --records 2 --textbook-records 1 --textbook-texts 1"
    last = "--tokens 500 --matmul 256"
    parts = ["delta", "covariance", "evaluation", "run"]
    arguments = [*parts, "--preset", "gpu", *sizes.split(), *more.split(), *last.split()]
    main([*arguments, "--out", str(tmp_path)])
    about = json.loads((tmp_path / "run.json").read_text())["about"]
    assert about["settings"]["dtype"] == "bfloat16"
    assert about["settings"]["steps"] == 2


def test_wrong_arguments_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["delta", "nonsense"])
    assert "no part nonsense" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--shape", "tiny", "--layers", "3", "8"])
    assert "layers are 0 to 3" in capsys.readouterr().err
