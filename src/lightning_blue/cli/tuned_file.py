"""The run file that `tune` writes: what was tuned, on which facts, and what was tried."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blue_callbacks import ClosedFormUpdate
from lightning_blue import __version__
from lightning_blue.api.settings import arguments
from lightning_blue.cli.found import FIRST_STEP, of_tuning, run_name
from lightning_blue.cli.parser import EditCLI
from lightning_blue.cli.settings_file import Proposal, Settings
from lightning_blue.cli.written import WIDTH, comment, flat, spell
from lightning_blue.tuning import results
from lightning_blue.tuning.halving import KEPT
from lightning_blue.tuning.results import Tuned

WEIGHT = "update.covariance_weight"
_INDENT = "  "


def run_file(cli: EditCLI, found: Tuned, file: Path) -> str:
    """Write out the run file with its comments.

    Args:
        cli: with the configuration, into which the values that were found are put.
        found: by tuning.
        file: where it will be.
    """
    config, name = cli.config, f"{run_name(found.model, found.data)}_tuned"
    proposals = {"for_model": Proposal(found.model)} | of_tuning(found.to_dict(), None, found.data)
    for key, each in proposals.items():
        config[key] = each.value
    if config["run.name"] == name:
        config["run.name"] = f"{name}_{found.plan}"
        proposals["run.name"] = Proposal(config["run.name"])
    update = ClosedFormUpdate(**update_arguments(cli))
    settings = Settings(cli, cli.model, update, proposals)
    remarks = dict(_remarks(found))
    head = "".join(f"{comment(line)}\n" for line in _head(found, settings.config, file))
    return f"{head}\n{settings.text(remarks)}"


def update_arguments(cli: EditCLI) -> dict[str, Any]:
    """Return what the configuration makes the update of."""
    values = flat(cli.config.as_dict())
    return arguments("update", {k: v for k, v in values.items() if k.startswith("update.")})


def _remarks(found: Tuned) -> Iterator[tuple[str, str]]:
    """Say of values what they come to."""
    weight, step = found.best.choice.weight, found.best.choice.first_step
    if weight is not None:
        yield WEIGHT, f"{weight:g} for each key dimension"
    if step is not None:
        yield FIRST_STEP, "of |h|"


def _head(found: Tuned, config: dict[str, Any], file: Path) -> Iterator[str]:
    """Say at the top what the file is, what to run next, and what was tried."""
    folder = shlex.quote(f"{config['run.root']}/{config['run.name']}")
    command = f"lightning-blue fit --config={shlex.quote(str(file))}"
    yield f"Edits {spell(found.data)} into {spell(found.model)}, with settings that were tuned"
    yield f"for the plan {found.plan}; by lightning-blue tune {__version__}."
    yield ""
    yield "Next:"
    yield f"{_INDENT}{command}"
    yield f'{_INDENT}lightning-blue ask {folder} "PROMPT" --before'
    yield ""
    yield from _wrapped(
        f"Tuned on {found.facts} facts, the usable ones from data.offset = {found.first} on, in "
        f"one batch. data.offset = {found.offset} below leaves them out: a run that has them too "
        "counts facts in its scores that its settings were chosen on. Other facts than these: "
        "--data.path=FILE --data.offset=0."
    )
    yield from _wrapped(
        "Maximised: the harmonic mean of the percentages in the table; of equal ones, the soft "
        f"score, by probabilities. One of {KEPT} goes on to more facts, and what is decided "
        f"without tuning goes on with them. Seed {found.seed}; {found.seconds / 60:.1f} minutes."
    )
    for note in found.notes:
        yield from _wrapped(f"Note: {' '.join(note.split())}")
    yield ""
    for name, measured in (
        ("unedited model", found.unedited),
        ("without tuning", found.untuned.measured),
        ("tuned", found.best.measured),
    ):
        yield f"{name}: {results.sentence(measured)}"
    yield ""
    yield "Tried (step and clamp in |h|, weight in key dimensions):"
    yield from results.as_table(found).splitlines()
    yield ""
    yield "Behind each value: where it comes from. Keys that are not here have their defaults,"
    yield f"which `{command} --print_config` shows."


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH - 2)
