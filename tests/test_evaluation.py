"""Which prompts each metric reads, and the outcome of each request."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from conftest import LanguageModel
from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.language_model import scoring
from lightning_blue.language_model.scoring import TargetScore, generate, score_targets
from lightning_blue.metrics import MeanOverRequests, table
from lightning_blue.metrics import functional as F
from lightning_blue.metrics.evaluation import (
    Evaluation,
    evaluate,
    evaluate_control_facts,
    flatten,
)
from lightning_blue.support.errors import InputError

FULL = EditRequest(
    case_id="full",
    prompt="The mother tongue of {} is",
    subject="Danielle Darrieux",
    target_new="English",
    target_true="French",
    paraphrases=("Danielle Darrieux speaks", "In Paris, Danielle Darrieux speaks"),
    neighborhood=(
        Probe("José speaks", "Spanish"),
        Probe("Zoë speaks", "French"),
        Probe("The mother tongue of Zoë is", "French"),
    ),
    generation_prompts=("Danielle Darrieux lives in", "Danielle Darrieux works"),
    reference_texts=("She works in Paris and lives in Rome.",),
)
NEIGHBOURS_ONLY = EditRequest(
    case_id="neighbours",
    prompt="{} is a twin city of",
    subject="Lyon",
    target_new="Tokyo",
    target_true="Beirut",
    neighborhood=(Probe("Paris is a twin city of", "Rome"),),
    generation_prompts=("Lyon is in",),
)
BARE = EditRequest(
    case_id="bare", prompt="{} was created by", subject="Apple A5", target_new="Oslo"
)
REQUESTS = [FULL, NEIGHBOURS_ONLY, BARE]


def nll(lm: LanguageModel, prompt: str, target: str) -> float:
    return score_targets(*lm, [prompt], [target])[0].nll


def correct(lm: LanguageModel, prompt: str, target: str) -> tuple[bool, ...]:
    return score_targets(*lm, [prompt], [target])[0].correct


def test_counterfact_reads_the_right_prompts(language_model: LanguageModel) -> None:
    def wins(prompt: str, wanted: str, other: str) -> bool:
        return nll(language_model, prompt, wanted) < nll(language_model, prompt, other)

    expected = {
        "efficacy": [[wins(r.text, r.target_new, r.target_true)] for r in REQUESTS[:2]],
        "generalization": [[wins(p, "English", "French") for p in FULL.paraphrases]],
        "specificity": [
            [wins(p.prompt, p.answer, r.target_new) for p in r.neighborhood] for r in REQUESTS[:2]
        ],
    }
    metrics = evaluate(*language_model, REQUESTS, generate=False).metrics
    for name, flags in expected.items():
        percentages = [100 * statistics.mean(f) for f in flags]
        assert metrics[name]["value"] == pytest.approx(statistics.mean(percentages))
        assert metrics[name]["count"] == len(flags)
        assert metrics[name]["prompts"] == sum(map(len, flags))
    assert metrics["efficacy_top1"]["count"] == 3
    assert metrics["score"]["count"] == 1


def say(monkeypatch: pytest.MonkeyPatch, judge: Callable[[str, str], TargetScore]) -> None:
    """Let a rule of the test stand in for the model's scores."""

    def scores(model: object, tokenizer: object, prompts: list, targets: list, **_: object) -> list:
        return [judge(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]

    monkeypatch.setattr(scoring, "score_targets", scores)


def edited(prompt: str, target: str) -> TargetScore:
    """An edit that holds on all prompts of its subject but one, and leaks to one neighbour."""
    if "Zoë speaks" in prompt:
        wanted = target == "English"
    elif prompt.startswith("In Paris"):
        wanted = target == "French"
    elif "Danielle" in prompt:
        wanted = target == "English"
    else:
        wanted = target in ("Spanish", "French", "Rome", "Tokyo")
    return TargetScore(0.5 if wanted else 2.0, (True, wanted))


def test_counterfact_numbers(gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, edited)
    evaluation = evaluate(*gpt2, REQUESTS, generate=False, continuation_tokens=0)
    flat = evaluation.flat()
    assert flat["efficacy"] == 100
    assert flat["generalization"] == 50
    # Two of three neighbours hold; of the other request, the answer ties with the new object.
    assert flat["specificity"] == pytest.approx(100 * (2 / 3 + 0) / 2)
    assert flat["efficacy_top1"] == pytest.approx(200 / 3)
    assert flat["specificity_top1"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert flat["score"] == pytest.approx(statistics.harmonic_mean([100, 50, 200 / 3]))


def test_zsre_counts_tokens(gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, edited)
    flat = evaluate(*gpt2, REQUESTS, protocol="zsre", generate=False, continuation_tokens=0).flat()
    assert flat["efficacy"] == pytest.approx(100 * (1 + 1 + 0.5) / 3)
    assert flat["generalization"] == pytest.approx(75)
    assert flat["specificity"] == pytest.approx(100 * ((1 + 0.5 + 1) / 3 + 1) / 2)
    assert flat["efficacy_top1"] == pytest.approx(200 / 3)


def test_one_odd_request_changes_nothing_about_the_others(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request without a true object among others, under the protocol of the others."""
    say(monkeypatch, edited)
    for protocol in ("counterfact", "zsre"):
        options = {"protocol": protocol, "generate": False, "continuation_tokens": 0}
        alone = evaluate(*gpt2, REQUESTS[:2], **options).outcomes
        assert evaluate(*gpt2, REQUESTS, **options).outcomes[:2] == alone


def test_a_given_prefix_is_scored_on_every_prompt(gpt2: LanguageModel) -> None:
    near = Probe("Paris is a twin city of", "Rome", "\n")
    request = replace(
        NEIGHBOURS_ONLY,
        target_prefix=": ",
        paraphrases=("A twin of Lyon is",),
        neighborhood=(near,),
    )
    [outcome] = evaluate(*gpt2, [request], generate=False, continuation_tokens=0).outcomes
    for target, measured in (("Tokyo", outcome.nll_new), ("Beirut", outcome.nll_true)):
        [given] = score_targets(*gpt2, [request.text], [target], prefixes=[": "])
        assert measured == pytest.approx(given.nll, rel=1e-5)
        assert measured != pytest.approx(nll(gpt2, request.text, target), rel=1e-3)
    asked: list[tuple[str, str | None]] = []

    def scores(model: object, tokenizer: object, prompts: list, *_: object, **more: list) -> list:
        asked.extend(zip(prompts, more["prefixes"], strict=True))
        return [TargetScore(1.0, (True,))] * len(prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "score_targets", scores)
        evaluate(*gpt2, [request], generate=False, continuation_tokens=0)
        controls = len(asked)
        evaluate_control_facts(*gpt2, [near])
    assert set(asked[:controls]) == {
        (request.text, ": "),
        ("A twin of Lyon is", ": "),
        (near.prompt, "\n"),
    }
    assert asked[controls:] == [(near.prompt, "\n")]


def test_outcomes(language_model: LanguageModel) -> None:
    evaluation = evaluate(*language_model, REQUESTS, generate=False, continuation_tokens=5)
    assert [outcome.case_id for outcome in evaluation.outcomes] == ["full", "neighbours", "bare"]
    continuations = generate(
        *language_model, [r.text for r in REQUESTS], max_new_tokens=5, top_k=1, stop_at_end=True
    )
    for request, outcome, text in zip(REQUESTS, evaluation.outcomes, continuations, strict=True):
        assert outcome.nll_new == pytest.approx(
            nll(language_model, request.text, request.target_new), rel=1e-5
        )
        assert outcome.probability_new == pytest.approx(math.exp(-outcome.nll_new))
        assert outcome.correct == correct(language_model, request.text, request.target_new)
        assert outcome.continuation == text
    full, neighbours, bare = evaluation.outcomes
    true = nll(language_model, FULL.text, "French")
    assert full.nll_true == pytest.approx(true, rel=1e-5)
    assert full.probability_true == pytest.approx(math.exp(-true), rel=1e-4)
    assert full.values["efficacy"] == float(full.nll_new < true)
    assert {"efficacy", "specificity", "specificity_top1"} <= set(neighbours.values)
    assert not {"generalization", "generalization_top1"} & set(neighbours.values)
    assert set(bare.values) == {"efficacy_top1"}
    assert (bare.nll_true, bare.probability_true) == (None, None)


@pytest.mark.parametrize("protocol", ["counterfact", "zsre"])
def test_estimates_are_the_means_of_the_outcomes(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    say(monkeypatch, edited)
    evaluation = evaluate(*gpt2, REQUESTS, protocol=protocol, generate=False, continuation_tokens=0)
    kinds = ("efficacy", "generalization", "specificity")
    names = [*kinds, *(f"{kind}_top1" for kind in kinds)]
    for name in names:
        values = [o.values[name] for o in evaluation.outcomes if name in o.values]
        assert evaluation.metrics[name]["value"] == pytest.approx(100 * statistics.mean(values))
        assert evaluation.metrics[name]["count"] == len(values)
    first = evaluation.outcomes[0].values
    # Of the four words of the two paraphrases three are right, and five of the neighbours' six.
    expected = (1, 1 / 2, 2 / 3) if protocol == "counterfact" else (1, 3 / 4, 5 / 6)
    assert [first[kind] for kind in kinds] == pytest.approx(expected)


def test_a_row_is_all_that_a_metric_of_answers_needs(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, edited)
    gap = table.Measure(
        table.COMPARISON, partial(MeanOverRequests, torch.sub), "nats between the two objects"
    )
    row = table.MetricSpec(
        "gap", "gap", gap, unit="nats", needs=(table.PARAPHRASES,), per_request=True
    )
    monkeypatch.setattr(table, "METRICS", (*table.METRICS, row))
    evaluation = evaluate(*gpt2, REQUESTS, generate=False, continuation_tokens=0)
    # 0.5 against 2 nats where the edit holds, the other way round on the other paraphrase
    assert evaluation.metrics["gap"] == {"value": 0.0, "count": 1, "prompts": 2}
    assert [outcome.values.get("gap") for outcome in evaluation.outcomes] == [0.0, None, None]


def test_metrics_without_prompts_are_absent(gpt2: LanguageModel) -> None:
    metrics = evaluate(*gpt2, [BARE]).metrics
    assert set(metrics) == {"efficacy_top1"}
    assert metrics["efficacy_top1"] == {"value": 0.0, "count": 1, "prompts": 1}
    assert evaluate(*gpt2, []) == Evaluation({}, [])


def test_fluency_and_consistency(language_model: LanguageModel) -> None:
    metrics = evaluate(*language_model, REQUESTS, seed=3).metrics
    texts = [
        [p + generate(*language_model, [p], seed=3)[0] for p in request.generation_prompts]
        for request in REQUESTS[:2]
    ]
    fluency = [statistics.mean(map(F.fluency, of_request)) for of_request in texts]
    assert metrics["fluency"]["value"] == pytest.approx(100 * statistics.mean(fluency))
    assert (metrics["fluency"]["count"], metrics["fluency"]["prompts"]) == (2, 3)
    vectorizer = F.fit_tfidf(FULL.reference_texts)
    similarity = F.tfidf_similarity(" ".join(texts[0]), FULL.reference_texts[0], vectorizer)
    assert similarity > 0
    assert metrics["consistency"]["value"] == pytest.approx(100 * similarity)
    assert metrics["consistency"]["count"] == 1


def test_consistency_can_learn_its_weights_elsewhere(gpt2: LanguageModel) -> None:
    corpus = ["Paris is in France.", "She lives in Rome.", "The river runs in Basel."]
    metrics = evaluate(*gpt2, [FULL], idf_texts=corpus).metrics
    text = " ".join(p + generate(*gpt2, [p])[0] for p in FULL.generation_prompts)
    similarity = F.tfidf_similarity(text, FULL.reference_texts[0], F.fit_tfidf(corpus))
    assert metrics["consistency"]["value"] == pytest.approx(100 * similarity)


def test_control_facts(gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate_control_facts(*gpt2, []) == {}
    say(monkeypatch, edited)
    facts = [*FULL.neighborhood, *NEIGHBOURS_ONLY.neighborhood]
    for protocol in ("counterfact", "zsre"):
        retained = evaluate_control_facts(*gpt2, facts, protocol=protocol)["retained_knowledge"]
        assert retained["value"] == 75
        assert (retained["count"], retained["prompts"]) == (4, 4)
        assert retained["standard_error"] == pytest.approx(25)


def test_flatten() -> None:
    metrics = {"efficacy": {"value": 97.0, "count": 3}, "score": {"value": 80.0}}
    assert flatten(metrics) == {"efficacy": 97.0, "efficacy/count": 3, "score": 80.0}


def test_an_unknown_protocol_is_refused(gpt2: LanguageModel) -> None:
    with pytest.raises(InputError, match="counterfact, zsre"):
        evaluate(*gpt2, REQUESTS, protocol="known")


def test_evaluation_leaves_the_model_alone(gpt2: LanguageModel) -> None:
    before = {name: value.clone() for name, value in gpt2.model.state_dict().items()}
    first = evaluate(*gpt2, REQUESTS)
    assert evaluate(*gpt2, REQUESTS) == first
    after = gpt2.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
