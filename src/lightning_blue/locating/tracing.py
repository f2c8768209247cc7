"""Causal tracing: noise on the subject, states restored one place at a time (Meng et al. 2022a).

Restorations at one layer are computed together, for all facts, tokens and samples of noise, from
behind that layer and from that token on: nothing else changes. Of the layer itself only the token
does, so that all layers share one pass for it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_blue.editing.fast.frozen import Frozen
from lightning_blue.editing.fast.passes import Pass, cache_before, logits_with, only_at
from lightning_blue.editing.fast.rows import AlignedRows
from lightning_blue.editing.targets import Budget, micro_batches
from lightning_blue.language_model.architectures import (
    Architecture,
    blocks,
    feed_forward,
    hidden_size,
)
from lightning_blue.language_model.batching import context_length, inference
from lightning_blue.language_model.states import hidden_of, replacing
from lightning_blue.locating.corrupted import (
    States,
    embedding_spread,
    noise_of,
    run_corrupted,
)
from lightning_blue.locating.facts import TracedFact
from lightning_blue.locating.modules import KINDS, traced_modules, window, window_size
from lightning_blue.support.processes import progress_bar

log = logging.getLogger(__name__)

NOISE = 3.0  # in standard deviations of the subjects' embeddings, as in the paper
STATE_BYTES = 2**29  # of what is kept of facts that are traced together


class Trace(NamedTuple):
    """Probabilities of a fact's answer, each a mean over samples of noise.

    Attributes:
        clean: without noise.
        corrupted: with noise on the subject.
        restored: with one output put back, ``(n_kinds, n_layers, n_positions)``: kinds are
            `KINDS`, positions those of the fact.
    """

    clean: float
    corrupted: float
    restored: Tensor


class _Item(NamedTuple):
    """A token of a fact at which outputs are restored."""

    fact: int
    position: int


@dataclass(frozen=True)
class _Rows:
    """Restorations that are computed together: a row for each item and sample.

    Attributes:
        row: of the states, ``(n_rows,)``.
        fact: whose clean states are put in, ``(n_rows,)``.
        position: of the token, ``(n_rows,)``.
        width: tokens from it to the end, ``(n_rows,)``.
        widest: the most of them; the other rows are padded on the right.
        answers: ``(n_rows,)``.
    """

    row: Tensor
    fact: Tensor
    position: Tensor
    width: Tensor
    widest: int
    answers: Tensor

    @property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of what is no padding, the token's column being 0."""
        columns = torch.arange(self.widest, device=self.width.device)
        row, column = (columns < self.width[:, None]).nonzero().T
        return row, column


class CausalTracer:
    """Traces facts through a model.

    Args:
        model: a causal language model, unedited.
        architecture: where its modules are.
        samples: of noise, for each fact.
        seed: of the noise.
        tokens_per_batch: tokens that are computed together, about.

    Attributes:
        window: over how many layers FFN and attention outputs are restored.
        noise: its standard deviation; None until facts are traced.
        in_parts: whether the model can be run from a layer and a token on; else whole prompts are
            run, which is slower.

    Raises:
        InputError: if a block's attention or FFN cannot be found.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        *,
        samples: int = 10,
        seed: int = 0,
        tokens_per_batch: int = 2048,
    ) -> None:
        self.model, self.architecture = model, architecture
        self.blocks = blocks(model, architecture)
        self.modules = traced_modules(self.blocks, architecture, hidden_size(model))
        self.samples, self.seed, self.tokens_per_batch = samples, seed, tokens_per_batch
        self.window = window_size(len(self.blocks))
        self.noise: float | None = None
        self.in_parts = True

    @torch.no_grad()
    def trace(self, facts: Sequence[TracedFact]) -> list[Trace]:
        """Trace facts; the standard deviation of the noise is that of all of them together."""
        self.noise = NOISE * embedding_spread(self.model, facts)
        traces: list[Trace] = []
        with inference(self.model), progress_bar(len(facts), "causal tracing", "fact") as bar:
            self._try_parts(facts[0])
            step = self._facts_at_once(max(len(fact.ids) for fact in facts))
            for begin in range(0, len(facts), step):
                part = facts[begin : begin + step]
                traces += self._trace(part)
                bar.update(len(part))
        return traces

    def _facts_at_once(self, longest: int) -> int:
        """Return of how many facts the states fit into `STATE_BYTES`, about."""
        each = 4 * len(self.blocks) * hidden_size(self.model) * self.model.dtype.itemsize
        return max(1, STATE_BYTES // (each * longest * (1 + self.samples)))

    def _trace(self, facts: Sequence[TracedFact]) -> list[Trace]:
        states = self._states(facts)
        probabilities = states.log_probabilities.double().exp()
        layers = len(self.blocks)
        restored = [torch.empty(len(KINDS), layers, len(fact.positions)) for fact in facts]
        for items in self._batches(facts):
            rows = self._rows(facts, items)
            found = self._restorations(states, rows)
            means = found.double().exp().view(len(KINDS), layers, len(items), -1).mean(-1).cpu()
            for place, (fact, position) in enumerate(items):
                restored[fact][:, :, position - facts[fact].first] = means[..., place]
        return [
            Trace(float(row[0]), float(row[1:].mean()), grid)
            for row, grid in zip(probabilities.cpu(), restored, strict=True)
        ]

    def _states(self, facts: Sequence[TracedFact]) -> States:
        assert self.noise is not None
        width = self.model.get_input_embeddings()(
            torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        ).shape[-1]
        noise = [self.noise * noise_of(fact, self.samples, self.seed, width) for fact in facts]
        return run_corrupted(self.model, self.modules, facts, noise, cached=self.in_parts)

    def _batches(self, facts: Sequence[TracedFact]) -> list[list[_Item]]:
        """Group tokens that are about as far from the ends of their prompts."""
        items = [_Item(n, position) for n, fact in enumerate(facts) for position in fact.positions]
        widths = [len(facts[item.fact].ids) - item.position for item in items]
        lengths = widths if self.in_parts else [len(facts[item.fact].ids) for item in items]
        budget = Budget(self.tokens_per_batch)
        limit = context_length(self.model) or math.inf
        batches = []
        for group in micro_batches(lengths, [self.samples] * len(items), budget):
            padded = max(items[n].position for n in group) + max(widths[n] for n in group)
            same = sorted({widths[n] for n in group}) if padded > limit else [None]
            batches += [[items[n] for n in group if w in (None, widths[n])] for w in same]
        return batches

    def _rows(self, facts: Sequence[TracedFact], items: Sequence[_Item]) -> _Rows:
        each, device = 1 + self.samples, self.model.device
        row = [item.fact * each + 1 + i for item in items for i in range(self.samples)]

        def per_row(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, device=device).repeat_interleave(self.samples)

        width = [len(facts[item.fact].ids) - item.position for item in items]
        return _Rows(
            torch.tensor(row, device=device),
            per_row([item.fact for item in items]),
            per_row([item.position for item in items]),
            per_row(width),
            max(width),
            per_row([facts[item.fact].answer for item in items]),
        )

    def _restorations(
        self, states: States, rows: _Rows, places: Sequence[tuple[str, int]] | None = None
    ) -> Tensor:
        """Return log probabilities of the answers with each output restored.

        Args:
            states: of the facts.
            rows: at which tokens.
            places: kinds and layers; None: all, kind by kind.

        Returns:
            ``(n_places, n_rows)``.
        """
        frozen = self._frozen(states, rows)
        chosen = places or [(kind, layer) for kind in KINDS for layer in range(len(self.blocks))]
        kinds = {kind for kind, _ in chosen} if self.in_parts else set()
        behind = {kind: self._behind(states, rows, frozen, kind) for kind in kinds}
        return torch.stack([self._restored(states, rows, frozen, behind, *at) for at in chosen])

    def _behind(self, states: States, rows: _Rows, frozen: Frozen, kind: str) -> list[Tensor]:
        """Return each block's output at the token if an output is restored there in it alone.

        One pass of the tokens alone: every block takes the corrupted run's states, which nothing
        has changed below the first restored layer.

        Returns:
            By layer, ``(n_rows, d_model)``.
        """
        clean = [each[rows.fact, rows.position] for each in states.clean[kind]]
        if kind == "hidden":
            return clean
        column = frozen.rows.column
        aligned = frozen.rows._replace(input_ids=frozen.rows.input_ids[:, : column + 1])
        token = replace(frozen, rows=aligned)
        found: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> Any:
            corrupted = states.hidden[len(found)][rows.row, rows.position][:, None]
            found.append(hidden_of(output)[:, 0])
            return (corrupted, *output[1:]) if isinstance(output, tuple) else corrupted

        with ExitStack() as stack:
            stack.enter_context(_embedded(self.model, states, token, rows))
            for block, module, values in zip(self.blocks, self.modules[kind], clean, strict=True):
                stack.enter_context(replacing(module, values, 0))
                stack.callback(block.register_forward_hook(keep).remove)
            cache = cache_before(token.before, token.start)
            self.model.base_model(
                **aligned.arguments(token.first), past_key_values=cache, use_cache=bool(cache)
            )
        return found

    def _restored(
        self,
        states: States,
        rows: _Rows,
        frozen: Frozen,
        behind: Mapping[str, Sequence[Tensor]],
        kind: str,
        layer: int,
    ) -> Tensor:
        """Return log probabilities with the outputs around one layer restored, ``(n_rows,)``."""
        layers = range(layer, layer + 1)
        if kind != "hidden":
            layers = window(layer, self.window, len(self.blocks))
        if self.in_parts:
            hidden = self._from(states, rows, layers[0], behind[kind][layers[0]])
            frozen = replace(frozen, start=layers[0], hidden=hidden)
            layers = layers[1:]
        replaced = {self.modules[kind][each] for each in layers}
        ffns = [feed_forward(block, self.architecture) for block in self.blocks]
        # One that is restored must see all tokens
        free = [None if ffn is None or replaced & set(ffn.modules()) else ffn for ffn in ffns]
        with ExitStack() as stack:
            if not self.in_parts:
                stack.enter_context(_embedded(self.model, states, frozen, rows))
            for each in layers:
                values = states.clean[kind][each][rows.fact, rows.position]
                at = frozen.rows.column - frozen.first
                stack.enter_context(replacing(self.modules[kind][each], values, at))
            if self.in_parts:
                for ffn in filter(None, free[frozen.start + 1 : -1]):
                    stack.enter_context(only_at(ffn, *rows.tokens))
            index = torch.arange(len(rows.row), device=rows.row.device)
            last = frozen.rows.column + rows.width - 1
            single = Pass(frozen, [], index, last, ffn=free[-1])
            (logits,) = logits_with(self.model, self.blocks, [single])
        return logits.log_softmax(-1).gather(1, rows.answers[:, None])[:, 0]

    def _from(self, states: States, rows: _Rows, layer: int, token: Tensor) -> Tensor:
        """Return the corrupted output of a layer from the token on, which itself is given."""
        columns = rows.position[:, None] + torch.arange(rows.widest, device=rows.row.device)
        columns = columns.clamp(max=states.ids.shape[1] - 1)
        hidden = states.hidden[layer][rows.row[:, None], columns]
        hidden[:, 0] = token
        return hidden

    def _frozen(self, states: States, rows: _Rows) -> Frozen:
        """Align rows at their tokens; take the keys and values of what is before them."""
        column = int(rows.position.max())
        starts = column - rows.position
        device = rows.position.device
        columns = torch.arange(column + rows.widest, device=device) - starts[:, None]
        places = columns.clamp(0, states.ids.shape[1] - 1)
        ids = states.ids[rows.row[:, None], places].masked_fill(columns < 0, 0)
        ends = column + rows.width
        first = column if self.in_parts else 0
        before = columns[:, :first].clamp(min=0)

        def picked(cached: Tensor) -> Tensor:
            return cached.transpose(1, 2)[rows.row[:, None], before].transpose(1, 2).contiguous()

        kept = [(picked(keys), picked(values)) for keys, values in states.cache] if first else []
        aligned = AlignedRows(ids, starts, ends, column)
        return Frozen(aligned, first, -1, None, list(kept), [], states.returns_tuple)

    def _try_parts(self, fact: TracedFact) -> None:
        """Find out whether the numbers stay the same when the model is run in parts."""
        middle = len(self.blocks) // 2
        places = [("hidden", middle), ("ffn", middle), ("attention", 0)]
        items = [_Item(0, fact.last)]
        found = []
        for self.in_parts in (False, True):
            try:
                rows, states = self._rows([fact], items), self._states([fact])
                found.append(self._restorations(states, rows, places))
            except Exception:
                if not self.in_parts:
                    raise
                found.append(torch.full_like(found[0], float("inf")))
        rounding = 10 * torch.finfo(self.model.dtype).eps
        change = float((found[1] - found[0]).abs().max())
        self.in_parts = change <= max(1e-2, rounding)
        if not self.in_parts:
            log.warning("this model cannot be run in parts: whole prompts are traced, slowly")


def _embedded(model: PreTrainedModel, states: States, frozen: Frozen, rows: _Rows) -> ExitStack:
    """Let the model embed the tokens as the corrupted run did, noise included."""
    columns = torch.arange(frozen.first, frozen.rows.input_ids.shape[1], device=rows.row.device)
    places = (columns - frozen.rows.starts[:, None]).clamp(0, states.ids.shape[1] - 1)
    embedded = states.embeddings[rows.row[:, None], places]

    def give(_module: nn.Module, _args: object, _output: Tensor) -> Tensor:
        return embedded

    stack = ExitStack()
    stack.callback(model.get_input_embeddings().register_forward_hook(give).remove)
    return stack
