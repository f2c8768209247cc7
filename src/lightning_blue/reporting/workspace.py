"""The dashboard as a workspace of W&B, by its own package wandb-workspaces (an extra)."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from lightning_blue.reporting.dashboard import GROUPED_BY, Panel, described, sections
from lightning_blue.support.errors import InputError, first_line
from lightning_blue.support.storage import write_atomic

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

COLUMNS = 3  # of panels
DRY_RUN = "or see what would be made: lightning-blue dashboard --dry-run"


def dashboard(args: Namespace) -> str:
    """Make the workspace, or say what it would be.

    Args:
        args: ``project``, ``entity``, ``name``; ``dry_run``: send nothing; ``spec``: file for W&B's
            own form of it, or None.

    Returns:
        What is to be told: where it is, or the sections and panels that it would have.

    Raises:
        InputError: if wandb-workspaces is not installed, or the server cannot be reached.
    """
    told = []
    if args.spec is not None:
        write_atomic(args.spec, as_json(args.project, args.entity or "", args.name))
        told.append(f"specification: {args.spec}")
    if args.dry_run:
        place = f"{args.entity or 'your entity'}/{args.project}"
        told += [f"Would make the workspace {args.name!r} in {place}.", described()]
    else:
        told.append(f"dashboard: {_made(args.project, args.entity, args.name)}")
    return "\n".join(told)


def workspace(project: str, entity: str, name: str) -> Workspace:
    """Return the dashboard as a workspace; nothing is sent.

    Raises:
        InputError: if wandb-workspaces is not installed.
    """
    ws, wr = _packages()
    shown = [
        ws.Section(
            name=section.title,
            panels=[_panel(wr, panel, place) for place, panel in enumerate(section.panels)],
            is_open=section.is_open,
            layout_settings=ws.SectionLayoutSettings(columns=COLUMNS, rows=2),
        )
        for section in sections()
    ]
    grouped = ws.RunsetSettings(groupby=[ws.Config(key) for key in GROUPED_BY])
    return ws.Workspace(
        entity=entity, project=project, name=name, sections=shown, runset_settings=grouped
    )


def as_json(project: str, entity: str, name: str) -> str:
    """Return W&B's own specification of the workspace."""
    view = workspace(project, entity, name)._to_model()  # no public way to it without a server
    spec = view.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    return json.dumps(spec, indent=1, ensure_ascii=False) + "\n"


def _panel(wr: Any, panel: Panel, place: int) -> Any:
    layout = wr.Layout(x=8 * (place % COLUMNS), y=6 * (place // COLUMNS), w=8, h=6)
    if panel.kind == "table":
        (name,) = panel.keys
        return wr.WeavePanelSummaryTable(table_name=name, layout=wr.Layout(w=24, h=12))
    if panel.kind == "bars":
        return wr.BarPlot(title=panel.title, metrics=list(panel.keys), layout=layout)
    regex = f"^{panel.pattern}$" if panel.pattern else None
    return wr.LinePlot(
        title=panel.title, x=panel.axis, y=list(panel.keys), metric_regex=regex, layout=layout
    )


def _made(project: str, entity: str | None, name: str) -> str:
    """Save the workspace, and return its address."""
    _packages()  # before a key is asked for
    import wandb

    from lightning_blue.reporting.wandb_logger import require_key

    try:
        require_key()
    except InputError as error:
        raise InputError(first_line(error), hint=f"run `wandb login`, {DRY_RUN}") from error
    try:
        owner = entity or os.environ.get("WANDB_ENTITY") or wandb.Api(timeout=15).default_entity
        return str(workspace(project, owner or "", name).save().url)
    except Exception as error:  # of many kinds, from a network that is down to a full server
        raise InputError(
            f"W&B did not take the workspace: {first_line(error)}",
            where=f"project {project} of {entity or 'your own entity'}",
            hint=f"check the network, and the project (a first run makes it), {DRY_RUN}",
        ) from error


def _packages() -> tuple[Any, Any]:
    try:
        from wandb_workspaces import workspaces
        from wandb_workspaces.reports import v2
    except ImportError as error:
        raise InputError(
            "the dashboard is made by wandb-workspaces, which is not installed",
            hint="pip install 'lightning-blue[dashboard]'",
        ) from error
    return workspaces, v2
