"""The callback that measures a run: before any edit, after each batch, and at the end."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from blue_callbacks import ClosedFormUpdate, EditGuard, EditRecord
from blue_callbacks.ranges import COUNT, SEED, WHOLE, Range, check_ranges
from lightning_blue.ability import AbilitySettings, GeneralAbility
from lightning_blue.data.corpus import corpus_texts, require_named, require_own_text
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.fingerprints import tokenizer_fingerprint
from lightning_blue.editing.module import EditModule
from lightning_blue.judge import Judge, JudgeSettings
from lightning_blue.language_model.chat import markers
from lightning_blue.language_model.joining import joint
from lightning_blue.language_model.scoring import perplexity
from lightning_blue.metrics.evaluation import (
    Evaluation,
    Metrics,
    RequestOutcome,
    evaluate,
    evaluate_control_facts,
    flatten,
)
from lightning_blue.metrics.generated import (
    GenerationSettings,
    prompt_form,
    unedited_continuations,
    with_answers,
)
from lightning_blue.metrics.history import READ, LossCurve, Measurement, RunHistory
from lightning_blue.metrics.judged import with_verdicts
from lightning_blue.metrics.negation import negated_prompts, negation_text
from lightning_blue.metrics.protocols import choose, require_answers, require_protocols
from lightning_blue.metrics.retention import Retention, RetentionSettings, choose_sample
from lightning_blue.metrics.retention_matrix import FOLLOWED, retention_matrix, three_numbers
from lightning_blue.metrics.table import GENERATION
from lightning_blue.metrics.unedited import UneditedMeasurements
from lightning_blue.support.digests import digest
from lightning_blue.support.errors import InputError, first_line
from lightning_blue.support.seeds import run_seed

CONTINUATION_TOKENS = 12  # of each request's continuation before and after


class MeasureEdits(Callback):
    """Measure efficacy, generalization, specificity, fluency, consistency, and side effects.

    Stages are kept apart by name: ``pre`` reads all requests before any edit and ``post`` all
    edits in force at the end (a later request on the same prompt supersedes an earlier one),
    ``batch`` the batch just applied, ``cumulative`` a sample of all edits in force until then,
    ``first_batch`` the first batch at the end. Texts are generated for ``pre`` and ``post`` only.
    ``Trainer.test`` measures all requests without editing, as ``test``.

    ``cumulative`` is measured in Lightning's validation: after every edit batch with
    ``Trainer(val_check_interval=1, check_val_every_n_epoch=None)``, less often with a higher
    number. All values are in ``trainer.callback_metrics`` as ``batch/efficacy``,
    ``cumulative/score`` and so on, so that ``EarlyStopping`` and ``ModelCheckpoint`` can monitor
    them; the loggers get them, with their standard errors, over edits applied.

    Args:
        text: ordinary text for perplexity, see
            :func:`lightning_blue.data.corpus.corpus_texts`; None leaves perplexity out.
        text_split: split, where the text is a dataset on the hub.
        text_tokens: how many of its tokens are read.
        cumulative: edits in the sample; 0 leaves ``cumulative`` out.
        generate: whether to write texts for fluency and consistency.
        tokens_per_batch: tokens in one forward pass.
        seed: seed of the sampling of texts and of the sample of edits; None: the one of
            ``seed_everything``.
        unedited_cache: folder that keeps what was measured of unedited models, for other runs on
            the same model, requests and settings; None keeps nothing.
        retention: how much is spent on the retention matrix.
        ability: tasks of lm-evaluation-harness that the model is measured on.
        protocols: how requests are scored, several in one run: ``probability`` (two objects are
            compared), ``teacher_forced`` (right tokens are counted), ``generation`` (the model
            answers freely). The metrics of the main protocol, the data's (``data.protocol``) if it
            is named or none that scores objects is, have plain names; those of the others are named
            by them. None: the data's alone.
        generation: how answers are generated under ``generation``: for ``pre``, ``post`` and
            ``test`` only, unless ``each_batch`` is set.
        negation: whether to measure negation probes: true for "It is not true that {}", or other
            words with ``{}`` for the request's own prompt.
        judge: a language model behind an endpoint that judges the answers of ``pre``, ``post`` and
            ``test``.
    """

    def __init__(
        self,
        text: str | None = None,
        text_split: str = "test",
        text_tokens: int = 8192,
        cumulative: int = 100,
        generate: bool = True,
        tokens_per_batch: int = 4096,
        seed: int | None = None,
        unedited_cache: str | None = None,
        retention: RetentionSettings = RetentionSettings(),  # noqa: B008  (frozen)
        ability: AbilitySettings = AbilitySettings(),  # noqa: B008  (frozen)
        protocols: list[str] | None = None,
        generation: GenerationSettings = GenerationSettings(),  # noqa: B008  (frozen)
        negation: bool | str = False,
        judge: JudgeSettings = JudgeSettings(),  # noqa: B008  (frozen)
    ) -> None:
        self.text, self.text_split, self.text_tokens = text, text_split, text_tokens
        self.cumulative = cumulative
        self.generate = generate
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        self.unedited_cache = unedited_cache
        self.retention = retention
        self.ability = GeneralAbility(ability)
        self.protocols, self.generation = protocols, generation
        self.negation = negation_text(negation)
        self.judge = None if judge.url is None else Judge(judge)
        require_protocols(protocols)
        if self.judge is not None:
            require_answers(protocols)
        check_ranges(
            "measure",
            vars(self),
            text_tokens=Range(2, whole=True),
            cumulative=WHOLE,
            tokens_per_batch=COUNT,
            seed=SEED,
        )
        if text is not None:
            require_named("measure.text", text)
        self.history = RunHistory()
        self._text: str | None = None
        self._started = 0.0
        self._committed: EditRecord | None = None  # by the newest batch
        self._ability_of: tuple[str, Metrics] | None = None  # digest of weights, their ability

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Take the requests over, and read the text before any work is spent."""
        if stage not in ("fit", "test"):
            return  # what was measured before stays
        data = trainer.datamodule  # type: ignore[attr-defined]
        known = markers(pl_module.tokenizer)
        protocol, added = choose(self.protocols, data.protocol, data.protocol_given)
        if GENERATION in added:
            form = prompt_form(pl_module.tokenizer, self.generation.prompt)
            form(data.requests[0].text)  # refused before any work is spent
        self.history = RunHistory(
            settings=self.history.settings,
            requests=data.requests,
            rejected=data.rejected,
            protocol=protocol,
            added=added,
            generation=self.generation if GENERATION in added else None,
            negation=self.negation,
            judge="" if self.judge is None else str(self.judge.settings.model),
            joints=[joint(r.text, r.target_prefix, known) for r in data.requests],
        )
        self._ability_of = None
        if self.ability.settings.tasks:
            self.history.settings["ability"] = self.ability.described()
        if self.judge is not None:
            self.history.settings["judge"] = self.history.judge
        if self.negation is not None:
            self._say_what_cannot_be_denied(data.requests, pl_module)
        if stage == "fit":
            sample = self._sample(data.requests, data.batch_size)
            self.history.retention = Retention(sample)
        if self.text is not None:
            try:
                require_own_text(self.text, pl_module.tokenizer)
            except InputError as error:
                rank_zero_warn(f"perplexity says little here: {first_line(error)}")
            self._text = "".join(corpus_texts(self.text, self.text_split))

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure the unedited model; a resumed run has done so before."""
        pl_module.settle_controls()
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.history.controls_kept = data.controls_kept
        if self.history.before:
            return
        if self.unedited_cache is None:
            before = self._unedited(trainer, pl_module)
        else:
            cache = UneditedMeasurements(Path(self.unedited_cache))
            identity = self._unedited_identity(trainer, pl_module)
            before = cache.shared(
                identity, trainer.strategy, lambda: self._unedited(trainer, pl_module)
            )
        before = self._with_verdicts(before, pl_module)  # kept by what was said, not with these
        self.history.before, self.history.answers_before = before.outcomes, before.answers
        self._keep(trainer, "pre", before.metrics)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock of the edit."""
        self._started, self._committed = time.perf_counter(), None

    def on_edit_committed(self, trainer: Trainer, module: Any, record: EditRecord) -> None:
        """Note that the batch is there to stay."""
        self._committed = record

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: list[EditRequest],
        batch_idx: int,
    ) -> None:
        """Measure the batch just applied."""
        seconds, read = time.perf_counter() - self._started, _targets_read(pl_module)
        self._count_seconds("editing", seconds)
        if read:
            self._count_seconds(READ, seconds)
        if self._committed is None:
            return
        first = batch_idx * trainer.datamodule.batch_size  # type: ignore[attr-defined]
        number = self._committed.batch  # rejected batches do not count
        self.history.batches[number] = list(range(first, first + len(batch)))
        if read:
            self.history.targets_read[number] = read
        for layer, losses in pl_module.target_losses.items():
            self.history.loss_curves.append(LossCurve(number, layer, losses.cpu()))
        evaluation = self._evaluate(pl_module, batch)
        metrics = evaluation.metrics
        self._keep(trainer, "batch", metrics)
        self._follow(pl_module, batch_idx, dict(enumerate(evaluation.outcomes, start=first)))
        self._log(trainer, _norms(trainer))
        shown = _values("batch", metrics)
        if self._ability_due(len(batch)):
            metrics = self._general_ability(trainer, pl_module)
            self._keep(trainer, "cumulative", metrics)
            shown |= _values("cumulative", metrics)
        pl_module.log_dict(shown, on_step=True, logger=False, batch_size=len(batch))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure a sample of all edits applied so far."""
        places = self.history.in_force
        if trainer.sanity_checking or not self.cumulative or not places:
            return
        sampler = random.Random(run_seed(self.seed))
        sample = sampler.sample(places, min(self.cumulative, len(places)))
        evaluation = self._evaluate(pl_module, [self.history.requests[place] for place in sample])
        metrics = {**evaluation.metrics, **self._side_effects(trainer, pl_module)}
        self._keep(trainer, "cumulative", metrics)
        shown = _values("cumulative", metrics)
        score = {key: shown.pop(key) for key in ("cumulative/score",) if key in shown}
        pl_module.log_dict(score, prog_bar=True, logger=False)
        pl_module.log_dict(shown, logger=False)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure everything that was applied again, on the edited model."""
        if self.history.applied < len(self.history.requests):
            self.history.ended_early = _reason_of_end(trainer)
        self.measure_end(trainer, pl_module)

    def measure_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure the first batch, and all edits in force, on the model as it is."""
        history, in_force = self.history, self.history.in_force
        if not in_force:
            return
        first = [place for place in next(iter(history.batches.values())) if place in in_force]
        evaluation = self._evaluate(pl_module, [history.requests[place] for place in first])
        self._keep(trainer, "first_batch", evaluation.metrics)
        requests = [history.requests[place] for place in in_force]
        after = self._with_verdicts(self._evaluate(pl_module, requests, whole=True), pl_module)
        history.after = dict(zip(in_force, after.outcomes, strict=True))
        history.answers_after = [
            replace(answer, request=in_force[answer.request]) for answer in after.answers
        ]
        effects = self._side_effects(trainer, pl_module)
        ability = self._general_ability(trainer, pl_module)
        metrics = {**after.metrics, **effects, **self._retained(), **ability}
        self._keep(trainer, "post", metrics)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure a model as it is, on all requests."""
        requests = self.history.requests
        evaluation = self._evaluate(pl_module, requests, whole=True)
        evaluation = self._with_verdicts(evaluation, pl_module)
        self.history.after = dict(enumerate(evaluation.outcomes))
        self.history.answers_after = evaluation.answers
        effects = self._side_effects(trainer, pl_module)
        metrics = {**evaluation.metrics, **effects, **self._general_ability(trainer, pl_module)}
        self.history.measurements.append(Measurement("test", 0, metrics))
        pl_module.log_dict({f"test/{key}": value for key, value in flatten(metrics).items()})

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured until now, and by which protocols."""
        return self.history.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was measured until a checkpoint.

        Raises:
            InputError: if it was measured by other protocols than the run is to go on with.
        """
        self.history.load_state_dict(state_dict)

    def _evaluate(
        self,
        module: EditModule,
        requests: Sequence[EditRequest],
        whole: bool = False,
        negation: bool = True,
    ) -> Evaluation:
        started = time.perf_counter()
        evaluation = evaluate(
            module.model,
            module.tokenizer,
            requests,
            protocol=self.history.protocol,
            added=self.history.added,
            generate=self.generate and whole,
            continuation_tokens=CONTINUATION_TOKENS if whole else 0,
            negation=self.negation if negation else None,
            seed=run_seed(self.seed),
            tokens_per_batch=self.tokens_per_batch,
            progress=whole,
            sent=module.memory,
        )
        self._count_seconds("evaluate", time.perf_counter() - started)
        if self.history.generation is not None and (whole or self.generation.each_batch):
            evaluation = self._with_answers(evaluation, module, requests, whole)
        return evaluation

    def _with_answers(
        self,
        evaluation: Evaluation,
        module: EditModule,
        requests: Sequence[EditRequest],
        progress: bool,
    ) -> Evaluation:
        """Let the model answer freely; locality compares with what it wrote before any edit."""
        started = time.perf_counter()
        unedited = unedited_continuations(self.history.answers_before)
        evaluation = with_answers(
            evaluation,
            module.model,
            module.tokenizer,
            requests,
            self.generation,
            unedited=unedited,
            negation=self.negation,
            progress=progress,
            sent=module.memory,
        )
        self._count_seconds("answers", time.perf_counter() - started)
        return evaluation

    def _with_verdicts(self, evaluation: Evaluation, module: EditModule) -> Evaluation:
        """Let the judge, if there is one, say which answers are right."""
        if self.judge is None:
            return evaluation
        started = time.perf_counter()
        evaluation = with_verdicts(evaluation, self.judge, module.tokenizer, progress=True)
        self._count_seconds("judge", time.perf_counter() - started)
        return evaluation

    def _say_what_cannot_be_denied(self, requests: Sequence[EditRequest], module: Any) -> None:
        """Warn of questions: they have no negation, and count in no metric of it."""
        denied = negated_prompts(module.tokenizer, requests, self.negation)
        if None in denied:
            rank_zero_warn(
                f"{denied.count(None):,} of {len(denied):,} prompts are questions, which cannot be "
                "negated: measure.negation leaves them out"
            )

    def _sample(self, requests: Sequence[EditRequest], batch_size: int) -> dict[int, list[int]]:
        """Return the requests of each batch that the retention matrix follows."""
        return choose_sample(requests, batch_size, self.retention.prompts, run_seed(self.seed))

    def _follow(self, module: EditModule, batch: int, outcomes: dict[int, RequestOutcome]) -> None:
        """Measure the sample of earlier batches again, after the batch that has the outcomes."""
        history, applied = self.history, set(self.history.applied_places)
        places = [place for place in history.retention.earlier(batch) if place in applied]
        if places:
            earlier = [history.requests[place] for place in places]
            again = self._evaluate(module, earlier, negation=False).outcomes
            outcomes = {**outcomes, **dict(zip(places, again, strict=True))}
        history.retention.take(batch, {place: o.values for place, o in outcomes.items()})

    def _retained(self) -> Metrics:
        """Sum the retention matrix up, if there is one."""
        return three_numbers(retention_matrix(self.history, FOLLOWED))

    def _unedited(self, trainer: Trainer, module: EditModule) -> Evaluation:
        """Measure the model as it is on all requests, and what stands beside them."""
        before = self._evaluate(module, self.history.requests, whole=True)
        effects = self._side_effects(trainer, module)
        ability = self._general_ability(trainer, module)
        return replace(before, metrics={**before.metrics, **effects, **ability})

    def _unedited_identity(self, trainer: Trainer, module: EditModule) -> dict[str, Any]:
        """Return everything that the measurement of the unedited model depends on."""
        return {
            "model": module.identity,
            "tokenizer": tokenizer_fingerprint(module.tokenizer),
            "data": trainer.datamodule.state_dict()["requests"],  # type: ignore[attr-defined]
            "protocol": self.history.protocol,
            **self.history.added_settings,
            "text": None if self._text is None else sha256(self._text.encode()).hexdigest(),
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

    def _side_effects(self, trainer: Trainer, module: EditModule) -> Metrics:
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
        if self._text is not None:
            metrics["perplexity"] = perplexity(
                module.model,
                module.tokenizer,
                self._text,
                max_tokens=self.text_tokens,
            )
        self._count_seconds("evaluate", time.perf_counter() - started)
        return metrics

    def _ability_due(self, newest: int) -> bool:
        """Say whether general ability is to be measured after a batch of so many edits."""
        every, applied = self.ability.settings.every, self.history.applied
        return bool(every) and applied // every > (applied - newest) // every

    def _general_ability(self, trainer: Trainer, module: EditModule) -> Metrics:
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
        self._count_seconds("ability", time.perf_counter() - started)
        return measured

    def _keep(self, trainer: Trainer, stage: str, metrics: Metrics) -> None:
        """Put a measurement into the history and before the loggers."""
        self.history.measurements.append(Measurement(stage, self.history.applied, metrics))
        self._log(trainer, {f"{stage}/{key}": value for key, value in flatten(metrics).items()})

    def _log(self, trainer: Trainer, values: dict[str, float]) -> None:
        applied = self.history.applied
        self.history.logged.append((applied, {**values, "edits/applied": applied}))
        for logger in trainer.loggers:
            logger.log_metrics({**values, "edits/applied": applied}, step=applied)

    def _count_seconds(self, part: str, seconds: float) -> None:
        self.history.seconds[part] = self.history.seconds.get(part, 0.0) + seconds


def _reason_of_end(trainer: Trainer) -> str:
    """Say why a run that ended without an error has not applied all requests."""
    if getattr(trainer, "fast_dev_run", False):
        return "trainer.fast_dev_run"
    if trainer.max_steps == trainer.global_step:
        return f"trainer.max_steps={trainer.max_steps}"
    if trainer.should_stop:
        return "a callback stopped the run"
    batches = len(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
    if trainer.num_training_batches < batches:
        return f"trainer.limit_train_batches={trainer.limit_train_batches}"
    return "batches were rejected"


def _values(stage: str, metrics: Metrics) -> dict[str, float]:
    """Return each metric's value under ``stage/name``, NaN where it is not finite."""
    return {f"{stage}/{name}": e.get("value", math.nan) for name, e in metrics.items()}


def _targets_read(module: Any) -> list[int]:
    """Return the layers whose targets of the newest batch were not optimised by this run."""
    read: dict[int, bool] = getattr(module, "targets_read", {})
    return sorted(layer for layer, from_file in read.items() if from_file)


def _norms(trainer: Trainer) -> dict[str, float]:
    updates = [c for c in trainer.callbacks if isinstance(c, ClosedFormUpdate)]  # type: ignore[attr-defined]
    guards = [c for c in trainer.callbacks if isinstance(c, EditGuard)]  # type: ignore[attr-defined]
    norms = {f"update/{name}": norm for update in updates for name, norm in update.norms.items()}
    return norms | {f"guard/{name}": v for guard in guards for name, v in guard.readings.items()}
