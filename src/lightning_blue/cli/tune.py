"""The command ``tune``: settings for a model that nobody has published any for."""

from __future__ import annotations

import json
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_blue.api.protection import quietly
from lightning_blue.cli.check import plans_of
from lightning_blue.cli.found import RATE, located_layers, run_name, tuned_folder
from lightning_blue.cli.parser import EditCLI
from lightning_blue.cli.tuned_file import run_file, update_arguments
from lightning_blue.cli.written import flat
from lightning_blue.editing.module import EditModule
from lightning_blue.preflight.estimate import RANGE
from lightning_blue.preflight.layout import duration
from lightning_blue.preflight.timing import measure_rates
from lightning_blue.reporting.plots import png
from lightning_blue.support.errors import InputError
from lightning_blue.support.processes import no_progress_bars
from lightning_blue.support.seeds import run_seed
from lightning_blue.support.space import check_writable
from lightning_blue.support.storage import write_atomic
from lightning_blue.support.text import counted
from lightning_blue.tuning import FILE, results, space
from lightning_blue.tuning.estimate import seconds, seconds_left
from lightning_blue.tuning.figure import figure_of
from lightning_blue.tuning.halving import Trial, halve, rounds
from lightning_blue.tuning.held_back import HeldBack, hold_back
from lightning_blue.tuning.objective import ORDINARY_TEXT, PRICES
from lightning_blue.tuning.space import Choice, Space
from lightning_blue.tuning.workbench import Workbench

SOLVERS = ("least_squares", "null_space")  # in closed form
KEYS = {  # of the configuration, by field of a choice
    "layers": "update.layers",
    "first_step": "model.target.first_step",
    "clamp": "model.target.clamp",
    "weight": "update.covariance_weight",
}


class TuneCLI(EditCLI):
    """What ``tune`` is configured by."""

    def before_instantiate_classes(self) -> None:
        """Refuse several processes and what is not tuned, before the model is loaded."""
        super().before_instantiate_classes()
        solver = self.config["update.solver"]
        if solver not in SOLVERS:
            raise InputError(
                "what is tuned belongs to updates in closed form",
                where=f"update.solver = {solver}",
                hint=f"choose one of: {', '.join(SOLVERS)}",
            )
        if self._several():
            raise InputError(
                "tune runs in one process",
                where="trainer.devices",
                hint="give 1, or leave it out",
            )


def tune(own: Namespace, for_fit: Sequence[str]) -> int:
    """Try settings on facts that are held back; write a run file and what was tried.

    Args:
        own: arguments of the command itself.
        for_fit: keys of `fit`; what they give is not tuned.

    Returns:
        0.

    Raises:
        InputError: for what cannot be used.
    """
    started = time.perf_counter()
    cli = _configured(own, for_fit)
    plan = cli.config["update.plan"]
    folder = Path(own.output or tuned_folder(own.model, own.data, plan))
    _require_own(folder)
    check_writable(folder)
    notes: list[str] = []
    with quietly(notes), no_progress_bars():
        found = _tuned(own, cli, for_fit, folder, started)
    found.notes.extend(note for note in notes if note not in found.notes)
    _write(cli, found, folder)
    return 0


def _configured(own: Namespace, for_fit: Sequence[str]) -> EditCLI:
    """Return the configuration; flags win over what is proposed."""
    proposed = [f"--for_model={own.model}", f"--run.name={run_name(own.model, own.data)}_tuned"]
    given = [f"--model.name_or_path={own.model}", f"--data.path={own.data}"]
    given += [] if own.plan is None else [f"--update.plan={own.plan}"]
    return TuneCLI([*proposed, *for_fit, *given], "tune")


def _require_own(folder: Path) -> None:
    """Refuse a folder whose run file tuning has not written."""
    if (folder / "run.yaml").exists() and not (folder / FILE).exists():
        raise InputError(
            f"a run.yaml stands there, and no {FILE} beside it",
            where=str(folder),
            hint="give another folder: --output=FOLDER",
        )


def _tuned(
    own: Namespace, cli: EditCLI, for_fit: Sequence[str], folder: Path, started: float
) -> results.Tuned:
    """Hold facts back, try settings on them, and say so line by line."""
    plans = plans_of(cli)
    module, plan = plans.module, cli.config["update.plan"]
    offset = plans.data.offset
    drawn_from = _space(cli, module, for_fit, located_layers(own))
    every = sorted({layer for layers in drawn_from.layers for layer in layers})
    module.check_layers(every)
    held = hold_back(plans.data, module, own.facts)
    update = {key: value for key, value in update_arguments(cli).items() if key != "layers"}
    bench = Workbench(
        module,
        update,
        held.facts,
        folder / "trials",
        tokens_per_batch=plans.measure.tokens_per_batch,
        trainer={key: cli.config[f"trainer.{key}"] for key in ("accelerator", "precision")},
    )
    seed = run_seed(module.seed)
    choices = space.draw(drawn_from, min(own.trials, drawn_from.size), seed)
    count = len(held.facts.requests)
    bench.measure_site(every)
    _say_facts(offset, held)
    _say_time(bench, choices, held, plan)
    bench.prepare(sorted({layer for choice in choices for layer in choice.layers}))
    unedited = bench.unedited(count)
    _say(f"unedited, {counted(count, 'fact')}: {results.sentence(unedited)}")
    trials = halve(choices, count, _Told(bench, choices))
    best = results.best(trials)
    return results.Tuned(
        model=own.model,
        data=own.data,
        plan=plan,
        space=drawn_from,
        trials=trials,
        unedited=unedited,
        settings=_values(bench, best.choice),
        facts=count,
        first=offset,
        offset=held.offset,
        left=held.left,
        controls=(len(held.facts.controls), held.asked),
        seed=seed,
        seconds=time.perf_counter() - started,
        notes=_notes(trials, held),
    )


def _space(
    cli: EditCLI, module: EditModule, for_fit: Sequence[str], located: Sequence[int] | None
) -> Space:
    """Return what is tried; what is given is not tuned."""
    config, defaults = flat_of(cli), flat(cli.parser.get_defaults().as_dict())

    def given(key: str) -> bool:
        named = any(arg.startswith(f"--{key}=") for arg in for_fit)
        return named or config[key] != defaults[key]

    layers = config[KEYS["layers"]]
    windows = space.windows(len(module.blocks), module.editable_layers)
    candidates: list[Sequence[int]] = [layers] if layers else [*windows]
    if not layers:
        candidates += [] if windows else [module.propose_layers()]  # says why there is none
        candidates += [located] if located else []
    rated = config[RATE] is not None or given(KEYS["first_step"])
    least_squares = config["update.solver"] == "least_squares"
    weighted = not least_squares or config[KEYS["weight"]] is not None
    return Space(
        tuple(space.laid_out(config["update.plan"], candidates)),
        (None,) if rated else _first(space.FIRST_STEPS, config[KEYS["first_step"]]),
        (None,) if given(KEYS["clamp"]) else _first(space.CLAMPS, config[KEYS["clamp"]]),
        (None,) if weighted else _first(space.WEIGHTS, 1.0),
    )


def flat_of(cli: EditCLI) -> dict[str, Any]:
    """Return the configuration by dotted key."""
    return flat(cli.config.as_dict())


def _first(values: Sequence[float], default: float) -> tuple[float, ...]:
    """Put the value that holds without tuning first."""
    return default, *(value for value in values if value != default)


def _values(bench: Workbench, choice: Choice) -> dict[str, Any]:
    """Return the settings of a choice by key, those that were given left out."""
    values = {
        "layers": list(choice.layers),
        "first_step": choice.first_step,
        "clamp": choice.clamp,
        "weight": None if choice.weight is None else float(f"{_weight(bench, choice):.6g}"),
    }
    return {KEYS[name]: value for name, value in values.items() if value is not None}


def _weight(bench: Workbench, choice: Choice) -> float:
    weight = bench.covariance_weight(choice)
    assert weight is not None
    return weight


class _Told:
    """Runs trials, and says what came of each, and how long the others will take."""

    def __init__(self, bench: Workbench, choices: Sequence[Choice]) -> None:
        self._bench, self._choices = bench, choices
        self._done: list[Trial] = []

    def __call__(self, number: int, facts: int, choice: Choice) -> Trial:
        before = self._bench.known(choice, facts)
        trial = self._bench.run(number, facts, choice)
        self._done.append(trial)
        layers, step, clamp, weight = results.spelled(choice)
        when = "made before" if before else f"{trial.measured.seconds:.1f} s"
        left = seconds_left(self._done, self._choices, len(self._bench.facts.requests))
        _say(
            f"trial {len(self._done)}, {facts} facts: layers {layers}, step {step}, clamp {clamp}, "
            f"weight {weight}: {results.sentence(trial.measured)}, {when}"
            + (f"; about {duration(left)} left" if left else "")
        )
        return trial


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _say_facts(offset: int, held: HeldBack) -> None:
    """Say what is tuned on."""
    count, known = len(held.facts.requests), len(held.facts.controls)
    _say(
        f"tuned on {counted(count, 'fact')}, usable ones from data.offset = {offset} on; "
        f"{held.left:,} are left behind data.offset = {held.offset}"
    )
    _say(f"control facts: {known} that the model answers, of {held.asked} asked{_instead(held)}")


def _instead(held: HeldBack) -> str:
    if held.facts.controls:
        return ""
    if any(request.neighborhood for request in held.facts.requests):
        return "; retained knowledge is not in the score"
    return "; neither they nor neighbours are in the score: the loss on ordinary text is"


def _say_time(bench: Workbench, choices: Sequence[Choice], held: HeldBack, plan: str) -> None:
    """Say how long it will take, from a little of each part."""
    count, module = len(held.facts.requests), bench.module
    layers = sorted({layer for choice in choices for layer in choice.layers})
    rates = measure_rates(
        module,
        bench.closed_form(choices[0]),
        held.facts.requests,
        bench.tokens_per_batch,
        texts=False,
    )
    total = seconds(
        choices,
        count,
        len(held.facts.controls),
        plan,
        rates,
        tokens=round(module.covariance.tokens_per_dim * bench.key_width(layers)),
        covariances=len(bench.missing(layers)),
    )
    laid_out = ", then ".join(f"{n} on {facts}" for n, facts in rounds(len(choices), count))
    low, high = (duration(part * total) for part in RANGE)
    _say(f"{len(choices)} combinations of settings: {laid_out} facts; {low} to {high}")


def _notes(trials: Sequence[Trial], held: HeldBack) -> list[str]:
    """Say what the score rests on, and what should be known of it."""
    found = results.best(trials).measured
    notes = []
    if not held.facts.controls:
        notes.append(
            f"of {held.asked} facts asked the model answers none: retained knowledge is not in the "
            "score (--data.controls=FILE names facts that it knows)"
        )
    if ORDINARY_TEXT in found.components:
        notes.append(
            "the facts have no neighbours: ordinary text, 100 exp(-nats per token that it costs "
            "more), stands for what edits should not change"
        )
    elif PRICES[0] not in found.components:
        notes.append("the facts have no neighbours: specificity is not in the score")
    if results.without_tuning(trials) == results.best(trials):
        notes.append("nothing that was tried is better than what is decided without tuning")
    return notes


def _write(cli: EditCLI, found: results.Tuned, folder: Path) -> None:
    """Write all files, and say where they are and what to run.

    Raises:
        NotWritten: if the disk is full or may not be written.
    """
    file = folder / "run.yaml"
    write_atomic(folder / "tune.csv", results.as_csv(found.trials))
    write_atomic(folder / "tune.png", png(figure_of(found)))
    write_atomic(folder / FILE, json.dumps(found.to_dict(), indent=2) + "\n")
    write_atomic(file, run_file(cli, found, file))
    rows = (("untuned", found.untuned.measured), ("tuned", found.best.measured))
    for name, measured in (("unedited", found.unedited), *rows):
        _say(f"{name}, {found.facts} facts: {results.sentence(measured)}")
    for note in found.notes:
        _say(f"note: {' '.join(note.split())}")
    _say(f"what was tried: {folder / 'tune.csv'}, {folder / 'tune.png'}")
    _say(f"next: lightning-blue fit --config={shlex.quote(str(file))}")
