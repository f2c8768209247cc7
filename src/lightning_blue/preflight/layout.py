"""What was checked, laid out for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from lightning_blue.preflight.estimate import RANGE
from lightning_blue.preflight.facts import FactSeen, Requests
from lightning_blue.preflight.model import Arrival, ModelFacts
from lightning_blue.preflight.report import Cost, Report, Settings
from lightning_blue.support.space import size
from lightning_blue.support.text import counted

WIDTH = 80
LABEL = 14  # characters of a line's name
MARK = "[{}]"  # around the subject's last token
SLOWED = 1.2  # times; from here on it is said that other programs ran
SMALL = 1e-4  # a probability below it is not spelled in percent


def as_text(report: Report, *, facts: bool = True) -> str:
    """Lay a report out in lines of at most 80 characters.

    Args:
        report: to be laid out.
        facts: whether it is shown how the model reads single facts.
    """
    sections = [
        _model(report.model),
        _settings(report.settings, report.additivity),
        [] if report.requests is None else _requests(report.requests),
        _facts(report.facts, report.requests) if facts else [],
        [] if report.cost is None else _cost(report.cost),
        [said for note in report.notes for said in line("note", note)],
        _verdict(report.problems),
    ]
    return "\n\n".join("\n".join(lines) for lines in map(list, sections) if lines) + "\n"


def duration(seconds: float) -> str:
    """Spell a number of seconds for people.

    >>> duration(0.4), duration(75), duration(600), duration(50_000)
    ('under 1 s', '75 s', '10 min', '13.9 h')
    """
    if seconds < 1:
        return "under 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def cut_into_tokens(tokens: Sequence[str], lookup: int | None = None) -> str:
    r"""Show tokens with bars between them, and one of them in brackets.

    >>> cut_into_tokens(["The", " mayor", " of", " Lyon", "\n"], 3)
    '|The| mayor| of|[ Lyon]|\\n|'
    """
    shown = [_visible(token) for token in tokens]
    if lookup is not None:
        shown[lookup] = MARK.format(shown[lookup])
    return f"|{'|'.join(shown)}|"


def percent(probability: float) -> str:
    """Spell a probability.

    >>> percent(0.12345), percent(0.0000031)
    ('12.35%', '3e-06')
    """
    return f"{probability:.2%}" if probability >= SMALL else f"{probability:.0e}"


def _model(model: ModelFacts) -> Iterator[str]:
    yield from line("model", f"{model.name} ({model.model_type})")
    context = "" if model.context is None else f", reads {model.context:,} tokens"
    yield from line("", f"{model.parameters / 1e6:,.1f} million parameters{context}")
    saved = "" if model.dtype == model.saved_dtype else f", saved in {model.saved_dtype}"
    yield from line("dtype", f"edited in {model.dtype}{saved}")
    yield from line("blocks", f"{model.block}, {model.n_layers} of them")
    shape = f"d_model {model.d_model:,} x d_in {model.d_in:,}"
    where = f"layers {span(model.editable)}"
    yield from line("weight", f"{model.down_projection}, {shape}, {where}")
    if model.attention_output is not None:
        yield from line("attention", f"{model.attention_output} (for PMET's target site)")
    tied = "is the embedding (tied)" if model.tied_head else "is a matrix of its own"
    yield from line("head", tied)
    sizes = f"{model.vocabulary:,} in the tokenizer, {model.embeddings:,} in the embedding"
    yield from line("tokens", sizes)
    before = " ".join(model.before_text) or "nothing"
    yield from line("BOS", f"{before} is put before a text")
    spaced, unspaced = "|".join(model.spaced), "|".join(model.unspaced)
    yield from line("objects", f"behind a space {spaced}; behind none {unspaced}")
    chat = "yes: --data.chat=true puts it around prompts" if model.chat_template else "none"
    yield from line("chat template", chat)


def _settings(settings: Settings, additivity: Sequence[Arrival]) -> Iterator[str]:
    how = ", proposed by depth: --update.layers gives others" if settings.proposed else ""
    yield from line("layers", f"{', '.join(map(str, settings.layers))}{how}")
    written = ", ".join(map(str, settings.written))
    yield from line("plan", f"{settings.plan}, which writes layers {written}")
    same: dict[str, list[int]] = {}
    for arrival in additivity:
        same.setdefault(_arrived(arrival), []).append(arrival.layer)
    for said, layers in same.items():
        yield from line("additivity", f"layers {span(layers)}: {said}")
    if settings.site is not None:
        note = "" if settings.site_note is None else f"; {settings.site_note}"
        yield from line("target site", f"{settings.site}{note}")
    yield from line("device", settings.device)


def _arrived(arrival: Arrival) -> str:
    """Say how a change of a layer's weight arrived at its block's output."""
    if arrival.multiple is None or arrival.missed is None:
        return "nothing could be measured"
    if not arrival.follows:
        return (
            f"what arrives at the block's output is off by {arrival.missed:.0%} of a known change"
        )
    times = "as it is" if arrival.multiple == 1 else f"times {arrival.multiple:.4g}"
    return f"a known change arrives at the block's output {times}"


def _requests(requests: Requests) -> Iterator[str]:
    yield from line("facts", f"{requests.usable:,} of {requests.total:,} will be edited")
    for unusable in requests.unusable:
        why = f"{unusable.source}: {_visible(unusable.reason)}; {unusable.hint}"
        yield from line("unusable", why)
    for place in requests.superseded:
        yield from line("superseded", f"{place}: a later batch wants another object after it")
    if requests.blanks:
        said = "prompt ends with a blank, which is kept: the object follows without another"
        yield from line("blank", f"{', '.join(requests.blanks)}: {said}")
    for group in requests.companions:
        places = ", ".join(group.sources)
        said = (
            f"batch {group.batch}, {_visible(group.subject)}: {places}; one key cannot hold "
            "several targets, --model.target.merge_subjects=true gives them one"
        )
        yield from line("one subject", said)
    for each in requests.returning:
        batches = ", ".join(map(str, each.batches))
        said = (
            f"batches {batches}, {_visible(each.subject)}: {', '.join(each.sources)}; their keys "
            "are much alike, so that the later edit weakens the earlier one"
        )
        yield from line("again", said)


def _facts(facts: Sequence[FactSeen], requests: Requests | None) -> Iterator[str]:
    for number, fact in enumerate(facts):
        if number:
            yield ""
        yield from line(fact.source or f"case {fact.case_id}", "")
        yield from _folded("tokens", cut_into_tokens(fact.tokens, fact.lookup))
        joined = repr(fact.prefix) if fact.prefix else "nothing"
        objects = cut_into_tokens(fact.object_tokens)
        yield from _folded("object", f"{objects}   behind {joined} ({fact.joined_by})")
        yield from line("says now", _visible(fact.says_now) or "nothing")
        yield from line("probability", _probabilities(fact))
    more = 0 if requests is None else requests.usable - len(facts)
    if more > 0:
        yield from (
            "",
            *line("", f"and {more:,} more, not asked about (--facts=N)"),
        )


def _probabilities(fact: FactSeen) -> str:
    old = "no current object is named"
    if fact.probability_true is not None:
        old = f"{fact.target_true} {percent(fact.probability_true)} (now)"
    said = ", and is said already" if fact.known_already else ""
    return f"{fact.target_new} {percent(fact.probability_new)} (wanted{said}), {old}"


def _cost(cost: Cost) -> Iterator[str]:
    what = counted(cost.edits, "edit") + (" of facts in the package" if cost.stand_ins else "")
    total = f"{duration(cost.seconds[0])} to {duration(cost.seconds[1])}"
    yield from line("time", f"{total} for {what}; start, plots and saving come on top")
    for part in cost.parts:
        if part.amount:
            amount = f"{part.amount:,} {part.unit}"
            yield from line("", f"{part.name:<16} {duration(part.seconds):>9}  ({amount})")
    low, high = map(size, cost.memory)
    available = f"; {size(cost.memory_available)} can be had"
    yield from line("memory", f"{low} to {high}{available}")
    free = "" if cost.disk_free is None else f"; {size(cost.disk_free)} are free"
    yield from line("disk", f"about {size(cost.disk)} in {cost.folder}{free}")
    if cost.covariance_bytes:
        what = f"{size(cost.covariance_bytes)} of covariances are added"
    else:
        what = "the covariances are there"
    yield from line("", f"{what}: {cost.covariance_file}")
    low_factor, high_factor = RANGE
    yield from line("", f"(times {low_factor:g} to {high_factor:g} of what a few items took)")
    if cost.slowed > SLOWED:
        had = f"other programs had {1 - 1 / cost.slowed:.0%} of the processor meanwhile"
        yield from line("", f"({had}: the shorter time is without them)")


def _verdict(problems: Sequence[str]) -> Iterator[str]:
    if not problems:
        yield from line("verdict", "fit to go")
        return
    count = counted(len(problems), "problem")
    yield from line("verdict", f"not yet: {count} to be mended first")
    for problem in problems:
        yield from line("problem", problem)


def line(name: str, text: str) -> Iterator[str]:
    """Yield a named line, folded; a longer name stands alone."""
    if len(name) >= LABEL or not text:
        yield name[:WIDTH]
        name = ""
        if not text:
            return
    paragraphs = text.splitlines() or [""]
    for number, paragraph in enumerate(paragraphs):
        start = f"{name if number == 0 else '':<{LABEL}} "
        yield from textwrap.wrap(
            paragraph.strip(),
            WIDTH,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_on_hyphens=False,
        )


def _folded(name: str, text: str) -> Iterator[str]:
    """Yield a named line, cut where it is full and not at its blanks, which are the tokens' own."""
    room = WIDTH - LABEL - 1
    for start in range(0, len(text), room):
        yield f"{name if start == 0 else '':<{LABEL}} {text[start : start + room]}"


def span(layers: Sequence[int]) -> str:
    """Spell layers, those that follow each other as a span.

    >>> span([0, 1, 2, 5])
    '0 to 2, 5'
    """
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][-1] + 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    return ", ".join(f"{s[0]} to {s[-1]}" if len(s) > 1 else str(s[0]) for s in spans)


def _visible(text: str) -> str:
    """Spell line breaks and other control characters."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
