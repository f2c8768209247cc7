"""`edit`: facts into a model that is in memory, in one call."""

from __future__ import annotations

import copy as copying
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning import Trainer
from torch import device as Device
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blue_callbacks import ClosedFormUpdate, EditGuard
from lightning_blue.api import settings as by_name
from lightning_blue.api.progress import OneBar
from lightning_blue.api.protection import WeightSnapshot, left_as_found, quietly, require_editable
from lightning_blue.api.result import EditResult, State
from lightning_blue.cli.signals import Stopped, stoppable
from lightning_blue.data import EditDataModule
from lightning_blue.data.memory import Facts
from lightning_blue.editing import EditModule
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.support.errors import InputError
from lightning_blue.support.processes import no_progress_bars

DEFAULTS: dict[str, Any] = {  # where a call departs from a run of the command line
    "model.covariance.cache": None,  # no file is written
    "measure.judge.replies": None,  # nor here
    "measure.cumulative": 0,
    "measure.generate": False,  # texts take longer than the edits
}


def edit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: str | Path | Facts,
    *,
    method: str | None = None,
    plan: str | None = None,
    layers: Sequence[int] | None = None,
    after: EditResult | None = None,
    copy: bool = False,
    seed: int = 0,
    progress: bool = True,
    settings: Mapping[str, Any] | None = None,
    **named: Any,
) -> EditResult:
    """Make a language model say other things, and measure what came of it.

    The model that is given is edited in place. Its ``requires_grad``, mode, dtype, device, hooks
    and gradients are then as they were, and so are its weights if anything fails or is
    interrupted. No file is written, and nothing is printed but one progress bar.

    Args:
        model: a causal language model of transformers, on one device, in any mode and dtype.
        tokenizer: its fast tokenizer.
        facts: what it should say: dictionaries with ``subject``, ``prompt`` (with ``{}`` for the
            subject) and ``target_new``, tuples of these three, with ``target_true`` behind or
            without, a pandas DataFrame, a split of ``datasets``, or the path of a file.
        method: a row of ``conf/methods``: ``memit``, ``rect``, ``prune``, ``alphaedit``, ``pmet``;
            or ``locft_bf``, a baseline that fine-tunes.
            None: that of ``after``, or ``memit``.
        plan: which layers are written with whose residual. None: that of ``after``, or
            ``boundary`` (BLUE).
        layers: critical layers, ascending. None: those of ``after``, or by depth.
        after: the result of an earlier call, on whose model this one goes on: its keys and the
            covariance are respected, and its settings hold unless others are given.
        copy: whether to edit a copy, ``result.model``, and leave the model alone.
        seed: of everything that is random.
        progress: whether to show the progress bar.
        settings: others by their dotted names: ``{"model.target.learning_rate": 0.1}``.
        **named: the same by the end of their names, where that is clear: ``learning_rate=0.1``.

    Returns:
        Scores, what failed, and the way back; see `EditResult`.

    Raises:
        InputError: for a model, facts or settings that cannot be used.
        NonFiniteError: if numbers of an edit are not finite.
        UnsolvableError: if an update cannot be computed.
    """
    chosen = {"method": method, "plan": plan, "layers": layers}
    values = _settings(
        chosen, {**by_name.resolved(settings or {}), **by_name.resolved(named)}, after
    )
    model = require_editable(model)
    if after is not None:
        after.require_current(model)
    target = copying.deepcopy(model) if copy else model
    notes: list[str] = []
    try:
        with quietly(notes), left_as_found(target), stoppable((signal.SIGINT,)), no_progress_bars():
            state = _run(_build(target, tokenizer, facts, values, seed, after), after, progress)
    except Stopped:  # Lightning would end the program at a KeyboardInterrupt
        raise KeyboardInterrupt from None
    return EditResult(state, values, seed, notes, after)


class _Parts(NamedTuple):
    module: EditModule
    data: EditDataModule
    update: ClosedFormUpdate
    guard: EditGuard
    measure: MeasureEdits


def _settings(
    chosen: Mapping[str, Any], given: by_name.Settings, after: EditResult | None
) -> by_name.Settings:
    """Return the settings of a call: defaults, those of the call before, the method, what is given.

    Raises:
        InputError: if an argument and a setting say the same thing.
    """
    own = {
        f"update.{name}": chosen[name] for name in ("plan", "layers") if chosen[name] is not None
    }
    for name in own:
        if name in given:
            raise InputError(
                f"{name} is given twice", where="edit()", hint="give it as an argument only"
            )
    first = after is None
    values = {**DEFAULTS} if after is None else {**after.settings}
    if first or chosen["method"] is not None:
        values |= by_name.of_method(chosen["method"] or "memit")
    return {**values, **own, **given}


def _build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: str | Path | Facts,
    values: by_name.Settings,
    seed: int,
    after: EditResult | None,
) -> _Parts:
    """Build what a run is made of; data and settings are refused before the model is touched."""
    seeded = {"model.seed": seed, "measure.seed": seed, "update.fine_tuning.seed": seed, **values}
    path = str(facts) if isinstance(facts, Path) else facts
    data = EditDataModule(path, **by_name.arguments("data", seeded))
    update = ClosedFormUpdate(**by_name.arguments("update", seeded))
    if update.solver.kind == "in_context":
        raise InputError(
            "in-context editing changes no weight, and so there would be no edited model",
            where="edit(method)",
            hint="measure it with `lightning-blue fit --config conf/methods/in_context.yaml`",
        )
    guard = EditGuard(**by_name.arguments("guard", seeded))
    measure = MeasureEdits(**by_name.arguments("measure", seeded))
    module = EditModule(model, tokenizer, **by_name.arguments("model", seeded))
    if after is not None:
        module.go_on_from(after.state.module)
        update.find_layers(module)
        update.load_state_dict(after.state.update)
        guard.load_state_dict({**after.state.guard, "events": []})
    return _Parts(module, data, update, guard, measure)


def _run(parts: _Parts, after: EditResult | None, progress: bool) -> State:
    """Edit; put the weights back if that fails.

    Raises:
        Exception: what the run has raised; the weights are then as they were.
    """
    module, data, update, guard, measure = parts
    update.find_layers(module)
    module.check_layers(update.layers)
    names = module.weight_names(list(dict.fromkeys(update.written_weights(module))))
    before = WeightSnapshot(module.model, names)
    module.rounding.active = True  # what is measured is what `save` writes
    bar = OneBar(progress)
    trainer = Trainer(
        **_place(module.model.device),
        max_epochs=1,
        callbacks=[bar, update, guard, measure],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    try:
        trainer.fit(module, datamodule=data)
    except BaseException:
        before.restore()
        raise
    finally:
        bar.close()
        module.frozen.thaw()
        module.trainer = None
    return State(module, before, update, guard.state_dict(), measure.history, guard.notes)


def _place(device: Device) -> dict[str, Any]:
    """Return the Trainer's flags for the device that a model is on."""
    if device.type == "cuda":
        return {"accelerator": "gpu", "devices": [device.index or 0]}
    return {"accelerator": device.type, "devices": 1}
