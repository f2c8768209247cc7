"""Metrics as functions of tensors and strings: no model, tokenizer or state inside."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blue_callbacks.precision import in_float64

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

BIGRAM_WEIGHT, TRIGRAM_WEIGHT = 1 / 3, 2 / 3


def probability_success(nll_wanted: Tensor, nll_other: Tensor) -> Tensor:
    """Say for each prompt whether the wanted object is more probable than the other one.

    Args:
        nll_wanted: mean negative log-likelihood of the wanted object's tokens, nats per token; (n,)
        nll_other: the same of the other object; (n,)

    Returns:
        Booleans, (n,). A tie counts as failure, as in ROME's evaluator.
    """
    return nll_wanted < nll_other


def probability_avoidance(nll_unwanted: Tensor, nll_other: Tensor) -> Tensor:
    """Say for each prompt whether the unwanted object is less probable than the other one.

    Args:
        nll_unwanted: of the object that should not follow, nats per token; (n,)
        nll_other: of the other one; (n,)

    Returns:
        Booleans, (n,). A tie counts as failure.
    """
    return nll_unwanted > nll_other


def not_said(correct: Sequence[Sequence[bool]]) -> Tensor:
    """Say for each prompt whether a target token is not the most probable one; (n,) bool."""
    return ~exact_match(correct)


def token_accuracy(correct: Sequence[Sequence[bool]]) -> Tensor:
    """Fraction of each target's tokens that are the most probable ones under teacher forcing.

    Args:
        correct: for each of n prompts, one flag per target token (at least one).

    Returns:
        Fractions from 0 to 1; (n,) float64.
    """
    fractions = [sum(flags) / len(flags) for flags in correct]
    return torch.tensor(fractions, dtype=torch.float64)


def exact_match(correct: Sequence[Sequence[bool]]) -> Tensor:
    """Say for each prompt whether all its target tokens are the most probable ones; (n,) bool."""
    return torch.tensor([all(flags) for flags in correct], dtype=torch.bool)


def as_given(values: Tensor) -> Tensor:
    """Return numbers that are averaged as they are; (n,)."""
    return values


def ngram_entropy(text: str, n: int) -> float:
    """Shannon entropy of a text's word n-grams, in bits; 0 for a text of fewer than n words.

    Words are those of NLTK's Treebank tokenizer on the whole text, which needs no downloaded data.
    """
    from nltk.tokenize.destructive import NLTKWordTokenizer  # seconds to import, often not needed

    words = NLTKWordTokenizer().tokenize(text)
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    if not counts:
        return 0.0
    frequency = torch.tensor(list(counts.values()), dtype=torch.float64)
    return float(torch.special.entr(frequency / frequency.sum()).sum()) / math.log(2)


def fluency(text: str) -> float:
    """Weighted n-gram entropy of one text in bits: bigrams count one third, trigrams two thirds.

    The "generation entropy" of ROME (Meng et al. 2022, section 3.3); low for text that repeats.
    The paper's tables show it times 100.
    """
    return BIGRAM_WEIGHT * ngram_entropy(text, 2) + TRIGRAM_WEIGHT * ngram_entropy(text, 3)


def fit_tfidf(texts: Sequence[str]) -> TfidfVectorizer | None:
    """Learn word frequencies from ``texts``; None where they hold no word to learn from."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer()
    if not any(vectorizer.build_analyzer()(text) for text in texts):
        return None
    return vectorizer.fit(texts)


def tfidf_similarity(text_a: str, text_b: str, vectorizer: TfidfVectorizer) -> float:
    """Cosine between the tf-idf vectors of two texts, from 0 to 1.

    A text without a single known word has no direction; its similarity to anything is 0 here,
    where the reference evaluator divides by zero.
    """
    first, second = vectorizer.transform([text_a, text_b])  # rows of unit length, or zero
    return float((first @ second.T).sum())


def harmonic_mean(values: Tensor) -> Tensor:
    """Harmonic mean over the last dimension of values that are not negative; 0 where one is 0."""
    return values.shape[-1] / values.reciprocal().sum(-1)


def mean_by_request(values: Tensor, request: Tensor) -> Tensor:
    """Average the prompts of each request, because they are correlated.

    Args:
        values: one number per prompt; (n_prompts,)
        request: the request each prompt belongs to, as an integer; (n_prompts,)

    Returns:
        One mean per request that has a prompt, ordered by its integer; (n_requests,) float64.
    """
    _, index, prompts = request.unique(return_inverse=True, return_counts=True)
    values = in_float64(values)
    sums = values.new_zeros(len(prompts))
    return sums.index_add(0, index.to(values.device), values) / prompts.to(values.device)


def ratio_moments(sums: Tensor, weights: Tensor) -> Tensor:
    """Six sums over independent units from which a weighted mean and its error follow.

    Args:
        sums: the total s of each unit, for instance nats in a window of text; (n,)
        weights: the weight w of each unit, for instance the window's tokens; (n,)

    Returns:
        ``[sum s, sum w, sum s^2, sum s w, sum w^2, n]``; (6,) float64. Moments of disjoint sets of
        units add up, which is what lets several processes share one metric.
    """
    s, w = in_float64(sums), in_float64(weights)
    return torch.stack([s, w, s * s, s * w, w * w, torch.ones_like(s)]).sum(1)


def ratio_estimate(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and its standard error from `ratio_moments`, as two scalars.

    The mean is ``m = sum s / sum w``; the error is that of a ratio estimator,
    ``sqrt(n / (n - 1) * sum (s - m w)^2) / sum w``, which for equal weights is the usual
    standard deviation over the square root of n. Undefined quantities are NaN: the mean of no
    unit, the error of fewer than two.
    """
    s, w, ss, sw, ww, n = moments.unbind()
    mean = s / w
    deviation = (ss - 2 * mean * sw + mean**2 * ww).clamp(min=0)  # rounding can fall below 0
    return mean, torch.where(n > 1, (deviation * n / (n - 1)).sqrt() / w, torch.nan)


def score_estimate(sums: Tensor, products: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Harmonic mean of several metrics measured on the same requests, with its standard error.

    Args:
        sums: sum over requests of each metric's value; (k,)
        products: sum over requests of the outer products of these values; (k, k)
        n: number of requests, scalar

    Returns:
        Two scalars. The error follows from the metrics' covariance by the delta method: the
        derivative of the harmonic mean H by the mean x is ``(H / x)^2 / k``. NaN where undefined.
    """
    # Without this lower bound the derivative at 0 would be 0/0; its limit is finite.
    means = (sums / n).clamp(min=1e-9)
    covariance = (products - torch.outer(sums, sums) / n) / (n - 1)
    score = harmonic_mean(means)
    slope = (score / means) ** 2 / len(means)
    variance = (slope @ covariance @ slope / n).clamp(min=0)
    return harmonic_mean(sums / n), torch.where(n > 1, variance.sqrt(), torch.nan)
