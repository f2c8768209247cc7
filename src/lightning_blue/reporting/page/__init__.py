"""The report as a page: one HTML file that needs no other, and no network.

Plain HTML, CSS and a small script, with pictures as SVG that Python draws from the same views as
``report.md``: nothing to load, nothing that ages, and no number that could differ. What the page
has no form of its own for is rendered from the report's markdown.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lightning_blue.metrics.history import RunHistory
from lightning_blue.reporting.page.bars import bars
from lightning_blue.reporting.page.charts import course_charts, legend, loss_charts
from lightning_blue.reporting.page.drawing import draw
from lightning_blue.reporting.page.edits import edits_data
from lightning_blue.reporting.page.prose import render
from lightning_blue.reporting.page.scores import score_tables
from lightning_blue.reporting.plots import CAPTIONS
from lightning_blue.reporting.tables import STAGES, sample_sizes
from lightning_blue.reporting.tables import legend as score_legend
from lightning_blue.reporting.text import protocol_sentence
from lightning_blue.reporting.views import metrics_at

DRAWN = {  # pictures of lines: what makes the charts, and what their bands are
    "metrics": (course_charts, ("± standard error", "error")),
    "losses": (loss_charts, ("total, 8 of 10 edits", "error first")),
}
FOLDED = ("Settings", "Time", "Between prompt and object")  # sections that open when asked to


def page(
    history: RunHistory, sections: Mapping[str, str], pictures: Mapping[str, bytes], title: str
) -> str:
    """Return the page.

    Args:
        history: of the run.
        sections: of the report, as markdown by heading; the first has none.
        pictures: PNG files by name, for those that the page does not draw itself.
        title: of the page.
    """
    environment = _environment()
    images = {f"plots/{name}.png": _data_uri(png) for name, png in pictures.items()}
    own: dict[str, Callable[[], str]] = {
        "Scores": lambda: _scores(environment, history),
        "Plots": lambda: _charts(environment, history, images),
        "Edits": lambda: _edits(environment, history),
    }
    shown = []
    for heading, text in sections.items():
        content = own[heading]() if heading in own else render(text, images)
        if content.strip():
            shown.append((heading, Markup(content)))
    script = _asset("page.js")
    return environment.get_template("page.html").render(
        title=title,
        name=history.settings.get("model"),
        sections=shown,
        folded=FOLDED,
        style=Markup(_asset("page.css")),
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _scores(environment: Environment, history: RunHistory) -> str:
    stages = {label: metrics_at(history, stage) for stage, label in STAGES.items()}
    tables = score_tables(history, stages)
    notes = [score_legend(stages), sample_sizes(stages)] if tables else ["Nothing was measured."]
    notes += filter(None, [protocol_sentence(history)])
    return environment.get_template("scores.html").render(tables=tables, notes=notes)


def _charts(environment: Environment, history: RunHistory, images: Mapping[str, str]) -> str:
    groups = []
    for name, caption in CAPTIONS.items():
        if name == "before_after":
            group: dict[str, Any] = {"bars": bars(history)}
        elif name in DRAWN:
            make, band = DRAWN[name]
            charts = make(history)
            group = {"charts": [(chart, draw(chart)) for chart in charts]}
            group["legend"] = legend(charts, band) if charts else []
        else:
            group = {"image": images.get(f"plots/{name}.png")}
        if any(group.values()):
            groups.append({"caption": caption, **group})
    return environment.get_template("charts.html").render(groups=groups) if groups else ""


def _edits(environment: Environment, history: RunHistory) -> str:
    if not history.requests:
        return ""
    data = edits_data(history)
    return environment.get_template("edits.html").render(data=data)


@cache
def _environment() -> Environment:
    """Return an environment that escapes every text unless it is known to be markup."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # |tojson escapes <, >, & and ' as \u003c and so on, so that no text can end its element
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "allow_nan": False,
        "separators": (",", ":"),
    }
    environment.filters["px"] = lambda value: f"{value:.1f}".removesuffix(".0")
    return environment


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
