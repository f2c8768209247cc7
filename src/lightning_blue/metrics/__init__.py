"""Metrics of model editing: pure functions, metric classes, and one table that names them all."""

from .classes import (
    Consistency,
    Estimate,
    ExactMatch,
    Fluency,
    MeanOverBatches,
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
    "MeanOverBatches",
    "MeanOverRequests",
    "Perplexity",
    "ProbabilitySuccess",
    "Score",
    "TokenAccuracy",
    "numbers",
]
