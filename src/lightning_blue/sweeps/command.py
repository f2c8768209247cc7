"""The command ``sweep``: what is to be done, a line for each run as it ends, and what failed."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_blue.support.errors import InputError
from lightning_blue.support.space import check_writable
from lightning_blue.support.text import counted
from lightning_blue.sweeps.launch import cores, jobs_with_room, run_here, visible_devices
from lightning_blue.sweeps.planned import DONE, PlannedRun, plan_runs
from lightning_blue.sweeps.shared import covariance_tasks
from lightning_blue.sweeps.sweep_file import read_sweep
from lightning_blue.sweeps.tasks import Outcome, RunTask, Task

Launch = Callable[[Sequence[Task], int, Callable[[Outcome], None]], None]


def sweep(args: Namespace, passed_on: Sequence[str]) -> int:
    """Run what of a sweep is not finished.

    Args:
        args: see :func:`lightning_blue.cli.experiment_commands.experiment_parser`.
        passed_on: arguments for `fit`.

    Returns:
        0 where every run has a result, else 1.

    Raises:
        InputError: for a sweep that cannot be run, before any run is started.
    """
    asked = read_sweep(args.sweep).narrowed(args.choices)
    runs = plan_runs(asked, args.root, [*_online(), *passed_on])
    tasks = [RunTask(run.name, tuple(run.command), run.root, run) for run in runs]
    if args.list:
        _list(runs)
        return 0
    folder = args.root / asked.name
    check_writable(folder)
    states = [run.state for run in runs]
    to_do = [task for task, state in zip(tasks, states, strict=True) if state not in DONE]
    launch, jobs = _launcher(args, runs, folder)
    _say(_plan(runs, states, jobs if to_do else 0, args.cluster))
    outcomes = _run(to_do, len(runs), launch, jobs)
    return _close(folder, outcomes)


def _run(tasks: Sequence[RunTask], total: int, launch: Launch, jobs: int) -> list[Outcome]:
    """Collect what is shared, then run; say a line for each run."""
    done = total - len(tasks)
    outcomes: list[Outcome] = []

    def on_end(outcome: Outcome) -> None:
        outcomes.append(outcome)
        _say(_line(outcome, done + len(outcomes), total))

    if jobs > 1:
        launch(covariance_tasks([task.planned for task in tasks]), 1, _on_shared)
    if tasks:
        launch(tasks, jobs, on_end)
    return outcomes


def _launcher(args: Namespace, runs: Sequence[PlannedRun], folder: Path) -> tuple[Launch, int]:
    if args.cluster == "slurm":
        from lightning_blue.sweeps.slurm import run_on_slurm

        options = _options(args.slurm)
        jobs = args.jobs or max(1, len(runs))

        def on_slurm(tasks: Sequence[Task], jobs: int, on_end: Callable[[Outcome], None]) -> None:
            run_on_slurm(tasks, jobs, options, folder / "slurm", on_end)

        return on_slurm, jobs
    if args.slurm:
        raise InputError(
            "--slurm has options for SLURM jobs", hint="add --cluster=slurm, or leave it out"
        )
    return run_here, args.jobs or jobs_with_room(runs)


def _options(given: Sequence[str]) -> dict[str, Any]:
    """Read options of ``sbatch``, each as ``NAME=VALUE``."""
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(
                f"{text!r} is not an option with a value",
                where="--slurm",
                hint="--slurm partition=gpu",
            )
        options[name.replace("-", "_")] = yaml.safe_load(value)
    return options


def _online() -> list[str]:
    """Log to the server where a W&B agent has started this."""
    return ["--run.wandb=online"] if os.environ.get("WANDB_SWEEP_ID") else []


def _list(runs: Sequence[PlannedRun]) -> None:
    for run in runs:
        _say(f"{run.state:<12} {run.name}")
        _say(f"{'':<12} python -m lightning_blue {shlex.join(run.command)}")


def _plan(runs: Sequence[PlannedRun], states: Sequence[str], jobs: int, cluster: str) -> str:
    """Say what there is to do, and how many run at a time."""
    known = (*DONE, "stopped")
    counts = [f"{states.count(state)} {state}" for state in known if state in states]
    new = states.count("new")
    text = f"{counted(len(runs), 'run')}: {', '.join([*counts, f'{new} new'])}"
    if jobs > 1 or (jobs and cluster == "local"):
        text += f"; {jobs} at a time"
    if jobs and cluster == "local":
        threads = max(1, cores() // jobs)
        devices = visible_devices()
        each = "a GPU" if devices else f"{threads} thread{'s' * (threads > 1)}"
        text += f", {each} each"
    return text


def _line(outcome: Outcome, number: int, total: int) -> str:
    width = len(str(total))
    minutes, seconds = divmod(round(outcome.seconds), 60)
    said = f"  {first}" if (first := next(iter(outcome.said.splitlines()), "")) else ""
    took = f"{minutes:>3}:{seconds:02}"
    return f"{number:>{width}}/{total}  {outcome.state:<8} {took}  {outcome.name}{said}"


def _on_shared(outcome: Outcome) -> None:
    if not outcome.ok:
        _say(
            f"covariances: {outcome.state}: {outcome.said} ({outcome.log}); runs collect their own"
        )


def _close(folder: Path, outcomes: Sequence[Outcome]) -> int:
    """List what has no result."""
    failed = [outcome for outcome in outcomes if not outcome.ok]
    early = [outcome for outcome in outcomes if outcome.state == "ended early"]
    for outcome in early:
        _say(f"ended early: {outcome.name}: {outcome.said}")
    if failed:
        _say(
            f"\nwithout a result: {len(failed)} of {counted(len(outcomes), 'run')}; "
            "the same command tries again:"
        )
        for outcome in failed:
            _say(f"  {outcome.name}: {outcome.said or outcome.state}\n    log: {outcome.log}")
    _say(f"runs: {folder}\ncompare them: lightning-blue compare {folder}")
    return 1 if failed else 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
