"""Loss and gradient of a down projection on edits, for the fine-tuning baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_blue.editing.prompts import EditPrompts
from lightning_blue.language_model.batching import batches
from lightning_blue.language_model.scoring import Row, logits_at

MAX_TOKENS = 4096  # of a forward pass with gradients, padding included


def losses_and_gradient(
    model: PreTrainedModel,
    projection: nn.Module,
    prompts: Sequence[EditPrompts],
    tokens_per_batch: int = MAX_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Return what the model loses on new objects, and how a projection's weight changes that.

    An edit's loss is the mean over the tokens of its target, behind the bare prompt, as LocFT-BF's
    code has it; the gradient is of the mean over edits, whatever is computed together.

    Args:
        model: frozen, in eval mode.
        projection: whose weight the gradient is of.
        prompts: of n edits; the first of each, the bare one, is read.
        tokens_per_batch: tokens in one forward pass, padding included.

    Returns:
        Losses in nats per token, ``(n,)``, and the gradient, ``(d_out, d_in)``, float32 or better.
    """
    weight: Tensor = projection.weight  # type: ignore[assignment]
    rows = [_row(each) for each in prompts]
    kind = torch.promote_types(weight.dtype, torch.float32)
    gradient = torch.zeros_like(weight, dtype=kind)
    losses = torch.zeros(len(rows), dtype=kind, device=weight.device)
    required = weight.requires_grad
    weight.requires_grad_(True)
    try:
        for group in batches([len(row.ids) for row in rows], tokens_per_batch):
            with torch.enable_grad():
                nll = _mean_nll(model, [rows[index] for index in group])
                [part] = torch.autograd.grad(nll.sum() / len(rows), [weight])
            gradient += part
            losses[group] = nll.detach().to(losses)
    finally:
        weight.requires_grad_(required)
    return losses, gradient.T if isinstance(projection, Conv1D) else gradient


def _row(prompts: EditPrompts) -> Row:
    """Return the bare prompt with its whole target, and where the target begins."""
    ids = [*prompts.rewriting[0].ids, prompts.target[-1]]
    return Row(ids, len(ids) - len(prompts.target))


def _mean_nll(model: PreTrainedModel, rows: Sequence[Row]) -> Tensor:
    """Return each row's mean nats over its scored tokens, ``(n,)``."""
    device, width = model.device, max(len(row.ids) for row in rows) - 1
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids) - 1] = torch.tensor(row.ids[:-1])
        mask[number, : len(row.ids) - 1] = 1
    places = [
        number * width + column
        for number, row in enumerate(rows)
        for column in range(row.start - 1, len(row.ids) - 1)
    ]
    labels = [token for row in rows for token in row.ids[row.start :]]
    arguments = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    logits = logits_at(model, arguments, torch.tensor(places, device=device))
    nll = nn.functional.cross_entropy(logits, torch.tensor(labels, device=device), reduction="none")
    return torch.stack([part.mean() for part in nll.split([len(r.ids) - r.start for r in rows])])
