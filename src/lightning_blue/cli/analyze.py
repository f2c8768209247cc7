"""The command ``analyze``: the paper's studies on a run file's model and data."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from blue_callbacks import ClosedFormUpdate
from lightning_blue import __version__
from lightning_blue.cli.baselines import require_closed_form
from lightning_blue.cli.parser import EditCLI
from lightning_blue.editing.covariance import covariance_file
from lightning_blue.reporting import MeasureEdits
from lightning_blue.studies.bench import Bench, StudySettings
from lightning_blue.studies.results import Described, read_section, write_report, write_result
from lightning_blue.studies.shift import edits_of
from lightning_blue.studies.table import STUDIES
from lightning_blue.support.errors import InputError
from lightning_blue.support.leftovers import sweep
from lightning_blue.support.seeds import run_seed
from lightning_blue.support.space import check_writable
from lightning_blue.support.text import counted

log = logging.getLogger(__name__)

ALL = "all"


class AnalyzeCLI(EditCLI):
    """What ``analyze`` is configured by: a run file, and a section ``study``.

    Args:
        args: of the command line, behind the name of the study.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.batch_size = 0  # of the run file
        super().__init__(args, "analyze")

    def setting(self, key: str) -> Any:
        """Return a value of the configuration, by its dotted key."""
        return self._get(self.config, key)

    @property
    def settings(self) -> StudySettings:
        """What the studies are made with."""
        settings: StudySettings = self._get(self.config_init, "study")
        return settings

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the section ``study``."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(StudySettings, "study")

    def before_instantiate_classes(self) -> None:
        """Let the data offer what the studies need: the records in one batch, and control facts."""
        super().before_instantiate_classes()
        config = self.config
        settings = StudySettings(**self.setting("study").as_dict())
        check_writable(Path(settings.root))
        if self._several():
            raise InputError(
                "analyze runs in one process",
                where="trainer.devices",
                hint="give 1, or leave it out",
            )
        self.batch_size = self.setting("data.batch_size")
        config["data.edits"] = settings.records
        config["data.batch_size"] = max(settings.records, self.batch_size)
        edited = sum(len(edits_of(Path(run))) for run in settings.runs)  # they may be among them
        config["data.controls"] = settings.prompts + edited


def analyze(args: Sequence[str]) -> None:
    """Make one study, or all; print what was found and where the report is."""
    chosen, rest = _chosen(args)
    cli = AnalyzeCLI(rest)
    bench = make_bench(cli)
    folder = Path(cli.settings.root) / cli.record.name
    sweep(folder.parent, levels=2)
    for name in chosen:
        study, described = STUDIES[name], _described(cli, bench, name)
        known = read_section(folder, name, described.key) if len(chosen) > 1 else None
        if known is not None and not (name == "shift" and cli.settings.runs):
            sys.stdout.write(f"{name}: made before\n")
            continue
        log.info("study %s", name)
        result = study.run(bench)
        write_result(folder, described, result)
        sys.stdout.write(f"{name}: {result.finding}\n")
    sys.stdout.write(f"report: {write_report(folder, list(STUDIES))}\n")


def make_bench(cli: AnalyzeCLI) -> Bench:
    """Return the bench for a configuration, its model on the trainer's device.

    Raises:
        InputError: if the data or the layers cannot be used.
    """
    (update,) = (c for c in cli.trainer.callbacks if isinstance(c, ClosedFormUpdate))  # type: ignore[attr-defined]
    require_closed_form(update, "analyze")
    (measure,) = (c for c in cli.trainer.callbacks if isinstance(c, MeasureEdits))  # type: ignore[attr-defined]
    module = cli.model.to(cli.trainer.strategy.root_device)
    data = cli.datamodule
    data.prepare(module.tokenizer, module.max_length, module.contexts_length)
    return Bench(
        module,
        update,
        data.requests,
        batch_size=cli.batch_size,
        controls=data.controls,
        settings=cli.settings,
        protocol=data.protocol,
        generate=measure.generate,
        tokens_per_batch=measure.tokens_per_batch,
        seed=measure.seed,
        trainer={key: cli.setting(f"trainer.{key}") for key in ("accelerator", "precision")},
    )


def _chosen(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the studies that are asked for, and the arguments behind them."""
    name, rest = (args[0], list(args[1:])) if args else ("", [])
    if name in ("-h", "--help"):
        return [], list(args)
    if name == ALL:
        return list(STUDIES), rest
    if name not in STUDIES:
        near = difflib.get_close_matches(name, [*STUDIES, ALL], n=1)
        raise InputError(
            f"there is no study {name!r}" if name else "name a study",
            where="lightning-blue analyze STUDY --config FILE",
            hint=f"did you mean {near[0]}?"
            if near
            else f"choose one of {', '.join(STUDIES)}, {ALL}",
        )
    return [name], rest


def _described(cli: AnalyzeCLI, bench: Bench, name: str) -> Described:
    """Say what a study is made on, and hash what it depends on."""
    study, module = STUDIES[name], bench.module
    model, data = cli.setting("model.name_or_path"), cli.setting("data.path")
    layers = ", ".join(map(str, bench.layers))
    requests = counted(len(bench.requests), "request")
    setting = (
        f"Made on {Path(str(model)).name} with the first {requests} of "
        f"{Path(str(data)).name}, critical layers {layers}."
    )
    depends = {
        "study": name,
        "version": __version__,
        "targets": [module.target_identity(bench.requests, layer) for layer in bench.layers],
        "covariances": covariance_file(
            module.model, module.tokenizer, module.covariance, bench.layers
        ).identity,
        "requests": cli.datamodule.state_dict()["requests"],  # probes and control facts with them
        "protocol": bench.protocol,
        "seed": run_seed(bench.seed),
        "precision": cli.setting("trainer.precision"),
        "update": {k: v for k, v in vars(cli.setting("update")).items() if k != "plan"},
        "measure": vars(cli.setting("measure")),
        "study_settings": asdict(cli.settings),
        "batch_size": bench.batch_size,
    }
    key = hashlib.sha256(json.dumps(depends, default=str, sort_keys=True).encode()).hexdigest()
    title = f"{study.title} ({study.where})"
    return Described(name, title, study.claim, setting, key[:16])
