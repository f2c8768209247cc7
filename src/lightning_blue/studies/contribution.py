"""Contribution scores by simulated editing (Eq. 9, Sec. 4.1.1, Fig. 2 of the paper)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_blue.editing.targets import TargetFinder
from lightning_blue.studies.bench import Bench
from lightning_blue.studies.pictures import KINDS, lines_over_layers
from lightning_blue.studies.results import Estimate, Result, Row, estimate

RECORDS_AT_ONCE = 64


def contribution(bench: Bench) -> Result:
    """Score each layer's memory: how probable it makes the new object, less how probable it was.

    Three memories take the place of what a layer's FFN gives out at the subject's last token.
    ``distributed``: its present output and a share of the last layer's residual, R^L / (L - l + 1);
    ``computed``: its present output and the residual of its own target; ``literal``: the last
    layer's whole memory m^L / (L - l + 1), as the paper's text spells it.
    """
    first = probabilities(bench, bench.layers[0], torch.zeros_like(bench.residual(bench.layers[0])))
    lines: dict[str, list[Estimate]] = {kind: [] for kind in KINDS}
    rows: list[Row] = []
    for layer in bench.layers:
        for kind, change in simulated_changes(bench, layer).items():
            score = estimate(probabilities(bench, layer, change) - first)
            lines[kind].append(score)
            values = {"score": score.mean, "standard_error": score.error}
            rows.append({"layer": layer, "kind": kind, **values, "records": len(bench.requests)})
    figure = lines_over_layers(lines, bench.layers, KINDS, "contribution score")
    figure.axes[0].axhline(1, color="#9A9A9A", linewidth=0.8, linestyle=":")
    return Result(rows, _finding(bench, lines, estimate(first)), figure)


def simulated_changes(bench: Bench, layer: int) -> dict[str, Tensor]:
    """Return kind -> what its memory adds to the layer's present output, ``(d_model, n)``."""
    last, share = bench.layers[-1], bench.shares[layer]
    memory = bench.ffn_output(last) + bench.residual(last)
    return {
        "computed": bench.residual(layer),
        "distributed": share * bench.residual(last),
        "literal": share * memory - bench.ffn_output(layer),
    }


@torch.no_grad()
def probabilities(bench: Bench, layer: int, change: Tensor) -> Tensor:
    """Return the probability of each new object after the bare prompt, ``(n,)``.

    The geometric mean over the object's tokens, as everywhere in this package.

    Args:
        bench: with the unedited model.
        layer: whose output is changed.
        change: added to the output at the subject's last token, ``(d_model, n)``.
    """
    module = bench.module
    bare = [prompt._replace(rewriting=prompt.rewriting[:1]) for prompt in bench.prompts]
    settings = replace(module.target, loss_layer=None)
    finder = TargetFinder(module.model, module.architecture, settings)
    finder.site = module.site
    nll = []
    for begin in range(0, len(bare), RECORDS_AT_ONCE):
        predictor = finder.predictor(bare[begin : begin + RECORDS_AT_ONCE], layer)
        delta = torch.zeros_like(predictor.initial)  # of several sites, the last is written
        delta[-1] = change.T[begin : begin + RECORDS_AT_ONCE]
        every = torch.arange(delta.shape[1], device=delta.device)
        nll.append(predictor(every, delta).nll)
    return (-torch.cat(nll)).exp()


def _finding(bench: Bench, lines: dict[str, list[Estimate]], before: Estimate) -> str:
    first, last = bench.layers[0], bench.layers[-1]
    parts = [
        f"{kind} memories {each[0]} in layer {first} and {each[-1]} in layer {last}"
        for kind, each in lines.items()
    ]
    below = [
        layer for layer, s in zip(bench.layers, lines["distributed"], strict=True) if s[0] < 0.7
    ]
    return (
        f"contribution score of {'; '.join(parts)}. Distributed memories stay under 0.7 in "
        f"{len(below)} of {len(bench.layers)} layers; the unedited model gives the new objects "
        f"{before}."
    )
