"""What was checked, as plain values."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_blue.preflight.estimate import Part
from lightning_blue.preflight.facts import FactSeen, Requests
from lightning_blue.preflight.model import Arrival, ModelFacts


@dataclass(frozen=True)
class Settings:
    """What `fit` would do, as far as it was not checked but chosen.

    Attributes:
        layers: critical layers.
        proposed: whether they were proposed by the model's depth, and not given.
        plan: of the update.
        written: layers that it writes.
        site: where targets are found; None where no site is right.
        site_note: what a reader should know of it.
        device: that the run would use.
        batch_size: requests that are edited together.
    """

    layers: list[int]
    proposed: bool
    plan: str
    written: list[int]
    site: str | None
    site_note: str | None
    device: str
    batch_size: int


@dataclass(frozen=True)
class Cost:
    """What a run will cost.

    Attributes:
        edits: that it is about.
        parts: of the time; ``amount`` of a ``unit`` takes so many ``seconds``.
        seconds: the least and the most that it should take.
        slowed: how many times longer the timing took than the processor worked on it, because
            other programs had it meanwhile; the least that a run takes is without them.
        memory: the least and the most bytes that it should take.
        memory_available: bytes that this process may take on the device.
        disk: bytes that it writes.
        disk_free: bytes that are free there; None where nobody knows.
        folder: where it writes them.
        covariance_file: in which covariances are kept or found.
        covariance_bytes: that are added to it.
        stand_ins: whether the edits are facts of the package, for want of others.
    """

    edits: int
    parts: list[Part]
    seconds: tuple[float, float]
    slowed: float
    memory: tuple[float, float]
    memory_available: int
    disk: int
    disk_free: int | None
    folder: str
    covariance_file: str
    covariance_bytes: int
    stand_ins: bool


@dataclass(frozen=True)
class Report:
    """All that was checked.

    Attributes:
        model: see `ModelFacts`.
        settings: see `Settings`.
        additivity: by layer, see `Arrival`.
        requests: of all facts; None where none were given.
        facts: those that the model was asked about.
        cost: None where it could not be found out.
        problems: what must be mended first; none: the run is fit to go.
        notes: what should be known besides.
    """

    model: ModelFacts
    settings: Settings
    additivity: list[Arrival]
    requests: Requests | None
    facts: list[FactSeen]
    cost: Cost | None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fit_to_go(self) -> bool:
        """Whether nothing has to be mended first."""
        return not self.problems

    def to_json(self) -> str:
        """Spell it for programs."""
        content: dict[str, Any] = {"fit_to_go": self.fit_to_go, **asdict(self)}
        if self.cost is not None:
            content["cost"]["parts"] = [part._asdict() for part in self.cost.parts]
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
