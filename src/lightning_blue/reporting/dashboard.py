"""What the W&B dashboard of a project shows: sections and panels, made from the table of metrics.

Nothing here needs W&B; `workspace` makes its workspace of them.

>>> [section.title for section in sections()][:2]
['Scores over edits', 'Top-1 over edits']
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lightning_blue.metrics import table
from lightning_blue.metrics.table import METRICS, MetricSpec
from lightning_blue.reporting.wandb_logger import AXIS
from lightning_blue.reporting.wandb_run import INNER_AXIS, TERMS

GROUPED_BY = ("method", "update/plan")  # keys of a run's configuration
NAME = "Model editing"

# Stages at which a metric is measured again and again, by what it reads; others at the end only.
COURSES = {
    table.COMPARISON: ("batch", "cumulative"),
    table.TEACHER_FORCED: ("batch", "cumulative"),
    table.COMBINATION: ("batch", "cumulative"),
    table.ORDINARY_TEXT: ("cumulative",),
    table.CONTROL_FACTS: ("cumulative",),
}
RETENTION = "retention"  # group of the metrics that follow each batch through the run
LAYER = r"layer[^/]*(/[^/]+)?"  # as a weight is named: layer3, or layer3/shared_expert


@dataclass(frozen=True)
class Panel:
    """A panel.

    Attributes:
        title: above it.
        kind: ``lines`` over an axis, ``bars`` of the runs' summaries, or a ``table``.
        keys: what it shows, by the keys that runs log.
        pattern: or all keys that this regular expression matches whole; layers differ by run.
        axis: of lines.
    """

    title: str
    kind: Literal["lines", "bars", "table"]
    keys: tuple[str, ...] = ()
    pattern: str = ""
    axis: str = AXIS

    def shows(self, key: str) -> bool:
        """Tell whether it shows what is logged under a key."""
        return key in self.keys or bool(self.pattern and re.fullmatch(self.pattern, key))


@dataclass(frozen=True)
class Section:
    """Panels under one title.

    Attributes:
        title: of the section.
        panels: in order.
        is_open: whether it is open at first.
    """

    title: str
    panels: tuple[Panel, ...]
    is_open: bool = True


def sections() -> tuple[Section, ...]:
    """Return the dashboard, its sections in order."""
    groups = dict.fromkeys(spec.group for spec in METRICS)
    courses = {group: tuple(_courses(group)) for group in groups}
    return (
        *(
            Section(f"{_titled(group)} over edits", panels, is_open=group == "scores")
            for group, panels in courses.items()
            if panels
        ),
        Section("General ability over edits", (_ability(),), is_open=False),
        Section("Retention", tuple(_retention())),
        Section("Update norms and guard", tuple(_norms())),
        Section("Inner losses", tuple(_inner_losses()), is_open=False),
        Section(
            "Edits", (Panel("edits", "table", ("edits",)), Panel("answers", "table", ("answers",)))
        ),
        Section("Runs compared by method and plan", tuple(_compared())),
    )


def described() -> str:
    """Say what the dashboard shows, a line a panel."""
    lines = [f"Runs grouped by {' and '.join(GROUPED_BY)}."]
    for section in sections():
        lines += ["", section.title]
        for panel in section.panels:
            keys = panel.pattern or ", ".join(panel.keys)
            over = f" over {panel.axis}" if panel.kind == "lines" else ""
            lines.append(f"  {panel.title}: {panel.kind}{over}: {keys}")
    return "\n".join(lines)


def _courses(group: str) -> Iterator[Panel]:
    """Yield the metrics of a group that are measured as the run goes on."""
    for spec in METRICS:
        stages = _stages(spec)
        if spec.group == group and stages:
            yield Panel(spec.label, "lines", tuple(f"{stage}/{spec.name}" for stage in stages))


def _ability() -> Panel:
    """Return the tasks of lm-evaluation-harness, which a run names: no row of the table does."""
    return Panel("tasks", "lines", (), f"cumulative/{table.ABILITY}[^/]+/[^/]+")


def _retention() -> Iterator[Panel]:
    """Yield what the run keeps: of its first batch, of each batch, and of facts left alone."""
    for spec in METRICS:
        if spec.panel == "success" and spec.group == "scores":
            keys = (f"first_batch/{spec.name}", f"post/{spec.name}")
            yield Panel(f"{spec.title} of the first batch, and of all edits", "bars", keys)
        elif spec.group == RETENTION:
            yield Panel(spec.label, "bars", (f"post/{spec.name}",))
        elif spec.measure("counterfact").protocol == table.CONTROL_FACTS:
            yield Panel(spec.label, "bars", (f"pre/{spec.name}", f"post/{spec.name}"))


def _norms() -> Iterator[Panel]:
    for name in ("delta_norm", "residual_norm"):
        yield Panel(
            f"{name.replace('_', ' ')} of each update", "lines", (), f"update/{LAYER}/{name}"
        )
    for name in ("weight_ratio", "change_ratio"):
        title = f"guard: {name.replace('_', ' ')}"
        yield Panel(title, "lines", (), f"guard/{LAYER}/{name}")
    for name in ("loss_increase", "retained_drop"):
        yield Panel(f"guard: {name.replace('_', ' ')}", "lines", (f"guard/{name}",))
    yield Panel("guard: batches that crossed a limit", "bars", ("guard/events",))


def _inner_losses() -> Iterator[Panel]:
    for term in TERMS:
        title = f"{term.replace('_', ' ')} by target layer (nats)"
        yield Panel(title, "lines", (), rf"inner/layer_\d+/{term}", INNER_AXIS)


def _compared() -> Iterator[Panel]:
    """Yield each metric before any edit and at the end, and what the edits cost."""
    for spec in METRICS:
        if spec.group != RETENTION:
            yield Panel(spec.label, "bars", (f"pre/{spec.name}", f"post/{spec.name}"))
    yield Panel("seconds for one edit", "bars", ("seconds/edit",))


def _stages(spec: MetricSpec) -> tuple[str, ...]:
    return COURSES.get(spec.measure("counterfact").protocol, ())


def _titled(group: str) -> str:
    return group[:1].upper() + group[1:].replace("_", " ")
