"""The command ``check``: whether a model and facts can be edited, and what a run will cost."""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blue_callbacks import ClosedFormUpdate, EditGuard
from lightning_blue.cli.baselines import require_closed_form
from lightning_blue.cli.parser import EditCLI
from lightning_blue.data.hub import ALMANAC
from lightning_blue.preflight.checking import Plans, examine
from lightning_blue.preflight.layout import as_text
from lightning_blue.reporting import MeasureEdits
from lightning_blue.support.storage import write_atomic

STAND_INS = 100  # facts of the package that a run is estimated for where none are given


def check(own: Namespace, for_fit: Sequence[str]) -> int:
    """Check a model and facts, print what was found, and say whether they can be edited.

    Args:
        own: arguments of the command itself.
        for_fit: keys of `fit`.

    Returns:
        0 if they can, 1 if something must be mended first.
    """
    named = {"model.name_or_path": own.model, "data.path": own.data}
    args = [f"--{key}={value}" for key, value in named.items() if value is not None]
    cli = EditCLI([*for_fit, *args], "check")
    given = own.data is not None or cli.datamodule.path != ALMANAC
    if not given and cli.datamodule.edits is None:
        cli.datamodule.edits = STAND_INS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says what is worth it
        report = examine(plans_of(cli), facts=own.facts, tokens=own.tokens, given=given)
    if own.json == "-":
        sys.stdout.write(report.to_json())
    else:
        sys.stdout.write(as_text(report))
    if own.json not in (None, "-"):
        write_atomic(Path(own.json), report.to_json())
    return 0 if report.fit_to_go else 1


def plans_of(cli: EditCLI) -> Plans:
    """Gather what `fit` would be made of."""
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    (update,) = (c for c in callbacks if isinstance(c, ClosedFormUpdate))
    require_closed_form(update, cli.command)
    (measure,) = (c for c in callbacks if isinstance(c, MeasureEdits))
    (guard,) = (c for c in callbacks if isinstance(c, EditGuard))
    return Plans(
        module=cli.model.to(cli.trainer.strategy.root_device),
        data=cli.datamodule,
        update=update,
        measure=measure,
        guard=guard,
        run=cli.record,
        layers_proposed=update.proposed,
    )
