"""A small run by hand: four requests in two batches, every number known."""

from __future__ import annotations

import math

import torch

from lightning_blue.data.requests import EditRequest, Rejected
from lightning_blue.metrics.evaluation import RequestOutcome
from lightning_blue.metrics.history import LossCurve, Measurement, RunHistory

NAN = math.nan


def estimate(value: float, error: float | None = None, **counts: int) -> dict[str, float]:
    """Return an estimate as the metrics give it."""
    return {"value": value, **({} if error is None else {"standard_error": error}), **counts}


def outcome(case_id: str, success: float, text: str) -> RequestOutcome:
    """Return an outcome whose probabilities are 0.5 and 0.25."""
    return RequestOutcome(
        case_id=case_id,
        values={
            "efficacy": success,
            "specificity": 0.5,
            "efficacy_top1": success,
            "specificity_top1": 0.25,
        },
        nll_new=math.log(2),
        nll_true=math.log(4),
        probability_new=0.5,
        probability_true=0.25,
        correct=(success == 1, False),
        continuation=text,
    )


def losses(*totals: list[float]) -> torch.Tensor:
    """Return losses whose nll is half of the total, kl a quarter, weight decay a quarter."""
    return torch.tensor(totals)[:, :, None] * torch.tensor([1, 0.5, 0.25, 0.25])


def small_history() -> RunHistory:
    """Return a run in which the third edit fails and the fourth request was never applied."""
    places = ["Rome", "Oslo", "Bern", "Lima"]
    requests = [
        EditRequest(f"c{i}", "{} lies in", f"Tower {i}", new, target_true="Paris")
        for i, new in enumerate(places)
    ]
    return RunHistory(
        settings={
            "model": "almanac",
            "plan": "boundary",
            "layers": [1, 3],
            "covariance_weight": 15000.0,
            "past_keys": True,
            "batch_size": 2,
            "data": "facts.jsonl",
        },
        requests=requests,
        rejected=[Rejected("facts.jsonl:5", "c9", "missing field", "no subject", "add one")],
        batches={0: [0, 1], 1: [2]},
        measurements=measurements(),
        loss_curves=[
            LossCurve(0, 1, losses([4.0, 2.0, 1.0], [2.0, NAN, NAN])),
            LossCurve(0, 3, losses([3.0, 1.0, NAN], [1.0, 0.5, 0.25])),
            LossCurve(1, 1, losses([8.0, 4.0, 2.0])),
            LossCurve(1, 3, losses([5.0, 2.5, 1.5])),
        ],
        before=[outcome(f"c{i}", 0.0, " Paris,\nthe city") for i in range(4)],
        after={i: outcome(f"c{i}", float(i != 2), f" {places[i]}") for i in range(3)},
        seconds={"editing": 6.0, "total": 10.5},
    )


def measurements() -> list[Measurement]:
    """Return measurements of every stage."""
    pre = {
        "efficacy": estimate(4.5, 1.52, count=4, prompts=4),
        "specificity": estimate(93.21, 0.62, count=4, prompts=40),
        "specificity_top1": estimate(61.0, 2.0, count=4, prompts=40),
        "retained_knowledge": estimate(98.0, 0.9, count=200, prompts=200),
        "perplexity": estimate(12.345, 0.0412, count=16, tokens=8192),
    }
    post = {
        "efficacy": estimate(100.0, 0.0, count=4, prompts=4),
        "specificity": estimate(80.0, 1.25, count=4, prompts=40),
        "specificity_top1": estimate(50.0, 2.0, count=4, prompts=40),
        "retained_knowledge": estimate(97.0, 1.1, count=200, prompts=200),
        "perplexity": estimate(15.0, 0.05, count=16, tokens=8192),
    }
    batch = {"efficacy": estimate(100.0, 0.0, count=2, prompts=2)}
    return [
        Measurement("pre", 0, pre),
        Measurement("batch", 2, batch),
        Measurement(
            "cumulative", 2, {**batch, "retained_knowledge": estimate(97.5, count=200, prompts=200)}
        ),
        Measurement("batch", 3, {"efficacy": estimate(90.0, count=1, prompts=1)}),
        Measurement("cumulative", 3, {"efficacy": estimate(95.0, 5.0, count=3, prompts=3)}),
        Measurement("first_batch", 3, {"efficacy": estimate(50.0, 50.0, count=2, prompts=2)}),
        Measurement("post", 3, post),
    ]
