"""How alike the distributed and the computed memory of a layer are (Sec. 4.1.2, Fig. 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_blue.reporting.plots import BLUE, VERMILLION
from lightning_blue.studies.bench import Bench
from lightning_blue.studies.contribution import simulated_changes
from lightning_blue.studies.pictures import GREEN, lines_over_layers
from lightning_blue.studies.results import Estimate, Result, Row, estimate

STYLES = {
    "memories": {"color": BLUE, "marker": "o"},
    "residuals": {"color": VERMILLION, "marker": "s"},
    "literal": {"color": GREEN, "marker": "^", "linestyle": "--"},
}


def similarity(bench: Bench) -> Result:
    """Take the cosine between what is distributed to a layer and what is computed for it.

    ``memories``: outputs of the FFN with the residual added; ``residuals``: R^L against R^l*,
    whatever the share; ``literal``: m^L, whatever the share, against the computed memory.
    """
    lines: dict[str, list[Estimate]] = {kind: [] for kind in STYLES}
    rows: list[Row] = []
    for layer in bench.layers:
        for kind, cosines in _cosines(bench, layer).items():
            mean = estimate(cosines)
            lines[kind].append(mean)
            values = {"cosine": mean.mean, "standard_error": mean.error}
            rows.append({"layer": layer, "kind": kind, **values, "records": len(bench.requests)})
    figure = lines_over_layers(lines, bench.layers, STYLES, "cosine, distributed against computed")
    first, last = bench.layers[0], bench.layers[-1]
    parts = [
        f"of {kind} {each[0]} in layer {first}, {each[-1]} in layer {last}"
        for kind, each in lines.items()
    ]
    falling = [kind for kind, each in lines.items() if _rises(each)]
    finding = f"cosine {'; '.join(parts)}. It falls with every step away from the last layer for "
    return Result(rows, f"{finding}{', '.join(falling) or 'none of them'}.", figure)


def _cosines(bench: Bench, layer: int) -> dict[str, Tensor]:
    """Return kind -> cosine of each record, ``(n,)``."""
    own = bench.ffn_output(layer)
    changes = simulated_changes(bench, layer)
    computed = own + changes["computed"]
    pairs = {
        "memories": (own + changes["distributed"], computed),
        "residuals": (changes["distributed"], changes["computed"]),
        "literal": (own + changes["literal"], computed),
    }
    return {kind: torch.cosine_similarity(*pair, dim=0) for kind, pair in pairs.items()}


def _rises(line: list[Estimate]) -> bool:
    means = [each.mean for each in line]
    return means == sorted(means)
