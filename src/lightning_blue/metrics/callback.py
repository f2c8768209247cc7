"""The callback that measures a run: before any edit, after each batch, and at the end."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from blue_callbacks import ClosedFormUpdate, EditGuard, EditRecord
from blue_callbacks.ranges import COUNT, SEED, WHOLE, Range, check_ranges
from lightning_blue.ability import AbilitySettings, GeneralAbility
from lightning_blue.data.checks import without_unmet_premises
from lightning_blue.data.corpus import corpus_texts, require_named, require_own_text
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.module import EditModule
from lightning_blue.judge import Judge, JudgeSettings
from lightning_blue.language_model.chat import markers
from lightning_blue.language_model.joining import joint
from lightning_blue.metrics.evaluation import Metrics, RequestOutcome, flatten
from lightning_blue.metrics.generated import GenerationSettings, prompt_form
from lightning_blue.metrics.history import READ, LossCurve, Measurement, RunHistory
from lightning_blue.metrics.instruments import Instruments
from lightning_blue.metrics.negation import negated_prompts, negation_text
from lightning_blue.metrics.protocols import choose, require_answers, require_protocols
from lightning_blue.metrics.retention import Retention, RetentionSettings, choose_sample
from lightning_blue.metrics.retention_matrix import FOLLOWED, retention_matrix, three_numbers
from lightning_blue.metrics.table import GENERATION
from lightning_blue.metrics.unedited import UneditedMeasurements
from lightning_blue.support.errors import InputError, first_line
from lightning_blue.support.seeds import run_seed


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
        self.instruments: Instruments  # made by setup, for the history that it begins
        self._started = 0.0
        self._committed: EditRecord | None = None  # by the newest batch

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
        if self.ability.settings.tasks:
            self.history.settings["ability"] = self.ability.described()
        if self.judge is not None:
            self.history.settings["judge"] = self.history.judge
        if self.negation is not None:
            self._say_what_cannot_be_denied(data.requests, pl_module)
        if stage == "fit":
            sample = self._sample(data.requests, data.batch_size)
            self.history.retention = Retention(sample)
        text = None
        if self.text is not None:
            try:
                require_own_text(self.text, pl_module.tokenizer)
            except InputError as error:
                rank_zero_warn(f"perplexity says little here: {first_line(error)}")
            text = "".join(corpus_texts(self.text, self.text_split))
        self.instruments = Instruments(
            self.history,
            generate=self.generate,
            seed=self.seed,
            tokens_per_batch=self.tokens_per_batch,
            text=text,
            text_tokens=self.text_tokens,
            judge=self.judge,
            ability=self.ability,
        )
        if stage == "fit":
            self.history.asked = self.instruments.asked(self.cumulative, self.retention.prompts)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure the unedited model; a resumed run has done so before."""
        pl_module.settle_controls()
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.history.controls_kept = data.controls_kept
        if self.history.before:
            return
        measure = partial(self.instruments.unedited, trainer, pl_module)
        if self.unedited_cache is None:
            before = measure()
        else:
            cache = UneditedMeasurements(Path(self.unedited_cache))
            identity = self.instruments.unedited_identity(trainer, pl_module)
            before = cache.shared(identity, trainer.strategy, measure)
        # verdicts are kept by what was said, not with these
        before = self.instruments.with_verdicts(before, pl_module)
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
        self.history.count_seconds("editing", seconds)
        if read:
            self.history.count_seconds(READ, seconds)
        if self._committed is None:
            return
        first = batch_idx * trainer.datamodule.batch_size  # type: ignore[attr-defined]
        number = self._committed.batch  # rejected batches do not count
        self.history.batches[number] = list(range(first, first + len(batch)))
        if read:
            self.history.targets_read[number] = read
        for layer, losses in pl_module.target_losses.items():
            self.history.loss_curves.append(LossCurve(number, layer, losses.cpu()))
        evaluation = self.instruments.evaluate(
            pl_module, self._requests(self.history.batches[number])
        )
        metrics = evaluation.metrics
        self._keep(trainer, "batch", metrics)
        outcomes = dict(enumerate(evaluation.outcomes, start=first))
        if not number:
            self.history.first_values = {place: o.values for place, o in outcomes.items()}
        self._follow(pl_module, batch_idx, outcomes)
        self._log(trainer, _norms(trainer))
        shown = _values("batch", metrics)
        if self._ability_due(len(batch)):
            metrics = self.instruments.general_ability(trainer, pl_module)
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
        evaluation = self.instruments.evaluate(pl_module, self._requests(sample))
        metrics = {**evaluation.metrics, **self.instruments.side_effects(trainer, pl_module)}
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
        instruments = self.instruments
        first = [place for place in next(iter(history.batches.values())) if place in in_force]
        evaluation = instruments.evaluate(pl_module, self._requests(first))
        self._keep(trainer, "first_batch", evaluation.metrics)
        after = instruments.evaluate(pl_module, self._requests(in_force), whole=True)
        after = instruments.with_verdicts(after, pl_module)
        history.after = dict(zip(in_force, after.outcomes, strict=True))
        history.answers_after = [
            replace(answer, request=in_force[answer.request]) for answer in after.answers
        ]
        effects = instruments.side_effects(trainer, pl_module)
        ability = instruments.general_ability(trainer, pl_module)
        metrics = {**after.metrics, **effects, **self._retained(), **ability}
        self._keep(trainer, "post", metrics)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure a model as it is, on all requests."""
        requests = self.history.requests
        evaluation = self.instruments.evaluate(pl_module, requests, whole=True)
        evaluation = self.instruments.with_verdicts(evaluation, pl_module)
        self.history.after = dict(enumerate(evaluation.outcomes))
        self.history.answers_after = evaluation.answers
        effects = self.instruments.side_effects(trainer, pl_module)
        ability = self.instruments.general_ability(trainer, pl_module)
        metrics = {**evaluation.metrics, **effects, **ability}
        self.history.measurements.append(Measurement("test", 0, metrics))
        pl_module.log_dict({f"test/{key}": value for key, value in flatten(metrics).items()})

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured until now, and by which protocols."""
        return self.history.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was measured until a checkpoint.

        Raises:
            InputError: if it was measured in another way than the run is to go on with.
        """
        self.history.load_state_dict(state_dict)

    def _requests(self, places: Sequence[int]) -> list[EditRequest]:
        """Return the requests at their places, with portability prompts whose premises hold now."""
        requests = self.history.requests
        applied = [requests[place] for place in self.history.applied_places]
        return without_unmet_premises([requests[place] for place in places], applied)

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
            earlier = self._requests(places)
            again = self.instruments.evaluate(module, earlier, negation=False).outcomes
            outcomes = {**outcomes, **dict(zip(places, again, strict=True))}
        history.retention.take(batch, {place: o.values for place, o in outcomes.items()})

    def _retained(self) -> Metrics:
        """Sum the retention matrix up, if there is one."""
        return three_numbers(retention_matrix(self.history, FOLLOWED))

    def _ability_due(self, newest: int) -> bool:
        """Say whether general ability is to be measured after a batch of so many edits."""
        every, applied = self.ability.settings.every, self.history.applied
        return bool(every) and applied // every > (applied - newest) // every

    def _keep(self, trainer: Trainer, stage: str, metrics: Metrics) -> None:
        """Put a measurement into the history and before the loggers."""
        self.history.measurements.append(Measurement(stage, self.history.applied, metrics))
        self._log(trainer, {f"{stage}/{key}": value for key, value in flatten(metrics).items()})

    def _log(self, trainer: Trainer, values: dict[str, float]) -> None:
        applied = self.history.applied
        self.history.logged.append((applied, {**values, "edits/applied": applied}))
        for logger in trainer.loggers:
            logger.log_metrics({**values, "edits/applied": applied}, step=applied)


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
