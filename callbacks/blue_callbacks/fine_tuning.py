"""Fine-tuning of one weight, where the closed form stands otherwise: a baseline.

After LocFT-BF (Yang et al. 2025, arXiv 2509.22072): all edits of a batch are passed over in
mini-batches, epoch by epoch (breadth first), and not one after the other, each until it holds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning import Trainer
from torch import Tensor

from blue_callbacks.errors import InputError, NonFiniteError
from blue_callbacks.protocol import EditableModule, edit_names, request_ids
from blue_callbacks.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SEED, check_ranges
from blue_callbacks.records import WeightChange
from blue_callbacks.weights import WeightId

ONE_LAYER = ("first", "last")  # plans that write one layer
NOT_FOR = {  # settings that a baseline has no use for
    "fine_tuning": ("rect_keep",),
    "in_context": ("rect_keep", "post_edit_transform"),
}


@dataclass(frozen=True)
class FineTuning:
    """Settings of fine-tuning. The defaults are those of LocFT-BF's published code.

    Args:
        lr: Adam's learning rate; its state begins anew with each edit batch.
        epochs: passes over all edits of a batch, at most.
        mini_batch: edits that one step is computed from.
        converged: loss in nats per target token, the mean over edits: a mini-batch below it takes
            no step, and an epoch below it is the last one.
        norm_constraint: the most by which an edit batch may change any entry of the weight (the
            L-infinity constraint of Zhu et al. 2020, arXiv 2012.00363). None: any.
        seed: of the order in which an epoch takes the edits. None: the one of ``seed_everything``.
    """

    lr: float = 5e-4
    epochs: int = 25
    mini_batch: int = 100
    converged: float = 0.01
    norm_constraint: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_ranges(
            "update.fine_tuning",
            vars(self),
            lr=POSITIVE,
            epochs=COUNT,
            mini_batch=COUNT,
            converged=NOT_NEGATIVE,
            norm_constraint=POSITIVE,
            seed=SEED,
        )

    def order(self, batch: int) -> torch.Generator:
        """Return the generator that orders the edits of a batch, by its number in the run."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed
        return torch.Generator().manual_seed(seed * 1_000_003 + batch)


class Trained(NamedTuple):
    """What fine-tuning did to a weight.

    Attributes:
        before: the weight as it was, ``(d_out, d_in)``.
        delta: what it was changed by, likewise.
        loss: mean over the edits in the last epoch, each before its own step, nats per token.
        epochs: that were passed.
    """

    before: Tensor
    delta: Tensor
    loss: float
    epochs: int


def fine_tune(
    module: EditableModule, batch: Any, weight: WeightId, settings: FineTuning, number: int
) -> Trained:
    """Train one weight on the edits of a batch, with Adam.

    The module sees the weight in its own precision; Adam keeps float32 or better.

    Args:
        module: offers ``edit_gradient`` and ``request_ids``, see `EditableModule`.
        batch: of n edits.
        weight: to be trained; the module holds the trained one afterwards.
        settings: of the training.
        number: of the batch in its run.

    Raises:
        NonFiniteError: naming the edits whose loss is not finite.
    """
    store, order = module.editable_weights, settings.order(number)
    before = store.read(weight).clone()
    value = before.clone()
    adam = torch.optim.Adam([value], lr=settings.lr)
    n = len(request_ids(module, batch, 0))
    loss, epochs = float("inf"), 0
    while epochs < settings.epochs and loss >= settings.converged:
        total, epochs = 0.0, epochs + 1
        for columns in torch.randperm(n, generator=order).split(settings.mini_batch):
            losses, gradient = _gradient(module, batch, columns.tolist(), weight)
            total += float(losses.sum())
            if float(losses.mean()) >= settings.converged:
                value.grad = gradient.to(value)
                adam.step()
                if settings.norm_constraint is not None:
                    most = settings.norm_constraint
                    value.copy_(before + (value - before).clamp(-most, most))
                store.write(weight, value)
        loss = total / n
    return Trained(before, value - before, loss, epochs)


def fine_tuned_change(
    trainer: Trainer,
    module: EditableModule,
    batch: Any,
    weight: WeightId,
    settings: FineTuning,
    number: int,
) -> tuple[WeightChange, dict[str, float]]:
    """Fine-tune a weight and write what came of it; of several processes the first one's counts.

    Returns:
        The change, whole, and numbers for whoever logs them.

    Raises:
        NonFiniteError: as `fine_tune`; the caller puts the weight back.
    """
    with torch.autocast(module.editable_weights.read(weight).device.type, enabled=False):
        trained = fine_tune(module, batch, weight, settings, number)
    delta = trainer.strategy.broadcast(trained.delta.cpu())
    module.editable_weights.write(weight, trained.before + delta.to(trained.before))
    d_out, d_in = delta.shape
    none = delta.new_empty
    change = WeightChange(
        weight=weight,
        target_layer=weight.layer,
        share=1.0,
        left=none(d_out, 0),
        right=none(0, d_in),
        keys=none(d_in, 0),
        residual=none(d_out, 0),
        past_keys=None,
        kept=None,
        change_norm=float(delta.norm()),
        residual_norm=0.0,
        whole=delta,
    )
    numbers = {"fine_tuning_loss": trained.loss, "epochs": float(trained.epochs)}
    return change, {f"{weight}/{name}": value for name, value in numbers.items()}


def check_baseline(
    solver: str, plan: str, rect_keep: float | None, post_edit_transform: str | None
) -> None:
    """Refuse settings that do not go together with a baseline, or only with one.

    Raises:
        InputError: naming the setting and what to choose.
    """
    if solver == "fine_tuning" and plan not in ONE_LAYER:
        raise InputError(
            f"fine-tuning trains one layer, and the plan {plan} is for the closed form",
            where=f"update.plan = {plan}",
            hint=f"choose {' or '.join(ONE_LAYER)}: the critical layer that is trained",
        )
    if (solver == "in_context") != (plan == "none"):
        hint = "choose none" if solver == "in_context" else "choose another one"
        what = "an in-context baseline writes no layer, and no other method writes none"
        raise InputError(what, where=f"update.plan = {plan}", hint=f"{hint} for solver {solver}")
    given = {"rect_keep": rect_keep, "post_edit_transform": post_edit_transform}
    for name in NOT_FOR.get(solver, ()):
        if given[name] is not None:
            raise InputError(
                f"{solver} has no update in closed form that could be transformed",
                where=f"update.{name} = {given[name]}",
                hint="leave it out",
            )


def _gradient(
    module: EditableModule, batch: Any, columns: Sequence[int], weight: WeightId
) -> tuple[Tensor, Tensor]:
    """Return losses ``(k,)`` and gradient ``(d_out, d_in)``, if they are finite."""
    ask = getattr(module, "edit_gradient", None)
    if ask is None:
        raise InputError(
            "the module has no edit_gradient, which fine-tuning needs",
            where="update.solver = fine_tuning",
            hint="choose least_squares or null_space",
        )
    losses, gradient = ask(batch, columns, weight)
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if bad or not bool(torch.isfinite(gradient).all()):
        names = edit_names(module, batch, [columns[i] for i in bad] or list(columns))
        raise NonFiniteError(
            f"the loss of {names} is not finite at {weight}, or its gradient; the weights are as "
            "they were before this batch"
        )
    return losses, gradient
