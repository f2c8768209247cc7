"""Equality with the reference evaluators, on the reference numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.language_model.scoring import generate, perplexity, score_targets
from lightning_blue.metrics import functional as F
from lightning_blue.metrics.evaluation import evaluate

MODELS = ("tiny-gpt2", "tiny-llama")
STATES = {"pre": False, "post_MEMIT_blue_b2": True}
WEIGHT = {
    "tiny-gpt2": "transformer.h.{}.mlp.c_proj.weight",
    "tiny-llama": "model.layers.{}.mlp.down_proj.weight",
}


class Case(NamedTuple):
    name: str
    state: str
    model: Any
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "golden/metrics/model_metrics.json").read_text())


@pytest.fixture(scope="module")
def texts(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "golden/metrics/text_metrics.json").read_text())


@pytest.fixture(scope="module", params=[(n, s) for n in MODELS for s in STATES], ids="-".join)
def case(request: pytest.FixtureRequest, shared: Path) -> Case:
    """Each model, as it was and after two batches of MEMIT with BLUE."""
    name, state = request.param
    model = AutoModelForCausalLM.from_pretrained(
        shared / "golden/models" / name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if STATES[state]:
        edited = load_file(shared / "golden/edits" / name / "MEMIT_blue.safetensors")
        for layer in (1, 4):
            model.get_parameter(WEIGHT[name].format(layer)).data.copy_(
                edited[f"b2.weight.layer{layer}"]
            )
    tokenizer = AutoTokenizer.from_pretrained(shared / "golden/models" / name)
    return Case(name, state, model, tokenizer)


def counterfact_request(record: dict[str, Any]) -> EditRequest:
    fact = record["requested_rewrite"]
    true = fact["target_true"]["str"]
    return EditRequest(
        case_id=str(record["case_id"]),
        prompt=fact["prompt"],
        subject=fact["subject"],
        target_new=fact["target_new"]["str"],
        target_true=true,
        paraphrases=tuple(record["paraphrase_prompts"]),
        neighborhood=tuple(Probe(prompt, true) for prompt in record["neighborhood_prompts"]),
    )


def zsre_request(raw: dict[str, Any]) -> EditRequest:
    return EditRequest(
        case_id="0",
        prompt=raw["src"].replace(raw["subject"], "{}"),
        subject=raw["subject"],
        target_new=raw["answers"][0],
        paraphrases=(raw["rephrase"],),
        neighborhood=(Probe(raw["loc"] + "?", raw["loc_ans"]),),
    )


def counterfact_records(golden: dict[str, Any], case: Case) -> list[tuple[dict, dict]]:
    """Pair every record, real and synthetic, with what the reference evaluator says of it."""
    expected = golden["counterfact"][case.name]
    real = zip(golden["counterfact"]["records"], expected[case.state], strict=True)
    synthetic = zip(expected["synthetic_records"], expected[f"{case.state}_synthetic"], strict=True)
    return [*real, *synthetic]


def test_counterfact_probabilities_and_top1(golden: dict[str, Any], case: Case) -> None:
    prompts, targets, nll, correct = [], [], [], []
    for record, expected in counterfact_records(golden, case):
        request = counterfact_request(record)
        by_kind = {
            "rewrite": ([request.text], "target_new"),
            "paraphrase": (request.paraphrases, "target_new"),
            "neighborhood": (record["neighborhood_prompts"], "target_true"),
        }
        for kind, (asked, wanted) in by_kind.items():
            flags = expected[f"{kind}_prompts_correct"]
            for prompt, probs, flag in zip(
                asked, expected[f"{kind}_prompts_probs"], flags, strict=True
            ):
                for target in ("target_new", "target_true"):
                    prompts.append(prompt)
                    targets.append(record["requested_rewrite"][target]["str"])
                    nll.append(probs[target])
                    correct.append(flag if target == wanted else None)
    scores = score_targets(case.model, case.tokenizer, prompts, targets)
    torch.testing.assert_close(
        torch.tensor([score.nll for score in scores]), torch.tensor(nll), rtol=1e-4, atol=0
    )
    judged = [
        (all(s.correct), flag) for s, flag in zip(scores, correct, strict=True) if flag is not None
    ]
    assert [ours for ours, _ in judged] == [reference for _, reference in judged]


def test_counterfact_metrics(golden: dict[str, Any], case: Case) -> None:
    pairs = counterfact_records(golden, case)
    evaluation = evaluate(
        case.model,
        case.tokenizer,
        [counterfact_request(record) for record, _ in pairs],
        generate=False,
        continuation_tokens=0,
    )
    wanted = {
        "efficacy": ("rewrite", lambda p: p["target_new"] < p["target_true"]),
        "generalization": ("paraphrase", lambda p: p["target_new"] < p["target_true"]),
        "specificity": ("neighborhood", lambda p: p["target_true"] < p["target_new"]),
    }
    for name, (kind, success) in wanted.items():
        fractions = []
        for _, expected in pairs:
            flags = [success(probs) for probs in expected[f"{kind}_prompts_probs"]]
            fractions.append(sum(flags) / len(flags))
        estimate = evaluation.metrics[name]
        assert estimate["value"] == pytest.approx(100 * sum(fractions) / len(fractions))
        ours = [outcome.values[name] for outcome in evaluation.outcomes]
        assert ours == pytest.approx(fractions)


def zsre_flags(case: Case, raw: dict[str, Any]) -> dict[str, list[bool]]:
    request = zsre_request(raw)
    (probe,) = request.neighborhood
    scores = score_targets(
        case.model,
        case.tokenizer,
        [request.text, request.paraphrases[0], probe.prompt],
        [request.target_new, request.target_new, probe.answer],
    )
    return {
        f"{kind}_prompts_correct": list(score.correct)
        for kind, score in zip(("rewrite", "paraphrase", "neighborhood"), scores, strict=True)
    }


def top1(case: Case, text: str, token: int) -> bool:
    """Say whether a token is the most probable one after a text, by one plain forward pass."""
    with torch.no_grad():
        logits = case.model(torch.tensor([case.tokenizer(text)["input_ids"]])).logits
    return bool(logits[0, -1].argmax() == token)


def with_reference_flaws(case: Case, raw: dict[str, Any], record: dict[str, Any]) -> dict:
    """Flags as the reference evaluator computes them on Llama.

    It puts a second space before the target tokens that it has already read, and takes the BOS
    that its tokenizer puts before a neighbour's answer for the answer's first token.
    """
    ids = case.tokenizer(f" {raw['answers'][0]}", add_special_tokens=False)["input_ids"]
    flags = {}
    for kind, prompt in (("rewrite", raw["src"]), ("paraphrase", raw["rephrase"])):
        flags[f"{kind}_prompts_correct"] = [
            top1(case, f"{prompt} {case.tokenizer.decode(ids[:i])}" if i else prompt, token)
            for i, token in enumerate(ids)
        ]
    flags["neighborhood_prompts_correct"] = [
        top1(case, pair["prompt"], case.tokenizer(pair["target"])["input_ids"][1])
        for pair in record["neighborhood_prompts"]
    ]
    return flags


def test_zsre_flags(golden: dict[str, Any], case: Case) -> None:
    data = golden["zsre"][case.name]
    raw_records = data["raw_records"] + data["synthetic_raw"]
    records = data["records"] + data["synthetic_records"]
    expected = data[case.state] + data[f"{case.state}_synthetic"]
    ours = [zsre_flags(case, raw) for raw in raw_records]
    assert any(any(flags["rewrite_prompts_correct"]) for flags in ours)
    if case.name == "tiny-gpt2":
        assert ours == expected
        return
    # Right where the reference is wrong: its flags follow from its two flaws, and ours from
    # the target's own tokens behind the prompt.
    flawed = [with_reference_flaws(case, *pair) for pair in zip(raw_records, records, strict=True)]
    assert flawed == expected
    assert ours == [without_flaws(case, raw) for raw in raw_records]
    for kind in ("rewrite_prompts_correct", "neighborhood_prompts_correct"):
        assert [flags[kind] for flags in ours] != [flags[kind] for flags in expected]
    for mine, reference in zip(ours, expected, strict=True):
        for kind in ("rewrite_prompts_correct", "paraphrase_prompts_correct"):
            assert mine[kind][0] == reference[kind][0]  # no flaw before the first token


def without_flaws(case: Case, raw: dict[str, Any]) -> dict:
    flags = {}
    for kind, prompt, target in (
        ("rewrite", raw["src"], raw["answers"][0]),
        ("paraphrase", raw["rephrase"], raw["answers"][0]),
        ("neighborhood", f"{raw['loc']}?", raw["loc_ans"]),
    ):
        ids = case.tokenizer(f" {target}", add_special_tokens=False)["input_ids"]
        flags[f"{kind}_prompts_correct"] = [
            top1(case, prompt + case.tokenizer.decode(ids[:i]), token)
            for i, token in enumerate(ids)
        ]
    return flags


def test_zsre_metrics(golden: dict[str, Any], case: Case) -> None:
    data = golden["zsre"][case.name]
    raw_records = data["raw_records"] + data["synthetic_raw"]
    expected = data[case.state] + data[f"{case.state}_synthetic"]
    if case.name == "tiny-llama":
        expected = [without_flaws(case, raw) for raw in raw_records]
    evaluation = evaluate(
        case.model,
        case.tokenizer,
        [zsre_request(raw) for raw in raw_records],
        protocol="zsre",
        continuation_tokens=0,
    )
    kinds = {"efficacy": "rewrite", "generalization": "paraphrase", "specificity": "neighborhood"}
    for name, kind in kinds.items():
        flags = [record[f"{kind}_prompts_correct"] for record in expected]
        mean = sum(sum(f) / len(f) for f in flags) / len(flags)
        assert evaluation.metrics[name]["value"] == pytest.approx(100 * mean)


@pytest.mark.parametrize(("key", "length"), [("ppl", None), ("ppl_max10", 10)])
def test_perplexity(golden: dict[str, Any], case: Case, key: str, length: int | None) -> None:
    expected = golden["perplexity"][case.name][case.state]
    special = len(case.tokenizer("")["input_ids"])
    cut = None if length is None else length - special
    ours = perplexity(case.model, case.tokenizer, expected["text"], max_tokens=cut)
    # The reference divides the sum over n - 1 predicted tokens by n; ours is the mean over them.
    predicted = len(case.tokenizer(expected["text"])["input_ids"][:length]) - 1
    assert ours["tokens"] == predicted
    nats = math.log(expected[key]) * (predicted + 1) / predicted
    assert ours["value"] == pytest.approx(math.exp(nats), rel=1e-4)


def test_greedy_generation(golden: dict[str, Any], case: Case) -> None:
    expected = golden["generate_top1"][case.name][case.state]
    prompts = expected["prompts"]
    continuations = generate(case.model, case.tokenizer, prompts, max_length=30, top_k=1)
    ours = [prompt + more for prompt, more in zip(prompts, continuations, strict=True)]
    assert ours == expected["naive_greedy"]


def test_ngram_entropy(texts: dict[str, Any]) -> None:
    for record in texts["ngram"]:
        assert F.fluency(record["text"]) == pytest.approx(record["entropy"], abs=1e-9)


def test_tfidf_similarity(shared: Path, texts: dict[str, Any]) -> None:
    corpus = json.loads((shared / "golden/cov_texts.json").read_text())
    vectorizer = F.fit_tfidf(corpus["texts"][:50])
    assert len(vectorizer.vocabulary_) == 1341
    for record in texts["tfidf"]:
        similarity = F.tfidf_similarity(record["a"], record["b"], vectorizer)
        # Where the reference divides by zero, ours is defined.
        expected = 0.0 if record["is_nan"] else record["with_toarray_fix"]
        assert similarity == pytest.approx(expected, abs=1e-9)
