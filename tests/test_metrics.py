"""Metrics against naive references, and their states against one another."""

from __future__ import annotations

import math
import statistics
from collections import Counter

import pytest
import torch
from torchmetrics import Metric

from lightning_blue.metrics import (
    Consistency,
    ExactMatch,
    Fluency,
    MeanOverRequests,
    Perplexity,
    ProbabilitySuccess,
    Score,
    TokenAccuracy,
    numbers,
)
from lightning_blue.metrics import functional as F

WORDS = ["the", "river", "runs", "through", "the", "town", "and", "the", "river", "sings"]
TEXTS = ["the river runs", "a town sings and sings", "the town and the river", "runs runs runs"]
VECTORIZER = F.fit_tfidf(TEXTS)
REQUEST = torch.tensor([4, 4, 7, 9])  # two prompts belong to one request
FLAGS = [[True, False], [True, True], [False, False, True], [True]]


def test_a_tie_counts_as_failure() -> None:
    wanted, other = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0, 1.0, 2.0])
    assert F.probability_success(wanted, other).tolist() == [True, False, False]


def test_token_accuracy_and_exact_match() -> None:
    assert F.token_accuracy(FLAGS).tolist() == [0.5, 1, 1 / 3, 1]
    assert F.exact_match(FLAGS).tolist() == [False, True, False, True]


def naive_entropy(words: list[str], n: int) -> float:
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values())


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ngram_entropy(n: int) -> None:
    assert F.ngram_entropy(" ".join(WORDS), n) == pytest.approx(naive_entropy(WORDS, n))


@pytest.mark.parametrize("text", ["", "word", "two words"])
def test_fluency_of_short_texts_is_defined(text: str) -> None:
    assert F.fluency(text) == 0.0


def test_fluency_weights_trigrams_twice() -> None:
    expected = (naive_entropy(WORDS, 2) + 2 * naive_entropy(WORDS, 3)) / 3
    assert F.fluency(" ".join(WORDS)) == pytest.approx(expected)


def naive_tfidf(text: str, corpus: list[str]) -> dict[str, float]:
    """Smoothed tf-idf of words of two and more letters, of unit length."""
    vocabulary = {word for other in corpus for word in other.split() if len(word) > 1}
    weights = {}
    for word, count in Counter(text.split()).items():
        if word in vocabulary:
            documents = sum(word in other.split() for other in corpus)
            weights[word] = count * (math.log((1 + len(corpus)) / (1 + documents)) + 1)
    norm = math.sqrt(sum(weight**2 for weight in weights.values()))
    return {word: weight / norm for word, weight in weights.items()}


def test_tfidf_similarity() -> None:
    first, second = "the river sings", "the town and the river unheard"
    a, b = naive_tfidf(first, TEXTS), naive_tfidf(second, TEXTS)
    expected = sum(weight * b.get(word, 0) for word, weight in a.items())
    assert 0.1 < expected < 0.9
    assert F.tfidf_similarity(first, second, VECTORIZER) == pytest.approx(expected)


def test_tfidf_similarity_of_unknown_words_is_zero() -> None:
    assert F.tfidf_similarity("zzzz", TEXTS[0], VECTORIZER) == 0
    assert F.tfidf_similarity("", TEXTS[0], VECTORIZER) == 0
    assert F.fit_tfidf(["", "a b"]) is None


def test_harmonic_mean() -> None:
    values = [90.0, 80.0, 45.0]
    assert float(F.harmonic_mean(torch.tensor(values))) == pytest.approx(
        statistics.harmonic_mean(values)
    )
    assert float(F.harmonic_mean(torch.tensor([90.0, 0.0, 45.0]))) == 0


def test_mean_by_request_ignores_order() -> None:
    request = torch.tensor([7, 2, 7, 7])
    means = F.mean_by_request(torch.tensor([1.0, 10.0, 0.0, 0.5]), request)
    assert means.tolist() == [10.0, 0.5]


def test_ratio_estimate_of_equal_weights_is_the_textbook_error() -> None:
    values = [3.0, 4.0, 8.0, 1.0, 5.5]
    mean, error = F.ratio_estimate(F.ratio_moments(torch.tensor(values), torch.ones(len(values))))
    assert float(mean) == pytest.approx(statistics.mean(values))
    assert float(error) == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))


def test_ratio_error_matches_resampling() -> None:
    torch.manual_seed(0)
    weights = torch.randint(10, 100, (400,)).double()
    sums = weights * (3 + torch.randn(400).double())
    _, error = F.ratio_estimate(F.ratio_moments(sums, weights))
    picks = torch.randint(400, (4000, 400))
    resampled = sums[picks].sum(1) / weights[picks].sum(1)
    assert float(error) == pytest.approx(float(resampled.std()), rel=0.1)


def test_score_error_matches_resampling() -> None:
    torch.manual_seed(0)
    efficacy = torch.rand(500).double()
    success = torch.stack([efficacy, (efficacy + torch.rand(500)) / 2, 1 - efficacy / 3], 1)
    metric = Score()
    metric.update(success)
    ours = numbers(metric.compute())
    picks = torch.randint(500, (4000, 500))
    resampled = F.harmonic_mean(100 * success[picks].mean(1))
    assert ours["value"] == pytest.approx(float(F.harmonic_mean(100 * success.mean(0))))
    assert ours["standard_error"] == pytest.approx(float(resampled.std()), rel=0.1)


def test_score_with_a_zero_is_zero() -> None:
    metric = Score()
    metric.update(torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.5, 1.0]]))
    estimate = numbers(metric.compute())
    assert estimate == pytest.approx({"value": 0.0, "standard_error": 0.0, "count": 2})


def test_unit_of_the_error_is_the_request() -> None:
    metric = ProbabilitySuccess()
    metric.update(torch.tensor([1.0, 3, 1, 3]), torch.full((4,), 2.0), REQUEST)
    by_request = [50, 100, 0]
    assert numbers(metric.compute()) == {
        "value": pytest.approx(statistics.mean(by_request)),
        "standard_error": pytest.approx(statistics.stdev(by_request) / math.sqrt(3)),
        "count": 3,
        "prompts": 4,
    }


@pytest.mark.parametrize(
    ("metric", "by_request"),
    [(TokenAccuracy(), [75, 100 / 3, 100]), (ExactMatch(), [50, 0, 100])],
    ids=["TokenAccuracy", "ExactMatch"],
)
def test_teacher_forced_metrics(metric: Metric, by_request: list[float]) -> None:
    metric.update(FLAGS, REQUEST)
    assert numbers(metric.compute())["value"] == pytest.approx(statistics.mean(by_request))


def test_a_function_is_all_that_a_mean_over_requests_needs() -> None:
    metric = MeanOverRequests(torch.sub, 10)
    metric.update(torch.tensor([1.0, 3, 1, 3]), torch.full((4,), 2.0), REQUEST)
    assert metric.by_request == {4: 0.0, 7: -1.0, 9: 1.0}
    assert numbers(metric.compute())["value"] == 0
    metric.update(torch.tensor([5.0]), torch.tensor([2.0]), torch.tensor([11]))
    assert metric.by_request == {4: 0.0, 7: -1.0, 9: 1.0, 11: 3.0}
    assert numbers(metric.compute())["value"] == pytest.approx(10 * 3 / 4)
    metric.reset()
    assert metric.by_request == {}
    unscaled = MeanOverRequests(torch.sub)
    unscaled.update(torch.tensor([5.0]), torch.tensor([2.0]), torch.tensor([11]))
    assert numbers(unscaled.compute())["value"] == 3


@pytest.mark.parametrize(
    ("metric", "inputs", "values"),
    [
        (ProbabilitySuccess(), (torch.tensor([1.0, 3, 1, 3]), torch.full((4,), 2.0)), [0.5, 1, 0]),
        (TokenAccuracy(), (FLAGS,), [0.75, 1 / 3, 1]),
        (ExactMatch(), (FLAGS,), [0.5, 0, 1]),
        (Fluency(), (["a b"] * 4,), [0, 0, 0]),  # one bigram has no entropy
        (Consistency(VECTORIZER), (TEXTS, TEXTS), [1, 1, 1]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_by_request_are_not_scaled(
    metric: MeanOverRequests, inputs: tuple, values: list[float]
) -> None:
    metric.update(*inputs, REQUEST)
    assert metric.by_request == pytest.approx(dict(zip([4, 7, 9], values, strict=True)))
    assert numbers(metric.compute())["value"] == pytest.approx(100 * statistics.mean(values))


def test_text_metrics_average_texts_of_a_request() -> None:
    request = torch.tensor([0, 0, 1, 2])
    fluency, consistency = Fluency(), Consistency(VECTORIZER)
    fluency.update(TEXTS, request)
    consistency.update(TEXTS, TEXTS[::-1], request)
    for metric, values in (
        (fluency, [F.fluency(text) for text in TEXTS]),
        (
            consistency,
            [
                F.tfidf_similarity(*pair, VECTORIZER)
                for pair in zip(TEXTS, TEXTS[::-1], strict=True)
            ],
        ),
    ):
        expected = statistics.mean([(values[0] + values[1]) / 2, values[2], values[3]])
        assert numbers(metric.compute())["value"] == pytest.approx(100 * expected)


def test_perplexity_weighs_windows_by_tokens() -> None:
    metric = Perplexity()
    metric.update(torch.tensor([20.0, 3.0]), torch.tensor([10, 2]))
    estimate = numbers(metric.compute())
    assert estimate["value"] == pytest.approx(math.exp(23 / 12))
    assert (estimate["count"], estimate["tokens"]) == (2, 12)


def test_an_error_over_one_unit_is_left_out() -> None:
    metric = ExactMatch()
    metric.update([[True]], torch.tensor([0]))
    assert numbers(metric.compute()) == {"value": 100.0, "count": 1, "prompts": 1}


NLL = torch.tensor([1.0, 3.0, 1.0, 3.0])
SHARDS = {
    "ProbabilitySuccess": (ProbabilitySuccess, (NLL, NLL.flip(0), REQUEST)),
    "TokenAccuracy": (TokenAccuracy, (FLAGS, REQUEST)),
    "ExactMatch": (ExactMatch, (FLAGS, REQUEST)),
    "Fluency": (Fluency, (TEXTS, REQUEST)),
    "Consistency": (lambda: Consistency(VECTORIZER), (TEXTS, TEXTS[::-1], REQUEST)),
    "Perplexity": (Perplexity, (NLL, torch.tensor([4, 1, 1, 2]))),
    "Score": (Score, (torch.tensor([[0.5, 1, 1], [0.3, 0.5, 0.9], [1, 1, 0], [0, 1, 1]]),)),
}


@pytest.mark.parametrize("name", SHARDS)
def test_states_of_several_processes_add_up(name: str) -> None:
    build, arguments = SHARDS[name]
    whole, *parts = (build() for _ in range(4))
    whole.update(*arguments)
    # The third part gets nothing, as a process does when there are fewer requests than processes.
    for part, cut in zip(parts, (slice(0, 2), slice(2, None), slice(4, None)), strict=True):
        part.update(*(argument[cut] for argument in arguments))
    for other in parts[1:]:
        parts[0].merge_state(other)
    merged, single = numbers(parts[0].compute()), numbers(whole.compute())
    assert "standard_error" in single
    assert merged == pytest.approx(single)
