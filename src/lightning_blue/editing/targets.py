"""The targets of a batch: which edits have one together, and how many are optimised at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel

from lightning_blue.data.checks import by_subject
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.fast.frozen import ALL_SHORTCUTS, Shortcuts
from lightning_blue.editing.fast.plain import PlainPredictor
from lightning_blue.editing.fast.predictor import FastPredictor, can_run_in_parts
from lightning_blue.editing.optimization import TargetOptimization, Targets, optimize_targets
from lightning_blue.editing.prompts import EditPrompts
from lightning_blue.editing.target_site import TargetSite
from lightning_blue.language_model.architectures import (
    Architecture,
    blocks,
    feed_forward,
    site_modules,
    weight_view,
)
from lightning_blue.language_model.batching import attention_width
from lightning_blue.support.errors import InputError
from lightning_blue.support.memory import available_memory
from lightning_blue.support.processes import distribute, progress_bar

MIN_TOKENS, MAX_TOKENS = 512, 8192  # of a micro-batch; more at once is no faster
PASS_PRICE = 128  # tokens whose computation costs as much as one more pass, about


class TargetFinder:
    """Optimises the targets of edit batches.

    Args:
        model: a causal language model in eval mode.
        architecture: where its modules are.
        settings: of the optimisation.

    Attributes:
        site: what targets are the output of; `auto` has to be measured before.
    """

    def __init__(
        self, model: PreTrainedModel, architecture: Architecture, settings: TargetOptimization
    ) -> None:
        self.model, self.architecture, self.settings = model, architecture, settings
        self.blocks = blocks(model, architecture)
        self.site = TargetSite(settings.site)
        self.shortcuts: Shortcuts | None = None  # None: not known; found out at the first batch
        self.runs_in_parts = True

    def find(
        self, prompts: Sequence[EditPrompts], groups: Sequence[Sequence[int]], layer: int
    ) -> Targets:
        """Optimise the targets of n edits at a layer; processes that work together divide them.

        Args:
            prompts: of the n edits.
            groups: indices of edits that have one target, by target; each edit is in one group.
            layer: target layer.

        Returns:
            Targets and losses in the order of the edits, on the CPU.
        """
        self.get_ready(prompts, layer)
        parts = distribute(groups, partial(self._find_groups, prompts, layer))
        order = torch.tensor([index for group in groups for index in group]).argsort()
        values = torch.cat([part.values for part in parts], dim=1)[:, order]
        return Targets(values, torch.cat([part.losses for part in parts])[order])

    def not_finite(self, prompts: Sequence[EditPrompts], losses: Tensor, layer: int) -> list[int]:
        """Return the edits of a batch whose loss was not finite, of those whose own is not.

        Edits that are computed together share their NaN: where any of them is not finite by itself,
        those are returned, else all.

        Args:
            prompts: of the n edits.
            losses: that :meth:`find` gave for them.
            layer: target layer.
        """
        bad = losses_not_finite(losses)
        alone = [i for i in bad if losses_not_finite(self.find([prompts[i]], [[0]], layer).losses)]
        return alone or bad

    def check_loss_layer(self, layer: int) -> None:
        """Refuse a layer of the loss that the model does not have, or that lies below a target's.

        Args:
            layer: target layer.

        Raises:
            InputError: naming the layers that can be.
        """
        loss_layer, n_layers = self.settings.loss_layer, len(self.blocks)
        if loss_layer is None:
            return
        if loss_layer >= n_layers:
            raise InputError(
                f"the model has no layer {loss_layer}: its {n_layers} layers are 0 to "
                f"{n_layers - 1}",
                where="model.target.loss_layer",
                hint="choose one of them, or null for the last one",
            )
        if loss_layer < layer:
            raise InputError(
                f"loss_layer {loss_layer} lies below the target layer {layer}, where no delta can "
                "change the loss",
                where="model.target.loss_layer",
                hint="choose a higher layer, or null for the last one",
            )

    def predictor(
        self, prompts: Sequence[EditPrompts], layer: int
    ) -> FastPredictor | PlainPredictor:
        """Return what predicts for these edits, with a delta at the layer."""
        self.get_ready(prompts, layer)
        return (self._fast if self.runs_in_parts else self._plain)(prompts, layer)

    def _plain(self, prompts: Sequence[EditPrompts], layer: int) -> PlainPredictor:
        sites = site_modules(self.site.name, self.blocks[layer], self.architecture)
        return PlainPredictor(self.model, self.blocks, sites, prompts, self.settings.loss_layer)

    def _fast(self, prompts: Sequence[EditPrompts], layer: int) -> FastPredictor:
        return FastPredictor(
            self.model,
            self.blocks,
            layer - 1 if self.site.name != "block" else layer,
            site_modules(self.site.name, self.blocks[layer], self.architecture),
            prompts,
            self.settings.loss_layer,
            partial(feed_forward, architecture=self.architecture),
            self.shortcuts or ALL_SHORTCUTS,
        )

    def get_ready(self, prompts: Sequence[EditPrompts], layer: int) -> None:
        """Find out once whether the model's numbers stay the same when it is run in parts."""
        if self.shortcuts is not None:
            return
        farthest = max(prompts, key=lambda prompt: prompt.rewriting[-1].lookup)
        self.shortcuts = ALL_SHORTCUTS
        plain = self._plain([farthest], layer)
        self.runs_in_parts = can_run_in_parts(partial(self._fast, [farthest], layer), plain)

    def _find_groups(
        self, prompts: Sequence[EditPrompts], layer: int, groups: Sequence[Sequence[int]]
    ) -> list[Targets]:
        """Optimise a target for each group of edits, as many at once as memory holds."""
        batches = micro_batches(
            [max(prompts[i].length for i in group) for group in groups],
            [sum(len(prompts[i].rewriting) for i in group) for group in groups],
            self._budget(layer),
            [max(prompts[i].prefix_length for i in group) for group in groups],
        )
        targets: dict[int, Targets] = {}
        with progress_bar(sum(map(len, groups)), f"targets, layer {layer}") as bar:
            for batch in batches:
                sizes = [len(groups[member]) for member in batch]
                edits = [i for member in batch for i in groups[member]]
                owner = torch.arange(len(batch)).repeat_interleave(torch.tensor(sizes))
                predictor = self.predictor([prompts[i] for i in edits], layer)
                with torch.enable_grad():
                    values, losses = optimize_targets(
                        predictor.initial, predictor, self.settings, owner.to(self.model.device)
                    )
                parts = values.cpu().split(sizes, dim=1), losses.cpu().split(sizes)
                for member, value, course in zip(batch, *parts, strict=True):
                    targets[member] = Targets(value.clone(), course.clone())
                bar.update(len(edits))
        return [targets[member] for member in range(len(groups))]

    def _budget(self, layer: int) -> Budget:
        """Return how much an optimisation may hold at once."""
        if self.settings.tokens_per_batch is not None:
            return Budget(self.settings.tokens_per_batch)
        each = self.token_bytes(layer)
        kept = 2 * attention_width(self.model) * (2 * len(self.blocks) - layer)  # read in each pass
        memory = max(MIN_TOKENS, available_memory(self.model.device) // each)
        return Budget(min(MAX_TOKENS, memory), memory, 2 * 4 * kept / each)

    def token_bytes(self, layer: int) -> int:
        """Return the memory that each token takes that is optimised at a layer, about, in bytes."""
        projection = site_modules("ffn", self.blocks[layer], self.architecture)[0]
        d_model, d_in = weight_view(projection).shape
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        computed = (len(self.blocks) - layer) * (16 * d_model + 4 * d_in) + 4 * vocabulary
        return int(2 * 4 * computed)


class TargetGroups:
    """Says which edits of a batch have one target together.

    Args:
        merge: whether those on one subject do. Where they do not, each subject with several edits
            in a batch is warned of once.
    """

    def __init__(self, merge: bool) -> None:
        self.merge = merge
        self._warned_of: set[str] = set()

    def __call__(self, batch: Sequence[EditRequest]) -> list[list[int]]:
        """Return the places of the edits of a batch, by target."""
        groups = by_subject(batch)
        if self.merge:
            return list(groups.values())
        for subject, edits in groups.items():
            if len(edits) > 1 and subject not in self._warned_of:
                self._warned_of.add(subject)
                names = ", ".join(batch[i].case_id for i in edits)
                rank_zero_warn(
                    f"requests {names} of one batch are about {subject!r}, and one key cannot "
                    "hold several targets; --model.target.merge_subjects=true gives them one"
                )
        return [[index] for index in range(len(batch))]


class Budget(NamedTuple):
    """How much a micro-batch may hold.

    Attributes:
        tokens: that are computed, padding counted.
        memory: the same, as far as memory goes; what is kept of prefixes takes from it too.
        prefix_price: memory for a token of a prefix, of which keys and values are kept, as a
            fraction of that for a token that is computed.
    """

    tokens: int
    memory: float = float("inf")
    prefix_price: float = 0.0

    def holds(self, rows: int, width: int, prefix: int) -> bool:
        """Say whether so many rows of so many computed tokens, behind such prefixes, fit."""
        taken = rows * (width + self.prefix_price * prefix)
        return rows * width <= self.tokens and taken <= self.memory


class _Split(NamedTuple):
    """The cheapest way to split the first items: its cost, and where its last group begins."""

    cost: float
    begin: int


def micro_batches(
    lengths: Sequence[int],
    rows: Sequence[int],
    budget: Budget,
    prefixes: Sequence[int] | None = None,
) -> list[list[int]]:
    """Split items into micro-batches of similar length, so that little is padding.

    Args:
        lengths: tokens of each item's longest prompt.
        rows: prompts of each item.
        budget: of a micro-batch; a larger item stands alone.
        prefixes: tokens before those, of each item's longest prompt; None: no matter.

    Returns:
        Indices of the items, by micro-batch; the split whose padded tokens, with the price of a
        pass for each micro-batch, are fewest.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    splits = [_Split(0.0, 0)]
    for end in range(1, len(order) + 1):
        width, height, prefix = lengths[order[end - 1]], 0, 0
        best = _Split(float("inf"), end - 1)
        for begin in range(end - 1, -1, -1):
            height += rows[order[begin]]
            prefix = max(prefix, prefixes[order[begin]] if prefixes else 0)
            if begin < end - 1 and not budget.holds(height, width, prefix):
                break
            best = min(best, _Split(splits[begin].cost + height * width + PASS_PRICE, begin))
        splits.append(best)
    groups, end = [], len(order)
    while end:
        groups.append(order[splits[end].begin : end])
        end = splits[end].begin
    return groups[::-1]


def losses_not_finite(losses: Tensor) -> list[int]:
    """Return the edits whose loss was infinite, or not a number at the first step.

    Args:
        losses: from :func:`optimize_targets`, ``(n, steps, 4)``.
    """
    total = losses[..., 0]
    bad = (torch.isinf(total) | torch.isnan(total[:, :1])).any(1)
    return bad.nonzero().flatten().tolist()
