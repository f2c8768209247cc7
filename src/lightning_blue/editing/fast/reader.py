"""What the target search reads from the model at every step, computed with as little as needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_blue.editing.fast.frozen import NO_SHORTCUTS, Frozen, Shortcuts, freeze
from lightning_blue.editing.fast.passes import Pass, logits_with
from lightning_blue.editing.fast.rows import align
from lightning_blue.editing.optimization import Readings
from lightning_blue.editing.prompts import EditPrompts
from lightning_blue.language_model.tokens import Encoded

PASS_PRICE = 128  # tokens whose computation costs as much as one more pass, about


class Reads(NamedTuple):
    """Positions whose logits are wanted, one entry each; ``labels`` are the tokens to say there."""

    rows: Tensor
    columns: Tensor
    labels: Tensor

    def select(self, kept_rows: Tensor, n_rows: int) -> Reads:
        """Keep the positions in some rows, and number these rows anew."""
        number = torch.full((n_rows,), -1, device=kept_rows.device)
        number[kept_rows] = torch.arange(len(kept_rows), device=kept_rows.device)
        kept = number[self.rows] >= 0
        return Reads(number[self.rows[kept]], self.columns[kept], self.labels[kept])


class PromptReader:
    """Reads targets' probabilities in all rewriting prompts, and what is said of the subjects.

    Two passes a step: one over the lookups of the subject prompts, one over the rewriting prompts
    from the lookup on; the head runs once for both. Edits that are done leave both.

    Args:
        model: a causal language model in eval mode.
        blocks: its decoder blocks.
        layer: the target layer.
        sites: modules whose outputs a delta is added to.
        inside: whether the sites lie inside the block, so that the block itself must run.
        prompts: of the n edits.
        loss_layer: the block whose output is read for the target; None: the last.
        ffn: returns the FFN of a block; None: passes run it at all positions.
        shortcuts: what the passes leave out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[nn.Module],
        layer: int,
        sites: Sequence[nn.Module],
        inside: bool,
        prompts: Sequence[EditPrompts],
        loss_layer: int | None = None,
        ffn: Callable[[nn.Module], nn.Module | None] = lambda _block: None,
        shortcuts: Shortcuts = Shortcuts(),  # noqa: B008  (frozen)
    ) -> None:
        self.model, self.blocks, self.sites = model, blocks, sites
        self.loss_layer, self.ffn, self.shortcuts = loss_layer, ffn, shortcuts
        self.n_contexts = len(prompts[0].rewriting)
        start = layer - 1 if inside else layer

        def frozen(rows: list[Encoded]) -> Frozen:
            aligned = align(rows, model.device)
            return freeze(model, blocks, start, aligned, sites, shortcuts)

        self.rewriting = frozen([row for prompt in prompts for row in prompt.rewriting])
        self.subject = frozen([prompt.subject for prompt in prompts])
        self.reads = _reads(prompts, self.rewriting.rows.column, model.device)
        outputs = torch.stack(self.rewriting.outputs)
        self.initial = outputs[:, :: self.n_contexts]  # at the bare prompts, (n_sites, n, d)
        self._all = (self.rewriting, self.subject, self.reads)
        self._running = len(prompts)

    def __call__(self, edits: Tensor, delta: Tensor) -> Readings:
        """Read with delta added.

        Args:
            edits: indices of the edits that still run, ``(m,)``; only ever fewer of them.
            delta: what is added to their sites' outputs, ``(n_sites, m, d)``.
        """
        if len(edits) < self._running:
            self._keep(edits)
        logits, said = self.logits(delta)
        nll, most_probable = self._judge(logits, len(edits))
        return Readings(nll, most_probable, F.log_softmax(said, dim=-1))

    def logits(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits where the targets' tokens are said and behind the subject prompts."""
        index = torch.arange(delta.shape[1], device=delta.device)
        column = torch.full_like(index, self.subject.rows.column)
        spread = delta.repeat_interleave(self.n_contexts, dim=1)
        said, logits = logits_with(
            self.model,
            self.blocks,
            [
                self._pass(self.subject, delta, index, column, None),
                self._pass(
                    self.rewriting, spread, self.reads.rows, self.reads.columns, self.loss_layer
                ),
            ],
            self.shortcuts,
        )
        return logits, said

    def _pass(
        self, frozen: Frozen, delta: Tensor, rows: Tensor, columns: Tensor, last: int | None
    ) -> Pass:
        added = list(zip(self.sites, delta, strict=True))
        ffn = self.ffn(self.blocks[-1 if last is None else last])
        return Pass(frozen, added, rows, columns, last, ffn)

    def _judge(self, logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Average nats over a target's tokens and over contexts, ``(n,)``, and find the hits."""
        rows, _, labels = self.reads
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
        rewriting, subject, reads = self._all
        contexts = torch.arange(self.n_contexts, device=edits.device)
        rows = (edits[:, None] * self.n_contexts + contexts).flatten()
        self.rewriting, self.subject = rewriting.select(rows), subject.select(edits)
        self.reads = reads.select(rows, len(rewriting.rows.starts))
        self._running = len(edits)


@torch.no_grad()
def usable_shortcuts(reader: Callable[[Shortcuts], PromptReader]) -> Shortcuts:
    """Return all shortcuts if they leave the logits as they are; if not, warn and return none.

    A block may depend on more than its attention's keys and values: on how many columns there are,
    for one.

    Args:
        reader: makes a reader of a few edits with the shortcuts it is given.
    """

    def unedited(one: PromptReader) -> Tensor:
        return torch.cat(one.logits(torch.zeros_like(one.initial)))

    whole = reader(NO_SHORTCUTS)
    plain, rounding = unedited(whole), 10 * torch.finfo(whole.model.dtype).eps
    try:
        change = float((unedited(reader(Shortcuts())) - plain).norm() / plain.norm())
        reason = f"would change its logits by {change:.1%}"
    except Exception as error:  # whatever a foreign block says to being run in part
        change, reason = float("inf"), f"fails ({type(error).__name__}: {error})"
    if change <= max(1e-3, rounding) or not bool(plain.isfinite().all()):
        return Shortcuts()
    rank_zero_warn(
        f"running only parts of this model {reason}; the target search runs all of it over whole "
        "prompts instead, which takes several times as long"
    )
    return NO_SHORTCUTS


def _reads(prompts: Sequence[EditPrompts], column: int, device: torch.device) -> Reads:
    """Return where each target token is predicted: at the position before it."""
    entries = []
    rows = ((row, prompt.target) for prompt in prompts for row in prompt.rewriting)
    for index, (row, target) in enumerate(rows):
        first = column + len(row.ids) - row.lookup - len(target)
        entries += [(index, first + i, token) for i, token in enumerate(target)]
    return Reads(*torch.tensor(entries, device=device).T)


def micro_batches(
    lengths: Sequence[int], rows: Sequence[int], tokens_at_once: int
) -> list[list[int]]:
    """Split items into micro-batches of similar length, so that little is padding.

    Args:
        lengths: tokens of each item's longest prompt.
        rows: prompts of each item.
        tokens_at_once: tokens in a micro-batch, padding counted; a larger item stands alone.

    Returns:
        Indices of the items, by micro-batch; the split whose padded tokens, with the price of a
        pass for each micro-batch, are fewest.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    cost, begins = [0.0], []  # of the first k items: tokens, and where their last group begins
    for end in range(1, len(order) + 1):
        width, height = lengths[order[end - 1]], 0
        best = (float("inf"), end - 1)
        for begin in range(end - 1, -1, -1):
            height += rows[order[begin]]
            if begin < end - 1 and height * width > tokens_at_once:
                break
            best = min(best, (cost[begin] + height * width + PASS_PRICE, begin))
        cost.append(best[0])
        begins.append(best[1])
    groups, end = [], len(order)
    while end:
        groups.append(order[begins[end - 1] : end])
        end = begins[end - 1]
    return groups[::-1]
