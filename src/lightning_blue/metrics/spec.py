"""What a row of the table of metrics says: how a metric is named, measured and shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

PERCENT = "percent"

# What a metric reads. The first two read answers to the prompts of requests.
COMPARISON = "probability comparison"  # nats per token of two objects
TEACHER_FORCED = "teacher-forced tokens"  # which of the wanted object's tokens are most probable
COMBINATION = "combination"  # the values per request of other metrics
GENERATED_TEXT = "generated text"
ORDINARY_TEXT = "ordinary text"
CONTROL_FACTS = "control facts"  # known facts that are not edited
RETENTION = "retention matrix"  # the efficacy of each edit batch, over the run
HARNESS = "lm-evaluation-harness"
GENERATED_ANSWERS = "generated answers"  # to the prompts of requests, written freely
JUDGED_ANSWERS = "judged answers"  # the same, with what a judge says of each

# How a run may ask for requests to be scored. One of the first two is its main protocol.
PROBABILITY, TEACHER_FORCING, GENERATION = "probability", "teacher_forced", "generation"
PROTOCOLS = (PROBABILITY, TEACHER_FORCING, GENERATION)
MAIN = {PROBABILITY: "counterfact", TEACHER_FORCING: "zsre"}  # as `RunHistory.protocol` says it

# What a request or a run must offer for a metric to be measured.
TRUE_OBJECT = "true object"  # only where the probabilities of two objects are compared
PARAPHRASES = "paraphrases"
NEIGHBOURS = "neighbours"
PORTABILITY = "portability prompts"  # what follows from the edit
ALIASES = "aliases"  # of the wanted object
GENERATION_PROMPTS = "generation prompts"
REFERENCE_TEXTS = "reference texts"
NEGATED = "negated prompts"  # what is no question, behind "It is not true that"
JUDGE = "a judge"

OWN_PROMPT = "own prompt"  # the prompts of a metric that needs no other prompts
ANSWERS = "answers"  # those of a metric that reads all answers that are compared with the object

Direction = Literal["higher", "lower", "neither"]  # that is better


@dataclass(frozen=True)
class Measure:
    """How a metric is measured.

    Attributes:
        protocol: what is read: `COMPARISON`, `TEACHER_FORCED`, `COMBINATION`, `GENERATED_TEXT`,
            `GENERATED_ANSWERS`, `JUDGED_ANSWERS`, `ORDINARY_TEXT`, `CONTROL_FACTS`, `RETENTION` or
            `HARNESS`.
        metric: builds a `torchmetrics.Metric`, for instance ``ExactMatch``, or
            ``partial(MeanOverRequests, function)`` for a function of the prompts' answers:
            ``(nll_wanted, nll_other)`` under `COMPARISON`, ``(correct,)`` under `TEACHER_FORCED`
            and `CONTROL_FACTS`, ``(texts,)`` under `GENERATED_TEXT`, ``(answers,)`` under
            `GENERATED_ANSWERS` and `JUDGED_ANSWERS`.
        definition: what the number says, a phrase without a full stop.
    """

    protocol: str
    metric: Callable[..., Any]
    definition: str


@dataclass(frozen=True)
class MetricSpec:
    """A metric: how it is named, measured and shown.

    Attributes:
        name: key in summaries, logs and outcomes.
        title: as people read it.
        measured: how it is measured, or that by data protocol (``counterfact``, ``zsre``).
        unit: `PERCENT` or the number's unit; empty where it has none.
        direction: whether higher or lower is better, or neither.
        needs: what a request or the run must offer; without it the metric is absent.
        combines: the metrics that a `COMBINATION` reads; their rows stand above this one.
        group: the table that shows it: ``scores``, ``top-1`` for the strict variants,
            ``negation``, the protocol it belongs to, ``retention``, or ``ability`` for general
            ability.
        panel: how plots over edits applied show it: the batch just applied and all edits so far
            (``success``, percent), one line (``side effects``), or not at all.
        per_request: whether each outcome of a request holds its value.
        side_effect: whether it shows what an edit did to the rest of the model.
        protocol: of `PROTOCOLS`, which a run has to ask for beside its main one; None: measured
            under the main protocol, or under any.
    """

    name: str
    title: str
    measured: Measure | Mapping[str, Measure]
    unit: str = PERCENT
    direction: Direction = "higher"
    needs: tuple[str, ...] = ()
    combines: tuple[str, ...] = ()
    group: Literal[
        "scores",
        "top-1",
        "negation",
        "probability",
        "teacher_forced",
        "generation",
        "retention",
        "ability",
    ] = "scores"
    panel: Literal["success", "side effects"] | None = None
    per_request: bool = False
    side_effect: bool = False
    protocol: Literal["probability", "teacher_forced", "generation"] | None = None

    def measure(self, data_protocol: str) -> Measure:
        """Return how it is measured under ``counterfact`` or ``zsre``."""
        return self.measured if isinstance(self.measured, Measure) else self.measured[data_protocol]

    @property
    def prompts(self) -> str:
        """The prompts of a request that it reads, for metrics that read their answers."""
        others = (PARAPHRASES, NEIGHBOURS, PORTABILITY, NEGATED, ANSWERS)
        return next((need for need in self.needs if need in others), OWN_PROMPT)

    @property
    def label(self) -> str:
        """Title and unit, as on an axis."""
        unit = "%" if self.unit == PERCENT else self.unit
        return f"{self.title} ({unit})" if unit else self.title
