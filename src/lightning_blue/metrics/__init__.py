"""Metrics of model editing: pure functions, and torchmetrics shells that hold their state."""

from .classes import (
    Consistency,
    Estimate,
    ExactMatch,
    Fluency,
    MeanOverRequests,
    Perplexity,
    ProbabilitySuccess,
    Score,
    TokenAccuracy,
    numbers,
)

__all__ = [
    "Consistency",
    "Estimate",
    "ExactMatch",
    "Fluency",
    "MeanOverRequests",
    "Perplexity",
    "ProbabilitySuccess",
    "Score",
    "TokenAccuracy",
    "numbers",
]
