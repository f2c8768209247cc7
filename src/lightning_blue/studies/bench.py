"""What all studies share: a model and its requests, known targets, edits that are taken back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, Trainer
from torch import Tensor

from blue_callbacks import ClosedFormUpdate, CommittedBatches, WeightId
from blue_callbacks.plans import PLANS, LayerUpdate
from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.editing.lookups import outputs_at_lookups
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.optimization import Targets
from lightning_blue.editing.prompts import EditPrompts, edit_prompts
from lightning_blue.language_model.architectures import down_projection
from lightning_blue.metrics.evaluation import Metrics, evaluate
from lightning_blue.studies.module import StudyModule
from lightning_blue.support.errors import InputError
from lightning_blue.support.seeds import run_seed


@dataclass(frozen=True)
class StudySettings:
    """What the studies are made with.

    Args:
        records: how many of the run file's requests, the first ones.
        prompts: how many factual prompts ``shift`` reads, at most.
        runs: folders of runs whose models ``shift`` compares; without any it edits the records
            with the plans ``even`` and ``boundary``.
        root: folder of all analyses.
    """

    records: int = 200
    prompts: int = 1000
    runs: list[str] = field(default_factory=list)
    root: str = "analyses"

    def __post_init__(self) -> None:
        for name in ("records", "prompts"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"study.{name} must be positive, not {getattr(self, name)}",
                    where=f"study.{name}",
                    hint="give a number from 1 up",
                )


class Bench:
    """A model on which edits are tried out and taken back.

    Args:
        module: with an unedited model, on the device to be used. A `StudyModule` is used as it is.
        update: how edits are written: its critical layers, solver and transforms.
        requests: n edits.
        batch_size: of the run, for what is edited in sequential batches.
        controls: known facts that are not edited.
        settings: of the studies.
        protocol: ``counterfact`` or ``zsre``.
        generate: whether to write texts for fluency and consistency.
        tokens_per_batch: tokens in one forward pass of the measurements.
        seed: of the sampling of texts; None: the one of ``seed_everything``.
        trainer: further arguments of the Trainer: ``accelerator``, ``precision``.

    Raises:
        InputError: if the model has no such layer.
    """

    def __init__(
        self,
        module: EditModule,
        update: ClosedFormUpdate,
        requests: Sequence[EditRequest],
        *,
        batch_size: int,
        controls: Sequence[Probe] = (),
        settings: StudySettings = StudySettings(),
        protocol: str = "counterfact",
        generate: bool = True,
        tokens_per_batch: int = 4096,
        seed: int | None = None,
        trainer: dict[str, Any] | None = None,
    ) -> None:
        known = isinstance(module, StudyModule)
        self.module: StudyModule = cast(StudyModule, module) if known else StudyModule.of(module)
        self.device = module.device
        self.update, self.layers = update, list(update.layers)
        self.requests, self.controls = list(requests), list(controls)
        self.batch_size, self.settings = batch_size, settings
        self.protocol, self.generate = protocol, generate
        self.tokens_per_batch, self.seed = tokens_per_batch, seed
        self._trainer = trainer or {}
        self.module.check_layers(self.layers)
        self.module.remember_weights(self.weights)
        self._outputs: dict[int, Tensor] = {}

    @property
    def weights(self) -> list[WeightId]:
        """The weights of all critical layers."""
        return [WeightId(layer) for layer in self.layers]

    @property
    def shares(self) -> dict[int, float]:
        """Layer -> 1 / layers left, the share of the last layer's residual (MEMIT, Eq. 6)."""
        return {update.layer: update.share for update in PLANS["even"](self.layers)}

    @cached_property
    def prompts(self) -> list[EditPrompts]:
        """The tokenised prompts of the requests."""
        module = self.module
        return edit_prompts(
            module.tokenizer, self.requests, module.templates, module.target.end_of_text
        )

    @cached_property
    def targets(self) -> dict[int, Targets]:
        """Layer -> targets optimised on the unedited model."""
        cache = self.module.covariance.cache
        self._measure_site()
        found = self.module.unedited_targets(
            self.requests, self.layers, None if cache is None else Path(cache)
        )
        self.module.know(self.requests, found)
        return found

    def target(self, layer: int) -> Tensor:
        """Return the layer's targets, of what its weight writes, ``(d_model, n)``."""
        return self.targets[layer].values[-1].T.to(self.device)

    def output(self, layer: int) -> Tensor:
        """Return the unedited outputs at the target site, ``(d_model, n)``."""
        if layer not in self._outputs:
            self._outputs[layer] = self.module.edit_outputs(self.requests, layer)
        return self._outputs[layer]

    def residual(self, layer: int) -> Tensor:
        """Return R^l*: target minus output of the unedited model, ``(d_model, n)``."""
        return self.target(layer) - self.output(layer)

    def ffn_output(self, layer: int) -> Tensor:
        """Return what the layer's FFN adds at the target site, ``(d_model, n)``."""
        module = self.module
        projection = down_projection(module.blocks[layer], module.architecture)
        return self.multiple(layer) * outputs_at_lookups(module.model, projection, self.prompts)

    def multiple(self, layer: int) -> float:
        """Return what the target site moves by for a unit of the FFN's output; mostly 1."""
        self._measure_site()
        return self.module.output_multiple(WeightId(layer))

    def _measure_site(self) -> None:
        """Let the module find out about its target site while the weights are unedited."""
        for layer in self.layers:
            self.output(layer)

    def prepare(self) -> None:
        """Load or collect the covariances of all critical layers, on the unedited model."""
        self._measure_site()
        self.module.prepare(self.layers, self.weights, self.update.solver.covariance_weight)

    @contextmanager
    def edited(
        self,
        updates: Sequence[LayerUpdate],
        batch_size: int | None = None,
        callbacks: Sequence[Callback] = (),
        **changes: Any,
    ) -> Iterator[ClosedFormUpdate]:
        """Edit the requests for the duration of the block.

        Args:
            updates: which layers are written with whose target and what share.
            batch_size: requests in a batch; None: all in one.
            callbacks: beside the update.
            changes: of the update's attributes, for instance ``rect_keep=None``.
        """
        self.prepare()
        update = copy.deepcopy(self.update)
        update.layer_updates = list(updates)
        for name, value in changes.items():
            setattr(update, name, value)
        trainer = Trainer(
            **{"accelerator": "auto", "devices": 1, "max_epochs": 1, **self._trainer},
            callbacks=[update, *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        batches = CommittedBatches(self.requests, batch_size or len(self.requests))
        try:
            trainer.fit(self.module, batches)
            self.module.to(self.device)
            yield update
        finally:
            self.module.to(self.device)
            self.module.restore()

    def measure(self, generate: bool = False) -> Metrics:
        """Measure the requests on the model as it is."""
        return evaluate(
            self.module.model,
            self.module.tokenizer,
            self.requests,
            protocol=self.protocol,
            generate=generate and self.generate,
            continuation_tokens=0,
            seed=run_seed(self.seed),
            tokens_per_batch=self.tokens_per_batch,
        ).metrics

    def update_norm(self) -> float:
        """Return the Frobenius norm of the whole update, over all critical layers."""
        squared = [change.double().square().sum() for change in self.module.changes.values()]
        return float(torch.stack(squared).sum().sqrt())
