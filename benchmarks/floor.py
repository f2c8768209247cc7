"""Floating-point operations that each part of the work needs, whoever does it.

A multiplication and an addition are two operations. Counted are matrix products alone: norms,
softmax, activation functions, gathering and the optimizer take time but are no part of the floor.
What is the same for several rows (a shared prefix) is needed once; what nothing reads is not
needed. In the last block only read positions need queries and the FFN, the others keys and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedModel

from benchmarks.textbook import block


class Costs(NamedTuple):
    """Operations of a forward pass for one token.

    Attributes:
        block: all matrices of one block.
        key_value: of these, the projections to keys and values.
        head: logits of one position.
        attention: scores and mixing, for each token attended to, in one block.
        down: the FFN's down projection.
        n_layers: number of blocks.
        d_in: key dimensions of the down projection.
    """

    block: int
    key_value: int
    head: int
    attention: int
    down: int
    n_layers: int
    d_in: int


def costs_of(model: PreTrainedModel) -> Costs:
    """Count the operations of a model's parts."""
    config: PretrainedConfig = model.config
    d_model, n_heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or d_model // n_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    matrices = [p for p in block(model, 0).parameters() if p.dim() == 2]
    d_in = getattr(config, "n_inner", None) or getattr(config, "intermediate_size", 4 * d_model)
    return Costs(
        block=2 * sum(p.numel() for p in matrices),
        key_value=2 * 2 * d_model * kv_heads * head_dim,
        head=2 * d_model * config.vocab_size,
        attention=2 * 2 * n_heads * head_dim,
        down=2 * d_model * d_in,
        n_layers=config.num_hidden_layers,
        d_in=d_in,
    )


def distinct_tokens(rows: Iterable[Sequence[int]]) -> tuple[int, int]:
    """Count tokens of rows that differ from all others by themselves or by what is before them.

    Returns:
        Their number, and the sum over them of how many tokens each attends to.
    """
    prefixes = {tuple(row[: end + 1]) for row in rows for end in range(len(row))}
    return len(prefixes), sum(map(len, prefixes))


class EditRows(NamedTuple):
    """Token rows of one edit in the target search: rewriting prompts with their targets, then KL's.

    Attributes:
        ids: each row's token ids.
        lookups: index of the subject's last token in each row.
        reads: how many positions of each row are read.
    """

    ids: list[list[int]]
    lookups: list[int]
    reads: list[int]


def search_operations(
    costs: Costs, edits: Sequence[EditRows], layer: int, forwards: Sequence[int]
) -> int:
    """Count what optimising the targets of a batch at ``layer`` needs.

    Once: every distinct token up to each row's end through the blocks up to ``layer``, and the
    distinct ones before the lookups through the others. In every step: the tokens from the lookup
    on (of the KL prompt the lookup alone) through the blocks above ``layer``, and the head where
    something is read; a backward pass costs as much again, since weights need no gradient.

    Args:
        costs: see :func:`costs_of`.
        edits: the rows of each edit.
        layer: the layer whose output is optimised.
        forwards: forward passes that each edit took; one backward pass less.
    """
    above = costs.n_layers - layer - 1
    cut = [_cut(edit) for edit in edits]
    n_all, seen_all = distinct_tokens(row for ids, _ in cut for row in ids)
    before = [
        row[:lookup] for ids, lookups in cut for row, lookup in zip(ids, lookups, strict=True)
    ]
    n_before, seen_before = distinct_tokens(before)
    once = (layer + 1) * (n_all * costs.block + seen_all * costs.attention)
    if above:
        once += (above - 1) * (n_before * costs.block + seen_before * costs.attention)
        once += n_before * costs.key_value
    total = once
    for edit, (ids, lookups), count in zip(edits, cut, forwards, strict=True):
        forward = _step(costs, ids, lookups, edit.reads, above)
        total += forward * (2 * count - 1)
    return total


def _cut(edit: EditRows) -> tuple[list[list[int]], list[int]]:
    """Cut the KL prompt after its lookup, the only position that is read."""
    ids = [*edit.ids[:-1], edit.ids[-1][: edit.lookups[-1] + 1]]
    return ids, edit.lookups


def _step(
    costs: Costs,
    ids: Sequence[Sequence[int]],
    lookups: Sequence[int],
    reads: Sequence[int],
    above: int,
) -> int:
    """Count one forward pass of one edit from its lookups on."""
    total = sum(reads) * costs.head
    for row, lookup, n_read in zip(ids, lookups, reads, strict=True):
        length, tokens = len(row), len(row) - lookup
        seen = sum(range(lookup + 1, length + 1))
        seen_read = sum(range(length - n_read + 1, length + 1))
        if above:
            total += (above - 1) * (tokens * costs.block + seen * costs.attention)
            total += tokens * costs.key_value + n_read * (costs.block - costs.key_value)
            total += seen_read * costs.attention
    return total


def useful_tokens(edits: Sequence[EditRows]) -> tuple[int, int]:
    """Count positions from the lookup on, and rows; of the KL prompt the lookup alone."""
    cut = [_cut(edit) for edit in edits]
    rows = [(row, lookup) for ids, lookups in cut for row, lookup in zip(ids, lookups, strict=True)]
    return sum(len(row) - lookup for row, lookup in rows), len(rows)


def keys_operations(costs: Costs, rows: Sequence[Sequence[int]], layer: int) -> int:
    """Count what reading keys of rows, each cut after its lookup, needs at one layer."""
    n, seen = distinct_tokens(rows)
    full = layer * (n * costs.block + seen * costs.attention)
    return full + n * costs.key_value + len(rows) * (costs.block - costs.key_value - costs.down)


def covariance_operations(costs: Costs, lengths: Sequence[int], layers: Sequence[int]) -> int:
    """Count what second moments of ``layers`` over sequences need, in one pass to the last layer.

    A product k k^T is symmetric: half of it is needed.
    """
    n, seen = sum(lengths), sum(length * (length + 1) // 2 for length in lengths)
    passes = (max(layers) + 1) * (n * costs.block + seen * costs.attention) - n * costs.down
    return passes + len(layers) * n * costs.d_in * (costs.d_in + 1)


def closed_form_operations(d_in: int, d_out: int, n_new: int, n_past: int) -> int:
    """Count the update of one batch in its dual form.

    Two triangular solves against the factor for the new keys; their products with the past keys
    and the correction by them; the systems of the keys' number; the update itself. To remember
    the keys takes no more.
    """
    whiten = d_in**2 * n_new
    against_past = 2 * d_in * n_past * n_new + n_past**2 * n_new
    own = d_in * n_new**2 + n_new**3 // 3
    apply = 2 * d_out * n_new * d_in + 2 * d_out * n_new**2
    return 2 * whiten + 2 * against_past + own + apply


def scoring_operations(costs: Costs, rows: Sequence[tuple[list[int], int]]) -> int:
    """Count what scoring rows needs: (ids without the last token, number of positions read)."""
    n, seen = distinct_tokens(ids for ids, _ in rows)
    read = {tuple(ids[: len(ids) - i]) for ids, n_read in rows for i in range(n_read)}
    seen_read = sum(map(len, read))
    full = (costs.n_layers - 1) * (n * costs.block + seen * costs.attention)
    last = n * costs.key_value + len(read) * (costs.block - costs.key_value)
    return full + last + seen_read * costs.attention + len(read) * costs.head


def generation_operations(costs: Costs, prompts: Sequence[Sequence[int]], max_length: int) -> int:
    """Count what continuing distinct prompts up to ``max_length`` tokens needs."""
    distinct = {tuple(prompt) for prompt in prompts}
    n, seen = distinct_tokens(distinct)
    written = sum(max(0, max_length - 1 - len(prompt)) for prompt in distinct)
    seen += sum(sum(range(len(p) + 1, max_length)) for p in distinct)
    tokens = n + written
    heads = sum(max(0, max_length - len(prompt)) for prompt in distinct)
    return costs.n_layers * (tokens * costs.block + seen * costs.attention) + heads * costs.head
