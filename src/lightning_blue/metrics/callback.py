"""The callback that measures a run: before any edit, after each batch, and at the end."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from lightning import Callback, Trainer

from blue_callbacks import ClosedFormUpdate, EditGuard, EditRecord
from lightning_blue.data.corpus import corpus_texts
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.module import EditModule
from lightning_blue.language_model.scoring import perplexity
from lightning_blue.metrics.evaluation import Evaluation, Metrics, control_recall, evaluate, flatten
from lightning_blue.metrics.history import LossCurve, Measurement, RunHistory


class MeasureEdits(Callback):
    """Measure efficacy, generalization, specificity, fluency, consistency, and damage.

    Stages are kept apart by name: ``pre`` and ``post`` read all requests before any edit and at the
    end, ``batch`` the batch just applied, ``cumulative`` a sample of all edits applied until then,
    ``first_batch`` the first batch at the end. Texts are generated for ``pre`` and ``post`` only.

    Args:
        text: ordinary text for perplexity, see
            :func:`lightning_blue.data.corpus.corpus_texts`; None leaves perplexity out.
        text_split: split, where the text is a dataset on the hub.
        text_tokens: how many of its tokens are read.
        cumulative: edits in the sample after each batch; 0 leaves ``cumulative`` out.
        generate: whether to write texts for fluency and consistency.
        tokens_per_batch: tokens in one forward pass.
        seed: of the sampling of texts and of the sample of edits.
    """

    def __init__(
        self,
        text: str | None = None,
        text_split: str = "test",
        text_tokens: int = 8192,
        cumulative: int = 100,
        generate: bool = True,
        tokens_per_batch: int = 4096,
        seed: int = 0,
    ) -> None:
        self.text, self.text_split, self.text_tokens = text, text_split, text_tokens
        self.cumulative = cumulative
        self.generate = generate
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        self.history = RunHistory()
        self._text: str | None = None
        self._started = 0.0
        self._committed = False  # whether the newest batch stays

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Take the requests over, and read the text before any work is spent."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.history.requests = data.requests
        self.history.rejected = data.rejected
        self.history.protocol = data.protocol
        if self.text is not None:
            self._text = "".join(corpus_texts(self.text, self.text_split))

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure the unedited model."""
        before = self._evaluate(pl_module, self.history.requests, whole=True)
        self.history.before = before.outcomes
        self._keep(trainer, "pre", {**before.metrics, **self._damage(trainer, pl_module)})

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock of the edit."""
        self._started = time.perf_counter()

    def on_edit_committed(self, trainer: Trainer, module: Any, record: EditRecord) -> None:
        """Note that the batch was not rolled back."""
        self._committed = True

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: list[EditRequest],
        batch_idx: int,
    ) -> None:
        """Measure the batch just applied, and a sample of all edits so far.

        Of a batch that was rolled back there is nothing to measure.
        """
        self._count_seconds("edit", time.perf_counter() - self._started)
        for layer, losses in pl_module.target_losses.items():
            self.history.loss_curves.append(LossCurve(batch_idx, layer, losses.cpu()))
        committed, self._committed = self._committed, False
        self.history.count(len(batch), committed)
        if not committed:
            return
        metrics = self._evaluate(pl_module, batch).metrics
        self._keep(trainer, "batch", metrics)
        self._log(trainer, _norms(trainer))
        if self.cumulative:
            applied = self.history.applied_requests
            sampler = random.Random(self.seed)
            sample = sampler.sample(applied, min(self.cumulative, len(applied)))
            metrics = self._evaluate(pl_module, sample).metrics
            self._keep(trainer, "cumulative", {**metrics, **self._damage(trainer, pl_module)})

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure everything again on the edited model."""
        first = self.history.applied_requests[: trainer.datamodule.batch_size]  # type: ignore[attr-defined]
        self._keep(trainer, "first_batch", self._evaluate(pl_module, first).metrics)
        after = self._evaluate(pl_module, self.history.requests, whole=True)
        self.history.after = after.outcomes
        self._keep(trainer, "post", {**after.metrics, **self._damage(trainer, pl_module)})

    def _evaluate(
        self, module: EditModule, requests: Sequence[EditRequest], whole: bool = False
    ) -> Evaluation:
        started = time.perf_counter()
        evaluation = evaluate(
            module.model,
            module.tokenizer,
            requests,
            protocol=self.history.protocol,
            generate=self.generate and whole,
            continuation_tokens=12 if whole else 0,
            seed=self.seed,
            tokens_per_batch=self.tokens_per_batch,
            progress=whole,
        )
        self._count_seconds("evaluate", time.perf_counter() - started)
        return evaluation

    def _damage(self, trainer: Trainer, module: EditModule) -> Metrics:
        """Perplexity on ordinary text and recall of known facts that are not edited."""
        started = time.perf_counter()
        metrics: Metrics = {}
        controls = trainer.datamodule.controls  # type: ignore[attr-defined]
        if controls:
            metrics["recall"] = control_recall(
                module.model, module.tokenizer, controls, tokens_per_batch=self.tokens_per_batch
            )
        if self._text is not None:
            metrics["perplexity"] = perplexity(
                module.model,
                module.tokenizer,
                self._text,
                max_tokens=self.text_tokens,
            )
        self._count_seconds("evaluate", time.perf_counter() - started)
        return metrics

    def _keep(self, trainer: Trainer, stage: str, metrics: Metrics) -> None:
        """Put a measurement into the history and before the loggers."""
        self.history.measurements.append(Measurement(stage, self.history.applied, metrics))
        self._log(trainer, {f"{stage}/{key}": value for key, value in flatten(metrics).items()})

    def _log(self, trainer: Trainer, values: dict[str, float]) -> None:
        applied = self.history.applied
        for logger in trainer.loggers:
            logger.log_metrics({**values, "edits/applied": applied}, step=applied)

    def _count_seconds(self, part: str, seconds: float) -> None:
        self.history.seconds[part] = self.history.seconds.get(part, 0.0) + seconds


def _norms(trainer: Trainer) -> dict[str, float]:
    updates = [c for c in trainer.callbacks if isinstance(c, ClosedFormUpdate)]  # type: ignore[attr-defined]
    guards = [c for c in trainer.callbacks if isinstance(c, EditGuard)]  # type: ignore[attr-defined]
    norms = {f"update/{name}": norm for update in updates for name, norm in update.norms.items()}
    return norms | {f"guard/{name}": v for guard in guards for name, v in guard.readings.items()}
