"""The command ``init``: a commented run file for a model and facts, from what ``check`` finds."""

from __future__ import annotations

import shlex
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_blue import __version__
from lightning_blue.cli.check import plans_of
from lightning_blue.cli.found import PLAN, Found, as_flags, proposals, run_name
from lightning_blue.cli.parser import EditCLI
from lightning_blue.cli.settings_file import Proposal, Settings
from lightning_blue.cli.written import comment, spell
from lightning_blue.editing.decisions import key_widths
from lightning_blue.preflight.checking import Plans, examine
from lightning_blue.preflight.layout import as_text
from lightning_blue.preflight.report import Report
from lightning_blue.support.errors import InputError
from lightning_blue.support.space import check_writable
from lightning_blue.support.storage import write_atomic
from lightning_blue.support.text import counted

ASKED = 10  # facts of which it is found out whether the model says them already
SAID = 5  # unusable facts that are said to a terminal
DEFAULT_PLAN = "boundary"
LISTED = 20  # unusable facts, and others of a kind, that the file names


def init(own: Namespace, for_fit: Sequence[str]) -> int:
    """Check a model and facts, and write the run file that `fit` can be given.

    Args:
        own: arguments of the command itself.
        for_fit: keys of `fit`.

    Returns:
        0, or 1 if something must be mended first, which the file says.

    Raises:
        InputError: for what cannot be used; nothing is written then.
    """
    output = Path(own.output)
    _require_free(output, own.force)
    check_writable(output.parent)
    found = proposals(own, _plan(for_fit))
    found |= {
        "for_model": Proposal(own.model),
        "run.name": Proposal(run_name(own.model, own.data)),
    }
    cli = EditCLI(_arguments(own, for_fit, found), "init")
    _require_plan(cli, found)
    plans = plans_of(cli)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file says what is worth it
        report = examine(plans, facts=ASKED, tokens=1, given=True)
    text = run_file(cli, plans, report, output, found)
    _require_free(output, own.force)
    write_atomic(output, text)
    sys.stdout.write(_said(report, output))
    return 0 if report.fit_to_go else 1


def _arguments(own: Namespace, for_fit: Sequence[str], found: Found) -> list[str]:
    """Return arguments of `fit`: what was found first, over which what is given wins."""
    given = [f"--model.name_or_path={own.model}", f"--data.path={own.data}"]
    return [*as_flags(found), *for_fit, *given]


def _plan(for_fit: Sequence[str]) -> str:
    """Return the plan that a flag gives, or else the default."""
    start = f"--{PLAN}="
    given = [arg.removeprefix(start) for arg in for_fit if arg.startswith(start)]
    return given[-1] if given else DEFAULT_PLAN


def _require_plan(cli: EditCLI, found: Found) -> None:
    """Refuse settings that were tuned for another plan than the run's."""
    plan = cli.config[PLAN]
    if PLAN in found and found[PLAN].value != plan:
        raise InputError(
            f"settings were tuned for the plan {found[PLAN].value!r}, and the run has {plan!r}",
            where=f"{PLAN} = {plan}",
            hint="name the folder of the plan's own tuning with --from=FOLDER, or look nowhere: "
            "--from none",
        )


def _require_free(output: Path, force: bool) -> None:
    if output.is_dir():
        raise InputError(
            "a run file cannot be written where a folder is",
            where=f"--output {output}",
            hint=f"give a file in it: --output={output / 'run.yaml'}",
        )
    if output.exists() and not force:
        raise InputError(
            "there is a file of this name already",
            where=f"--output {output}",
            hint="give another name with --output=FILE, or write over it with --force",
        )


def run_file(cli: EditCLI, plans: Plans, report: Report, output: Path, found: Found) -> str:
    """Write out a run file with its comments.

    Args:
        cli: with the configuration.
        plans: made of it.
        report: on them.
        output: where the file will be.
        found: values that nobody gave, by key.
    """
    settings = Settings(cli, plans.module, plans.update, found)
    body = settings.text(_remarks(plans, report))
    return _head(settings.config, report, output) + "\n" + body


def _remarks(plans: Plans, report: Report) -> dict[str, str]:
    """Say what some values come to with this model and these facts."""
    remarks = {}
    requests, tokens = report.requests, plans.module.covariance.tokens_per_dim
    if requests is not None and requests.usable:
        batches = -(-requests.usable // report.settings.batch_size)
        remarks["data.batch_size"] = f"makes {counted(batches, 'batch', 'batches')}"
        remarks["data.edits"] = (
            f"{requests.usable:,} of {counted(requests.total, 'fact')} will be edited"
        )
    widths = [tokens * width for width in key_widths(plans.module, plans.update)]
    number = " or ".join(f"{round(width):,}" for width in widths)
    remarks["model.covariance.tokens_per_dim"] = f"{number} tokens of text in all"
    if report.settings.site is not None:
        remarks["model.target.site"] = f"measured: {report.settings.site}"
    saved = report.model.saved_dtype
    remarks["model.dtype"] = f"the edited model is saved in {saved}"
    return remarks


def _head(config: dict[str, Any], report: Report, output: Path) -> str:
    """Say at the top what the file is, what to run next, and what was found."""
    model, data = config["model.name_or_path"], config["data.path"]
    file = shlex.quote(str(output))
    folder = shlex.quote(f"{config['run.root']}/{config['run.name']}")
    check = f"lightning-blue check {shlex.quote(model)} --config={file}"
    ready = report.fit_to_go
    lines = [
        f"Edits {spell(data)} into {spell(model)}; by lightning-blue init {__version__}.",
        "",
        "Next:" if ready else "TO BE MENDED FIRST: each problem below. Then:",
        *([] if ready else [f"  {check}"]),
        f"  lightning-blue fit --config={file}",
        f'  lightning-blue ask {folder} "PROMPT" --before',
        "",
        "Behind each value: where it comes from. Keys that are not here have their defaults, which",
        f"`lightning-blue fit --config={file} --print_config` shows. Relative paths are read from",
        "the folder in which a command is run.",
        "",
        "Found:",
        *(
            f"  {line}" if line else ""
            for line in as_text(_short(report), facts=False).splitlines()
        ),
    ]
    return "".join(f"{comment(line)}\n" for line in lines)


def _short(report: Report) -> Report:
    """Leave out of a report what would make a file of thousands of lines."""
    requests = report.requests
    if requests is None:
        return report
    kinds = ("unusable", "superseded", "companions", "returning", "blanks")
    notes = [
        f"{more:,} more {kind} are left out here; `lightning-blue check` lists all"
        for kind in kinds
        if (more := len(getattr(requests, kind)) - LISTED) > 0
    ]
    kept = {kind: getattr(requests, kind)[:LISTED] for kind in kinds}
    return replace(report, requests=replace(requests, **kept), notes=[*report.notes, *notes])


def _said(report: Report, output: Path) -> str:
    """Tell a terminal what was written, what stands in the way, and what comes next."""
    lines = [f"run file, which says more: {output}"]
    unusable = [] if report.requests is None else report.requests.unusable
    for fact in unusable[:SAID]:
        lines.append(f"unusable: {fact.source}: {' '.join(fact.reason.split())}; {fact.hint}")
    if len(unusable) > SAID:
        lines.append(f"and {len(unusable) - SAID:,} more: `lightning-blue check` lists all")
    lines += [f"note: {' '.join(note.split())}" for note in report.notes]
    lines += [f"to be mended first: {' '.join(each.split())}" for each in report.problems]
    file = shlex.quote(str(output))
    lines.append(f"{'next' if report.fit_to_go else 'then'}: lightning-blue fit --config={file}")
    return "".join(f"{line}\n" for line in lines)
