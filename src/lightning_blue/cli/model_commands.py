"""The commands that look at a model before and after: check, locate, tune, init, ask.

Plain argparse; what is heavy is imported when the arguments are known to be right.
"""

from __future__ import annotations

import sys
from argparse import BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence

from lightning_blue.cli.arguments import Parser, UsageError

_CHECK = """Say whether a model and facts can be edited, and how: names and shapes found,
whether a change of a weight arrives where targets are found (measured), how
each fact is cut into tokens, what the model says now, which facts are unusable,
and what time, memory and disk `fit` will take on this machine.

Any key of `fit` may follow as --SECTION.KEY=VALUE, or a run file as
--config=FILE. Exit code 0: fit to go; 1: something must be mended first; 2:
input that cannot be used."""

_INIT = """Write a commented run file for a model and facts: what `tune` and `locate`
have found for them, all else that `fit` would decide, where each value comes
from, and what `check` found. It is `fit --config=FILE` from there.

Any key of `fit` may follow as --SECTION.KEY=VALUE, or a run file as
--config=FILE; they are written down too. Exit code 0: written; 1: written, and
the file says what must be mended first; 2: input that cannot be used, and
nothing is written."""

_LOCATE = """Find out which layers a model recalls facts in (causal tracing: noise on the
subject, hidden states, FFN and attention outputs put back one at a time), and
beside it where editing works: a few facts are edited in one layer after the
other, measured, and taken back. Facts that it does not know are left out.
Writes tables, pictures, and locate.json with the layers that it proposes.

Any key of `fit` may follow as --SECTION.KEY=VALUE, or a run file as
--config=FILE. Exit code 0: written; 2: input that cannot be used, and nothing
is written."""

_TUNE = """Find layers, first step, clamp and covariance weight for a model that nobody
has published settings for: by successive halving on a few facts, the first
usable ones, which the run file that it writes leaves out. Trials are made in
memory and taken back. Maximised is the harmonic mean of efficacy,
generalization, specificity and retained knowledge, as far as the facts have
what these need.

Any key of `fit` may follow as --SECTION.KEY=VALUE, or a run file as
--config=FILE; what they give is not tuned. The same command goes on where it
was stopped. Exit code 0: written; 2: input that cannot be used."""

_ASK = """Let a model go on behind prompts: its greedy continuation, and the most probable
next tokens. Of a run, the edited model is asked; with --before the unedited one
beside it."""


def run_command(command: str, args: Sequence[str]) -> int:
    """Run a command; return 0, 1 if something must be mended first, or 2 for unusable input."""
    try:
        chosen, rest = parse(command, args)
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    from lightning_blue.cli.commands import carry_out

    def work() -> int:
        if command == "check":
            from lightning_blue.cli.check import check

            return check(chosen, rest)
        if command == "init":
            from lightning_blue.cli.init import init

            return init(chosen, rest)
        if command == "locate":
            from lightning_blue.cli.locate import locate

            return locate(chosen, rest)
        if command == "tune":
            from lightning_blue.cli.tune import tune

            return tune(chosen, rest)
        from lightning_blue.cli.ask import ask_model

        return ask_model(chosen)

    return carry_out(work)


def parse(command: str, args: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Parse the arguments of a command; of all but ``ask``, keep what is for `fit`.

    Raises:
        UsageError: for arguments that the command does not have.
    """
    parser = model_parser(command)
    if command == "ask":
        return parser.parse_intermixed_args(args), []
    chosen, rest = parser.parse_known_args(args)
    _require_given_once(parser, chosen, rest)
    strange = [arg for arg in rest if not _is_key(arg)]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    return chosen, rest


_OWN = {"model": "model.name_or_path", "data": "data.path"}  # arguments that are keys of `fit`


def _require_given_once(parser: Parser, chosen: Namespace, rest: Sequence[str]) -> None:
    """Refuse a key of `fit` beside the argument that stands for it: one would be dropped."""
    for name, key in _OWN.items():
        given = getattr(chosen, name)
        twice = [arg for arg in rest if arg.partition("=")[0] == f"--{key}"]
        if given is not None and twice:
            what = "the model is" if name == "model" else "the facts are"
            parser.error(f"{what} given twice, as {given} and by {twice[0]}: leave one of them out")


def _is_key(arg: str) -> bool:
    """Say whether an argument is a key of `fit` with its value, or a run file."""
    name, given, _ = arg.partition("=")
    return bool(given) and name.startswith("--") and ("." in name or name in _WHOLE)


_WHOLE = ("--config", "--seed_everything", "--for_model")  # keys without a section


def model_parser(command: str) -> Parser:
    """Return the parser of a command's arguments."""
    parser = Parser(
        prog=f"lightning-blue {command}",
        description=_DESCRIPTIONS[command],
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _ARGUMENTS[command](parser)
    return parser


def _check_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, GGUF file or name on the hub")
    parser.add_argument("--data", metavar="FACTS", help="file or data set, as data.path")
    parser.add_argument(
        "--facts",
        type=_not_negative,
        default=10,
        metavar="N",
        help="facts that the model is asked about; default: 10",
    )
    parser.add_argument(
        "--tokens", type=_positive, default=8, metavar="N", help="that it says of each; default: 8"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the report for programs; - prints that one instead"
    )


def _init_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, GGUF file or name on the hub")
    parser.add_argument(
        "--data", metavar="FACTS", required=True, help="file or data set, as data.path"
    )
    parser.add_argument(
        "--output", metavar="FILE", default="run.yaml", help="the run file; default: run.yaml"
    )
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    _from_argument(parser, "what locate and tune found; default: where they write")


def _tune_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, GGUF file or name on the hub")
    parser.add_argument(
        "--data", metavar="FACTS", required=True, help="file or data set, as data.path"
    )
    parser.add_argument(
        "--plan",
        metavar="PLAN",
        choices=("boundary", "even", "square_root", "computed", "first", "last"),
        help="that is tuned: boundary (BLUE), even (MEMIT), square_root, computed, first, last; "
        "default: as update.plan, boundary",
    )
    parser.add_argument(
        "--facts",
        type=_positive,
        metavar="N",
        help="facts that are held back; default: 16, at most half",
    )
    parser.add_argument(
        "--trials",
        type=_positive,
        default=18,
        metavar="N",
        help="combinations of the first round; default: 18",
    )
    parser.add_argument("--output", metavar="FOLDER", help="default: tuned/MODEL_FACTS_PLAN")
    _from_argument(parser, "of locate, whose layers are tried too; default: where it writes")


def _from_argument(parser: Parser, meaning: str) -> None:
    parser.add_argument(
        "--from",
        dest="found",
        action="append",
        metavar="FOLDER",
        help=f"{meaning}; none: look nowhere",
    )


def _locate_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, GGUF file or name on the hub")
    parser.add_argument(
        "--data", metavar="FACTS", help="facts that it may know: file or data set, as data.path"
    )
    numbers = (
        ("--facts", _positive, 20, "known facts that are traced at most"),
        ("--samples", _positive, 5, "samples of noise, of each fact"),
        ("--probe-facts", _not_negative, 12, "facts that the probe edits at most; 0: no probe"),
        ("--probe-layers", _positive, 8, "layers that the probe tries, over the depth"),
    )
    for name, kind, default, meaning in numbers:
        parser.add_argument(
            name, type=kind, default=default, metavar="N", help=f"{meaning}; default: {default}"
        )
    parser.add_argument("--output", metavar="FOLDER", help="default: located/MODEL_FACTS")
    parser.add_argument("--force", action="store_true", help="write over what is there")


def _ask_arguments(parser: Parser) -> None:
    parser.add_argument(
        "source", metavar="RUN_OR_MODEL", help="folder of a run, or a model: folder or name"
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="read as it is typed")
    parser.add_argument(
        "--before", action="store_true", help="of a run: ask the unedited model as well"
    )
    parser.add_argument(
        "--tokens", type=_positive, default=20, metavar="N", help="to go on by; default: 20"
    )
    parser.add_argument(
        "--top", type=_positive, default=5, metavar="N", help="next tokens shown; default: 5"
    )
    parser.add_argument(
        "--model", help="of a run: the unedited model, if it is not where the run found it"
    )
    parser.add_argument("--dtype", help="of a model that is no run's; default: float32")
    parser.add_argument(
        "--chat",
        action=BooleanOptionalAction,
        help="put the chat template around prompts; of a run, as the run did",
    )
    parser.add_argument("--system", help="system text of the chat template")
    parser.add_argument("--json", action="store_true", help="print it for programs")


_DESCRIPTIONS = {
    "check": _CHECK,
    "locate": _LOCATE,
    "tune": _TUNE,
    "init": _INIT,
    "ask": _ASK,
}
_ARGUMENTS = {
    "check": _check_arguments,
    "locate": _locate_arguments,
    "tune": _tune_arguments,
    "init": _init_arguments,
    "ask": _ask_arguments,
}


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number
