"""The command ``init``: a commented run file for a model and facts, from what ``check`` finds."""

from __future__ import annotations

import json
import re
import shlex
import sys
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_blue import __version__
from lightning_blue.cli.check import plans_of
from lightning_blue.cli.help import first_sentences
from lightning_blue.cli.parser import EditCLI
from lightning_blue.cli.written import comment, flat, spell, write_sections
from lightning_blue.editing.decisions import decided, key_widths
from lightning_blue.preflight.checking import Plans, examine
from lightning_blue.preflight.layout import as_text
from lightning_blue.preflight.report import Report
from lightning_blue.support.errors import InputError
from lightning_blue.support.space import check_writable
from lightning_blue.support.storage import write_atomic

ASKED = 10  # facts of which it is found out whether the model says them already
SAID = 5  # unusable facts that are said to a terminal
LISTED = 20  # unusable facts, and others of a kind, that the file names

# Keys that are written down also where they have their default; all others where they have not.
ALWAYS = (
    "seed_everything",
    "for_model",
    "model.name_or_path",
    "model.dtype",
    "model.target.steps",
    "model.target.learning_rate",
    "model.target.weight_decay",
    "model.target.clamp",
    "model.target.kl_weight",
    "model.target.site",
    "model.covariance.corpus",
    "model.covariance.tokens_per_dim",
    "data.path",
    "data.batch_size",
    "data.edits",
    "data.controls",
    "data.on_unusable",
    "data.chat",
    "update.layers",
    "update.plan",
    "update.covariance_weight",
    "update.past_keys",
    "measure.text",
    "measure.generate",
    "run.name",
)
_NEVER = ("base", "ckpt_path")  # of a command line, not of a run


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
    proposed = {"for_model": own.model, "run.name": run_name(own.model, own.data)}
    cli = EditCLI(_arguments(own, for_fit, proposed), "init")
    plans = plans_of(cli)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file says what is worth it
        report = examine(plans, facts=ASKED, tokens=1, given=True)
    text = run_file(cli, plans, report, output, proposed)
    _require_free(output, own.force)
    write_atomic(output, text)
    sys.stdout.write(_said(report, output))
    return 0 if report.fit_to_go else 1


def _arguments(own: Namespace, for_fit: Sequence[str], proposed: Mapping[str, str]) -> list[str]:
    """Return arguments of `fit`: proposals first, over which what is given wins."""
    first = [f"--{key}={value}" for key, value in proposed.items()]
    return [*first, *for_fit, f"--model.name_or_path={own.model}", f"--data.path={own.data}"]


def run_name(model: str, data: str) -> str:
    """Name a run after its model and facts.

    >>> run_name("openai-community/gpt2", "../my facts.jsonl"), run_name("..", "/")
    ('gpt2_my_facts', 'model_facts')
    """
    stems = [re.sub(r"\.(jsonl?|csv|parquet|gguf)$", "", Path(name).name) for name in (model, data)]
    words = [re.sub(r"[^\w.-]+", "_", stem).strip("._-") for stem in stems]
    return f"{words[0] or 'model'}_{words[1] or 'facts'}"


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


def run_file(
    cli: EditCLI, plans: Plans, report: Report, output: Path, proposed: Mapping[str, str]
) -> str:
    """Write out a run file with its comments.

    Args:
        cli: with the configuration.
        plans: made of it.
        report: on them.
        output: where the file will be.
        proposed: values by key that nobody gave.
    """
    config, defaults = (flat(_plain(cli, each)) for each in (cli.config, cli.parser.get_defaults()))
    config |= _decided_values(plans)

    def same(key: str, value: Any) -> bool:
        return key in defaults and bool(defaults[key] == value)

    wanted = {
        key: value
        for key, value in config.items()
        if key not in _NEVER and (key in ALWAYS or not same(key, value))
    }
    sources = {
        key: "default"
        if same(key, value)
        else "proposed"
        if proposed.get(key) == value
        else "given"
        for key, value in wanted.items()
    }
    sources |= dict.fromkeys(("model.name_or_path", "data.path"), "given")
    for each in decided(plans.module, plans.update):
        sources[each.key] = f"decided: {each.sentence}"
    for key, remark in _remarks(plans, report).items():
        sources[key] += f"; {remark}"
    body = write_sections(wanted, first_sentences("fit"), sources)
    return _head(config, report, output) + "\n" + body


def _plain(cli: EditCLI, config: Any) -> dict[str, Any]:
    """Return a configuration as plain values; by way of JSON, which keeps the type of each."""
    text = cli.parser.dump(config, format="json", skip_none=False, skip_check=True)
    values: dict[str, Any] = json.loads(text)
    return values


def _decided_values(plans: Plans) -> dict[str, Any]:
    """Return the values of what was decided, where one value says it for the whole run.

    The learning rate goes by each hidden state's own length, and stays open.
    """
    keys = {each.key for each in decided(plans.module, plans.update)}
    values: dict[str, Any] = {
        "update.layers": list(plans.update.layers),
        "model.covariance.corpus": plans.module.covariance.corpus,
    }
    widths = key_widths(plans.module, plans.update)
    if len(widths) == 1:
        values["update.covariance_weight"] = float(widths[0])
    return {key: value for key, value in values.items() if key in keys}


def _remarks(plans: Plans, report: Report) -> dict[str, str]:
    """Say what some values come to with this model and these facts."""
    remarks = {}
    requests, tokens = report.requests, plans.module.covariance.tokens_per_dim
    if requests is not None and requests.usable:
        batches = -(-requests.usable // report.settings.batch_size)
        count = "1 batch" if batches == 1 else f"{batches:,} batches"
        remarks["data.batch_size"] = f"makes {count}"
        remarks["data.edits"] = f"{requests.usable:,} of {requests.total:,} facts will be edited"
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
