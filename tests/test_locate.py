"""Causal tracing against a plain loop, and whether planted facts are found where they are."""

from __future__ import annotations

import copy
import csv
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from blue_callbacks import ClosedFormUpdate
from conftest import CORPUS, LanguageModel
from lightning_blue import edit
from lightning_blue.__main__ import main
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.covariance import CovarianceSource
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.optimization import TargetOptimization
from lightning_blue.language_model.architectures import Architecture, find_architecture
from lightning_blue.language_model.tokens import encode_with_span
from lightning_blue.locating.corrupted import noise_of
from lightning_blue.locating.effects import Band, Effects, around_the_peak, average
from lightning_blue.locating.facts import (
    LAST_SUBJECT,
    TOKEN_CLASSES,
    TracedFact,
    as_tokens,
    find_known,
    token_class,
)
from lightning_blue.locating.modules import KINDS
from lightning_blue.locating.probe import (
    LayerScore,
    ProbeResult,
    around_the_best,
    measure,
    probe_layers,
    probe_requests,
    split_half,
)
from lightning_blue.locating.tracing import CausalTracer, Trace
from lightning_blue.studies.results import Estimate
from lightning_blue.support.errors import InputError
from random_models import SETTINGS, random_model, tokenizer

FACTS = [
    EditRequest("a", "The mother tongue of {} is", "Danielle Darrieux", "French"),
    EditRequest("b", "{} is a twin city of", "Lyon", "Beirut"),
    EditRequest("c", "{} was created by", "Apple A5", "Apple"),
    EditRequest("d", "In 1998 she went to {}", "São Paulo", "Rome"),
]


@torch.no_grad()
def one_at_a_time(
    model: Any, fact: TracedFact, noise: Tensor, modules: dict[str, list[Any]], size: int
) -> tuple[float, float, Tensor]:
    """The plain way: for each place a pass of a clean row and all noisy ones, from the start."""
    ids = torch.tensor([fact.ids] * (1 + len(noise)))
    subject = slice(fact.first, fact.last + 1)

    def corrupt(_m, _a, out):
        out = out.clone()
        out[1:, subject] += noise.to(out.dtype)
        return out

    def answers(restored: Sequence[Any], position: int) -> Tensor:
        def restore(_m, _a, out):
            whole = out[0] if isinstance(out, tuple) else out
            changed = whole.reshape(len(ids), len(fact.ids), -1).clone()
            changed[1:, position] = changed[0, position]
            changed = changed.reshape(whole.shape)
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        with ExitStack() as stack:
            for module, hook in [
                (model.get_input_embeddings(), corrupt),
                *((module, restore) for module in restored),
            ]:
                stack.callback(module.register_forward_hook(hook).remove)
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        return logits.double().softmax(-1)[:, fact.answer]

    plain = answers([], 0)
    layers = len(modules["hidden"])
    grid = torch.empty(len(KINDS), layers, len(fact.ids) - fact.first)
    for k, kind in enumerate(KINDS):
        for layer in range(layers):
            below = layer - size // 2 if kind != "hidden" else layer
            above = below + (size if kind != "hidden" else 1)
            together = modules[kind][max(0, below) : above]
            for place in range(grid.shape[2]):
                grid[k, layer, place] = answers(together, fact.first + place)[1:].mean()
    return float(plain[0]), float(plain[1:].mean()), grid


def plain_modules(model: Any) -> dict[str, list[Any]]:
    row = find_architecture(model)
    name = row.block.removesuffix(".{}")
    hidden = list(model.get_submodule(name))
    ffn = []
    for block in hidden:
        try:
            ffn.append(block.get_submodule(row.down_projection))
        except AttributeError:  # a mixture of experts
            ffn.append(block.get_submodule(row.down_projection.split(".")[0]))
    return {
        "hidden": hidden,
        "ffn": ffn,
        "attention": [block.get_submodule(row.attention_output) for block in hidden],
    }


def compared(
    model: Any, facts: Sequence[TracedFact], size: int, tokens_per_batch: Sequence[int] = (2048,)
) -> list[CausalTracer]:
    """Trace, and compare with the plain way; noise by its definition."""
    embedded = [
        model.get_input_embeddings()(torch.tensor(f.ids))[f.first : f.last + 1] for f in facts
    ]
    deviation = 3 * torch.cat(embedded).detach().double().std()
    noises = [deviation * noise_of(fact, 3, 5, embedded[0].shape[-1]) for fact in facts]
    modules = plain_modules(model)
    plain = [one_at_a_time(model, *each, modules, size) for each in zip(facts, noises, strict=True)]
    # A probability is off by what its logits are: the sums of all layers, each of d_model terms
    tolerance = 1000 * torch.finfo(model.dtype).eps
    tracers = []
    for tokens in tokens_per_batch:
        tracer = CausalTracer(
            model, find_architecture(model), samples=3, seed=5, tokens_per_batch=tokens
        )
        tracer.window = size
        traces = tracer.trace(facts)
        assert tracer.noise == pytest.approx(float(deviation), rel=1e-6)
        for trace, (clean, corrupted, grid) in zip(traces, plain, strict=True):
            assert trace.clean == pytest.approx(clean, rel=tolerance)
            assert trace.corrupted == pytest.approx(corrupted, rel=tolerance)
            torch.testing.assert_close(trace.restored, grid, rtol=tolerance, atol=0)
            assert (grid / corrupted - 1).abs().max() > 100 * tolerance, "nothing to compare"
        tracers.append(tracer)
    return tracers


@pytest.mark.parametrize("size", [2, 3])
def test_batched_restorations_equal_one_at_a_time(language_model, size):
    """Facts of several lengths and subjects at either end; all in one batch, and in many."""
    model, own = language_model
    tracers = compared(model, as_tokens(own, FACTS), size, tokens_per_batch=(2048, 20))
    assert all(tracer.in_parts for tracer in tracers)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_architecture_is_traced(name):
    model = random_model(name)
    compared(model, as_tokens(tokenizer(True), FACTS[1:2]), 2)


def test_a_model_that_cannot_be_run_in_parts_is_traced_whole(llama, monkeypatch, caplog):
    """Its attention counts columns, so that fewer of them are another result."""
    model, own = copy.deepcopy(llama)
    attention = model.model.layers[1].self_attn
    plain = attention.forward

    def counting(hidden_states, *args, **kwargs):
        out, *rest = plain(hidden_states, *args, **kwargs)
        return (out * (1 + hidden_states.shape[1]), *rest)

    attention.forward = counting
    facts = as_tokens(own, FACTS[:1])  # alone: a padded row would be another one too
    tracer = CausalTracer(model, find_architecture(model), samples=2)
    tracer.trace(facts)
    assert not tracer.in_parts
    assert "cannot be run in parts" in caplog.text


def test_attention_that_cannot_be_found_is_refused(llama):
    named = Architecture("model.layers.{}", "mlp.down_proj")
    with pytest.raises(InputError, match="attention's output projection"):
        CausalTracer(llama.model, named)


def test_the_subject_is_where_the_tokenizer_says(language_model):
    _, own = language_model
    for fact, span in zip(FACTS, as_tokens(own, FACTS), strict=True):
        begin = fact.prompt.index("{}")
        end = begin + len(fact.subject)
        offsets = own(fact.text, return_offsets_mapping=True)["offset_mapping"]
        inside = [i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > begin]
        assert (span.first, span.last) == (inside[0], inside[-1])
    twice = encode_with_span(own, ["Rome and {}"], ["Rome"])[0]
    assert twice.first > 1  # the one in the slot


def test_each_token_has_one_class():
    def classes(n: int, first: int, last: int) -> list[str]:
        fact = TracedFact(list(range(n)), first, last, 0)
        return [TOKEN_CLASSES[token_class(fact, place)] for place in fact.positions]

    assert classes(4, 2, 2) == ["last subject token", "last token"]
    assert classes(3, 1, 2) == ["first subject token", "last subject token"]
    assert classes(5, 0, 1)[2:] == ["first subsequent token", "further tokens", "last token"]


def test_known_facts_are_those_that_greedy_text_begins_with(language_model):
    """All objects that the model says by itself, and none of the others."""
    model, own = language_model
    requests, right = [], []
    for prompt in ("The mother tongue of {} is", "{} is a twin city of", "In 1998 she saw {}"):
        for who in ("Lyon", "Zoë", "São Paulo", "Apple A5", "Danielle Darrieux"):
            text = prompt.replace("{}", who)
            ids = own(text, return_tensors="pt")["input_ids"]
            said = own.decode(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1:])
            if not said.strip() or own(f"{text}{said}")["input_ids"][:-1] != ids[0].tolist():
                continue  # a space, or part of a character
            answers = len(requests) % 3 != 1
            case = EditRequest(text, prompt, who, said if answers else " Kraków", target_prefix="")
            requests.append(case)
            right += [text] * answers
    assert len(right) > 1
    found = find_known(model, own, requests, 99, seed=3)
    assert sorted(fact.case_id for fact in found.facts) == sorted(right)
    assert all(fact.target_true == fact.target_new for fact in found.facts)
    assert found.asked == len(requests)
    assert len(find_known(model, own, requests, 1, seed=3).facts) == 1
    wrong = [request for request in requests if request.case_id not in right]
    with pytest.raises(InputError, match=f"knows none of {len(wrong)} facts"):
        find_known(model, own, wrong, 10, seed=3)


# Averages and rules


def test_effects_are_averaged_over_facts_with_students_interval():
    draw = torch.Generator().manual_seed(0)
    facts = [TracedFact(list(range(n)), 0, last, 0) for n, last in ((4, 0), (6, 2), (7, 3))]
    traces = [Trace(0.9, 0.1, torch.rand(len(KINDS), 2, len(f.ids), generator=draw)) for f in facts]
    effects = average(facts, traces)
    assert effects.facts == [2, 2, 3, 3, 3, 3]
    middle = [
        t.restored[1, 1, 1 : f.last].mean() - 0.1
        for f, t in zip(facts[1:], traces[1:], strict=True)
    ]
    last = [t.restored[2, 0, f.last] - 0.1 for f, t in zip(facts, traces, strict=True)]
    for values, found in (
        (middle, effects.band("ffn", 1, 1)),
        (last, effects.band("attention", LAST_SUBJECT, 0)),
    ):
        mean = sum(map(float, values)) / len(values)
        low, high = scipy.stats.t.interval(
            0.95, len(values) - 1, mean, scipy.stats.sem([float(v) for v in values])
        )
        assert found == pytest.approx((mean, low, high), rel=1e-5)
    assert effects.total == pytest.approx((0.8, 0.8, 0.8))
    alone = average(facts[:1], traces[:1])
    assert math.isnan(alone.ffn_curve()[0].low)
    assert math.isnan(alone.band("ffn", 0, 0).mean)  # no such token


@pytest.mark.parametrize(
    ("curve", "usable", "layers", "peak"),
    [
        ([0, 1, 4, 9, 6, 5, 4, 0], range(7), [3, 4, 5], 3),
        ([9, 9, 9, 9, 9, 9, 9, 9], range(7), [0, 1, 2, 3, 4], 0),
        ([8, 7, 8, 9, 8, 7, 6, 5], range(7), [0, 1, 2, 3, 4], 3),
        ([0, 9, 0, 8, 0, 0, 0, 0], range(7), [1], 1),  # not across a gap
        ([0, 1, 4, 9, 6, 5, 4, 99], range(7), [3, 4, 5], 3),  # the last cannot be edited
        ([0, 5, 9, 5, 0, 0, 0, 0], [1, 3], [1], 1),
        ([0, 0, 0, 0, 0, 0, 0, 0], range(7), [], 0),
    ],
)
def test_layers_around_the_peak(curve, usable, layers, peak):
    mean = torch.zeros(len(KINDS), len(TOKEN_CLASSES), len(curve), dtype=torch.float64)
    mean[KINDS.index("ffn"), LAST_SUBJECT] = torch.tensor(curve)
    sure = Effects(mean, mean - 0.5, mean + 0.5, [3] * 6, Band(1, 1, 1))
    assert around_the_peak(sure, list(usable))[:2] == (layers, peak)
    unsure = Effects(mean, mean - 100, mean + 100, [3] * 6, Band(1, 1, 1))
    assert around_the_peak(unsure, list(usable))[:2] == ([], peak)


def test_layers_around_the_best_score():
    scores = [
        LayerScore(layer, Estimate(score, 0.1), [], [])
        for layer, score in ((0, 0.2), (3, 0.75), (6, 0.8), (9, 0.6), (12, 0.65))
    ]
    proposal = around_the_best(scores, [*range(5), *range(6, 12)])
    assert proposal[:2] == ([3, 4, 6], 6)
    assert around_the_best(scores[3:], range(12))[:2] == ([9, 10, 11], 12)


def test_halves_agree_where_every_fact_ranks_layers_alike():
    order = torch.tensor([0.1, 0.5, 0.3, 0.9], dtype=torch.float64)
    same = order[:, None, None].expand(4, 6, 3)
    assert split_half(same, 0) == pytest.approx(1)
    against = torch.cat([same[:, :1], 1 - same[:, :1]], dim=1)
    assert split_half(against, 0) == pytest.approx(-1)
    assert math.isnan(split_half(same[:, :1], 0))
    assert math.isnan(split_half(torch.ones(4, 6, 3, dtype=torch.float64), 0))


# Facts planted in a known layer

MIXED, PLANTED_IN = 2, 3
PLANTED = [
    ("Rome tower", "Apple"),
    ("Oslo tower", "Paris"),
    ("Tokyo tower", "violin"),
    ("London tower", "Basel"),
    ("Madrid tower", "French"),
    ("Berlin tower", "piano"),
]
PROMPT = "She met the {}"  # read where it is written: a random model attends to little
STRONG: dict[str, Any] = {"steps": 30, "clamp": 10.0, "contexts": [], "covariance_weight": 1e-3}


def mixing_once(mixed: int = MIXED) -> Any:
    """A random Llama whose attention is silent but in one layer.

    Subjects end alike, so that no layer below it can tell them apart at their last token.
    """
    torch.manual_seed(1)
    config = copy.deepcopy(random_model("llama").config)
    config.num_hidden_layers, config.intermediate_size = 6, 48  # fewer than tokens in the text
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            block.self_attn.o_proj.weight.mul_(3 if layer == mixed else 0)
    return model


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Ordinary text."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(CORPUS * 24))
    return file


def plant(model: Any, own: Any, layer: int, text: Path) -> None:
    facts = [{"subject": who, "prompt": PROMPT, "target_new": what} for who, what in PLANTED]
    source = {"corpus": str(text), "tokens_per_dim": 8}
    result = edit(model, own, facts, layers=[layer], progress=False, **source, **STRONG)
    assert not result.failed


@pytest.fixture(scope="module")
def planted(text) -> LanguageModel:
    """The model with facts that were edited into one layer."""
    model, own = mixing_once(), tokenizer(True)
    plant(model, own, PLANTED_IN, text)
    return LanguageModel(model, own)


def effects_of_planted(model: Any, own: Any) -> Effects:
    requests = [EditRequest(who, PROMPT, who, new) for who, new in PLANTED]
    found = find_known(model, own, requests, len(requests), seed=0)
    assert len(found.facts) == len(PLANTED)
    tokens = as_tokens(own, found.facts)
    return average(tokens, CausalTracer(model, find_architecture(model)).trace(tokens))


def test_tracing_finds_planted_facts(planted):
    effects = effects_of_planted(*planted)
    proposal = around_the_peak(effects, range(5))
    assert (proposal.layers, proposal.peak) == ([PLANTED_IN], PLANTED_IN)


@pytest.mark.parametrize("layer", [2, 4])
def test_tracing_finds_facts_of_the_same_model_planted_elsewhere(layer, text):
    model, own = mixing_once(), tokenizer(True)
    plant(model, own, layer, text)
    assert around_the_peak(effects_of_planted(model, own), range(5))[:2] == ([layer], layer)


def test_tracing_finds_another_layer_of_another_model(llama, text):
    model, own = copy.deepcopy(llama)
    plant(model, own, 1, text)
    assert around_the_peak(effects_of_planted(model, own), range(3)).peak == 1


def probed(model: Any, own: Any, text: Path) -> ProbeResult:
    source = CovarianceSource(str(text), tokens_per_dim=8, cache=None)
    target = TargetOptimization(steps=STRONG["steps"], clamp=STRONG["clamp"])
    module = EditModule(model, own, target=target, contexts=[], covariance=source)
    known = [EditRequest(w, PROMPT, w, new, target_true=new) for w, new in PLANTED]
    edits = probe_requests(known, known, module, seed=0)
    update = ClosedFormUpdate([0], covariance_weight=STRONG["covariance_weight"])
    return probe_layers(module, update, edits, range(5), range(5), accelerator="cpu")


@pytest.mark.parametrize(("mixed", "layer"), [(1, 4), (3, 4)])
def test_the_probe_finds_from_where_on_facts_can_be_written(mixed, layer, text):
    """It follows where subjects are told apart, wherever the facts that it overwrites stand."""
    model, own = mixing_once(mixed), tokenizer(True)
    plant(model, own, layer, text)
    efficacy = [each.shares[0] for each in probed(model, own, text).scores]
    steps = {at: min(efficacy[at:]) - max(efficacy[:at]) for at in range(1, 5)}
    assert steps[mixed] > 0
    assert max(steps, key=steps.__getitem__) == mixed


def test_the_probe_proposes_among_layers_that_tell_subjects_apart(planted, text):
    model, own = planted
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = probed(model, own, text)
    below, above = result.scores[:MIXED], result.scores[MIXED:]
    assert max(each.score.mean for each in below) + 0.1 < max(each.score.mean for each in above)
    assert set(result.proposal.layers) <= set(range(MIXED, 5))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_facts_become_edits_that_can_be_measured(planted):
    module = EditModule(*planted)
    known = [
        EditRequest("a", PROMPT, "Rome tower", "Apple", "Apple", relation="P1"),
        EditRequest("b", "{} speaks", "Zoë", "French", "French", relation="P2"),
        EditRequest("c", PROMPT, "Oslo tower", "Paris", "Paris", relation="P1"),
        EditRequest("d", "{} plays", "José", "violin", "piano", ("José plays",), relation="P3"),
    ]
    a, b, c, d = probe_requests(known, known, module, seed=0)
    assert (a.target_new, c.target_new) == ("Paris", "Apple")  # of the same relation
    assert b.target_new not in ("French", "violin")  # what some fact of the model says
    assert (d.target_new, d.target_true, d.paraphrases) == ("violin", "piano", ("José plays",))
    assert len(a.paraphrases) == 2
    assert all(text.endswith("She met the Rome tower") for text in a.paraphrases)
    near = [probe.prompt for probe in a.neighborhood]
    assert "She met the Oslo tower" not in near  # its object is the new one
    assert near == ["Zoë speaks", "José plays"]


@torch.no_grad()
def test_shares_and_successes_are_those_of_plain_passes(planted):
    model, own = planted
    known = [EditRequest(w, PROMPT, w, new, target_true=new) for w, new in PLANTED]
    module = EditModule(model, own)
    edits = probe_requests(known, known, module, seed=0)[:2]

    def probability(prompt: str, target: str) -> float:
        ids, logs = own(prompt)["input_ids"], []
        for token in own(f" {target}", add_special_tokens=False)["input_ids"]:
            logs.append(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token])
            ids = [*ids, token]
        return float(torch.stack(logs).mean().exp())

    found = measure(module, edits)
    for row, one in zip(found, edits, strict=True):
        groups = [
            [(one.text, one.target_new, one.target_true)],
            [(p, one.target_new, one.target_true) for p in one.paraphrases],
            [(n.prompt, n.answer, one.target_new) for n in one.neighborhood],
        ]
        for place, group in enumerate(groups):
            pairs = [(probability(p, w), probability(p, o)) for p, w, o in group]
            share = sum(w / (w + o) for w, o in pairs) / len(pairs)
            assert float(row[0, place]) == pytest.approx(share, rel=1e-3, abs=1e-6)
            assert float(row[1, place]) == sum(w > o for w, o in pairs) / len(pairs)


# The command


@pytest.fixture(scope="module")
def folder(planted, text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("locate")
    for part in planted:
        part.save_pretrained(folder / "model")
    records = [
        {"known_id": i, "subject": who, "prompt": PROMPT.format(who), "attribute": what}
        for i, (who, what) in enumerate([*PLANTED, ("Zoë tower", "river"), ("Lyon tower", "paper")])
    ]
    (folder / "known.json").write_text(json.dumps(records))
    (folder / "text.txt").write_text(text.read_text())
    return folder


def command(folder: Path, *more: str) -> int:
    given = [
        f"--model.covariance.corpus={folder / 'text.txt'}",
        f"--model.covariance.cache={folder / 'stats'}",
        "--model.covariance.tokens_per_dim=8",
        "--update.covariance_weight=0.001",
        "--model.target.steps=30",
        "--model.target.clamp=10",
        "--model.contexts=[]",
        "--trainer.accelerator=cpu",
    ]
    return main(["locate", str(folder / "model"), *given, *more])


def test_the_command_writes_what_others_read(folder, planted, capsys):
    out = folder / "out"
    few = ["--samples=3", "--probe-facts=4", "--probe-layers=2"]
    assert command(folder, f"--data={folder / 'known.json'}", f"--output={out}", *few) == 0
    said, log = capsys.readouterr()
    assert "decided for the probe: learning rate" in log
    assert "layers, by depth" not in log
    assert all(len(line) <= 80 for line in said.splitlines())
    assert "6 known of 8 asked" in " ".join(said.split())
    found = json.loads((out / "locate.json").read_text())
    assert found["model"] == str(folder / "model")
    assert found["identity"] == EditModule(*planted).identity
    assert found["tracing"]["layers"] == [PLANTED_IN]
    assert found["tracing"]["peak"] == PLANTED_IN
    assert found["layers"] == found["probe"]["layers"]
    assert set(found["layers"]) <= {3, 4}
    assert found["layers_from"] == "probe"
    assert f"--update.layers=[{','.join(map(str, found['layers']))}]" in said
    assert len(found["tracing"]["curve"]) == 6
    assert [each["layer"] for each in found["probe"]["curve"]] == [0, PLANTED_IN, 4]
    effects = list(csv.DictReader((out / "effects.csv").open()))
    ffn = [r for r in effects if (r["restored"], r["token"]) == ("ffn", "last subject token")]
    for row, band in zip(ffn, found["tracing"]["curve"], strict=True):
        assert float(row["indirect_effect"]) == pytest.approx(band["mean"], rel=1e-4, abs=1e-9)
    assert len(list(csv.DictReader((out / "facts.csv").open()))) == 6
    for name in ("heat_maps", "by_layer", "proposals"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    again = command(folder, f"--data={folder / 'known.json'}", f"--output={out}", *few)
    assert again == 2
    assert "--force" in capsys.readouterr().err


def test_without_a_probe_the_tracing_proposes(folder, capsys):
    out = folder / "traced"
    few = ["--facts=4", "--samples=2", "--probe-facts=0"]
    assert command(folder, f"--data={folder / 'known.json'}", f"--output={out}", *few) == 0
    found = json.loads((out / "locate.json").read_text())
    assert (found["layers"], found["layers_from"]) == ([PLANTED_IN], "tracing")
    assert found["probe"]["layers"] == found["probe"]["curve"] == []
    assert not (out / "probe.csv").exists()
    assert found["facts"]["known"] == 4


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "no facts are given that this model may know"),
        (["--data=nothing.json"], "no such file"),
        (["--facts=0"], "--facts"),
        (["--update.layer=[1]"], "update.layer"),
    ],
)
def test_bad_input_is_one_message(folder, tmp_path, capsys, args, said):
    assert command(folder, f"--output={tmp_path / 'out'}", *args) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("error: ") == 1
    assert not (tmp_path / "out").exists()
