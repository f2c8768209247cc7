"""Predictions at every step of the target optimisation, computed with as little as needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_blue.editing.fast.frozen import ALL_SHORTCUTS, Frozen, Shortcuts, freeze
from lightning_blue.editing.fast.passes import Pass, logits_with
from lightning_blue.editing.fast.plain import PlainPredictor
from lightning_blue.editing.fast.rows import align
from lightning_blue.editing.optimization import Predictions
from lightning_blue.editing.prompts import EditPrompts
from lightning_blue.language_model.tokens import Encoded


class TargetPositions(NamedTuple):
    """Positions that predict the targets' tokens, one entry each.

    Attributes:
        rows: of the aligned rows, ``(n_positions,)``.
        columns: likewise.
        labels: the tokens to be predicted there.
    """

    rows: Tensor
    columns: Tensor
    labels: Tensor

    def select(self, kept_rows: Tensor, n_rows: int) -> TargetPositions:
        """Keep the positions in some rows, and number these rows anew."""
        number = torch.full((n_rows,), -1, device=kept_rows.device)
        number[kept_rows] = torch.arange(len(kept_rows), device=kept_rows.device)
        kept = number[self.rows] >= 0
        return TargetPositions(number[self.rows[kept]], self.columns[kept], self.labels[kept])


class FastPredictor:
    """Predicts the targets in all rewriting prompts, and what follows the subjects.

    Two passes a step: one over the lookups of the subject prompts, one over the rewriting prompts
    from the lookup on; the head runs once for both. Edits that are done leave both.

    Args:
        model: a causal language model in eval mode.
        blocks: its decoder blocks.
        start: the last block whose output no delta changes; -1 if there is none.
        sites: modules whose outputs a delta is added to.
        prompts: of the n edits.
        loss_layer: the block whose output is read for the target; None: the last.
        ffn: returns the FFN of a block; None: passes run it at all positions.
        shortcuts: what the passes skip.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[nn.Module],
        start: int,
        sites: Sequence[nn.Module],
        prompts: Sequence[EditPrompts],
        loss_layer: int | None = None,
        ffn: Callable[[nn.Module], nn.Module | None] = lambda _block: None,
        shortcuts: Shortcuts = ALL_SHORTCUTS,
    ) -> None:
        self.model, self.blocks, self.sites = model, blocks, sites
        self.loss_layer, self.ffn, self.shortcuts = loss_layer, ffn, shortcuts
        self.n_contexts = len(prompts[0].rewriting)

        def frozen(rows: list[Encoded]) -> Frozen:
            aligned = align(rows, model.device)
            return freeze(model, blocks, start, aligned, sites, shortcuts)

        self.rewriting = frozen([row for prompt in prompts for row in prompt.rewriting])
        self.subject = frozen([prompt.subject for prompt in prompts])
        self.positions = _positions(prompts, self.rewriting.rows.column, model.device)
        outputs = torch.stack(self.rewriting.outputs)
        self.initial = outputs[:, :: self.n_contexts]  # at the bare prompts, (n_sites, n, d)
        self._all = (self.rewriting, self.subject, self.positions)
        self._active = len(prompts)

    def __call__(self, edits: Tensor, delta: Tensor) -> Predictions:
        """Predict with delta added.

        Args:
            edits: indices of the edits that are still active, ``(m,)``; only ever fewer of them.
            delta: what is added to their sites' outputs, ``(n_sites, m, d)``.
        """
        if len(edits) < self._active:
            self._keep(edits)
        target, subject = self.logits(delta)
        nll, most_probable = self._judge(target, len(edits))
        return Predictions(nll, most_probable, F.log_softmax(subject, dim=-1))

    def logits(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits where the targets' tokens are predicted and behind the subjects."""
        index = torch.arange(delta.shape[1], device=delta.device)
        column = torch.full_like(index, self.subject.rows.column)
        in_all_contexts = delta.repeat_interleave(self.n_contexts, dim=1)
        rows, columns, _ = self.positions
        subject, target = logits_with(
            self.model,
            self.blocks,
            [
                self._pass(self.subject, delta, index, column, None),
                self._pass(self.rewriting, in_all_contexts, rows, columns, self.loss_layer),
            ],
            self.shortcuts,
        )
        return target, subject

    def _pass(
        self, frozen: Frozen, delta: Tensor, rows: Tensor, columns: Tensor, last: int | None
    ) -> Pass:
        added = list(zip(self.sites, delta, strict=True))
        ffn = self.ffn(self.blocks[-1 if last is None else last])
        return Pass(frozen, added, rows, columns, last, ffn)

    def _judge(self, logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Average nats over a target's tokens and over contexts, ``(n,)``, and find the hits."""
        rows, _, labels = self.positions
        nats = F.cross_entropy(logits, labels, reduction="none")
        zero = nats.new_zeros(n * self.n_contexts)
        per_row = zero.index_add(0, rows, nats) / zero.index_add(0, rows, torch.ones_like(nats))
        missed = zero.index_add(0, rows, (logits.detach().argmax(-1) != labels).to(nats))
        return (
            per_row.view(n, self.n_contexts).mean(1),
            missed.view(n, self.n_contexts).sum(1) == 0,
        )

    def _keep(self, edits: Tensor) -> None:
        """Drop the rows of edits that are done."""
        rewriting, subject, positions = self._all
        contexts = torch.arange(self.n_contexts, device=edits.device)
        rows = (edits[:, None] * self.n_contexts + contexts).flatten()
        self.rewriting, self.subject = rewriting.select(rows), subject.select(edits)
        self.positions = positions.select(rows, len(rewriting.rows.starts))
        self._active = len(edits)


@torch.no_grad()
def can_run_in_parts(fast: Callable[[], FastPredictor], plain: PlainPredictor) -> bool:
    """Return whether a model can be run in parts without changing its logits; warn if not.

    A block may depend on more than its attention's keys and values: on how many columns there are,
    for one.

    Args:
        fast: makes a predictor of one edit that runs parts of the model.
        plain: a predictor of the same edit that runs all of it.
    """
    (prompt,) = plain.prompts
    rounding = 10 * torch.finfo(plain.model.dtype).eps
    # Mixed precision rounds both ways of running differently: 2% of the logits in thirty blocks.
    with torch.autocast(plain.model.device.type, enabled=False):
        zero = torch.zeros_like(plain.initial)
        whole = [plain.target_logits(row, prompt, zero[:, 0]) for row in prompt.rewriting]
        reference = torch.cat([*whole, plain.subject_logits(prompt, zero[:, 0])[None]])
        try:
            change = float((torch.cat(fast().logits(zero)) - reference).norm() / reference.norm())
            reason = f"would change its logits by {change:.1%}"
        except Exception as error:  # whatever a foreign block raises when run in part
            change, reason = float("inf"), f"fails ({type(error).__name__}: {error})"
    if change <= max(1e-3, rounding) or not bool(reference.isfinite().all()):
        return True
    rank_zero_warn(
        f"running only parts of this model {reason}; targets are optimised on whole prompts "
        "instead, one after the other, which takes many times as long"
    )
    return False


def _positions(
    prompts: Sequence[EditPrompts], column: int, device: torch.device
) -> TargetPositions:
    """Return where each target token is predicted: at the position before it."""
    entries = []
    rows = ((row, prompt.target) for prompt in prompts for row in prompt.rewriting)
    for index, (row, target) in enumerate(rows):
        first = column + len(row.ids) - row.lookup - len(target)
        entries += [(index, first + i, token) for i, token in enumerate(target)]
    return TargetPositions(*torch.tensor(entries, device=device).T)
