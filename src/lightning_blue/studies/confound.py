"""Which layers are written, whose target, what share: three things that BLUE changes at once.

Beyond the paper. The plan ``even`` writes all critical layers with shares of one target, that of
the last layer; BLUE writes two, each whole and with a target of its own. Here each of the three is
varied alone, and each update is measured again at the norm of BLUE's, because a longer update
changes more of everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from blue_callbacks.plans import PLANS, LayerUpdate
from lightning_blue.metrics.evaluation import Metrics
from lightning_blue.studies.bench import Bench
from lightning_blue.studies.confound_figure import confound_figure, is_norm
from lightning_blue.studies.results import Result, Row, measured_of, of_metric

SHOWN = ("score", "efficacy", "generalization", "specificity")


class Combination(NamedTuple):
    """One way to lay out an update.

    Attributes:
        written: ``first``, ``last``, ``boundary`` or ``all`` critical layers.
        target: ``own`` of each layer, or the ``last`` layer's for all of them.
        share: of the residual: ``full``; ``even`` (1 / written layers left) or ``square_root`` of
            that; ``as even``: of the first layer alone what the plan ``even`` gives it.
        updates: the plan that it is.
        plan: its name, where it has one.
    """

    written: str
    target: str
    share: str
    updates: tuple[LayerUpdate, ...]
    plan: str = ""

    @property
    def label(self) -> str:
        """What a legend calls it."""
        return self.plan or f"{self.written}, {self.target} target, {self.share}"


def combinations(layers: Sequence[int]) -> list[Combination]:
    """List all combinations, each once.

    A target below the layer that is written is left out: nothing written there can reach it.

    >>> [c.label for c in combinations([3])]
    ['even']
    """
    first, last = layers[0], layers[-1]
    places = {"first": [first], "last": [last], "boundary": [first, last], "all": list(layers)}
    found: dict[tuple[LayerUpdate, ...], Combination] = {}
    names = {tuple(make(layers)): name for name, make in reversed(PLANS.items())}
    for written, chosen in places.items():
        chosen = list(dict.fromkeys(chosen))
        for target in ("own", "last"):
            for share, power in (("full", 0.0), ("even", -1.0), ("square_root", -0.5)):
                updates = tuple(
                    LayerUpdate(
                        layer, layer if target == "own" else last, (len(chosen) - place) ** power
                    )
                    for place, layer in enumerate(chosen)
                )
                made = Combination(written, target, share, updates, names.get(updates, ""))
                found.setdefault(updates, made)
    alone = (LayerUpdate(first, last, 1 / len(layers)),)
    found.setdefault(alone, Combination("first", "last", "as even", alone))
    return list(found.values())


def confound(bench: Bench) -> Result:
    """Edit all records in one batch with each combination; measure it, and at BLUE's norm."""
    _ = bench.targets
    blue = PLANS["boundary"](bench.layers)
    with bench.edited(blue):
        norm = bench.update_norm()
    before = bench.measure()
    (shown, *_) = measured_of(SHOWN, before)
    rows = [_row("unedited", "", "", "", "own norm", 0.0, before)]
    for each in combinations(bench.layers):
        names = (each.label, each.written, each.target, each.share)
        with bench.edited(each.updates):
            own = bench.update_norm()
            rows.append(_row(*names, "own norm", own, bench.measure()))
            if own and not is_norm(own, norm):
                bench.module.rescale(norm / own)
                rows.append(_row(*names, "equal norm", bench.update_norm(), bench.measure()))
    return Result(rows, _finding(rows, shown), confound_figure(rows, shown, norm))


def _row(
    label: str, written: str, target: str, share: str, control: str, norm: float, metrics: Metrics
) -> Row:
    row: Row = {"combination": label, "written": written, "target": target, "share": share}
    row |= {"control": control, "norm": norm}
    for name in SHOWN:
        found = of_metric(metrics, name)
        row |= {name: found.mean, f"{name}_error": found.error}
    return row


def _finding(rows: list[Row], shown: str) -> str:
    """Compare the plans, and the best of what is none, by the first metric that was measured."""
    own = {row["combination"]: row for row in rows if row["control"] == "own norm"}
    equal = {row["combination"]: row for row in rows if row["control"] == "equal norm"}

    def said(name: str) -> str:
        row = own[name]
        text = f"{name} {_value(row, shown)} (norm {row['norm']:.3g}"
        if name in equal:
            text += f"; {_value(equal[name], shown)} at BLUE's"
        return f"{text})"

    named = [name for name in own if name in PLANS]
    others = sorted(
        (name for name in own if name not in PLANS and name != "unedited"),
        key=lambda name: -own[name][shown],
    )
    text = f"{shown} of {', '.join(map(said, named))}."
    if others:
        text += f" The best combination that is no plan: {said(others[0])}."
    return text


def _value(row: Row, name: str) -> str:
    return f"{row[name]:.1f} ± {row[f'{name}_error']:.1f}"
