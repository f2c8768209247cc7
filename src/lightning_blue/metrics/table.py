"""The metrics: one row each, from which outcomes, tables, legends, plots and reports are made.

To add a metric, write its function in `functional` (and a metric class in `classes` if its state is
more than a mean over requests), and give it a row here.

>>> [spec.name for spec in of_group("scores") if spec.panel == "success"]
['efficacy', 'generalization', 'specificity']
>>> by_name("retained_knowledge").label
'retained knowledge (%)'
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

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
from lightning_blue.metrics.protocol_rows import GENERATION_METRICS, scored
from lightning_blue.metrics.spec import (  # noqa: F401  (some are read as `table.NAME` only)
    ALIASES,
    ANSWERS,
    COMBINATION,
    COMPARISON,
    CONTROL_FACTS,
    GENERATED_ANSWERS,
    GENERATED_TEXT,
    GENERATION,
    GENERATION_PROMPTS,
    HARNESS,
    JUDGE,
    JUDGED_ANSWERS,
    MAIN,
    NEGATED,
    NEIGHBOURS,
    ORDINARY_TEXT,
    OWN_PROMPT,
    PARAPHRASES,
    PERCENT,
    PORTABILITY,
    PROBABILITY,
    PROTOCOLS,
    REFERENCE_TEXTS,
    RETENTION,
    TEACHER_FORCED,
    TEACHER_FORCING,
    TRUE_OBJECT,
    Direction,
    Measure,
    MetricSpec,
)

Directions = Mapping[str, Direction]  # by metric
NOTHING_SAID: Directions = MappingProxyType({})

_MAIN: tuple[MetricSpec, ...] = (
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
        "negation",
        "negation",
        Measure(
            COMPARISON,
            partial(MeanOverRequests, F.probability_avoidance, 100.0),
            "the new object is less probable than the true one after the negated prompt",
        ),
        needs=(TRUE_OBJECT, NEGATED),
        group="negation",
        per_request=True,
    ),
    MetricSpec(
        "negation_top1",
        "negation (top-1)",
        Measure(
            TEACHER_FORCED,
            partial(MeanOverRequests, F.not_said, 100.0),
            "a token of the new object is not the most probable one after the negated prompt",
        ),
        needs=(NEGATED,),
        group="negation",
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

ABILITY = "ability/"  # starts the name of each metric of a task of lm-evaluation-harness
REGISTERED: dict[str, Direction] = {  # the harness's own metrics; a run records what it says
    **dict.fromkeys(("acc", "acc_all", "acc_bytes", "acc_mutual_info", "acc_norm"), "higher"),
    **dict.fromkeys(("bleu", "bypass", "chrf", "chrf++", "exact_match", "f1"), "higher"),
    **dict.fromkeys(("likelihood", "mcc"), "higher"),
    **dict.fromkeys(("bits_per_byte", "brier_score", "byte_perplexity", "perplexity"), "lower"),
    **dict.fromkeys(("ter", "word_perplexity"), "lower"),
}
DIRECTION = "direction"  # the field of an estimate that says which direction is better
DIRECTIONS: dict[float, Direction] = {1: "higher", -1: "lower", 0: "neither"}
METRICS: tuple[MetricSpec, ...] = (
    *_MAIN,
    *scored(_MAIN, "probability"),
    *scored(_MAIN, "teacher_forced"),
    *GENERATION_METRICS,
)
GROUPS = ("scores", "top-1", "negation", *PROTOCOLS, "retention", "ability")  # the tables, in order


def by_name(name: str, directions: Directions = NOTHING_SAID) -> MetricSpec:
    """Return a metric's row; that of a task of lm-evaluation-harness is made of its name.

    Args:
        name: of the metric.
        directions: of metrics of the harness, see `directions_in`. Without it that of a metric of
            the harness's own is what its registry says, and of any other neither is better.

    Raises:
        KeyError: if no metric has that name.
    """
    if name.startswith(ABILITY):
        return _ability(name, directions)
    return {spec.name: spec for spec in METRICS}[name]


def among(names: Iterable[str], directions: Directions = NOTHING_SAID) -> list[MetricSpec]:
    """Return the rows of metrics that were measured, in the table's order, then general ability."""
    there = dict.fromkeys(names)
    known = [spec for spec in METRICS if spec.name in there]
    return known + [_ability(name, directions) for name in there if name.startswith(ABILITY)]


def directions_in(measured: Iterable[Mapping[str, Mapping[str, float]]]) -> dict[str, Direction]:
    """Return which direction of metrics is better, as their estimates say; neither if they differ.

    Args:
        measured: estimates by metric, several times.

    >>> bias = {"ability/bbq/bias": {"value": 0.1, "direction": -1.0}, "efficacy": {"value": 90.0}}
    >>> directions_in([bias])
    {'ability/bbq/bias': 'lower'}
    """
    found: dict[str, Direction] = {}
    for metrics in measured:
        for name, estimate in metrics.items():
            if DIRECTION in estimate:
                said = DIRECTIONS.get(estimate[DIRECTION], "neither")
                found[name] = said if found.get(name, said) == said else "neither"
    return found


def _ability(name: str, directions: Directions) -> MetricSpec:
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
        direction=directions.get(name) or REGISTERED.get(metric.split(",")[0], "neither"),
        needs=(HARNESS,),
        group="ability",
        panel="side effects",
        side_effect=True,
    )


def of_protocol(
    data_protocol: str, *protocols: str, added: Collection[str] = ()
) -> list[tuple[MetricSpec, Measure]]:
    """Return the metrics that read one of ``protocols`` under a data protocol, and how.

    Args:
        data_protocol: ``counterfact`` or ``zsre``, the main protocol.
        protocols: what is read, see `Measure`.
        added: of `PROTOCOLS`, those that the run asks for beside the main one.
    """
    wanted = [spec for spec in METRICS if spec.protocol is None or spec.protocol in added]
    measures = [(spec, spec.measure(data_protocol)) for spec in wanted]
    return [(spec, measure) for spec, measure in measures if measure.protocol in protocols]


def of_group(group: str) -> list[MetricSpec]:
    """Return the metrics that one table shows, in order."""
    return [spec for spec in METRICS if spec.group == group]


def per_request(values: Mapping[str, Any], added: Collection[str] = ()) -> dict[str, Any]:
    """Return the value of each metric that outcomes hold, None where it was not measurable."""
    return {
        spec.name: values.get(spec.name)
        for spec in METRICS
        if spec.per_request and (spec.protocol is None or spec.protocol in added)
    }
