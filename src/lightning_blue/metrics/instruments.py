"""Everything that is asked of a model at one point of a run, and how long it takes.

When each is asked is decided by `lightning_blue.metrics.callback.MeasureEdits`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

from lightning import Trainer

from lightning_blue.ability import GeneralAbility
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.fingerprints import tokenizer_fingerprint
from lightning_blue.editing.module import EditModule
from lightning_blue.judge import Judge
from lightning_blue.language_model.scoring import perplexity
from lightning_blue.metrics.evaluation import (
    Evaluation,
    Metrics,
    evaluate,
    evaluate_control_facts,
)
from lightning_blue.metrics.generated import (
    GenerationSettings,
    unedited_continuations,
    with_answers,
)
from lightning_blue.metrics.history import RunHistory
from lightning_blue.metrics.judged import with_verdicts
from lightning_blue.support.digests import digest
from lightning_blue.support.seeds import run_seed

CONTINUATION_TOKENS = 12  # of each request's continuation before and after


class Instruments:
    """Measure a model as it is: requests, answers, side effects, general ability.

    Seconds are counted in the run's history, which says besides by which protocols to measure.

    Args:
        history: of the run.
        generate: whether to write texts for fluency and consistency.
        seed: of the sampling of texts; None: the one of ``seed_everything``.
        tokens_per_batch: tokens in one forward pass.
        text: ordinary text for perplexity; None leaves it out.
        text_tokens: how many of its tokens are read.
        judge: of the answers; None: there is none.
        ability: measures general ability.
    """

    def __init__(
        self,
        history: RunHistory,
        *,
        generate: bool,
        seed: int | None,
        tokens_per_batch: int,
        text: str | None,
        text_tokens: int,
        judge: Judge | None,
        ability: GeneralAbility,
    ) -> None:
        self.history = history
        self.generate = generate
        self.seed = seed
        self.tokens_per_batch = tokens_per_batch
        self.text, self.text_tokens = text, text_tokens
        self.judge, self.ability = judge, ability
        self._ability_of: tuple[str, Metrics] | None = None  # digest of weights, their ability

    def evaluate(
        self,
        module: EditModule,
        requests: Sequence[EditRequest],
        whole: bool = False,
        negation: bool = True,
    ) -> Evaluation:
        """Score requests, and let the model answer freely where that is asked for.

        Args:
            module: with the model, edited or not.
            requests: that are scored.
            whole: whether texts, continuations and answers are written too, with progress bars.
            negation: whether to measure negation probes, if the run does.
        """
        started = time.perf_counter()
        evaluation = evaluate(
            module.model,
            module.tokenizer,
            requests,
            protocol=self.history.protocol,
            added=self.history.added,
            generate=self.generate and whole,
            continuation_tokens=CONTINUATION_TOKENS if whole else 0,
            negation=self.history.negation if negation else None,
            seed=run_seed(self.seed),
            tokens_per_batch=self.tokens_per_batch,
            progress=whole,
            sent=module.memory,
        )
        self.history.count_seconds("evaluate", time.perf_counter() - started)
        generation = self.history.generation
        if generation is not None and (whole or generation.each_batch):
            evaluation = self._with_answers(
                evaluation, generation, module, requests, whole, negation
            )
        return evaluation

    def _with_answers(
        self,
        evaluation: Evaluation,
        generation: GenerationSettings,
        module: EditModule,
        requests: Sequence[EditRequest],
        progress: bool,
        negation: bool,
    ) -> Evaluation:
        """Let the model answer freely; locality compares with what it wrote before any edit."""
        started = time.perf_counter()
        unedited = unedited_continuations(self.history.answers_before)
        evaluation = with_answers(
            evaluation,
            module.model,
            module.tokenizer,
            requests,
            generation,
            unedited=unedited,
            negation=self.history.negation if negation else None,
            progress=progress,
            sent=module.memory,
        )
        self.history.count_seconds("answers", time.perf_counter() - started)
        return evaluation

    def with_verdicts(self, evaluation: Evaluation, module: EditModule) -> Evaluation:
        """Let the judge, if there is one, say which answers are right."""
        if self.judge is None:
            return evaluation
        started = time.perf_counter()
        evaluation = with_verdicts(evaluation, self.judge, module.tokenizer, progress=True)
        self.history.count_seconds("judge", time.perf_counter() - started)
        return evaluation

    def unedited(self, trainer: Trainer, module: EditModule) -> Evaluation:
        """Measure the model as it is on all requests, and what stands beside them."""
        before = self.evaluate(module, self.history.requests, whole=True)
        effects = self.side_effects(trainer, module)
        ability = self.general_ability(trainer, module)
        return replace(before, metrics={**before.metrics, **effects, **ability})

    def unedited_identity(self, trainer: Trainer, module: EditModule) -> dict[str, Any]:
        """Return everything that the measurement of the unedited model depends on."""
        data, generation = trainer.datamodule, self.history.generation  # type: ignore[attr-defined]
        answers: dict[str, Any] = {}
        if generation is not None:
            answers["ends"] = str(module.model.generation_config.eos_token_id)
            if generation.prompt == "chat":
                answers["chat_template"] = str(module.tokenizer.chat_template)
        return {
            "model": module.identity,
            "tokenizer": tokenizer_fingerprint(module.tokenizer),
            "data": data.state_dict()["requests"],
            "controls": "all" if data.controls_kept is None else "those it answers",
            "protocol": self.history.protocol,
            **self.history.added_settings,
            "answers": answers,
            "text": None if self.text is None else sha256(self.text.encode()).hexdigest(),
            "text_tokens": self.text_tokens,
            "ability": self.ability.identity(),
            "generate": self.generate,
            "continuation_tokens": CONTINUATION_TOKENS,
            "tokens_per_batch": self.tokens_per_batch,
            "seed": run_seed(self.seed),
            "device": module.device.type,
            "dtype": str(module.model.dtype),
            "precision": trainer.precision,
        }

    def asked(self, cumulative: int, prompts: int) -> dict[str, Any]:
        """Return what the numbers of a run depend on, by setting, for `asked.require_same`.

        Left out is what may change when a run is resumed: how much is computed at a time, and how
        often something is measured.

        Args:
            cumulative: edits in the sample that is measured during the run.
            prompts: the budget of the retention matrix.
        """
        asked: dict[str, Any] = {
            "measure.seed": run_seed(self.seed),
            "measure.cumulative": cumulative,
            "measure.generate": self.generate,
            "measure.retention.prompts": prompts,
        }
        if self.text is not None:
            asked["measure.text"] = {"text": sha256(self.text.encode()).hexdigest()}
            asked["measure.text_tokens"] = self.text_tokens
        return asked | self.ability.asked()

    def side_effects(self, trainer: Trainer, module: EditModule) -> Metrics:
        """Perplexity on ordinary text and retained knowledge of control facts."""
        started = time.perf_counter()
        metrics = evaluate_control_facts(
            module.model,
            module.tokenizer,
            trainer.datamodule.controls,  # type: ignore[attr-defined]
            protocol=self.history.protocol,
            tokens_per_batch=self.tokens_per_batch,
            sent=module.memory,
        )
        if self.text is not None:
            metrics["perplexity"] = perplexity(
                module.model,
                module.tokenizer,
                self.text,
                max_tokens=self.text_tokens,
            )
        self.history.count_seconds("evaluate", time.perf_counter() - started)
        return metrics

    def general_ability(self, trainer: Trainer, module: EditModule) -> Metrics:
        """Measure general ability; the first process does it for all.

        At the end a run may measure weights that it has just measured: they are not read again.
        """
        if not self.ability.settings.tasks:
            return {}
        started, measured = time.perf_counter(), Metrics()
        if trainer.is_global_zero:
            weights = {n: module.model.get_parameter(n).cpu() for n in module.edited_names}
            now = digest(weights)
            if self._ability_of is None or self._ability_of[0] != now:
                found = self.ability.measure(module.model, module.tokenizer)
                self._ability_of = (now, found)
            measured = self._ability_of[1]
        measured = trainer.strategy.broadcast(measured)
        self.history.count_seconds("ability", time.perf_counter() - started)
        return measured
