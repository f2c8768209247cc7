"""The report as a page: its numbers, what it refers to, hostile texts, and its use in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from browser import Browser, browser
from histories import NAN, estimate, losses, outcome, small_history
from lightning_blue.data.requests import EditRequest, Rejected
from lightning_blue.metrics.history import LossCurve, Measurement, RunHistory
from lightning_blue.metrics.table import PERCENT
from lightning_blue.reporting.axes import ticks
from lightning_blue.reporting.page import page
from lightning_blue.reporting.page.bars import LONGEST, bars
from lightning_blue.reporting.page.charts import Chart, Line, Mark, course_charts, loss_charts
from lightning_blue.reporting.page.differences import differences
from lightning_blue.reporting.page.drawing import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, draw
from lightning_blue.reporting.page.edits import edits_data
from lightning_blue.reporting.page.prose import render
from lightning_blue.reporting.report import report, sections, title, write_report
from lightning_blue.reporting.tables import value_and_error

HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<!--<script>",
    "' onmouseover='alert(1)' &lt;b&gt; &amp;",
    "שלום \u202eעולם 🧪👩‍🔬 {{ 7 * 7 }} {% raw %}",
    "](javascript:alert(1)) ![x](http://example.org/x.png) \u2028 |",
)


class Page(HTMLParser):
    """What a test reads from a page: elements, the cells of tables, texts of script and style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.raw: list[tuple[dict[str, str | None], str]] = []
        self._in = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("script", "style"):
            self.raw.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in in ("td", "th"):
            self.rows[-1][-1] += data
        if self._in in ("script", "style"):
            attributes, text = self.raw[-1]
            self.raw[-1] = attributes, text + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> dict:
        (text,) = [text for attributes, text in self.raw if attributes.get("id") == "edits-data"]
        return json.loads(text)


def html_of(history: RunHistory, pictures: dict[str, bytes] | None = None) -> str:
    named = pictures or {}
    return page(history, sections(history, named, "model"), named, title(history))


def hostile_history() -> RunHistory:
    """The small run, with texts that would break out of their places."""
    history = small_history()
    history.requests = [
        EditRequest(
            f"c{i}", "{} lies in", text, HOSTILE[i - 1], target_true=HOSTILE[i - 2], relation=text
        )
        for i, text in enumerate(HOSTILE[:4])
    ]
    texts = [outcome(f"c{i}", 1.0, text) for i, text in enumerate(HOSTILE)]
    history.before = texts[:4]
    history.after = {i: texts[i + 2] for i in range(3)}
    history.settings |= {"model": HOSTILE[0], "data": HOSTILE[5], "plan": HOSTILE[1]}
    history.rejected = [Rejected(*([text] * 5)) for text in HOSTILE]
    return history


# what stands there


def test_scores_are_those_of_the_report_and_its_summary() -> None:
    history = small_history()
    rows = Page(html_of(history)).rows
    shown = {row[0]: row[1:] for row in rows if len(row) == 4}
    markdown = report(history, [], None).split("## Guard")[0].split("## The first")[0]
    told = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown.splitlines()
        if line.startswith("| ") and " ± " in line
    ]
    assert len(told) == 5
    for name, *cells in told:
        assert shown[name][:2] == cells
    assert shown["efficacy"] == ["4.5 ± 1.5", "100.0 ± 0.0", "↑ higher"]
    assert shown["perplexity"] == ["12.35 ± 0.04", "15.00 ± 0.05", "↓ lower"]


def test_every_section_of_the_report_is_on_the_page() -> None:
    history = small_history()
    html = html_of(history, {"metrics": b"", "losses": b"", "before_after": b""})
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    markdown = report(history, ["metrics", "losses", "before_after"], "model")
    assert headings == re.findall(r"^## (.*)$", markdown, flags=re.MULTILINE)
    assert "<td>no subject</td>" in html
    assert "3 of 4 requested facts of facts.jsonl were edited in almanac" in html
    assert "from_pretrained(&quot;model&quot;)" in html


def test_nothing_is_loaded_and_only_the_own_script_may_run() -> None:
    parsed = Page(html_of(hostile_history(), {"new": b"png"}))
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "data", "action", "srcset", "poster", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png")), (tag, value)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    assert not parsed.all("link")
    scripts = [(a, text) for a, text in parsed.raw if a.get("type") != "application/json"]
    (style, script) = sorted((text for _, text in scripts), key=lambda text: "use strict" in text)
    assert not re.search(r"url\(|@import", style)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [m["content"] for m in parsed.all("meta") if "http-equiv" in m]
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_hostile_texts_are_texts() -> None:
    history = hostile_history()
    parsed = Page(html_of(history))
    assert [tag for tag, _ in parsed.elements if tag == "script"] == ["script"] * 2
    assert not parsed.all("img")
    assert not parsed.all("b")
    for request, row in zip(history.requests, parsed.data["edits"], strict=True):
        assert "".join(row[1:4]) == request.shown
        assert row[2] == request.subject
        assert row[4:7] == [request.target_new, request.target_true, request.relation]
    for place, after in history.after.items():
        row = parsed.data["edits"][place]
        assert "".join(row[9][0]) == history.before[place].continuation
        assert "".join(row[10][0]) == after.continuation
    cells = [row[2] for row in parsed.rows if len(row) == 4 and row[0] == row[1]]
    assert cells == [" ".join(text.split()) for text in HOSTILE]  # of what could not be used


def test_pictures_of_a_section_are_inside_the_page() -> None:
    images = {"plots/map.png": "data:image/png;base64,AAAA"}
    text = "![a <map>](plots/map.png)\n\n![other](plots/other.png) ![far](http://x.org/y.png)"
    html = render(text, images)
    assert '<img src="data:image/png;base64,AAAA" alt="a &lt;map&gt;">' in html
    assert html.count("<img") == 1
    assert "other" in html
    assert "http" not in html


# charts


def test_charts_hold_the_measured_values() -> None:
    efficacy, retained = course_charts(small_history())
    values = {line.label: [(m.x, m.value, m.text) for m in line.marks] for line in efficacy.lines}
    assert values == {
        "the batch just applied": [(2, 100.0, "100.0"), (3, 90.0, "90.0")],
        "all edits so far (a sample)": [(2, 100.0, "100.0"), (3, 95.0, "95.0 ± 5.0")],
    }
    assert (efficacy.title, efficacy.note) == ("efficacy (%)", "higher is better")
    assert (efficacy.unedited, efficacy.aside) == (None, "unedited: 4.5 ↓")
    assert (retained.unedited, retained.aside) == (98.0, "")
    (line,) = retained.lines
    assert [(m.low, m.high) for m in line.marks] == [
        pytest.approx(span) for span in ((97.1, 98.9), (97.5, 97.5), (95.9, 98.1))
    ]
    first, second = loss_charts(small_history())
    assert [m.value for m in first.lines[0].marks] == [4.0, 2.0, 2.0]  # medians over three edits
    assert first.lines[0].marks[0].text == "4 (8 of 10 edits: 2.4 to 7.2)"
    assert first.limits == second.limits


def test_losses_that_are_not_finite_have_no_place_on_a_chart() -> None:
    history = small_history()
    nothing, broken = losses([NAN, NAN]), losses([2.0, math.inf, 1.0])
    history.loss_curves = [LossCurve(0, 1, nothing), LossCurve(0, 3, broken)]
    (chart,) = loss_charts(history)
    assert [(mark.x, mark.value) for mark in chart.lines[0].marks] == [(1, 2.0), (3, 1.0)]
    assert "nan" not in html_of(history)


def test_a_run_of_one_batch_has_no_curves() -> None:
    history = small_history()
    history.measurements = [taken for taken in history.measurements if taken.edits in (0, 2)]
    history.loss_curves = []
    assert course_charts(history) == loss_charts(history) == bars(history) == []
    html = html_of(history)
    assert "<svg" not in html
    assert ">Plots<" not in html


def chart(*values: float, limits: tuple[float, float], logarithmic: bool = False) -> Chart:
    marks = [Mark(x, value, value - 1, value + 1, f"{value}!") for x, value in enumerate(values)]
    lines = [Line("one", "first", marks)]
    x_limits = (0, len(values) - 1)
    return Chart("t", "", "edits", "at {}", lines, limits, x_limits, logarithmic)


def test_pixels() -> None:
    drawing = draw(chart(0.0, 50.0, 100.0, limits=(0, 100)))
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    middle = (LEFT + right) / 2, (TOP + bottom) / 2
    expected = [(LEFT, bottom), middle, (right, TOP)]
    points = [tuple(map(float, pair.split(","))) for pair in drawing.lines[0][0].split()]
    assert points == [pytest.approx(pair, abs=0.06) for pair in expected]  # a decimal is kept
    assert [(c.left, c.left + c.width) for c in drawing.columns] == [
        pytest.approx(span)
        for span in (
            (LEFT, (LEFT + middle[0]) / 2),
            ((LEFT + middle[0]) / 2, (middle[0] + right) / 2),
            ((middle[0] + right) / 2, right),
        )
    ]
    assert [column.tip for column in drawing.columns] == [
        f"at {x}\none: {value}!" for x, value in enumerate((0.0, 50.0, 100.0))
    ]
    drawing = draw(chart(1.0, 10.0, 100.0, limits=(1, 100), logarithmic=True))
    heights = [column.dots[0][0] for column in drawing.columns]
    assert heights == [pytest.approx(y) for y in (bottom, middle[1], TOP)]


def test_ticks_are_round_and_inside() -> None:
    assert ticks(62.9, 101.0) == [70.0, 80.0, 90.0, 100.0]
    assert ticks(2.0, 3000.0, logarithmic=True) == [10.0, 100.0, 1000.0]
    assert ticks(0, 3.12, whole=True) == [0.0, 1.0, 2.0, 3.0]


def test_perplexity_that_explodes_is_drawn_on_a_logarithmic_axis() -> None:
    history = small_history()
    for taken, value in zip(history.of("cumulative"), (20.0, 1e6), strict=True):
        taken.metrics["perplexity"] = estimate(value, 2 * value, tokens=8192)
    history.of("post")[0].metrics["perplexity"] = estimate(1e6, 1e5, tokens=8192)
    (perplexity,) = [each for each in course_charts(history) if each.title == "perplexity"]
    assert perplexity.logarithmic
    assert draw(perplexity).y_ticks
    (drawn,) = [each for each in bars(history) if each.title == "perplexity"]
    assert drawn.note == "lower is better, logarithmic"
    assert 0 < drawn.bars[0].length < drawn.bars[1].length <= LONGEST


def test_bars_are_as_long_as_their_values() -> None:
    efficacy, specificity, perplexity, _ = bars(small_history())
    assert [bar.length for bar in efficacy.bars] == [pytest.approx(0.045 * LONGEST), LONGEST]
    assert [bar.text for bar in specificity.bars] == ["93.2 ± 0.6", "80.0 ± 1.2"]
    low, high = specificity.bars[1].error
    assert high - low == pytest.approx(LONGEST * 2.5 / 100)
    assert perplexity.bars[0].length == pytest.approx(LONGEST * 12.345 / 15.05)


# the table of edits


@pytest.mark.parametrize(
    ("before", "after", "marked"),
    [
        (" Paris.", " Rome.", ([" ", "Paris", "."], [" ", "Rome", "."])),
        ("same", "same", (["same"], ["same"])),
        ("", "new", ([], ["", "new"])),
        ("one two", "", (["", "one two"], [])),
        ("首都是巴黎。", "首都是罗马。", (["首都是", "巴黎", "。"], ["首都是", "罗马", "。"])),
        ("क्षेत्र है", "क्षमा है", (["", "क्षेत्र", " है"], ["", "क्षमा", " है"])),
        ("👩‍🔬 x", "👩 x", (["", "👩‍🔬", " x"], ["", "👩", " x"])),
    ],
)
def test_differences(before: str, after: str, marked: tuple[list[str], list[str]]) -> None:
    found = differences(before, after)
    assert found == marked
    assert ("".join(found[0]), "".join(found[1])) == (before, after)
    assert "".join(found[0][::2]) == "".join(found[1][::2])  # what they share


def test_rows_of_edits() -> None:
    history = small_history()
    history.requests[1] = replace(history.requests[0], case_id="c1", target_new="Oslo")
    history.batches = {0: [0], 1: [1, 2]}  # the second replaces the first
    del history.after[0]
    data = edits_data(history)
    assert [row[8] for row in data["edits"]] == [
        "superseded",
        "succeeded",
        "failed",
        "never applied",
    ]
    assert [name for name, _ in data["results"]] == [
        "failed",
        "succeeded",
        "superseded",
        "never applied",
    ]
    assert [row[7] for row in data["edits"]] == [0, 1, 1, None]
    assert data["batches"] == [0, 1]
    assert data["relations"] == []
    assert [metric[0] for metric in data["metrics"]] == [
        "efficacy",
        "specificity",
        "efficacy (top-1)",
        "specificity (top-1)",
    ]
    before, after = data["edits"][2][9:11]
    assert before == [[" ", "Paris,\nthe city"], 0.5, 0.25, [0.0, 0.5, 0.0, 0.25]]
    assert after == [[" ", "Bern"], 0.5, 0.25, [0.0, 0.5, 0.0, 0.25]]
    assert data["edits"][1][11] == [[1, 2.0, 3], [3, 1.5, 3]]  # layer, loss, steps


def test_numbers_that_are_not_finite_have_no_place_in_json() -> None:
    history = small_history()
    history.before[0] = replace(history.before[0], probability_new=float("nan"))
    assert Page(html_of(history)).data["edits"][0][9][1] is None


def test_a_measurement_without_editing() -> None:
    history = small_history()
    history.measurements = [Measurement("test", 0, history.of("post")[0].metrics)]
    history.batches, history.before, history.loss_curves = {}, [], []
    html = html_of(history)
    assert "<h1>Measurement</h1>" in html
    data = Page(html).data
    assert data["measured_only"]
    assert [row[8] for row in data["edits"]][:3] == ["succeeded", "succeeded", "failed"]


def test_an_empty_run_and_one_that_stopped(tmp_path: Path) -> None:
    html = html_of(RunHistory())
    assert "Nothing was measured." in html
    assert 'id="edits-data"' not in html
    history = small_history()
    history.after, history.ended_early = {}, "stopped by <SIGINT>"
    write_report(tmp_path, history)
    written = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<strong>Partial:</strong>" in written
    assert "stopped by &lt;SIGINT&gt;" in written
    results = [row[8] for row in Page(written).data["edits"]]
    assert results == ["not measured"] * 3 + ["never applied"]


# in a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of 250 edits: every tenth fails, and hostile texts are among them."""
    history = hostile_history()
    requests = [
        EditRequest(f"c{i}", "{} lies in", f"Tower {i}", "Rome", relation=("place", "time")[i % 2])
        for i in range(246)
    ]
    history.requests += requests
    places = range(len(history.requests))
    history.before = [outcome(f"c{i}", 0.0, " Paris") for i in places]
    history.after = {i: outcome(f"c{i}", float(i % 10 != 9), f" Rome {i}") for i in places}
    history.after[0] = outcome("c0", 1.0, HOSTILE[0])
    history.batches = {number: [*places[50 * number :][:50]] for number in range(5)}
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html_of(history), encoding="utf-8")
    return path


def column(chromium: Browser, label: str) -> list[str]:
    cells = f"[...document.querySelectorAll('#edits td[data-label=\"{label}\"]')]"
    return chromium.run(f"{cells}.map(cell => cell.textContent)")


def choose(chromium: Browser, select: str, value: str) -> None:
    found = f"document.getElementById({select!r})"
    chromium.run(f"{found}.value = {value!r}; {found}.dispatchEvent(new Event('change'))")


def shown(chromium: Browser) -> str:
    return chromium.run("document.getElementById('count').textContent")


def test_filter_search_sort_and_pages_in_a_browser(chromium: Browser, many: Path) -> None:
    chromium.open(many)
    assert shown(chromium) == "250 of 250 edits, 1 to 100 shown."
    assert len(column(chromium, "result")) == 100
    chromium.click("#pager button:nth-of-type(4)")  # the last page
    assert shown(chromium) == "250 of 250 edits, 201 to 250 shown."

    choose(chromium, "result", "failed")
    assert shown(chromium) == "25 of 250 edits, 1 to 25 shown."
    assert set(column(chromium, "result")) == {"failed"}
    choose(chromium, "batch", "2")
    assert column(chromium, "#") == ["110", "120", "130", "140", "150"]
    choose(chromium, "relation", "place")
    assert shown(chromium) == "0 of 250 edits."
    choose(chromium, "relation", "time")  # of every second request, and of all these
    assert shown(chromium) == "5 of 250 edits, 1 to 5 shown."

    chromium.click("#edits th:nth-child(1) button")  # it is sorted by this: turned round
    assert column(chromium, "#") == ["150", "140", "130", "120", "110"]
    sorts = "[...document.querySelectorAll('#edits th')].map(head => head.ariaSort)"
    assert chromium.run(sorts) == ["descending", *["none"] * 8]

    chromium.click("#filters button[type=reset]")
    chromium.wait("document.getElementById('count').textContent.startsWith('250')")
    chromium.click("#search")
    chromium.type("45 TOWER")  # towers 45, 145 and 245, and three that answer so
    chromium.wait("document.getElementById('count').textContent.startsWith('6 of')")
    assert column(chromium, "after") == [f" Rome {i}" for i in (45, 49, 145, 149, 245, 249)]
    assert column(chromium, "prompt")[1] == "Tower 45 lies in"
    marks = "[...document.querySelectorAll('#edits tr:first-child :is(del, ins)')]"
    assert chromium.run(f"{marks}.map(mark => mark.textContent)") == ["Paris", "Rome 45"]

    chromium.click("#edits .opener")
    assert chromium.run("document.querySelector('#edits .opener').ariaExpanded") == "true"
    facts = chromium.run("document.querySelector('.details').textContent")
    assert "true object" in facts
    assert "100.0%" in facts


def test_values_under_the_pointer_and_by_key(chromium: Browser, many: Path) -> None:
    chromium.open(many)
    tip = "document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent"
    assert chromium.run(tip) == ""
    chromium.point("svg.chart .column:nth-of-type(2) rect", until=f"({tip}) !== ''")
    error = value_and_error(95.0, 5.0, PERCENT)
    assert chromium.run(tip) == (
        f"after 3 edits\nthe batch just applied: 90.0\nall edits so far (a sample): {error}"
    )
    chromium.run("document.querySelector('svg.chart').focus()")
    press = {"type": "keyDown", "key": "ArrowLeft", "code": "ArrowLeft"}
    chromium.send("Input.dispatchKeyEvent", **press)
    chromium.wait(f"({tip}).startsWith('after 2 edits')")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_the_window_and_its_colours(
    chromium: Browser, many: Path, width: int, dark: bool
) -> None:
    chromium.open(many, width=width, dark=dark)
    assert chromium.run("document.documentElement.scrollWidth") <= width
    ground, ink = (
        chromium.run(f"getComputedStyle(document.body).{name}").removeprefix("rgb(").split(",")[0]
        for name in ("backgroundColor", "color")
    )
    assert (int(ground) < int(ink)) is dark
    assert len(column(chromium, "result")) == (100 if width > 760 else 25)


def test_hostile_texts_do_nothing_in_a_browser(chromium: Browser, many: Path) -> None:
    chromium.open(many)
    assert column(chromium, "after")[0] == HOSTILE[0]
    assert chromium.run("document.querySelectorAll('script').length") == 2
    assert chromium.run("document.querySelectorAll('img').length") == 0
    assert chromium.complaints == []
    assert set(chromium.requests) <= {many.as_uri(), "about:blank"}
