"""Free generation against the reference evaluation's numbers: texts, token ids and scores, exactly.

Those of WILD's public code (arXiv 2502.11177) on two tiny models, as they were and after two edit
batches; ``golden/README-rivals.md`` of the reference data says how they were made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from helpers import load_model
from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.metrics import table
from lightning_blue.metrics.evaluation import Evaluation, evaluate
from lightning_blue.metrics.generated import (
    GenerationSettings,
    unedited_continuations,
    with_answers,
)
from lightning_blue.metrics.matching import is_match, normalized

WEIGHT = {
    "tiny-gpt2": "transformer.h.{}.mlp.c_proj.weight",
    "tiny-llama": "model.layers.{}.mlp.down_proj.weight",
}
FORMS = {"bare": "question-only", "qa": "qa_inst"}


class Case(NamedTuple):
    golden: dict[str, Any]
    form: str
    before: Evaluation
    after: Evaluation


def requests_of(golden: dict[str, Any]) -> list[EditRequest]:
    return [
        EditRequest(
            case_id=str(record["case_id"]),
            prompt=record["prompt"],
            subject="",
            target_new=record["target_new"],
            paraphrases=(record["rephrase"],),
            neighborhood=(Probe(record["locality_prompt"], "not read"),),
        )
        for record in golden["records"]
    ]


@pytest.fixture(scope="module", params=WEIGHT)
def golden(request: pytest.FixtureRequest, shared: Path) -> dict[str, Any]:
    path = shared / f"golden/metrics/wild_{request.param}.json"
    if not path.is_file():
        pytest.skip(f"the reference data has no {path.name}")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module", params=FORMS)
def case(request: pytest.FixtureRequest, golden: dict[str, Any], shared: Path) -> Case:
    """Answers of each model under each prompt form, before and after its edits."""
    model, tokenizer = load_model(shared / "golden/models" / golden["model"])
    model = model.eval()
    requests = requests_of(golden)
    scored = evaluate(model, tokenizer, requests, generate=False, continuation_tokens=0)
    settings = GenerationSettings(prompt=request.param)
    before = with_answers(scored, model, tokenizer, requests, settings)
    edited = load_file(shared / "golden/edits" / golden["model"] / "MEMIT_seq_blue.safetensors")
    for layer in (1, 4):
        weight = model.get_parameter(WEIGHT[golden["model"]].format(layer))
        with torch.no_grad():
            weight.copy_(edited[f"b2.weight.layer{layer}"])
    unedited = unedited_continuations(before.answers)
    after = with_answers(scored, model, tokenizer, requests, settings, unedited=unedited)
    return Case(golden, FORMS[request.param], before, after)


@pytest.mark.parametrize("state", ["before", "after"])
def test_texts_and_token_ids(case: Case, state: str) -> None:
    answers = {(a.request, a.prompts): a for a in getattr(case, state).answers}
    for i, record in enumerate(case.golden["records"]):
        expected = record[f"{state}.{case.form}"]
        own, paraphrase, neighbour = (
            answers[i, kind] for kind in (table.OWN_PROMPT, table.PARAPHRASES, table.NEIGHBOURS)
        )
        assert (own.answer, list(own.ids)) == (expected["answer"], expected["ids"])
        assert paraphrase.answer == expected["rephrase_answer"]
        assert list(neighbour.ids) == expected["locality_ids"]
        assert float(is_match(own.answer, expected["answer"])) == expected["em_against_own_answer"]


@pytest.mark.parametrize("state", ["before", "after"])
def test_scores(case: Case, state: str) -> None:
    evaluation = getattr(case, state)
    names = {"reliability_generation": "em", "generalization_generation": "rephrase_em"}
    for name, key in names.items():
        expected = [record[f"{state}.{case.form}"][key] for record in case.golden["records"]]
        assert [outcome.values[name] for outcome in evaluation.outcomes] == expected
        mean = sum(expected) / len(expected)
        assert evaluation.metrics[name]["value"] == pytest.approx(100 * mean)
    if state == "after":
        expected = [record[f"locality.{case.form}"] for record in case.golden["records"]]
        ours = [outcome.values["locality_generation"] for outcome in evaluation.outcomes]
        assert ours == expected


def test_normalisation_and_exact_match(golden: dict[str, Any]) -> None:
    assert [[text, normalized(text)] for text, _ in golden["normalize"]] == golden["normalize"]
    pairs = golden["exact_match"]
    assert [[*pair, is_match(*pair)] for *pair, _ in pairs] == pairs
