"""The callback that notices when a run is about to destroy the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from blue_callbacks.errors import EditRejected, InputError
from blue_callbacks.protocol import EditableModule
from blue_callbacks.ranges import POSITIVE, Range, check_ranges
from blue_callbacks.records import EditRecord, WeightChange, unpack_bits
from blue_callbacks.update import ClosedFormUpdate
from blue_callbacks.weights import WeightId

POWER_STEPS, POWER_VECTORS = 20, 8
OUTCOMES = {
    "warn": "it stays",
    "stop": "it was rolled back, and the run ends with the batches before it",
    "rollback": "it was rolled back, and the run goes on with the next one",
}


class EditGuard(Callback):
    """Compare the model with the unedited one after each batch, and act where it went too far.

    A batch is judged when it is written and not yet committed. Where a reading is above its limit,
    or not a number, the batch is an event: it is kept in ``events`` and answered by the action.
    Rolled back, the weights and the keys that later batches respect are as if it had never been.

    The last two limits need the module's methods ``ordinary_loss()`` and ``retained_knowledge()``;
    a module that lacks them, or returns None, is judged by its weights alone. A post-edit transform
    is no batch, and is not judged.

    Args:
        action: ``warn`` and commit the batch, ``stop``: roll it back and end the run with the
            batches before it, ``rollback``: roll it back and go on with the next one, ``off``
            (in YAML in quotes): measure nothing.
        weight_ratio: limit of |W| / |W0| of each written weight, Frobenius norms, above 1.
        change_ratio: limit of the batch's change of a weight over W0, spectral norms.
        loss_increase: limit of the loss on ordinary text above the unedited model's, in nats per
            token.
        retained_drop: limit of the drop in retained knowledge, in points of percent.

    A limit of None is switched off, and nothing is computed for it. The defaults leave runs alone
    that end well, and were chosen on the model in the package of lightning_blue, 10 batches of 20
    edits under each method and plan: these reached at most a weight ratio of 117, a change ratio of
    129, a loss increase of 0.55 and a drop of 62; where targets were driven far away, the model was
    lost at ratios of 170 to 250. What ratios a model bears depends on the model, and they were not
    measured on another: lower them to what its healthy runs need. A loss increase of 1, perplexity
    times 2.7, means the same on every model.

    Attributes:
        events: of each event ``batch`` (its place in the dataloader, from 0), ``requests`` (their
            ids), ``crossed`` (``reading``, ``value`` and ``limit`` of each) and ``action``.
        readings: of the newest batch, by name: ``layer3/weight_ratio``, ``layer3/change_ratio``,
            ``loss_increase``, ``retained_drop``, as far as they are measured.
    """

    def __init__(
        self,
        action: Literal["warn", "stop", "rollback", "off"] = "stop",
        weight_ratio: float | None = 200.0,
        change_ratio: float | None = 300.0,
        loss_increase: float | None = 1.0,
        retained_drop: float | None = 80.0,
    ) -> None:
        if action not in (*OUTCOMES, "off"):
            raise ValueError(f"action is warn, stop, rollback or off, not {action}")
        self.action = action
        self.weight_ratio, self.change_ratio = weight_ratio, change_ratio
        self.loss_increase, self.retained_drop = loss_increase, retained_drop
        check_ranges(
            "guard",
            vars(self),
            weight_ratio=Range(1, above=True),
            change_ratio=POSITIVE,
            loss_increase=POSITIVE,
            retained_drop=Range(0, 100, above=True),
        )
        self.events: list[dict[str, Any]] = []
        self.readings: dict[str, float] = {}
        self._unedited: dict[str, float] = {}  # what a reading is compared with, by its name

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the unedited model, as far as no checkpoint brought its numbers.

        Raises:
            InputError: if no callback of the trainer writes edits.
        """
        if self.action == "off":
            return
        module = cast(EditableModule, pl_module)
        weights = _written_weights(trainer, module)
        with torch.no_grad():
            new = self._measured(module, weights)
        held = getattr(pl_module, "edit_batches_held", 0)
        if new and held:
            rank_zero_warn(
                f"EditGuard takes a model that holds {held} edit batches for the unedited one; "
                "resume with the guard that watched them, or load the model anew"
            )
        self._unedited |= new

    def on_edit_written(self, trainer: Trainer, module: EditableModule, record: EditRecord) -> None:
        """Judge a batch that is written and not yet committed.

        Raises:
            EditRejected: if it is rolled back.
        """
        if self.action == "off":
            return
        with torch.autocast(trainer.strategy.root_device.type, enabled=False):  # as in on_fit_start
            readings = self._read(module, record)
        # what rank 0 reads counts for all: judged one by one, processes could part at a limit
        self.readings = trainer.strategy.broadcast(readings)
        crossed = self._crossed()
        if not crossed:
            return
        event = {
            "batch": trainer.global_step,
            "requests": list(record.request_ids),
            "crossed": crossed,
            "action": self.action,
        }
        self.events.append(event)
        rank_zero_warn(described(event))
        if self.action != "warn":
            raise EditRejected(described(event), stop=self.action == "stop")

    def state_dict(self) -> dict[str, Any]:
        """Return the unedited model's numbers, the events and the newest readings."""
        return {
            "unedited": {**self._unedited},
            "events": [*self.events],
            "readings": {**self.readings},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` has returned."""
        self._unedited = {**state_dict["unedited"]}
        self.events = [*state_dict["events"]]
        self.readings = {**state_dict["readings"]}

    @property
    def notes(self) -> list[str]:
        """All events in a line, for whoever tells the user how a run ended."""
        if not self.events:
            return []
        more = len(self.events) - 1
        others = f"; {more} more {'event' if more == 1 else 'events'}" if more else ""
        return [f"guard: {described(self.events[0])}{others}"]

    def _limit(self, reading: str) -> float | None:
        """Return the limit of a reading, by the last part of its name."""
        return cast("float | None", getattr(self, reading.rpartition("/")[2]))

    def _crossed(self) -> list[dict[str, Any]]:
        """Return the newest readings that are above their limits or NaN."""
        limits = {name: cast(float, self._limit(name)) for name in self.readings}
        return [
            {"reading": name, "value": value, "limit": limits[name]}
            for name, value in self.readings.items()
            if not value <= limits[name]
        ]

    def _measured(self, module: EditableModule, weights: list[WeightId]) -> dict[str, float]:
        """Measure what the readings are compared with and is not known yet; zeros are left out."""
        new: dict[str, float | None] = {}
        for weight in weights:
            value = module.editable_weights.read(weight)
            if self._wanted(name := f"{weight}/weight_ratio"):
                new[name] = float(value.norm()) or None
            if self._wanted(name := f"{weight}/change_ratio"):
                new[name] = spectral_norm(value) or None
        if self._wanted("loss_increase"):
            new["loss_increase"] = _asked(module, "ordinary_loss")
        if self._wanted("retained_drop"):
            new["retained_drop"] = _asked(module, "retained_knowledge")
        return {name: value for name, value in new.items() if value is not None}

    def _wanted(self, reading: str) -> bool:
        return self._limit(reading) is not None and reading not in self._unedited

    def _read(self, module: EditableModule, record: EditRecord) -> dict[str, float]:
        """Measure the weights as they are against the unedited ones."""
        before = {n: v for n, v in self._unedited.items() if self._limit(n) is not None}
        readings: dict[str, float] = {}
        for change in record.changes:
            weight = module.editable_weights.read(change.weight)
            if (name := f"{change.weight}/weight_ratio") in before:
                readings[name] = float(weight.norm()) / before[name]
            if (name := f"{change.weight}/change_ratio") in before:
                readings[name] = change_norm(change, weight) / before[name]
        for name, method, sign in (
            ("loss_increase", "ordinary_loss", 1),
            ("retained_drop", "retained_knowledge", -1),
        ):
            # a resumed run may have lost the text or the facts that it was started with
            now = _asked(module, method) if name in before else None
            if now is not None:
                readings[name] = sign * (now - before[name])
        return readings


def spectral_norm(*factors: Tensor) -> float:
    """Return the largest singular value of the product of matrices, without forming it.

    From 20 power steps on 8 vectors that are the same each time: never above the true value, and
    within 1% of it even where the largest singular values lie as close as a random matrix's.

    >>> round(spectral_norm(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0]])), 4)
    10.0
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(factors[-1].shape[1], POWER_VECTORS, generator=generator)
    vectors = start.to(factors[-1])
    for _ in range(POWER_STEPS):
        for factor in reversed(factors):
            vectors = factor @ vectors
        for factor in factors:
            vectors = factor.T @ vectors
        vectors = torch.linalg.qr(vectors).Q
    for factor in reversed(factors):
        vectors = factor @ vectors
    try:
        return float(torch.linalg.matrix_norm(vectors, ord=2))
    except torch.linalg.LinAlgError:  # of what is not finite
        return float("nan")


def change_norm(change: WeightChange, weight: Tensor) -> float:
    """Return the spectral norm of what a batch added to a weight, ``(d_out, d_in)``.

    From the factors; what a transform has cut (RECT) is formed, on the weight's device.
    """
    if change.whole is not None:
        return spectral_norm(change.whole)
    if change.kept is None:
        return spectral_norm(change.left, change.right)
    kept = unpack_bits(change.kept, weight.numel()).view(weight.shape).to(weight.device)
    return spectral_norm(torch.where(kept, change.left.to(weight) @ change.right.to(weight), 0))


def described(event: Mapping[str, Any]) -> str:
    """Say in a sentence which readings crossed which limits, and what became of the batch."""
    return (
        f"batch {event['batch']} crossed {', '.join(crossings(event))}; {OUTCOMES[event['action']]}"
    )


def crossings(event: Mapping[str, Any]) -> list[str]:
    """Say of each reading of an event which limit it crossed.

    >>> crossings({"crossed": [{"reading": "loss_increase", "value": 2.5, "limit": 1.0}]})
    ['loss_increase 2.5 (limit 1)']
    """
    return [f"{c['reading']} {c['value']:.4g} (limit {c['limit']:g})" for c in event["crossed"]]


def _written_weights(trainer: Trainer, module: EditableModule) -> list[WeightId]:
    """Return the ids of the weights that the trainer's callback writes."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ClosedFormUpdate):
            return list(dict.fromkeys(callback.written_weights(module)))
    raise InputError(
        "EditGuard has no edits to watch",
        hint="add ClosedFormUpdate(layers=[...]) to the trainer's callbacks",
    )


def _asked(module: EditableModule, method: str) -> Any:
    """Call an optional method of the module; None without it."""
    return getattr(module, method, lambda: None)()
