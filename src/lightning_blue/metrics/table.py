"""The metrics: one row each, from which outcomes, tables, legends, plots and reports are made.

To add a metric, write its function in `functional` (and a metric class in `classes` if its state is
more than a mean over requests), and give it a row here.

>>> [spec.name for spec in METRICS if spec.panel == "success"]
['efficacy', 'generalization', 'specificity']
>>> by_name("retained_knowledge").label
'retained knowledge (%)'
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lightning_blue.metrics import functional as F
from lightning_blue.metrics.classes import (
    Consistency,
    ExactMatch,
    Fluency,
    MeanOverBatches,
    MeanOverRequests,
    Perplexity,
    ProbabilitySuccess,
    Score,
    TokenAccuracy,
)

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

# What a request or a run must offer for a metric to be measured.
TRUE_OBJECT = "true object"  # only where the probabilities of two objects are compared
PARAPHRASES = "paraphrases"
NEIGHBOURS = "neighbours"
GENERATION_PROMPTS = "generation prompts"
REFERENCE_TEXTS = "reference texts"

OWN_PROMPT = "own prompt"  # the prompts of a metric that needs no other prompts


@dataclass(frozen=True)
class Measure:
    """How a metric is measured.

    Attributes:
        protocol: what is read: `COMPARISON`, `TEACHER_FORCED`, `COMBINATION`, `GENERATED_TEXT`,
            `ORDINARY_TEXT`, `CONTROL_FACTS`, `RETENTION` or `HARNESS`.
        metric: builds a `torchmetrics.Metric`, for instance ``ExactMatch``, or
            ``partial(MeanOverRequests, function)`` for a function of the prompts' answers:
            ``(nll_wanted, nll_other)`` under `COMPARISON`, ``(correct,)`` under `TEACHER_FORCED`
            and `CONTROL_FACTS`, ``(texts,)`` under `GENERATED_TEXT`.
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
            ``retention``, or ``ability`` for general ability.
        panel: how plots over edits applied show it: the batch just applied and all edits so far
            (``success``, percent), one line (``side effects``), or not at all.
        per_request: whether each outcome of a request holds its value.
        side_effect: whether it shows what an edit did to the rest of the model.
    """

    name: str
    title: str
    measured: Measure | Mapping[str, Measure]
    unit: str = PERCENT
    direction: Literal["higher", "lower", "neither"] = "higher"
    needs: tuple[str, ...] = ()
    combines: tuple[str, ...] = ()
    group: Literal["scores", "top-1", "retention", "ability"] = "scores"
    panel: Literal["success", "side effects"] | None = None
    per_request: bool = False
    side_effect: bool = False

    def measure(self, data_protocol: str) -> Measure:
        """Return how it is measured under ``counterfact`` or ``zsre``."""
        return self.measured if isinstance(self.measured, Measure) else self.measured[data_protocol]

    @property
    def prompts(self) -> str:
        """The prompts of a request that it reads, for metrics that read their answers."""
        return next((need for need in self.needs if need in (PARAPHRASES, NEIGHBOURS)), OWN_PROMPT)

    @property
    def label(self) -> str:
        """Title and unit, as on an axis."""
        unit = "%" if self.unit == PERCENT else self.unit
        return f"{self.title} ({unit})" if unit else self.title


METRICS: tuple[MetricSpec, ...] = (
    MetricSpec(
        "efficacy",
        "efficacy",
        {
            "counterfact": Measure(
                COMPARISON,
                ProbabilitySuccess,
                "the new object is more probable than the true one after the request's own prompt",
            ),
            "zsre": Measure(
                TEACHER_FORCED,
                TokenAccuracy,
                "fraction of the new object's tokens that are the most probable ones after the "
                "request's own prompt, under teacher forcing",
            ),
        },
        needs=(TRUE_OBJECT,),
        panel="success",
        per_request=True,
    ),
    MetricSpec(
        "generalization",
        "generalization",
        {
            "counterfact": Measure(
                COMPARISON, ProbabilitySuccess, "the same as efficacy, after paraphrases"
            ),
            "zsre": Measure(
                TEACHER_FORCED, TokenAccuracy, "the same as efficacy, after paraphrases"
            ),
        },
        needs=(TRUE_OBJECT, PARAPHRASES),
        panel="success",
        per_request=True,
    ),
    MetricSpec(
        "specificity",
        "specificity",
        {
            "counterfact": Measure(
                COMPARISON,
                ProbabilitySuccess,
                "after prompts about neighbouring subjects, their own object is more probable "
                "than the new one",
            ),
            "zsre": Measure(
                TEACHER_FORCED,
                TokenAccuracy,
                "fraction of the tokens of a neighbouring subject's own object that are the most "
                "probable ones after its prompt, under teacher forcing",
            ),
        },
        needs=(NEIGHBOURS,),
        panel="success",
        per_request=True,
        side_effect=True,
    ),
    MetricSpec(
        "score",
        "score",
        Measure(
            COMBINATION,
            Score,
            "harmonic mean of efficacy, generalization and specificity, over requests with all "
            "three",
        ),
        needs=(TRUE_OBJECT, PARAPHRASES, NEIGHBOURS),
        combines=("efficacy", "generalization", "specificity"),
    ),
    MetricSpec(
        "fluency",
        "fluency",
        Measure(
            GENERATED_TEXT,
            Fluency,
            "weighted entropy of the bigrams and trigrams of generated texts, in bits, times 100",
        ),
        unit="bits × 100",
        needs=(GENERATION_PROMPTS,),
        side_effect=True,
    ),
    MetricSpec(
        "consistency",
        "consistency",
        Measure(
            GENERATED_TEXT,
            Consistency,
            "tf-idf similarity of generated texts with reference texts, times 100",
        ),
        unit="× 100",
        needs=(GENERATION_PROMPTS, REFERENCE_TEXTS),
    ),
    MetricSpec(
        "perplexity",
        "perplexity",
        Measure(
            ORDINARY_TEXT,
            Perplexity,
            "exp of the mean nats per token of ordinary text that is not about any edit",
        ),
        unit="",
        direction="lower",
        needs=(ORDINARY_TEXT,),
        panel="side effects",
        side_effect=True,
    ),
    MetricSpec(
        "retained_knowledge",
        "retained knowledge",
        Measure(
            CONTROL_FACTS,
            ExactMatch,
            "the object of a control fact, known and not edited, is the most probable continuation",
        ),
        needs=(CONTROL_FACTS,),
        panel="side effects",
        side_effect=True,
    ),
    MetricSpec(
        "efficacy_top1",
        "efficacy (top-1)",
        Measure(
            TEACHER_FORCED,
            ExactMatch,
            "every token of the new object is the most probable one after the request's own prompt",
        ),
        group="top-1",
        per_request=True,
    ),
    MetricSpec(
        "generalization_top1",
        "generalization (top-1)",
        Measure(TEACHER_FORCED, ExactMatch, "the same as efficacy (top-1), after paraphrases"),
        needs=(PARAPHRASES,),
        group="top-1",
        per_request=True,
    ),
    MetricSpec(
        "specificity_top1",
        "specificity (top-1)",
        Measure(
            TEACHER_FORCED,
            ExactMatch,
            "after prompts about neighbouring subjects, every token of their own object is the "
            "most probable one",
        ),
        needs=(NEIGHBOURS,),
        group="top-1",
        per_request=True,
    ),
    MetricSpec(
        "retention_mean",
        "retention (mean)",
        Measure(
            RETENTION,
            MeanOverBatches,
            "mean over edit batches of the efficacy at the end of the run",
        ),
        needs=(RETENTION,),
        group="retention",
    ),
    MetricSpec(
        "retention_first_batch",
        "retention (first batch)",
        Measure(
            RETENTION,
            partial(MeanOverRequests, F.as_given),
            "efficacy of the first edit batch at the end of the run",
        ),
        needs=(RETENTION,),
        group="retention",
    ),
    MetricSpec(
        "forgetting",
        "forgetting",
        Measure(
            RETENTION,
            MeanOverBatches,
            "efficacy right after a batch less efficacy at the end of the run, mean over all "
            "batches but the last",
        ),
        direction="lower",
        needs=(RETENTION,),
        group="retention",
    ),
)
GROUPS = ("scores", "top-1", "retention", "ability")  # the tables, in order

ABILITY = "ability/"  # starts the name of each metric of a task of lm-evaluation-harness
LOWER_IS_BETTER = (  # of the harness's metrics
    "perplexity",
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
    "brier_score",
    "ter",
)


def by_name(name: str) -> MetricSpec:
    """Return a metric's row; that of a task of lm-evaluation-harness is made of its name.

    Raises:
        KeyError: if no metric has that name.
    """
    if name.startswith(ABILITY):
        return _ability(name)
    return {spec.name: spec for spec in METRICS}[name]


def among(names: Iterable[str]) -> list[MetricSpec]:
    """Return the rows of metrics that were measured, in the table's order, then general ability."""
    there = dict.fromkeys(names)
    known = [spec for spec in METRICS if spec.name in there]
    return known + [_ability(name) for name in there if name.startswith(ABILITY)]


def _ability(name: str) -> MetricSpec:
    """Make the row of ``ability/TASK/METRIC``, in the metric's own unit, which nothing says.

    >>> by_name("ability/arc_easy/acc_norm").label
    'arc_easy acc_norm'
    """
    task, _, metric = name.removeprefix(ABILITY).rpartition("/")
    return MetricSpec(
        name,
        f"{task} {metric}",
        Measure(HARNESS, MeanOverRequests, f"{metric} of the task {task} of {HARNESS}"),
        unit="",
        direction="lower" if metric.split(",")[0] in LOWER_IS_BETTER else "higher",
        needs=(HARNESS,),
        group="ability",
        panel="side effects",
        side_effect=True,
    )


def of_protocol(data_protocol: str, *protocols: str) -> list[tuple[MetricSpec, Measure]]:
    """Return the metrics that read one of ``protocols`` under a data protocol, and how."""
    measures = [(spec, spec.measure(data_protocol)) for spec in METRICS]
    return [(spec, measure) for spec, measure in measures if measure.protocol in protocols]


def of_group(group: str) -> list[MetricSpec]:
    """Return the metrics that one table shows, in order."""
    return [spec for spec in METRICS if spec.group == group]


def per_request(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each metric that outcomes hold, None where it was not measurable."""
    return {spec.name: values.get(spec.name) for spec in METRICS if spec.per_request}
