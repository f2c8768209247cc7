"""The commands for a run that was made: show, undo, export, apply.

Plain argparse; what is heavy is imported when the arguments are known to be right.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_blue.cli.arguments import Parser, UsageError

if TYPE_CHECKING:
    from lightning_blue.runs.base import UneditedModel
    from lightning_blue.runs.journal import Journal

_SHOW = """Say what was edited in a run, batch by batch, with the outcome where it was
measured, and what its folder holds."""

_UNDO = """Write the model of a run without some of its edits; without an option, without
the newest batch.

--to K is exact: the weights as they were after K batches. With --batch and
--requests, later batches stay as they were solved with the removed edits in
place; --replay solves them again from the keys and residuals that the run has
stored."""

_EXPORT = """Write a run as a model folder, as a PEFT LoRA adapter, or as a patch: one file
that `lightning-blue apply` turns into the edited model."""

_APPLY = """Apply a patch to the unedited model it was made for, and write the edited
model."""


def run_command(command: str, args: Sequence[str]) -> int:
    """Run a command; return 0, or 2 for input that cannot be used."""
    try:
        chosen = run_parser(command).parse_args(args)
    except UsageError as error:
        return _complain(error)
    from blue_callbacks import NonFiniteError, SingularCovarianceError, UnsolvableError
    from lightning_blue.support.errors import InputError, of_the_system

    _quiet()
    try:
        _COMMANDS[command](chosen)
    except (InputError, NonFiniteError, SingularCovarianceError, UnsolvableError) as error:
        return _complain(error)
    except OSError as error:
        return _complain(of_the_system(error))
    return 0


def show(args: Namespace) -> None:
    """Print what a run edited and left."""
    from lightning_blue.runs.show import describe_run

    _say(describe_run(args.run, args.all))


def undo(args: Namespace) -> None:
    """Write the model without some edits, and print what was done."""
    from lightning_blue.runs import undo as taking_out
    from lightning_blue.runs.base import check_output
    from lightning_blue.runs.card import card, undone
    from lightning_blue.runs.journal import Journal

    journal = Journal(args.run)
    journal.require_edits()
    removed, name = _removal(journal, args)
    taking_out.require_possible(journal, removed, args.replay)
    replay = args.replay and not taking_out.is_exact(journal, removed)
    output = args.output or args.run / (name + ("-replay" if replay else ""))
    check_output(output, args.force)
    covariance = taking_out.statistics(journal.header, args.covariance) if replay else None
    base = _base(journal, args)
    distances = taking_out.write_without(journal, removed, base, covariance)
    said = undone(journal, removed, distances, replay)
    base.save(output, card(journal.header.model, journal.request_ids, removed, said))
    _say(f"{said}\nmodel: {output}")


def export(args: Namespace) -> None:
    """Write a run in another form."""
    from lightning_blue.runs.base import check_output
    from lightning_blue.runs.journal import Journal

    if args.rank is not None and args.form != "adapter":
        raise _refused("--rank is for an adapter", "leave it out, or add --as adapter")
    journal = Journal(args.run)
    journal.require_edits()
    output = args.output or args.run / ("patch.safetensors" if args.form == "patch" else args.form)
    check_output(output, args.force)
    {"model": _as_model, "adapter": _as_adapter, "patch": _as_patch}[args.form](
        journal, output, args
    )
    _say(f"{args.form}: {output}")


def apply(args: Namespace) -> None:
    """Make the edited model of a patch and the unedited one."""
    from lightning_blue.runs.base import check_output
    from lightning_blue.runs.card import card, edits_in_batches
    from lightning_blue.runs.patch import Patch, load_for

    patch = Patch(args.patch)
    output = args.output or args.patch.with_name(f"{args.patch.stem}-model")
    check_output(output, args.force)
    base = load_for(patch, args.model)
    patch.apply(base)
    said = f"{edits_in_batches(patch.request_ids)}, from {args.patch.name}"
    base.save(output, card(patch.model, patch.request_ids, {}, said))
    _say(f"{said}\nmodel: {output}")


def _removal(journal: Journal, args: Namespace) -> tuple[dict[int, Sequence[int]], str]:
    """Return what is to be left out, and the name of a folder for it."""
    from lightning_blue.runs import undo as taking_out

    if args.to is not None:
        return dict(taking_out.all_from(journal, args.to)), f"undo-to-{args.to}"
    if args.requests is not None:
        ids = [name.strip() for name in args.requests.split(",") if name.strip()]
        return dict(taking_out.requests(journal, ids)), "undo-requests"
    batch = len(journal.files) - 1 if args.batch is None else args.batch
    return dict(taking_out.one_batch(journal, batch)), f"undo-batch-{batch}"


def _as_model(journal: Journal, output: Path, args: Namespace) -> None:
    from lightning_blue.runs.card import card, edits_in_batches
    from lightning_blue.runs.undo import write_without

    base = _base(journal, args)
    write_without(journal, {}, base, None)
    said = edits_in_batches(journal.request_ids)
    base.save(output, card(journal.header.model, journal.request_ids, {}, said))


def _as_adapter(journal: Journal, output: Path, args: Namespace) -> None:
    from lightning_blue.runs.adapter import write_adapter

    found = write_adapter(output, journal, lambda: _base(journal, args), args.rank)
    for weight, low in found.items():
        how = "the run's factors"
        if low.error is not None:
            how = f"by SVD, relative error {low.error:.2g}"
        _say(f"{weight}: rank {low.down.shape[0]}, {how}")


def _as_patch(journal: Journal, output: Path, args: Namespace) -> None:
    from lightning_blue.runs.patch import write_patch
    from lightning_blue.runs.show import size

    forms = write_patch(output, journal, lambda: _base(journal, args))
    for weight, form in forms.items():
        _say(f"{weight}: {form}")
    _say(f"size: {size(output.stat().st_size)}")


def _base(journal: Journal, args: Namespace) -> UneditedModel:
    from lightning_blue.runs.base import UneditedModel

    return UneditedModel(journal.header.model, journal.header.weights, args.model)


def run_parser(command: str) -> ArgumentParser:
    """Return the parser of a command's arguments."""
    described = {"show": _SHOW, "undo": _UNDO, "export": _EXPORT, "apply": _APPLY}[command]
    parser = Parser(
        prog=f"lightning-blue {command}",
        description=described,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if command == "apply":
        parser.add_argument(
            "patch", type=Path, metavar="PATCH", help="file that export has written"
        )
        parser.add_argument("--model", required=True, help="the unedited model: folder or name")
    else:
        parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    if command == "show":
        parser.add_argument("--all", action="store_true", help="list every edit")
        return parser
    if command != "apply":
        parser.add_argument(
            "--model", help="the unedited model, if it is not where the run found it"
        )
    {"undo": _undo_arguments, "export": _export_arguments}.get(command, lambda _: None)(parser)
    parser.add_argument("--output", type=Path, help="what to write; by default beside the input")
    parser.add_argument("--force", action="store_true", help="replace an output that exists")
    return parser


def _undo_arguments(parser: ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--batch", type=int, metavar="K", help="leave out batch K, from 0")
    which.add_argument("--requests", metavar="ID,ID", help="leave out edits by their ids")
    which.add_argument("--to", type=int, metavar="K", help="keep the first K batches only; exact")
    parser.add_argument("--replay", action="store_true", help="solve what follows again")
    parser.add_argument(
        "--covariance", metavar="FILE", help="for --replay: the run's statistics, if they moved"
    )


def _export_arguments(parser: ArgumentParser) -> None:
    forms = ("model", "adapter", "patch")
    parser.add_argument(
        "--as", dest="form", choices=forms, required=True, help="form of the output"
    )
    parser.add_argument(
        "--rank", type=_positive, metavar="R", help="highest rank of an adapter; by default any"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _refused(message: str, hint: str) -> Exception:
    from lightning_blue.support.errors import InputError

    return InputError(message, hint=hint)


def _quiet() -> None:
    """Silence what transformers say of things that are meant here."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _complain(error: Exception) -> int:
    sys.stderr.write(f"error: {error}\n")
    return 2


_COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "show": show,
    "undo": undo,
    "export": export,
    "apply": apply,
}
