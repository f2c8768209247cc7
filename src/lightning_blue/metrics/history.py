"""What happened in a run, gathered while it goes on and written when it ends."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lightning_blue.data.checks import superseded
from lightning_blue.data.requests import EditRequest, Rejected
from lightning_blue.language_model.joining import Joint
from lightning_blue.metrics.asked import require_same
from lightning_blue.metrics.evaluation import Metrics, RequestOutcome
from lightning_blue.metrics.generated import GenerationSettings
from lightning_blue.metrics.matching import GeneratedAnswer, answer_from
from lightning_blue.metrics.retention import Retention, Values
from lightning_blue.support.errors import InputError

READ = "editing_with_targets_read"  # a part of the seconds
ASKED = ("protocols", "generation", "negation", "judge")  # as a run was started with


class Measurement(NamedTuple):
    """Metrics of one protocol at one point of the run.

    Attributes:
        stage: ``pre`` (all requests, before any edit), ``batch`` (the batch just applied),
            ``cumulative`` (a sample of all edits applied until now), ``first_batch`` (the first
            batch, at the end), ``post`` (all applied requests, at the end) or ``test`` (all
            requests of a file, without editing).
        edits: edits applied when it was taken.
        metrics: name -> value, standard_error, count, prompts.
    """

    stage: str
    edits: int
    metrics: Metrics


class LossCurve(NamedTuple):
    """The inner optimisation of one edit batch at one target layer.

    Attributes:
        batch: number of the edit batch, from 0.
        layer: target layer.
        losses: total, nll, kl, weight decay; NaN once an edit is done, ``(n, steps, 4)``.
    """

    batch: int
    layer: int
    losses: Tensor


@dataclass
class RunHistory:
    """Everything that the files of a run are made from.

    Attributes:
        settings: what the reader of a report wants to know, as plain values: ``model``, ``plan``,
            ``layers``, ``covariance_weight``, ``past_keys``, ``batch_size``, ``data``.
        protocol: ``counterfact`` or ``zsre``.
        added: the protocols that requests are scored by besides, see `table.PROTOCOLS`.
        generation: how answers are generated; None where none are.
        negation: the words that deny a prompt; None without negation probes.
        judge: the model that judges answers; empty without one.
        asked: how everything else is measured, see `lightning_blue.metrics.asked`.
        requests: the requests of the run, in order.
        joints: what stands between the prompt and the object of each request, and why.
        rejected: requests that could not be used.
        controls_kept: how many facts the unedited model answers, of how many it was asked for; None
            where control facts were not asked for.
        batches: of each committed batch, by its number, the places of its requests in ``requests``.
        measurements: in the order they were taken.
        logged: edits applied and flat values, as the loggers got them.
        loss_curves: in the order of the batches.
        first_values: of each request of the first batch, by its place, the values right after it.
        retention: what was measured of earlier batches after later ones.
        before: outcome of each request on the unedited model.
        after: outcome of each request in force at the end, by its place in ``requests``.
        answers_before: what the unedited model answered, with places in ``requests``.
        answers_after: what the model answered at the end, likewise.
        seconds: time spent by part: ``editing``, ``evaluate``, ``prepare``, ``total``; of editing,
            ``editing_with_targets_read`` is that of batches some of whose targets were read.
        targets_read: of each such batch, by its number, the target layers.
        resumed_after: edits applied where the run was resumed, each time.
        guard_events: of the guard, see :class:`blue_callbacks.EditGuard`; None without one.
        ended_early: why requests are left that were never applied; empty if none are.
        export_dtype: in which the model was saved, where that is not what it was edited in.
        rounding_losses: by weight, the part of the update that was lost to it.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    protocol: str = "counterfact"
    added: tuple[str, ...] = ()
    generation: GenerationSettings | None = None
    negation: str | None = None
    judge: str = ""
    asked: dict[str, Any] = field(default_factory=dict)
    requests: list[EditRequest] = field(default_factory=list)
    joints: list[Joint] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    controls_kept: tuple[int, int] | None = None
    batches: dict[int, list[int]] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    logged: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    loss_curves: list[LossCurve] = field(default_factory=list)
    first_values: dict[int, Values] = field(default_factory=dict)
    retention: Retention = field(default_factory=Retention)
    before: list[RequestOutcome] = field(default_factory=list)
    after: dict[int, RequestOutcome] = field(default_factory=dict)
    answers_before: list[GeneratedAnswer] = field(default_factory=list)
    answers_after: list[GeneratedAnswer] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    targets_read: dict[int, list[int]] = field(default_factory=dict)
    resumed_after: list[int] = field(default_factory=list)
    guard_events: list[dict[str, Any]] | None = None
    ended_early: str = ""
    export_dtype: str = ""
    rounding_losses: dict[str, float] = field(default_factory=dict)

    @property
    def applied(self) -> int:
        """How many requests were applied."""
        return sum(map(len, self.batches.values()))

    @property
    def applied_places(self) -> list[int]:
        """The places in ``requests`` of those that were applied, in the order of their batches."""
        return [place for places in self.batches.values() for place in places]

    @property
    def in_force(self) -> list[int]:
        """The places of applied requests that no later applied request supersedes."""
        places = self.applied_places
        replaced = set(superseded([self.requests[place] for place in places]))
        return [place for index, place in enumerate(places) if index not in replaced]

    @property
    def added_settings(self) -> dict[str, Any]:
        """What the measurement of added protocols depends on, as plain values; empty without any.

        That is ``protocols``, ``generation`` where answers are generated, and ``negation``.
        """
        settings: dict[str, Any] = {"protocols": [*self.added]} if self.added else {}
        if self.generation is not None:
            how = asdict(self.generation)
            settings["generation"] = {**how, "stops": [*self.generation.stops]}
        if self.negation is not None:
            settings["negation"] = self.negation
        return settings

    def count_seconds(self, part: str, seconds: float) -> None:
        """Add to the time spent on a part."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def of(self, stage: str) -> list[Measurement]:
        """Return the measurements of one stage, in order."""
        return [taken for taken in self.measurements if taken.stage == stage]

    @property
    def _as_asked(self) -> dict[str, Any]:
        """What a run has to be resumed with: that, and the judge."""
        return self.added_settings | ({"judge": self.judge} if self.judge else {})

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run cannot find out again, as plain values and tensors."""
        return {
            "batches": self.batches,
            "measurements": [taken._asdict() for taken in self.measurements],
            "logged": self.logged,
            "loss_curves": [curve._asdict() for curve in self.loss_curves],
            "first_values": self.first_values,
            "retention": self.retention.state_dict(),
            "before": [asdict(outcome) for outcome in self.before],
            "answers_before": [asdict(answer) for answer in self.answers_before],
            "seconds": self.seconds,
            "targets_read": self.targets_read,
            "protocol": self.protocol,
            **self._as_asked,
            "asked": self.asked,
            "resumed_after": self.resumed_after,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what was gathered until a checkpoint.

        Raises:
            InputError: if it was measured in another way until then: by other protocols, on another
                text, over fewer records, and so on.
        """
        main = state.get("protocol", self.protocol)  # which older checkpoints do not say
        if main != self.protocol:
            raise InputError(
                f"the run was started with the protocol {main}, not {self.protocol}",
                where="measure.protocols, or data.protocol",
                hint="resume it with the same, or start a new run",
            )
        until_then = {key: state[key] for key in ASKED if key in state}
        if until_then != self._as_asked:
            said = ", ".join(f"{key}: {value}" for key, value in until_then.items())
            raise InputError(
                f"the run was started with {said or 'no added protocols'}",
                where=", ".join(f"measure.{key}" for key in ASKED),
                hint="resume it with the same, or start a new run",
            )
        if self.asked:  # to measure a model as it is needs no more than its weights
            require_same(state.get("asked", self.asked), self.asked)  # older ones do not say
        self.batches = state["batches"]
        self.measurements = [Measurement(**taken) for taken in state["measurements"]]
        self.logged = state["logged"]
        self.loss_curves = [LossCurve(**curve) for curve in state["loss_curves"]]
        self.first_values = state.get("first_values", {})
        self.retention.load_state_dict(state["retention"])
        self.before = [
            RequestOutcome(**{**outcome, "correct": tuple(outcome["correct"])})
            for outcome in state["before"]
        ]
        self.answers_before = [answer_from(each) for each in state.get("answers_before", [])]
        self.seconds = state["seconds"]
        self.targets_read = state.get("targets_read", {})
        self.resumed_after = [*state["resumed_after"], self.applied]

    def stages(self) -> list[str]:
        """Return the stages that were measured, each once, in order."""
        return list(dict.fromkeys(taken.stage for taken in self.measurements))
