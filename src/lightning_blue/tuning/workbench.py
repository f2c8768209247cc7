"""A loaded model on which combinations are tried and taken back; finished trials are kept."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from blue_callbacks import (
    ClosedFormUpdate,
    NonFiniteError,
    SingularCovarianceError,
    UnsolvableError,
    WeightId,
)
from lightning_blue import __version__
from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.editing.covariance import covariance_file
from lightning_blue.editing.fingerprints import tokenizer_fingerprint
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.optimization import TargetOptimization, Targets
from lightning_blue.editing.target_site import PROMPTS
from lightning_blue.metrics.evaluation import evaluate, evaluate_control_facts
from lightning_blue.metrics.ratings import rate
from lightning_blue.studies.bench import Bench
from lightning_blue.studies.module import StudyModule
from lightning_blue.support.errors import first_line
from lightning_blue.support.seeds import run_seed
from lightning_blue.support.storage import unless_full, write_atomic
from lightning_blue.tuning.halving import Trial
from lightning_blue.tuning.objective import PRICES, Measured, components, soft, strict
from lightning_blue.tuning.space import Choice

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """What trials are made on.

    Attributes:
        requests: that are edited, in one batch.
        controls: facts that the unedited model answers, and that are not edited.
        protocol: ``counterfact`` or ``zsre``.
    """

    requests: Sequence[EditRequest]
    controls: Sequence[Probe]
    protocol: str


class Workbench:
    """Tries combinations of settings on one loaded model.

    Covariances are collected once for each layer, and targets that depend on unedited weights once
    for all trials of a round that differ in the weight of the covariance alone. After each trial
    the weights are what they were, to the bit.

    Args:
        module: with the unedited model, on the device to be used.
        update: arguments of `ClosedFormUpdate`, the plan among them.
        facts: to try them on.
        folder: of finished trials.
        tokens_per_batch: tokens in one forward pass of the measurements.
        trainer: further arguments of the Trainer: ``accelerator``, ``precision``.
    """

    def __init__(
        self,
        module: EditModule,
        update: Mapping[str, Any],
        facts: Facts,
        folder: Path,
        *,
        tokens_per_batch: int = 4096,
        trainer: Mapping[str, Any] | None = None,
    ) -> None:
        self.module, self.update, self.facts, self.folder = module, dict(update), facts, folder
        self.tokens_per_batch, self._trainer = tokens_per_batch, dict(trainer or {})
        self._targets: dict[tuple[Any, ...], Targets] = {}  # of unedited weights
        self._target_seconds = 0.0  # that the newest trial spent on those
        self._text_loss: float | None = None
        self._identity: dict[str, Any] | None = None
        self._covariances: dict[tuple[int, ...], dict[str, str]] = {}  # what they are of, by layers

    def measure_site(self, layers: Sequence[int]) -> None:
        """Measure the target site for all layers that will be tried, so that they have one.

        Raises:
            InputError: as `EditModule.measure_site` does.
        """
        self.module.measure_site(layers, list(self.facts.requests[:PROMPTS]))

    def missing(self, layers: Sequence[int]) -> list[int]:
        """Return the layers whose covariance no file holds."""
        module = self.module
        file = covariance_file(module.model, module.tokenizer, module.covariance, layers)
        return [layer for layer in layers if not file.holds([layer])]

    def prepare(self, layers: Sequence[int]) -> None:
        """Load or collect the covariances of all layers, in one pass.

        Raises:
            InputError: as `EditModule.prepare` does.
        """
        module = self.module
        module.prepare(layers, [WeightId(layer) for layer in layers], None)

    def target_settings(self, choice: Choice) -> TargetOptimization:
        """Return the settings of the target optimisation with those of a choice."""
        changes = {"first_step": choice.first_step, "clamp": choice.clamp}
        given: dict[str, Any] = {name: v for name, v in changes.items() if v is not None}
        return replace(self.module.target, **given)

    def covariance_weight(self, choice: Choice) -> float | None:
        """Return the covariance weight of a choice, in tokens."""
        if choice.weight is None:
            given: float | None = self.update["covariance_weight"]
            return given
        return choice.weight * self.key_width(choice.layers)

    def key_width(self, layers: Sequence[int]) -> int:
        """Return the key dimensions of layers' weights; of several widths the largest."""
        read = self.module.editable_weights.read
        return max(read(WeightId(layer)).shape[1] for layer in layers)

    def closed_form(self, choice: Choice) -> ClosedFormUpdate:
        """Return the update with the settings of a choice."""
        weight = self.covariance_weight(choice)
        own = {"layers": list(choice.layers), "covariance_weight": weight}
        return ClosedFormUpdate(**{**self.update, **own})

    def unedited(self, count: int) -> Measured:
        """Measure the unedited model on the first so many facts."""
        return self._measured(count)

    def run(self, number: int, count: int, choice: Choice) -> Trial:
        """Try a choice on the first so many facts, or read what came of it before."""
        path = self._path(choice, count)
        found = _read(path)
        if found is None:
            started, self._target_seconds = time.perf_counter(), 0.0
            found = replace(
                self._tried(choice, count),
                seconds=time.perf_counter() - started,
                target_seconds=self._target_seconds,
            )
            with unless_full("the trial will be made again if tuning is stopped"):
                write_atomic(path, json.dumps(found.to_dict(), indent=1) + "\n")
        return Trial(number, count, choice, found)

    def known(self, choice: Choice, count: int) -> bool:
        """Say whether a trial was finished before."""
        return _read(self._path(choice, count)) is not None

    def _tried(self, choice: Choice, count: int) -> Measured:
        """Edit, measure, and put the weights back."""
        self._ordinary_loss()  # of the unedited model, at first use
        module = StudyModule.of(
            self.module,
            target=self.target_settings(choice),
            export_dtype=str(self.module.export_dtype).removeprefix("torch."),
        )
        module.go_on_from(self.module)
        module.rounding.active = True  # what is measured is what a run would save
        try:
            bench = self._bench(choice, count, module)
            bench.prepare()
            self._know_targets(bench, choice)
            with bench.edited(bench.update.layer_updates):
                return self._measured(count)
        except (NonFiniteError, UnsolvableError, SingularCovarianceError) as error:
            return Measured({}, failure=first_line(error))

    def _bench(self, choice: Choice, count: int, module: StudyModule) -> Bench:
        module.to(self.module.device)
        return Bench(
            module,
            self.closed_form(choice),
            self.facts.requests[:count],
            batch_size=count,
            controls=self.facts.controls,
            protocol=self.facts.protocol,
            generate=False,
            tokens_per_batch=self.tokens_per_batch,
            seed=module.seed,
            trainer=self._trainer,
        )

    def _know_targets(self, bench: Bench, choice: Choice) -> None:
        """Optimise the targets of the plan's first target layer, or take them from another trial.

        Only these are optimised on unedited weights, and do not depend on the covariance's weight.
        """
        module, layer = bench.module, bench.update.layer_updates[0].target_layer
        kind = layer, choice.first_step, choice.clamp, len(bench.requests)
        if kind not in self._targets:
            started = time.perf_counter()
            module.edit_targets(bench.requests, layer)
            values, losses = module.target_values[layer], module.target_losses[layer]
            self._targets[kind] = Targets(values.cpu(), losses.cpu())
            self._target_seconds = time.perf_counter() - started
        module.know(bench.requests, {layer: self._targets[kind]})

    def _measured(self, count: int) -> Measured:
        """Measure the model as it is."""
        model, tokenizer = self.module.model, self.module.tokenizer
        shared: dict[str, Any] = {
            "protocol": self.facts.protocol,
            "tokens_per_batch": self.tokens_per_batch,
        }
        requests, controls = self.facts.requests[:count], self.facts.controls
        compare = self.facts.protocol == "counterfact"
        rated = rate(model, tokenizer, requests, compare, self.tokens_per_batch)
        metrics = evaluate(
            model, tokenizer, requests, generate=False, continuation_tokens=0, rated=rated, **shared
        ).metrics
        metrics |= evaluate_control_facts(model, tokenizer, controls, **shared)
        needs_text = not set(PRICES) & set(metrics)
        cost = (self._now() - self._ordinary_loss()) if needs_text else 0.0
        return Measured(components(metrics, cost), soft(rated), strict(metrics))

    def _now(self) -> float:
        return self.module.ordinary_loss() or 0.0

    def _ordinary_loss(self) -> float:
        """Return the loss on ordinary text of the unedited model; 0 where it cannot be read."""
        if self._text_loss is None:
            self._text_loss = self._now()
        return self._text_loss

    def _path(self, choice: Choice, count: int) -> Path:
        """Return the file of a trial, which is named by all that its result depends on."""
        requests = [repr(replace(each, source="")) for each in self.facts.requests[:count]]
        content = {
            **self._unchanging(),
            "requests": hashlib.sha256(repr(requests).encode()).hexdigest(),
            "target": {**asdict(self.target_settings(choice)), "tokens_per_batch": None},
            "layers": choice.layers,
            "covariance": self._covariance(choice.layers),
            "covariance_weight": self.covariance_weight(choice),
        }
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{key[:24]}.json"

    def _unchanging(self) -> dict[str, Any]:
        """Return what the results of all trials depend on."""
        if self._identity is None:
            module = self.module
            self._identity = {
                "version": __version__,
                "measured": [each.name for each in fields(Measured)],
                "model": module.identity,
                "tokenizer": tokenizer_fingerprint(module.tokenizer),
                "dtype": [str(module.model.dtype), str(module.export_dtype)],
                "architecture": asdict(module.architecture),
                "templates": module.templates,
                "update": {key: repr(self.update[key]) for key in sorted(self.update)},
                "controls": hashlib.sha256(repr(self.facts.controls).encode()).hexdigest(),
                "protocol": self.facts.protocol,
                "seed": run_seed(module.seed),
                "device": module.device.type,
                "trainer": {key: str(value) for key, value in self._trainer.items()},
            }
        return self._identity

    def _covariance(self, layers: tuple[int, ...]) -> dict[str, str]:
        """Return what the covariances of layers are of; of those from elsewhere, their content."""
        module = self.module
        layers = layers if module.covariance.trust else ()  # of our own, all are known alike
        if layers not in self._covariances:
            file = covariance_file(module.model, module.tokenizer, module.covariance, layers)
            self._covariances[layers] = {key: str(value) for key, value in file.identity.items()}
        return self._covariances[layers]


def _read(path: Path) -> Measured | None:
    """Return a trial that was finished before; None where there is none that can be read."""
    try:
        return Measured.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
