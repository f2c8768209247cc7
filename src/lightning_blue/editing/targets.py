"""Target optimisation: the hidden state at the subject that makes the model say the new object.

All edits of a batch are optimised together; since Adam, the clamp and every term of the loss act on
each edit alone, the numbers are those of one edit at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # label of a position that carries no target token


@dataclass(frozen=True)
class TargetSearch:
    """Settings of the inner optimisation.

    Args:
        steps: forward passes; the last one only measures, so there are ``steps - 1`` updates.
        learning_rate: Adam's, in units of the hidden state.
        weight_decay: factor of ``|delta| / |h|^2``.
        clamp: radius of the ball delta is kept in, in units of ``|h|``.
        kl_weight: factor of the KL term that keeps what the model says of the subject itself.
        stop_loss: an edit is done when its loss (nats) falls below this.
        tokens_per_batch: tokens optimised at once, from the lookup on, padding counted; bounds
            memory.
    """

    steps: int = 25
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 0.75
    kl_weight: float = 0.0625
    stop_loss: float = 0.05
    tokens_per_batch: int = 8192

    def __post_init__(self) -> None:
        positive = ("steps", "learning_rate", "clamp", "tokens_per_batch")
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"target.{name} must be positive, not {getattr(self, name)}")


class TargetPrompts(NamedTuple):
    """Tokenised prompts of n edits: for each, C rewriting prompts and, last, the KL prompt.

    Rows are aligned at the subject's last token: it stands in the same column of all of them, with
    padding on the left of the shorter prefixes and on the right of the shorter rests.

    Attributes:
        input_ids: ``(n, C + 1, n_tokens)``.
        starts: columns of padding on the left, ``(n, C + 1)``.
        positions: columns where logits are read, ``(n, C + 1, P)``; the KL prompt's first is its
            lookup.
        labels: target tokens there, ``IGNORED`` where there is none, ``(n, C + 1, P)``.
        lookup: the column of the subject's last token.
    """

    input_ids: Tensor
    starts: Tensor
    positions: Tensor
    labels: Tensor
    lookup: int


class TargetLosses(NamedTuple):
    """Terms of the loss for each edit, nats, weights applied, each ``(n,)``."""

    nll: Tensor
    kl: Tensor
    weight_decay: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of the terms, ``(n,)``."""
        return self.nll + self.kl + self.weight_decay


class Targets(NamedTuple):
    """What the search found.

    Attributes:
        initial: hidden state at the lookup of the bare prompt, h, ``(n, d_model)``.
        delta: what was added to it, ``(n, d_model)``; the target is their sum.
        losses: total, nll, kl, weight decay before each update, NaN once an edit is done,
            ``(n, steps, 4)``.
    """

    initial: Tensor
    delta: Tensor
    losses: Tensor


LogitsAt = Callable[[Tensor, Tensor], Tensor]


def search_targets(
    hidden: Tensor, labels: Tensor, logits_at: LogitsAt, search: TargetSearch
) -> Targets:
    """Minimise ``NLL(target) + kl_weight KL + weight_decay |delta| / |h|^2`` over delta.

    delta is added to the block's output at the lookup of every prompt (MEMIT, Sec. 4.3 of Meng et
    al. 2022b). The NLL is the mean over a target's tokens and over the rewriting prompts.

    Args:
        hidden: the block's output from the lookup on, ``(n, C + 1, n_tokens, d_model)``.
        labels: see :class:`TargetPrompts`, ``(n, C + 1, P)``.
        logits_at: maps indices of the edits that still run, ``(m,)``, and their changed hidden
            states to logits at the prompts' positions, ``(m, C + 1, P, vocabulary)``.
        search: settings.

    Returns:
        Initial states, deltas and the course of the losses; everything float32.
    """
    n = hidden.shape[0]
    edits = torch.arange(n, device=hidden.device)
    initial = hidden[:, 0, 0].float()
    norms = initial.norm(dim=1)
    delta = torch.zeros_like(initial, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=search.learning_rate)
    losses = initial.new_full((n, search.steps, 4), torch.nan)
    before: Tensor | None = None  # log-probabilities at the KL position without any delta

    for step in range(search.steps):
        log_probs = logits_at(edits, _add_delta(hidden[edits], delta[edits]))
        log_probs = F.log_softmax(log_probs, dim=-1)
        if before is None:
            before = log_probs[:, -1, 0].detach()
        terms = TargetLosses(
            target_nll(log_probs[:, :-1], labels[edits, :-1]),
            search.kl_weight * kl_divergence(log_probs[:, -1, 0], before[edits]),
            search.weight_decay * delta[edits].norm(dim=1) / norms[edits] ** 2,
        )
        losses[edits, step] = torch.stack((terms.total, *terms), dim=1).detach()
        running = terms.total.detach() >= search.stop_loss
        running |= ~torch.isfinite(terms.total.detach())
        if step == search.steps - 1 or not bool(running.any()):
            break
        (delta.grad,) = torch.autograd.grad(terms.total[running].sum(), [delta])
        edits = edits[running]
        _step_some(optimizer, delta, edits)
        _clamp(delta, search.clamp * norms)
    return Targets(initial, delta.detach(), losses)


def target_nll(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the target: over its tokens, then over the prompts.

    Args:
        log_probs: ``(n, C, P, vocabulary)``, nats.
        labels: ``(n, C, P)`` with ``IGNORED`` where there is no target token.

    Returns:
        ``(n,)``, nats per token.
    """
    present = labels != IGNORED
    picked = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    per_prompt = -(picked * present).sum(-1) / present.sum(-1)
    return per_prompt.mean(-1)


def kl_divergence(log_probs: Tensor, before: Tensor) -> Tensor:
    """KL(now || before) of next-token distributions, ``(n, vocabulary)`` each, in nats, ``(n,)``.

    The order of the arguments is the reference implementation's.
    """
    return (log_probs.exp() * (log_probs - before)).sum(-1)


def _add_delta(hidden: Tensor, delta: Tensor) -> Tensor:
    """Add ``(n, d)`` at the lookup, the first of the tokens of ``(n, rows, tokens, d)``."""
    changed = (hidden[:, :, :1].float() + delta[:, None, None, :]).to(hidden.dtype)
    return torch.cat((changed, hidden[:, :, 1:]), dim=2)


def _step_some(optimizer: torch.optim.Optimizer, delta: Tensor, edits: Tensor) -> None:
    """Let Adam move only the edits that still run; the others keep their delta."""
    kept = delta.detach().clone()
    optimizer.step()
    with torch.no_grad():
        kept[edits] = delta[edits]
        delta.copy_(kept)


def _clamp(delta: Tensor, radius: Tensor) -> None:
    """Project each edit's delta into its ball, in place; Adam's state is left alone."""
    with torch.no_grad():
        norms = delta.norm(dim=1)
        shrink = torch.where(norms > radius, radius / norms, torch.ones_like(norms))
        delta.mul_(shrink[:, None])
