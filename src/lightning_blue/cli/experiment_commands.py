"""The commands for many runs: sweep makes, compare tabulates, dashboard shows them."""

from __future__ import annotations

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from lightning_blue.cli.arguments import Parser, UsageError

_SWEEP = """Run the product of the axes of a sweep file, each combination in a folder of its
own. What is finished is skipped, and what was stopped goes on.

AXIS=VALUE keeps of an axis only that value (several may be given). Any key of
`fit` may follow as --SECTION.KEY=VALUE; it goes to all runs."""

_COMPARE = """Make tables and curves of runs: metrics by method and plan, improvement by BLUE,
paired tests over the requests that runs share. Of two runs, show which requests
changed their outcome."""

_DASHBOARD = """Make a workspace in a project of W&B that shows its runs: scores over edits,
retention, norms of updates and the guard, losses of the target optimisation, the
table of edits, and runs compared by method and plan. Needs wandb-workspaces:
pip install 'lightning-blue[dashboard]'."""


def run_command(command: str, args: Sequence[str]) -> int:
    """Run a command; return 0, 1 if runs of a sweep failed, or 2 for input that cannot be used."""
    try:
        chosen, rest = parse(command, args)
    except UsageError as error:
        return _complain(error)
    from lightning_blue.cli.commands import quiet
    from lightning_blue.support.errors import InputError, of_the_system

    quiet()
    try:
        if command == "sweep":
            from lightning_blue.sweeps.command import sweep

            return sweep(chosen, rest)
        if command == "dashboard":
            from lightning_blue.reporting.workspace import dashboard

            sys.stdout.write(f"{dashboard(chosen)}\n")
            return 0
        from lightning_blue.comparison.command import compare

        compare(chosen)
    except InputError as error:
        return _complain(error)
    except OSError as error:
        return _complain(of_the_system(error))
    return 0


def parse(command: str, args: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Parse the arguments of a command; of ``sweep``, keep what is for `fit`.

    Raises:
        UsageError: for arguments that the command does not have.
    """
    parser = experiment_parser(command)
    if command != "sweep":
        return parser.parse_args(args), []
    for_fit = [arg for arg in args if _is_key(arg)]
    return parser.parse_intermixed_args([arg for arg in args if arg not in for_fit]), for_fit


def experiment_parser(command: str) -> Parser:
    """Return the parser of a command's arguments."""
    description, arguments = {
        "sweep": (_SWEEP, _sweep_arguments),
        "compare": (_COMPARE, _compare_arguments),
        "dashboard": (_DASHBOARD, _dashboard_arguments),
    }[command]
    parser = Parser(
        prog=f"lightning-blue {command}",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    arguments(parser)
    return parser


def _sweep_arguments(parser: Parser) -> None:
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="the axes")
    parser.add_argument("choices", nargs="*", metavar="AXIS=VALUE", help="only this value")
    parser.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help="runs at a time; by default what there is "
        "room for: one on each GPU, else as cores and memory allow",
    )
    parser.add_argument(
        "--root", type=Path, default=Path("runs"), help="folder of all sweeps; default: runs"
    )
    parser.add_argument(
        "--cluster", choices=("local", "slurm"), default="local", help="where runs are started"
    )
    parser.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="option of sbatch, as partition=gpu or time=600 (minutes); may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="list the runs and start none")


def _compare_arguments(parser: Parser) -> None:
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or of several"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for what is written; by default comparison/ in the folder that holds the runs",
    )
    parser.add_argument(
        "--paper",
        choices=("table2", "table3", "table4", "table5"),
        help="put the numbers of the paper's table beside",
    )
    parser.add_argument(
        "--wandb",
        choices=("offline", "online", "off"),
        default="off",
        help="log the tables to a W&B run; default: off",
    )


def _dashboard_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--project", default="lightning-blue", help="of the runs; default: lightning-blue"
    )
    parser.add_argument("--entity", help="who owns the project; default: your own")
    parser.add_argument(
        "--name", default="Model editing", help="of the workspace; default: Model editing"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="send nothing: list the sections and panels"
    )
    parser.add_argument(
        "--spec", type=Path, metavar="FILE.json", help="write W&B's specification of it to a file"
    )


def _is_key(arg: str) -> bool:
    """Tell a key of `fit`, ``--update.plan=even``, from an option of the sweep."""
    name = arg.partition("=")[0]
    return name.startswith("--") and ("." in name or name == "--seed_everything")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _complain(error: Exception) -> int:
    sys.stderr.write(f"error: {error}\n")
    return 2
