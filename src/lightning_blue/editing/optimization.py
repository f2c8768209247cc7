"""Target optimisation: the hidden state at the subject that makes the model say the new object.

All edits of a batch are optimised together; since Adam, the clamp and every term of the loss act on
each edit alone, the numbers are those of one edit at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from blue_callbacks.ranges import COUNT, NOT_NEGATIVE, POSITIVE, WHOLE, Range, check_ranges

MAX_STEPS = 100_000  # the losses of all steps are kept in one tensor
PMET_KL, PMET_FACTOR = 0.01, 0.1
FIRST_STEP = 0.5  # of |h|


@dataclass(frozen=True)
class TargetOptimization:
    """Settings of the inner optimisation.

    Args:
        steps: forward passes; the last one only measures, so there are ``steps - 1`` updates.
        learning_rate: Adam's, in units of the hidden state. None: ``first_step``, whatever
            numbers the model computes with.
        first_step: by how much of ``|h|`` Adam's first step moves delta, where no learning rate is
            given: that is ``first_step |h| / sqrt(d_model)``, for each edit its own.
        weight_decay: factor of ``|delta| / |h|^2``.
        clamp: radius of the ball delta is kept in, in units of ``|h|``.
        kl_weight: factor of the KL term that keeps what the model predicts behind the subject.
        stop_loss: an edit is done when its loss (nats) falls below this.
        site: what a target is the output of: the ``block``, the ``ffn`` (its down projection), or
            ``attention_and_ffn`` (PMET: two deltas optimised together, the second is written).
            ``auto``: the block, or the FFN where a norm or a gate keeps the block's output from
            following the weight, which is measured at the start.
        early_stop: when an edit is done besides: ``most_probable``, once its target's tokens are
            the most probable ones in all prompts (ENCORE, arXiv 2502.01636); ``pmet``, once they
            are and the KL divergence is below 0.01 (while it is not, the next step's NLL is scaled
            by 0.1).
        keep_norm: rescale each target to the norm of the state it replaces (NAS, arXiv
            2602.02543).
        merge_subjects: let requests of a batch with the same subject have one target
            (MEMIT-Merge, arXiv 2502.07322).
        loss_layer: the block whose output is read for the NLL, through the final norm and the
            head. None: the last.
        end_of_text: whether the end-of-text token belongs to each target, so that the model learns
            to stop behind the object too. No reference does so.
        tokens_per_batch: tokens optimised at once, from the lookup on, padding counted. None: as
            many as fit into free memory.
    """

    steps: int = 25
    learning_rate: float | None = None
    first_step: float = FIRST_STEP
    weight_decay: float = 0.5
    clamp: float = 0.75
    kl_weight: float = 0.0625
    stop_loss: float = 0.05
    site: Literal["auto", "block", "ffn", "attention_and_ffn"] = "auto"
    early_stop: Literal["most_probable", "pmet"] | None = None
    keep_norm: bool = False
    merge_subjects: bool = False
    loss_layer: int | None = None
    end_of_text: bool = False
    tokens_per_batch: int | None = None

    def __post_init__(self) -> None:
        check_ranges(
            "model.target",
            vars(self),
            steps=Range(1, MAX_STEPS, whole=True),
            learning_rate=POSITIVE,
            first_step=POSITIVE,
            weight_decay=NOT_NEGATIVE,
            clamp=POSITIVE,
            kl_weight=NOT_NEGATIVE,
            stop_loss=NOT_NEGATIVE,
            loss_layer=WHOLE,
            tokens_per_batch=COUNT,
        )


class Predictions(NamedTuple):
    """What the model predicts for m edits at one step.

    Attributes:
        nll: of the target, nats, the mean over its tokens and over the rewriting prompts, ``(m,)``.
        most_probable: whether all its tokens are the most probable ones in all prompts, ``(m,)``.
        subject: log-probabilities behind the subject prompt, ``(m, vocabulary)``.
    """

    nll: Tensor
    most_probable: Tensor
    subject: Tensor


class Targets(NamedTuple):
    """What the optimisation found.

    Attributes:
        values: the targets at each site, ``(n_sites, n, d_model)``.
        losses: total, nll, kl, weight decay before each update, weights applied, nats, NaN once an
            edit is done, ``(n, steps, 4)``.
    """

    values: Tensor
    losses: Tensor


Predict = Callable[[Tensor, Tensor], Predictions]


def optimize_targets(
    initial: Tensor, predict: Predict, settings: TargetOptimization, owner: Tensor | None = None
) -> Targets:
    """Minimise ``NLL(target) + kl_weight KL + weight_decay |delta| / |h|^2`` over delta.

    delta is added to the sites' outputs at the lookup of every prompt (MEMIT, Sec. 4.3 of Meng et
    al. 2022b). With several sites each has its own ball, and the weight decays add up (PMET).

    Args:
        initial: the sites' outputs at the lookup of the bare prompt, h, ``(n_sites, n, d_model)``,
            float32 or float64.
        predict: maps indices of the edits that are still active, ``(m,)``, and their deltas,
            ``(n_sites, m, d_model)``, to what the model then predicts.
        settings: of the optimisation.
        owner: which target each edit belongs to, from 0, ``(n,)``. Edits that share one have the
            mean of their states for h and the mean of their losses. None: each has its own.

    Returns:
        Targets and the course of the losses, in the type of the initial states.
    """
    every = torch.arange(initial.shape[1], device=initial.device)
    owner = every if owner is None else owner
    start = _mean_by(owner, initial.transpose(0, 1)).transpose(0, 1)
    norms = start.norm(dim=-1)  # (n_sites, n_targets)
    delta = torch.zeros_like(start, requires_grad=True)
    rate, scale = _rates(settings, norms, start.shape[-1])
    optimizer = torch.optim.Adam([delta], lr=rate)
    losses = initial.new_full((len(every), settings.steps, 4), torch.nan)
    factor = torch.ones_like(norms[0])  # of the NLL, by target
    edits, before = every, None

    for step in range(settings.steps):
        now = predict(edits, delta[:, owner[edits]])
        before = now.subject.detach() if before is None else before
        active, which = owner[edits].unique(return_inverse=True)
        kl = _mean_by(which, kl_divergence(now.subject, before[edits]))
        decay = (delta[:, active].norm(dim=-1) / norms[:, active] ** 2).sum(0)
        nll = factor[active] * _mean_by(which, now.nll)
        terms = torch.stack((nll, settings.kl_weight * kl, settings.weight_decay * decay), dim=1)
        total = terms.sum(1)
        losses[edits, step] = torch.cat((total[:, None], terms), dim=1).detach()[which]

        hit = _mean_by(which, now.most_probable.float()) == 1
        running = _still_active(settings, total.detach(), hit, kl.detach())
        if settings.early_stop == "pmet":
            factor[active] = torch.where(hit, PMET_FACTOR, 1.0).to(factor)
        if step == settings.steps - 1 or not bool(running.any()):
            break
        (delta.grad,) = torch.autograd.grad(total[running].sum(), [delta])
        _step_some(optimizer, delta, active[running], scale)
        _clamp(delta, settings.clamp * norms)
        edits = edits[running[which]]
    values = start + delta.detach()
    if settings.keep_norm:
        values = values * (norms / values.norm(dim=-1))[..., None]
    return Targets(values[:, owner], losses)


def kl_divergence(log_probs: Tensor, before: Tensor) -> Tensor:
    """KL(now || before) of next-token distributions, ``(n, vocabulary)`` each, in nats, ``(n,)``.

    The order of the arguments is the reference implementation's.
    """
    return (log_probs.exp() * (log_probs - before)).sum(-1)


def _still_active(settings: TargetOptimization, total: Tensor, hit: Tensor, kl: Tensor) -> Tensor:
    """Return which targets need another step, ``(n,)``; a loss that is not finite keeps running."""
    done = total < settings.stop_loss
    if settings.early_stop == "most_probable":
        done |= hit
    elif settings.early_stop == "pmet":
        done |= hit & (kl < PMET_KL)
    return ~done | ~torch.isfinite(total)


def _mean_by(owner: Tensor, values: Tensor) -> Tensor:
    """Average ``(m, ...)`` over the entries of each owner, ``(n_owners, ...)``."""
    n = int(owner.max()) + 1
    count = torch.bincount(owner, minlength=n).to(values)
    total = values.new_zeros(n, *values.shape[1:]).index_add(0, owner, values)
    return total / count.view(-1, *[1] * (values.ndim - 1))


def _rates(
    settings: TargetOptimization, norms: Tensor, d_model: int
) -> tuple[float, Tensor | None]:
    """Return Adam's learning rate, and by what each target's steps are multiplied, if by anything.

    Args:
        settings: with a learning rate, or the length of the first step.
        norms: ``|h|``, ``(n_sites, n_targets)``.
        d_model: entries of h; Adam's first step moves each by the learning rate.
    """
    if settings.learning_rate is not None:
        return settings.learning_rate, None
    rates = settings.first_step * norms / d_model**0.5
    largest = float(rates.max())
    if not 0 < largest < float("inf"):
        return 1.0, rates
    return largest, rates / largest


def _step_some(
    optimizer: torch.optim.Optimizer, delta: Tensor, targets: Tensor, scale: Tensor | None
) -> None:
    """Let Adam move only the targets that still run; the others keep their delta.

    Args:
        optimizer: of ``delta``.
        delta: ``(n_sites, n_targets, d_model)``.
        targets: that still run.
        scale: by which Adam's step of each delta is multiplied, ``(n_sites, n_targets)``.
    """
    kept = delta.detach().clone()
    optimizer.step()
    with torch.no_grad():
        if scale is not None:
            delta.copy_(kept + (delta - kept) * scale[..., None])
        kept[:, targets] = delta[:, targets]
        delta.copy_(kept)


def _clamp(delta: Tensor, radius: Tensor) -> None:
    """Project each delta into its ball, in place; Adam's state is left alone."""
    with torch.no_grad():
        norms = delta.norm(dim=-1)
        shrink = torch.where(norms > radius, radius / norms, torch.ones_like(norms))
        delta.mul_(shrink[..., None])
