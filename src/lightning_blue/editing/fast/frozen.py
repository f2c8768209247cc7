"""Run rows once and keep what all later passes over them have in common."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from lightning_blue.editing.fast.rows import AlignedRows
from lightning_blue.language_model.shared_prefixes import row_width, share_prefixes
from lightning_blue.language_model.states import hidden_of, precise


@dataclass(frozen=True)
class Shortcuts:
    """What repeated passes skip; the numbers are the same without any of it.

    Args:
        skip_blocks: start from the stored output of the last block that never changes.
        reuse_prefix: compute no column before the aligned one; its keys and values are stored.
        share_prefixes: compute what rows begin with in common once, for what is stored.
        read_few: run the head, and the FFN of the last block, only at positions that are read.
    """

    skip_blocks: bool = True
    reuse_prefix: bool = True
    share_prefixes: bool = True
    read_few: bool = True


ALL_SHORTCUTS = Shortcuts()
NO_SHORTCUTS = Shortcuts(
    skip_blocks=False, reuse_prefix=False, share_prefixes=False, read_few=False
)


@dataclass(frozen=True)
class Frozen:
    """Rows, and all that passes over them have in common.

    Attributes:
        rows: the tokens.
        first: the first column that a pass computes.
        start: the last block that a pass skips; -1 where it skips none.
        hidden: that block's output from the first column on, ``(n_rows, n_columns, d_model)``.
        before: by layer, the attention's keys and values of the columns before the first.
        outputs: of the watched modules at the aligned column, each ``(n_rows, d)``.
        returns_tuple: whether this architecture's blocks return a tuple.
    """

    rows: AlignedRows
    first: int
    start: int
    hidden: Tensor | None
    before: list[tuple[Tensor, ...]]
    outputs: list[Tensor]
    returns_tuple: bool

    def select(self, index: Tensor) -> Frozen:
        """Keep some of the rows."""
        ids, starts, ends, column = self.rows
        return replace(
            self,
            rows=AlignedRows(ids[index], starts[index], ends[index], column),
            hidden=None if self.hidden is None else self.hidden[index],
            before=[(keys[index], values[index]) for keys, values in self.before],
            outputs=[output[index] for output in self.outputs],
        )


def freeze(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    start: int,
    rows: AlignedRows,
    watched: Sequence[nn.Module] = (),
    shortcuts: Shortcuts = ALL_SHORTCUTS,
) -> Frozen:
    """Run the rows once; keep what later passes can start from.

    Args:
        model: a causal language model in eval mode.
        blocks: its decoder blocks.
        start: the last block whose output never changes; -1 if there is none.
        rows: the tokens.
        watched: modules whose outputs at the aligned column are wanted.
        shortcuts: what later passes skip.
    """
    first = rows.column if shortcuts.reuse_prefix else 0
    start = start if shortcuts.skip_blocks else -1
    sequences = rows.sequences()
    width = row_width(model, max(map(len, sequences))) if shortcuts.share_prefixes else 0
    shared = share_prefixes(model, sequences, width)
    nodes = _by_column(shared.nodes, rows)
    outputs: dict[int, Tensor] = {}
    tuples: list[bool] = []

    def keep(index: int, output: Any) -> None:
        hidden = hidden_of(output).detach()
        outputs[index] = hidden.reshape(-1, hidden.shape[-1])

    modules = [*watched, *([blocks[start]] if start >= 0 else [])]
    with ExitStack() as stack:
        hook = blocks[0].register_forward_hook(
            lambda _m, _a, out: tuples.append(isinstance(out, tuple))
        )
        stack.callback(hook.remove)
        for index, module in enumerate(modules):
            hook = module.register_forward_hook(lambda _m, _a, out, i=index: keep(i, out))
            stack.callback(hook.remove)
        with torch.no_grad():
            cache = DynamicCache() if first else None
            model.base_model(**shared.arguments, past_key_values=cache, use_cache=bool(first))
    kept = [
        tuple(_pick(t, nodes[:, :first]) for t in (cast(Tensor, c.keys), cast(Tensor, c.values)))
        for c in cast("list[CacheLayerMixin]", cache.layers if cache is not None else [])
    ]
    hidden = outputs[len(watched)][nodes[:, first:]] if start >= 0 else None
    watched_now = [precise(outputs[i][nodes[:, rows.column]]) for i in range(len(watched))]
    return Frozen(rows, first, start, hidden, kept, watched_now, tuples[0])


def _by_column(nodes: Tensor, rows: AlignedRows) -> Tensor:
    """Shift each sequence's nodes to its row's columns, 0 in the padding before them."""
    columns = torch.arange(rows.input_ids.shape[1], device=nodes.device)
    shifted = columns - rows.starts[:, None]
    return nodes.gather(1, shifted.clamp(0, nodes.shape[1] - 1)).masked_fill(shifted < 0, 0)


def _pick(cached: Tensor, nodes: Tensor) -> Tensor:
    """Take ``(n_rows, n_heads, n_columns, d)`` from a cache of packed rows by flat index."""
    return cached.transpose(1, 2).flatten(0, 1)[nodes].transpose(1, 2).contiguous()
