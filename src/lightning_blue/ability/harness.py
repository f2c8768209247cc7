"""General ability: tasks of lm-evaluation-harness, on the model as it is in memory."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import math
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_blue.ability.group_files import read_group, tasks_named
from lightning_blue.ability.jackknife import jackknife_error
from lightning_blue.ability.settings import AbilitySettings
from lightning_blue.metrics.table import ABILITY, DIRECTION
from lightning_blue.support.digests import file_digest
from lightning_blue.support.errors import InputError, first_line

OWN_TASKS = Path(__file__).parent / "tasks"
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "examples": 1234}  # simple_evaluate's
NO_FILTER = "none"
ADDRESS = re.compile(" at 0x[0-9a-f]+")  # of a function that a task names, new in each process

Metrics = dict[str, dict[str, float]]


class GeneralAbility:
    """Tasks of lm-evaluation-harness, loaded once and measured as often as is wanted.

    `lm_eval.simple_evaluate` is spelled out here, by its parts (`TaskManager.load`, `evaluate`): it
    would load the tasks anew each time, and spend seconds on a description of the machine.

    Args:
        settings: the tasks, and how much of them.

    Raises:
        InputError: if lm-evaluation-harness is not installed, or a task cannot be loaded.
    """

    def __init__(self, settings: AbilitySettings) -> None:
        self.settings = settings
        self._loaded: dict[str, Any] = {}
        if settings.tasks:
            require_harness()
            with isolate_rng(), _quietly():
                self._loaded = _load(settings)  # by each process: none waits for another here

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Metrics:
        """Measure all tasks; the model, the tokenizer and the random state are left as found.

        Args:
            model: a causal language model on any device, in any dtype.
            tokenizer: its tokenizer.

        Returns:
            An estimate for each ``ability/TASK/METRIC``, in the harness's own unit, its standard
            error over records, of all but means by the jackknife, and its ``direction``: 1 where
            higher is better, -1 where lower is, 0 where neither is. Groups that the harness
            aggregates have no error. Empty without tasks.

        Raises:
            InputError: for a task that the harness refuses to run on the model.
        """
        if not self._loaded:
            return {}
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        with isolate_rng(), _as_found(model), _quietly():
            _seed()
            found = evaluate(
                HFLM(
                    pretrained=model,
                    tokenizer=copy.deepcopy(tokenizer),  # it sets a padding token
                    batch_size=self.settings.batch_size,
                ),
                self._loaded,
                limit=self.settings.limit,
                bootstrap_iters=0,  # a hundred thousand, in processes of their own
            )
        assert found is not None  # but where several processes evaluate together
        return _estimates(found, self._loaded)

    def identity(self) -> dict[str, Any] | None:
        """Return everything but the model that the numbers depend on, as plain values."""
        if not self._loaded:
            return None
        configs = {name: task.dump_config() for name, task in self._loaded["tasks"].items()}
        files = sorted(Path(self.settings.data).glob("*.jsonl")) if self.settings.data else []
        own = [
            path
            for config in configs.values()
            for path in _local_files((config.get("dataset_kwargs") or {}).get("data_files"))
        ]
        return {
            "harness": version("lm_eval"),
            "tasks": json.loads(ADDRESS.sub("", json.dumps(configs, default=str))),
            "files": {path.name: file_digest(path) for path in files},
            "own_files": {str(path): file_digest(path) for path in own},
            "limit": self.settings.limit,
            "batch_size": self.settings.batch_size,
        }

    def asked(self) -> dict[str, Any]:
        """Return, by setting, what the numbers of a run depend on; empty without tasks.

        Of each task a hash of its definition, wherever that lies, and of each file its digest.
        """
        identity = self.identity()
        if identity is None:
            return {}
        files = {**identity["files"], **identity["own_files"]}
        return {
            "lm_eval": identity["harness"],
            "measure.ability.limit": self.settings.limit,
            "measure.ability.num_fewshot": self.settings.num_fewshot,
            "measure.ability.tasks": {
                name: _hash({key: value for key, value in config.items() if key != "metadata"})
                for name, config in identity["tasks"].items()
            },
            **({"measure.ability.data": files} if files else {}),
        }

    def described(self) -> str:
        """Say for a reader what was measured how."""
        shots = {task.get_config("num_fewshot") for task in self._loaded["tasks"].values()}
        limit = self.settings.limit
        return (
            f"lm-evaluation-harness {version('lm_eval')}, "
            f"{'all records' if limit is None else f'the first {limit:,} records'} of a task, "
            f"{' or '.join(map(str, sorted(shots)))} examples before each"
        )


def _hash(config: Mapping[str, Any]) -> str:
    return sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _local_files(given: Any) -> list[Path]:
    """Return the files among what a task names as its data: a path, several, or some by split."""
    if isinstance(given, Mapping):
        return [path for part in given.values() for path in _local_files(part)]
    if isinstance(given, (list, tuple)):
        return [path for part in given for path in _local_files(part)]
    return [Path(given)] if isinstance(given, str) and Path(given).is_file() else []


def require_harness() -> None:
    """Refuse to go on without lm-evaluation-harness.

    Raises:
        InputError: with the command that installs it.
    """
    if find_spec("lm_eval") is None:
        raise InputError(
            "general ability is measured by lm-evaluation-harness, which is not installed",
            where="measure.ability.tasks",
            hint="pip install 'lightning-blue[ability]'",
        )


def _load(settings: AbilitySettings) -> dict[str, Any]:
    """Load the tasks with the number of examples that is asked for."""
    from lm_eval.tasks import TaskManager

    names = list(dict.fromkeys(settings.tasks or []))
    known = {"folder": settings.data}
    manager = TaskManager(include_path=str(OWN_TASKS), include_defaults=False, metadata=known)
    if any(_unknown(manager, name) for name in names):
        manager = TaskManager(include_path=str(OWN_TASKS), metadata=known)  # seconds: thousands
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        for part, found in _load_one(manager, name).items():
            loaded[part].update(found)
    for task in loaded["tasks"].values():
        given = task.get_config("num_fewshot")
        if settings.num_fewshot is not None and given != 0:  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif given is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS["examples"])
    return loaded


def _unknown(manager: Any, name: str) -> list[str]:
    """Return the names that stand for tasks and are none: this one, or those in a group's file."""
    there = manager.all_tasks
    if name not in there and Path(name).is_file():
        return [each for each in tasks_named(read_group(Path(name)) or {}) if each not in there]
    return [name] if name not in there else []


def _index_group(manager: Any, name: str) -> None:
    """Let a manager know the group in a file by the file's name.

    Of a path it takes the list of a group's tasks for the group's name (lm_eval 0.4.13), and fails.
    """
    group = read_group(Path(name)) if name not in manager.all_tasks else None
    if group is not None:
        entry = next(iter(manager.task_index.values()))  # as a pattern
        manager.task_index[name] = replace(
            entry,
            name=str(group["group"]),
            kind=type(entry.kind).GROUP,
            yaml_path=Path(name).expanduser().resolve(),
            cfg=None,
            tags=set(),
        )


def _load_one(manager: Any, name: str) -> Mapping[str, Any]:
    unknown = _unknown(manager, name)
    if unknown:
        near = get_close_matches(unknown[0], manager.all_tasks, n=3)
        raise InputError(
            f"lm-evaluation-harness has no task, group or tag {unknown[0]!r}",
            where="measure.ability.tasks" + (f" = {name}" if unknown != [name] else ""),
            hint=f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them",
        )
    try:
        _index_group(manager, name)
        loaded: Mapping[str, Any] = manager.load([name])
    except InputError:
        raise
    except Exception as error:  # of any kind: of data sets, of the hub, of a task's own code
        raise InputError(
            f"the task {name} cannot be loaded: {first_line(error)}",
            where="measure.ability.tasks",
            hint="its data must be in the hub's cache, or the hub be reached; `paper` reads files",
        ) from error
    return loaded


def _estimates(found: Mapping[str, Any], loaded: Mapping[str, Any]) -> Metrics:
    """Take values from the harness's results, and errors from its samples.

    Of a group that has numbers of its own, the tasks in it are left out.
    """
    groups = found.get("groups", {})
    inside = {task.task_name for name in groups for task in loaded["groups"][name].get_all_tasks()}
    metrics: Metrics = {}
    for name, results in found["results"].items():
        if name in inside:
            continue
        for key, value in results.items():
            metric, comma, used = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            shown = metric if used == NO_FILTER else f"{metric},{used}"
            n = int(results["sample_len"])
            better = _direction(found, name, metric)
            estimate = {"value": float(value), "count": n, "records": n, **better}
            if name in loaded["tasks"]:
                estimate |= _error(loaded["tasks"][name], found["samples"][name], metric, used)
            metrics[f"{ABILITY}{name}/{shown}"] = estimate
    return metrics


def _direction(found: Mapping[str, Any], name: str, metric: str) -> dict[str, float]:
    """Return under its key which direction is better, as the task says; nothing where it does not.

    Of a group whose tasks do not agree the harness says None: neither is better.
    """
    said = found.get("higher_is_better", {}).get(name, {})
    if metric not in said:
        return {}
    return {DIRECTION: 0.0 if said[metric] is None else 1.0 if said[metric] else -1.0}


def _error(
    task: Any, samples: Sequence[Mapping[str, Any]], metric: str, used: str
) -> dict[str, float]:
    """Return the standard error of a task's metric, under its key; nothing where there is none."""
    from lm_eval.api.metrics import mean, mean_stderr

    aggregate = task.aggregation().get(metric, mean)  # as the harness takes it
    items = [s[metric] for s in samples if s["filter"] == used and metric in s]
    if len(items) < 2:
        return {}
    error = mean_stderr(items) if aggregate is mean else jackknife_error(aggregate, items)
    return {"standard_error": error} if math.isfinite(error) else {}


def _seed() -> None:
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])  # the state that the harness reads
    torch.manual_seed(SEEDS["torch"])


@contextlib.contextmanager
def _as_found(model: PreTrainedModel) -> Iterator[None]:
    """Put back what the harness sets on a model: modes, and which weights are trained."""
    modes = {name: module.training for name, module in model.named_modules()}
    trained = {name: weight.requires_grad for name, weight in model.named_parameters()}
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
        for name, weight in model.named_parameters():
            weight.requires_grad_(trained[name])


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence the harness's warnings about things that are meant, and its bars in a log."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    bars = (
        contextlib.nullcontext()
        if sys.stderr.isatty()
        else contextlib.redirect_stderr(io.StringIO())
    )
    try:
        with bars:
            yield
    finally:
        log.setLevel(level)
