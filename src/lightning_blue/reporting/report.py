"""The report of a run, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

from blue_callbacks.guard import OUTCOMES, crossings
from lightning_blue.data.requests import EditRequest
from lightning_blue.metrics import table
from lightning_blue.metrics.evaluation import RequestOutcome, over_requests
from lightning_blue.metrics.history import RunHistory
from lightning_blue.reporting.answers import generated_answers, verdicts_sentence
from lightning_blue.reporting.files import FACTS
from lightning_blue.reporting.page import page
from lightning_blue.reporting.plots import CAPTIONS, plots, png
from lightning_blue.reporting.retention import retention_figure, retention_section
from lightning_blue.reporting.tables import (
    markdown_table,
    protocols_table,
    score_table,
    stages_table,
)
from lightning_blue.reporting.text import (
    CELL,
    definitions,
    fill,
    inline,
    loaded_with,
    prefix_text,
    protocol_sentence,
    rounding_lines,
    settings_rows,
)
from lightning_blue.reporting.views import (
    cleaned,
    failed,
    measured,
    metrics_at,
    outcome_pairs,
    seconds_per_edit,
)
from lightning_blue.support.storage import write_atomic
from lightning_blue.support.text import counted

PLOTS = "plots"  # folder of pictures, in the run's
EXAMPLES = 10  # edits shown, and as many that failed
REJECTED_SHOWN = 20
EVENTS_SHOWN = 20

RETENTION = "Score of edit batches after later batches."
SIDE_BY_SIDE = (
    "Percent at the end, in brackets the unedited model. Generation: own prompt, paraphrases and "
    "portability by exact match, neighbours by unchanged continuations."
)

Example = tuple[EditRequest, RequestOutcome | None, RequestOutcome | None]


def write_report(folder: Path, history: RunHistory, model_folder: str | None = "model") -> Path:
    """Write ``report.md``, the pictures it shows, under ``plots/``, and the same as a page.

    The page, ``report.html``, is one file that needs no other.

    Args:
        folder: of the run.
        history: of the run.
        model_folder: where the edited model is, seen from ``folder``; None if it was not saved.

    Returns:
        The path of ``report.md``.

    Raises:
        InputError: if the disk is full or may not be written.
    """
    pictures = plots(history)
    heat_map = retention_figure(history)
    if heat_map is not None:
        pictures["retention"] = png(heat_map)
    for name, picture in pictures.items():
        write_atomic(folder / PLOTS / f"{name}.png", picture)
    path = folder / "report.md"
    write_atomic(path, report(history, pictures, model_folder))
    shown = sections(history, pictures, model_folder)
    write_atomic(folder / "report.html", page(history, shown, pictures, title(history)))
    return path


def report(history: RunHistory, pictures: Iterable[str], model_folder: str | None) -> str:
    """Return the report as markdown; ``pictures`` names the files under ``plots/``."""
    first, *others = sections(history, pictures, model_folder).items()
    body = [f"## {heading}\n\n{text}" for heading, text in others if text]
    return "\n\n".join([f"# {title(history)}", first[1], *body]) + "\n"


def title(history: RunHistory) -> str:
    """Say what kind of run it was."""
    return "Measurement" if history.of("test") else "Editing run"


def sections(
    history: RunHistory, pictures: Iterable[str], model_folder: str | None
) -> dict[str, str]:
    """Return the report's sections as markdown, by heading, in order; the first has no heading."""
    pictures = set(pictures)
    return {
        "": _sentence(history),
        "Scores": f"{score_table(history)}\n\n{fill(protocol_sentence(history))}".strip(),
        "The protocols side by side": _protocols(history),
        "Guard": _guard(history),
        "Plots": _pictures(pictures),
        "Retention": _heat_map(history, pictures),
        "The first batch, right after it was applied and at the end": _retention(history),
        "Edits": _examples(history),
        "Generated answers": generated_answers(history),
        "Between prompt and object": _joints(history),
        "Requests that could not be used": _rejected(history),
        "Settings": _table(settings_rows(history.settings), ["setting", "value"]),
        "Time": _times(history),
        "The edited model": _reload(model_folder, history),
        "How the numbers are defined": definitions(measured(history), history.protocol),
    }


def _sentence(history: RunHistory) -> str:
    settings = history.settings
    if history.of("test"):
        model, data = (inline(str(settings.get(key, f"the {key}"))) for key in ("model", "data"))
        return (
            f"{counted(len(history.requests), 'fact')} of {data} "
            f"{'was' if len(history.requests) == 1 else 'were'} measured in {model}, "
            "without editing."
        )
    text = f"{history.applied:,} of {counted(len(history.requests), 'requested fact')}"
    if "data" in settings:
        text += f" of {inline(str(settings['data']))}"
    text += " was edited" if history.applied == 1 else " were edited"
    if "model" in settings:
        text += f" in {inline(str(settings['model']))}"
    number = len(history.batches)
    if number:
        text += f", in {counted(number, 'batch', 'batches')}"
    if number and "batch_size" in settings:
        text += f" of up to {settings['batch_size']}"
    if "plan" in settings:
        text += f", with the plan {inline(str(settings['plan']))}"
    if history.rejected:
        text += f"; {len(history.rejected):,} more could not be used"
    text += "."
    if history.ended_early:
        never = len(history.requests) - history.applied
        text += f"\n\n**Partial:** {never:,} requests were never applied ({history.ended_early}); "
        text += "what is measured at the end is measured on those that were."
    if history.resumed_after:
        places = ", ".join(f"{edits:,}" for edits in history.resumed_after)
        text += f"\n\nThe run was stopped and resumed after {places} edits."
    return text


def _guard(history: RunHistory) -> str:
    """List the batches that went too far, and what became of them."""
    events = history.guard_events or []
    rows = [
        [
            str(event["batch"]),
            inline(", ".join(event["requests"]), CELL),
            inline(", ".join(crossings(event))),
            OUTCOMES[event["action"]],
        ]
        for event in events[:EVENTS_SHOWN]
    ]
    listed = _table(rows, ["batch, from 0", "requests", "above its limit", "what became of it"])
    more = len(events) - EVENTS_SHOWN
    return listed + (f"\n\nand {more:,} more." if more > 0 else "")


def _pictures(names: Iterable[str]) -> str:
    drawn = set(names)
    shown = [(name, text) for name, text in CAPTIONS.items() if name in drawn]
    return "\n\n".join(f"{text}\n\n![{text}](plots/{name}.png)" for name, text in shown)


def _heat_map(history: RunHistory, names: Collection[str]) -> str:
    """Show the retention matrix, and what it sums up to."""
    text = fill(
        "Of each edit batch, a sample that is fixed at the start, after later batches and at the "
        "end of the run: the diagonal is the immediate score, the last column the final one."
    )
    picture = f"{text}\n\n![{RETENTION}](plots/retention.png)" if "retention" in names else ""
    return "\n\n".join(filter(None, [picture, retention_section(history)]))


def _protocols(history: RunHistory) -> str:
    """Compare what the protocols say of the same prompts."""
    compared = protocols_table(history)
    said = f"{SIDE_BY_SIDE} {verdicts_sentence(history)}".strip()
    return compared and f"{compared}\n\n{fill(said)}"


def _retention(history: RunHistory) -> str:
    """Compare the first batch then and now, where later batches could have disturbed it."""
    taken, last = history.of("batch"), metrics_at(history, "first_batch")
    if len(taken) < 2 or not last:
        return ""
    then, said = cleaned(taken[0].metrics), ""
    first = next(iter(history.batches.values()))
    kept = [place for place in first if place in history.in_force]
    if len(kept) < len(first):
        known = history.first_values
        if known:
            values = [known[place] for place in kept]
            then = over_requests(values, history.protocol, history.added)
        said = "\n\n" + fill(_superseded(len(kept), len(first), compared=bool(known)))
    stages = {"right after": then, "at the end": last}
    return stages_table(stages, table.of_group("scores")) + said


def _superseded(kept: int, of: int, compared: bool) -> str:
    """Say over which requests of the first batch is compared: later ones have replaced others."""
    those = f"the {kept:,} of its {counted(of, 'request')} that no later one replaces"
    if compared:
        return f"Over {those}."
    return (
        f"Right after it was applied over all of its requests, at the end over {those}: the two "
        "are not to be compared."
    )


def _examples(history: RunHistory) -> str:
    pairs = outcome_pairs(history)
    applied = [pairs[place] for place in history.applied_places]
    missed = [example for example in applied if failed(example[2])]
    parts = [_example_table(applied[:EXAMPLES])] if applied else []
    if missed:
        parts.append(f"{len(missed):,} missed their own prompt; the first of them:")
        parts.append(_example_table(missed[:EXAMPLES]))
    if parts:
        parts.append("All of them, with probabilities, are in `edits.jsonl`.")
    return "\n\n".join(parts)


def _example_table(examples: Iterable[Example]) -> str:
    rows = [
        [
            inline(request.shown, CELL),
            inline(request.target_new),
            *(_text(outcome) for outcome in (before, after)),
            *(_probability(outcome) for outcome in (before, after)),
        ]
        for request, before, after in examples
    ]
    return markdown_table(
        rows, ["prompt", "new object", "before", "after", "p(new) before", "p(new) after"]
    )


def _joints(history: RunHistory) -> str:
    """Count what stands between prompts and objects."""
    counts = Counter(history.joints)
    rows = [
        [inline(prefix_text(each.prefix)), inline(each.reason), f"{count:,}"]
        for each, count in counts.most_common()
    ]
    return _table(rows, ["between prompt and object", "because of", "requests"])


def _text(outcome: RequestOutcome | None) -> str:
    return "" if outcome is None else inline(outcome.continuation, CELL)


def _probability(outcome: RequestOutcome | None) -> str:
    return "" if outcome is None else f"{outcome.probability_new:.3f}"


def _rejected(history: RunHistory) -> str:
    rows = [
        [inline(text) for text in (fault.source, fault.case_id, fault.reason, fault.hint)]
        for fault in history.rejected[:REJECTED_SHOWN]
    ]
    listed = _table(rows, ["where", "case", "why", "how to fix it"])
    more = len(history.rejected) - REJECTED_SHOWN
    return listed + (f"\n\nand {more:,} more, see `rejected.jsonl`." if more > 0 else "")


def _times(history: RunHistory) -> str:
    rows = [[inline(part), f"{seconds:.1f}"] for part, seconds in history.seconds.items()]
    text = _table(rows, ["part", "seconds"])
    each = seconds_per_edit(history)
    if each is not None:
        text += f"\n\n{each:.3g} seconds per edit."
    for batch, layers in history.targets_read.items():
        named = ", ".join(map(str, layers))
        edits = counted(len(history.batches[batch]), "edit")
        text += (
            f"\n\nTargets of batch {batch}, layer {named}, were read from the cache: another run "
            f"had optimised them. The seconds per edit leave out the batch's {edits}."
        )
    return text


def _table(rows: list[list[str]], header: list[str]) -> str:
    return markdown_table(rows, header) if rows else ""


def _reload(model_folder: str | None, history: RunHistory) -> str:
    if history.settings.get("solver") == "in_context":
        return fill(
            f"No weight was changed, and no model was saved: `{FACTS}` holds the facts and how "
            "they are put before prompts. Edits, paraphrases, neighbours, control facts and "
            "generated texts were measured with it, each prompt behind those facts whose subject "
            "it names. Perplexity and general ability are read without it: they are those of the "
            "unedited model."
        )
    if model_folder is None:
        return ""
    loader = loaded_with(history)
    rounding = "".join(f"{line}\n\n" for line in rounding_lines(history))
    return f"""{rounding}```python
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained("{model_folder}")
tokenizer = AutoTokenizer.from_pretrained("{model_folder}")
```

Paths are seen from this report's folder."""
