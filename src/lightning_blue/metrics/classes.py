"""Metric classes: `functional` with a state that adds up over processes.

Each ``compute()`` returns an estimate: ``value``, ``standard_error``, ``count`` (how many
independent units stand behind the error) and ``prompts`` or ``tokens``. The unit is the request,
because the prompts of one request are correlated; all prompts of a request must therefore reach
one process in one ``update``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from . import functional as F

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

PERCENT = 100.0

Estimate = dict[str, Tensor]


def numbers(estimate: Mapping[str, Tensor]) -> dict[str, float]:
    """Turn an estimate into plain numbers, leaving out what is undefined (JSON has no NaN)."""
    return {name: value.item() for name, value in estimate.items() if value.isfinite()}


class MeanOverRequests(Metric):
    """Mean over requests of the mean over a request's prompts: the mechanism of most metrics.

    ``update(*inputs, request)`` adds prompts: the inputs of ``function``, and the request of each
    prompt as an integer, of shape (n_prompts,).

    Args:
        function: returns one number per prompt, (n_prompts,).
        scale: what the estimate is multiplied by; 100 for percent.
        kwargs: passed on to `torchmetrics.Metric`.

    Attributes:
        by_request: mean of each request that was added here since the last reset, not scaled. The
            estimate is made from the same numbers.
    """

    is_differentiable = False
    full_state_update = False
    moments: Tensor
    prompts: Tensor

    def __init__(self, function: Callable[..., Tensor], scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.function, self.scale = function, scale
        self.by_request: dict[int, float] = {}
        self.add_state("moments", torch.zeros(6, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("prompts", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, *inputs: Any) -> None:
        """Add prompts; the last input is the request of each."""
        *measured, request = inputs
        values = self.function(*measured)
        means = F.mean_by_request(values, request.to(values.device)).to(self.moments.device)
        self.by_request.update(zip(request.unique().tolist(), means.tolist(), strict=True))
        self.moments += F.ratio_moments(self.scale * means, torch.ones_like(means))
        self.prompts += len(values)

    def reset(self) -> None:
        """Forget all prompts."""
        super().reset()
        self.by_request = {}

    def compute(self) -> Estimate:
        """Return value, standard error over requests, and the numbers of requests and prompts."""
        value, error = F.ratio_estimate(self.moments)
        count = self.moments[-1].long()
        return {
            "value": value, "standard_error": error, "count": count, "prompts": self.prompts
        }  # fmt: skip


class ProbabilitySuccess(MeanOverRequests):
    """Percentage of prompts on which the wanted object is more probable than the other one.

    On CounterFact this is efficacy (own prompt) and generalization (paraphrases), where the new
    object is wanted, and specificity (neighbours), where the neighbour's own answer is.

    ``update(nll_wanted, nll_other, request)`` adds prompts: nats per target token and the request
    of each; all of shape (n,).
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(F.probability_success, PERCENT, **kwargs)


class TokenAccuracy(MeanOverRequests):
    """Percentage of target tokens that are most probable under teacher forcing: zsRE's metrics.

    ``update(correct, request)`` adds prompts: one flag per target token, and the request of each
    prompt; (n,).
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(F.token_accuracy, PERCENT, **kwargs)


class ExactMatch(MeanOverRequests):
    """Percentage of prompts whose target tokens are all most probable (top-1).

    Over edited facts the strict form of efficacy; over control facts, each its own request,
    the retained knowledge.

    ``update(correct, request)`` adds prompts: one flag per target token, and the request of each
    prompt; (n,).
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(F.exact_match, PERCENT, **kwargs)


class MeanOverBatches(MeanOverRequests):
    """Mean over edit batches of a number that each has; the unit of the error is the batch.

    ``update(values, batch)`` adds batches; both (n,).
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(F.as_given, **kwargs)

    def compute(self) -> Estimate:
        """Return value, standard error over batches, and the number of batches."""
        estimate = super().compute()
        batches = estimate.pop("prompts")
        return {**estimate, "batches": batches}


class Fluency(MeanOverRequests):
    """Weighted bigram and trigram entropy of generated texts in bits, times 100.

    ``update(texts, request)`` adds texts and the request of each; (n,).
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(_entropies, 100, **kwargs)


class Consistency(MeanOverRequests):
    """Tf-idf similarity of generated texts with reference texts, times 100.

    ``update(texts, references, request)`` adds pairs of texts and the request of each pair; (n,).

    Args:
        vectorizer: what weighs the words; see `functional.fit_tfidf`.
        kwargs: passed on to `torchmetrics.Metric`.
    """

    def __init__(self, vectorizer: TfidfVectorizer, **kwargs: Any) -> None:
        super().__init__(partial(_similarities, vectorizer=vectorizer), 100, **kwargs)


class Perplexity(Metric):
    """Perplexity of a text, exp of the mean nats per token; the unit of its error is a window."""

    is_differentiable = False
    full_state_update = False
    moments: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("moments", torch.zeros(6, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: Tensor) -> None:
        """Add windows: the sum of nats in each and the number of tokens predicted; (n,)."""
        moments = F.ratio_moments(nll, tokens)
        self.moments += moments.to(self.moments.device)

    def compute(self) -> Estimate:
        """Return value, standard error (delta method), and the numbers of windows and tokens."""
        nats, error = F.ratio_estimate(self.moments)
        value = nats.exp()
        return {
            "value": value,
            "standard_error": value * error,
            "count": self.moments[-1].long(),
            "tokens": self.moments[1].long(),
        }


class Score(Metric):
    """Harmonic mean of efficacy, generalization and specificity over requests that have all three.

    All in percent. The error takes into account that the three are measured on the same requests.
    """

    is_differentiable = False
    full_state_update = False
    sums: Tensor
    products: Tensor
    requests: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(3, 3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("requests", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, success: Tensor) -> None:
        """Add requests: efficacy, generalization, specificity of each from 0 to 1; (n, 3)."""
        values = PERCENT * success.to(self.sums)
        self.sums += values.sum(0)
        self.products += values.T @ values
        self.requests += len(values)

    def compute(self) -> Estimate:
        """Return value, standard error, and the number of requests."""
        value, error = F.score_estimate(self.sums, self.products, self.requests)
        return {"value": value, "standard_error": error, "count": self.requests}


def _entropies(texts: Sequence[str]) -> Tensor:
    return torch.tensor([F.fluency(text) for text in texts], dtype=torch.float64)


def _similarities(
    texts: Sequence[str], references: Sequence[str], vectorizer: TfidfVectorizer
) -> Tensor:
    pairs = zip(texts, references, strict=True)
    similarities = [F.tfidf_similarity(*pair, vectorizer) for pair in pairs]
    return torch.tensor(similarities, dtype=torch.float64)
