"""Rows of the table of metrics that a run asks for by the protocol they belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from lightning_blue.metrics import matching
from lightning_blue.metrics.classes import MeanOverRequests
from lightning_blue.metrics.spec import (
    ALIASES,
    ANSWERS,
    GENERATED_ANSWERS,
    GENERATION,
    JUDGE,
    JUDGED_ANSWERS,
    MAIN,
    NEGATED,
    NEIGHBOURS,
    PARAPHRASES,
    PORTABILITY,
    PROBABILITY,
    TEACHER_FORCING,
    TRUE_OBJECT,
    Measure,
    MetricSpec,
)

TITLES = {PROBABILITY: "probability", TEACHER_FORCING: "teacher-forced", GENERATION: "generation"}


def scored(
    main: Sequence[MetricSpec], protocol: Literal["probability", "teacher_forced"]
) -> list[MetricSpec]:
    """Return the rows whose measure depends on the protocol, under one that is not the main one.

    Those are efficacy, generalization and specificity, and the score that combines them. They are
    named by the protocol, and otherwise the same.
    """
    by_comparison = protocol == PROBABILITY
    depend = {spec.name for spec in main if isinstance(spec.measured, Mapping)}
    return [
        replace(
            spec,
            name=f"{spec.name}_{protocol}",
            title=f"{spec.title} ({TITLES[protocol]})",
            measured=spec.measure(MAIN[protocol]),
            needs=tuple(need for need in spec.needs if by_comparison or need != TRUE_OBJECT),
            combines=tuple(f"{name}_{protocol}" for name in spec.combines),
            group=protocol,
            protocol=protocol,
        )
        for spec in main
        if spec.name in depend or depend.intersection(spec.combines)
    ]


_generated = partial(
    MetricSpec, group="generation", protocol="generation", panel="success", per_request=True
)


def _answered(function: Callable[..., Any], definition: str) -> Measure:
    """Return how a function of generated answers is measured, in percent."""
    return Measure(GENERATED_ANSWERS, partial(MeanOverRequests, function, 100.0), definition)


def _judged(function: Callable[..., Any], definition: str) -> Measure:
    """Return how a function of judged answers is measured, in percent."""
    return Measure(JUDGED_ANSWERS, partial(MeanOverRequests, function, 100.0), definition)


_MATCHES = (  # suffixes of name and title, function, what it says, what it needs besides
    ("", "generation", matching.exact_match, "{} is the object, normalized", ()),
    (
        "_containment",
        "containment",
        matching.containment,
        "the object stands in {}, read on by as many stop strings as it holds itself",
        (),
    ),
    (
        "_alias",
        "alias",
        matching.alias_match,
        "{} is the object or one of its aliases, normalized; over requests with aliases",
        (ALIASES,),
    ),
)
_ASKED = (
    ("reliability", "the answer to the request's own prompt", ()),
    ("generalization", "the answer to a paraphrase", (PARAPHRASES,)),
    ("portability", "the answer to a prompt on what follows from the edit", (PORTABILITY,)),
)
GENERATION_METRICS: tuple[MetricSpec, ...] = (
    *(
        _generated(
            f"{name}_generation{suffix}",
            f"{name} ({said})",
            _answered(function, definition.format(answer)),
            needs=(*prompts, *needs),
        )
        for suffix, said, function, definition, needs in _MATCHES
        for name, answer, prompts in _ASKED
    ),
    *(
        _generated(
            f"{name}_generation_judge",
            f"{name} (judge)",
            _judged(matching.called_right, f"the judge calls {answer} right; over judged answers"),
            needs=(*prompts, JUDGE),
        )
        for name, answer, prompts in _ASKED
    ),
    _generated(
        "locality_generation",
        "locality (generation)",
        _answered(
            matching.same_continuation,
            "the continuation of a neighbour's prompt has the token ids that it had before any "
            "edit, to the last one",
        ),
        needs=(NEIGHBOURS,),
        side_effect=True,
    ),
    _generated(
        "empty_generation",
        "empty answers (generation)",
        _answered(matching.is_empty, "an answer that should be the object is empty"),
        direction="lower",
        needs=(ANSWERS,),
        panel=None,
        per_request=False,
    ),
    _generated(
        "cut_off_generation",
        "cut-off answers (generation)",
        _answered(
            matching.is_cut_off,
            "an answer that should be the object was ended by the limit of new tokens",
        ),
        direction="lower",
        needs=(ANSWERS,),
        panel=None,
        per_request=False,
    ),
    _generated(
        "negation_generation",
        "negation (generation)",
        _answered(
            matching.avoids,
            "the new object does not stand in the answer to the negated prompt",
        ),
        needs=(NEGATED,),
    ),
    _generated(
        "agreement_generation_judge",
        "agreement (judge)",
        _judged(
            matching.agreement,
            "the judge says of an answer what exact match says; over answers that it was sent",
        ),
        direction="neither",
        needs=(ANSWERS, JUDGE),
        panel=None,
        per_request=False,
    ),
    _generated(
        "unjudged_generation_judge",
        "answers without a verdict (judge)",
        _judged(
            matching.is_not_judged,
            "an answer that the judge should judge has no verdict: the endpoint has failed, or the "
            "reply is not the letter asked for",
        ),
        direction="lower",
        needs=(ANSWERS,),
        panel=None,
        per_request=False,
    ),
)
