"""What was located: the outputs in a folder, and the summary for a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_blue import __version__
from lightning_blue.data.requests import EditRequest
from lightning_blue.locating import FILE
from lightning_blue.locating.effects import CONFIDENCE, Band, Effects, Proposal
from lightning_blue.locating.facts import TOKEN_CLASSES, TracedFact
from lightning_blue.locating.modules import KINDS
from lightning_blue.locating.pictures import by_layer, heat_maps, proposals
from lightning_blue.locating.probe import MEASURES, ProbeResult
from lightning_blue.locating.tracing import Trace
from lightning_blue.preflight.layout import line, span
from lightning_blue.reporting.plots import png
from lightning_blue.studies.results import Row, csv_text
from lightning_blue.support.storage import write_atomic


@dataclass(frozen=True)
class Located:
    """All that was found.

    Attributes:
        model: its name, as it was given, and
        identity: the hash of its weights by which covariances and checkpoints know it.
        data: where the facts are from.
        asked: facts that the model was asked for.
        facts, tokens, traces: those that were traced, by fact.
        samples: of noise, of each fact.
        noise: its standard deviation.
        window: layers that are restored together.
        effects: averages over facts.
        tracing: what is proposed from them.
        probe: the direct probe; None where it was not made.
        agreement: rank correlation between the FFN's effect and the probe's score over the
            candidate layers.
        by_depth: layers that are proposed where neither says anything.
        notes: what should be known besides.
    """

    model: str
    identity: str
    data: str
    asked: int
    facts: Sequence[EditRequest]
    tokens: Sequence[TracedFact]
    traces: Sequence[Trace]
    samples: int
    noise: float
    window: int
    effects: Effects
    tracing: Proposal
    probe: ProbeResult | None
    agreement: float
    by_depth: list[int]
    notes: list[str] = field(default_factory=list)

    @property
    def chosen(self) -> tuple[str, list[int]]:
        """The layers to be used, and where they are from: the probe, else the tracing, else depth.

        The probe goes first because it measures what edits come to; where tracing peaks does not
        tell that (Hase et al. 2023).
        """
        if self.probe is not None and self.probe.proposal.layers:
            return "probe", self.probe.proposal.layers
        if self.tracing.layers:
            return "tracing", self.tracing.layers
        return "depth", self.by_depth


def write(located: Located, folder: Path) -> None:
    """Write CSV files, pictures, and last `locate.json`, which says that all are there.

    Raises:
        NotWritten: if the disk is full or may not be written.
    """
    effects, probe = located.effects, located.probe
    write_atomic(folder / "facts.csv", csv_text(list(_fact_rows(located))))
    write_atomic(folder / "effects.csv", csv_text(list(_effect_rows(effects))))
    write_atomic(folder / "heat_maps.png", png(heat_maps(effects, located.window)))
    write_atomic(folder / "by_layer.png", png(by_layer(effects, located.window)))
    scores = [] if probe is None else probe.scores
    if probe is not None:
        write_atomic(folder / "probe.csv", csv_text(list(_probe_rows(probe))))
    figure = proposals(effects, located.tracing, scores, None if probe is None else probe.proposal)
    write_atomic(folder / "proposals.png", png(figure))
    text = json.dumps(as_json(located), indent=2, ensure_ascii=False)
    write_atomic(folder / FILE, text + "\n")


def as_json(located: Located) -> dict[str, Any]:
    """Spell it for programs; what is not finite is null."""
    probe = located.probe
    source, layers = located.chosen
    return {
        "version": __version__,
        "model": located.model,
        "identity": located.identity,
        "data": located.data,
        "facts": {"asked": located.asked, "known": len(located.facts)},
        "layers": layers,
        "layers_from": source,
        "tracing": {
            "layers": located.tracing.layers,
            "peak": located.tracing.peak,
            "rule": located.tracing.rule,
            "facts": len(located.facts),
            "samples": located.samples,
            "noise": located.noise,
            "window": located.window,
            "confidence": CONFIDENCE,
            "total_effect": _numbers(located.effects.total),
            "curve": [
                {"layer": layer, **_numbers(band)}
                for layer, band in enumerate(located.effects.ffn_curve())
            ],
        },
        "probe": {
            "layers": [] if probe is None else probe.proposal.layers,
            "peak": None if probe is None else probe.proposal.peak,
            "rule": "not made" if probe is None else probe.proposal.rule,
            "facts": 0 if probe is None else probe.facts,
            "agreement_of_halves": None if probe is None else _number(probe.agreement),
            "stable": None if probe is None else probe.stable,
            "curve": [] if probe is None else list(_probe_rows(probe, finite=True)),
        },
        "rank_correlation": _number(located.agreement),
        "notes": located.notes,
    }


def as_text(located: Located, folder: Path) -> str:
    """Lay the summary out in lines of at most 80 characters."""
    return "".join(f"{each}\n" for each in _summary(located, folder))


def _summary(located: Located, folder: Path) -> Iterator[str]:
    effects, tracing, probe = located.effects, located.tracing, located.probe
    yield from line("model", f"{located.model}, {effects.n_layers} layers")
    known = f"{len(located.facts):,} known of {located.asked:,} asked ({located.data})"
    yield from line("facts", known)
    total = effects.total
    yield from line(
        "noise",
        f"{located.samples} samples of standard deviation {located.noise:.3g} on the subject take "
        f"{_points(total)} points from the object's probability",
    )
    if tracing.peak is not None:
        curve = effects.ffn_curve()
        yield from line(
            "tracing",
            f"FFN effect at the subject's last token peaks at layer {tracing.peak}: "
            f"{_points(curve[tracing.peak])} points; proposes {span(tracing.layers) or 'none'}",
        )
    else:
        yield from line("tracing", tracing.rule)
    if probe is not None:
        best = max(probe.scores, key=lambda each: each.score.mean)
        halves = f"halves of the facts rank layers alike to {probe.agreement:.2f}"
        stable = "" if probe.stable else ", not stable: more facts may rank them otherwise"
        yield from line(
            "probe",
            f"{probe.facts} facts edited in each of {len(probe.scores)} layers: best at layer "
            f"{best.layer}, score {best.score.mean:.1%} ± {best.score.error:.1%}; proposes "
            f"{span(probe.proposal.layers)} ({halves}{stable})",
        )
        if not math.isnan(located.agreement):
            yield from line("", f"rank correlation of the two curves {located.agreement:+.2f}")
    for note in located.notes:
        yield from line("note", note)
    source, layers = located.chosen
    given = ",".join(map(str, layers))
    yield from line("layers", f"{span(layers)}, by {source}: --update.layers=[{given}]")
    yield from line("written to", str(folder))


def _points(band: Band) -> str:
    if math.isnan(band.low):
        return f"{100 * band.mean:.1f}"
    return f"{100 * band.mean:.1f} ({100 * band.low:.1f} to {100 * band.high:.1f})"


def _numbers(band: Band) -> dict[str, float | None]:
    return {name: _number(value) for name, value in band._asdict().items()}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _fact_rows(located: Located) -> Iterator[Row]:
    for fact, tokens, trace in zip(located.facts, located.tokens, located.traces, strict=True):
        yield {
            "case_id": fact.case_id,
            "prompt": fact.text,
            "subject": fact.subject,
            "object": fact.target_true,
            "subject_tokens": tokens.last + 1 - tokens.first,
            "probability": trace.clean,
            "probability_corrupted": trace.corrupted,
        }


def _effect_rows(effects: Effects) -> Iterator[Row]:
    for kind in KINDS:
        for number, name in enumerate(TOKEN_CLASSES):
            for layer in range(effects.n_layers if effects.facts[number] else 0):
                mean, low, high = effects.band(kind, number, layer)
                yield {
                    "restored": kind,
                    "token": name,
                    "layer": layer,
                    "indirect_effect": mean,
                    "low": low,
                    "high": high,
                    "facts": effects.facts[number],
                }


def _probe_rows(probe: ProbeResult, finite: bool = False) -> Iterator[Row]:
    for each in probe.scores:
        error = each.score.error
        yield {
            "layer": each.layer,
            "score": each.score.mean,
            "standard_error": _number(error) if finite else error,
            **{f"{name}_share": v for name, v in zip(MEASURES, each.shares, strict=True)},
            **dict(zip(MEASURES, each.successes, strict=True)),
            "facts": probe.facts,
        }
