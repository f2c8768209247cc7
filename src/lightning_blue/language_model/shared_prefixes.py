"""Token sequences that share beginnings, packed so that each shared prefix is computed once.

The sequences of a row form a forest: sorted, each continues one of the paths before it. Columns
hold its nodes in that order, so that a node's descendants follow it without a gap; an attention
mask lets each node see its ancestors alone, and its position is its depth.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

log = logging.get_logger(__name__)

_tried: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
ROW_WIDTH = 128  # attention costs more in wider rows, and what they share more is little


class PackedRow(NamedTuple):
    """One row of a model's input.

    Attributes:
        ids: its token ids.
        depths: how many tokens come before each of them on its path.
        paths: index of a sequence -> the column of each of its tokens.
    """

    ids: list[int]
    depths: list[int]
    paths: dict[int, list[int]]


def merge_prefixes(sequences: Sequence[list[int]], width: int) -> list[PackedRow]:
    """Pack sequences into rows of at most ``width`` tokens; what they share in a row stands once.

    A longer sequence has a row of its own. With a width of 0 a row holds one sequence and those
    that it begins with, so that any causal model reads it without a mask.
    """
    rows: list[PackedRow] = []
    last: list[int] = []
    path: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda index: sequences[index]):
        sequence = sequences[index]
        shared = _common_length(last, sequence)
        filled = len(rows[-1].ids) if rows else 0
        if not rows or not (shared == filled or filled + len(sequence) - shared <= width):
            rows.append(PackedRow([], [], {}))
            shared = filled = 0
        path = path[:shared] + list(range(filled, filled + len(sequence) - shared))
        rows[-1].ids.extend(sequence[shared:])
        rows[-1].depths.extend(range(shared, len(sequence)))
        rows[-1].paths[index] = path
        last = sequence
    return rows


def _common_length(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def row_width(model: PreTrainedModel, longest: int) -> int:
    """Return how wide rows may be that this model reads right; 0 where it takes single sequences.

    Args:
        model: a causal language model in eval mode.
        longest: tokens of the longest sequence. A given mask takes the place of a model's sliding
            window, which must therefore reach over it.
    """
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "window_size")]
    window = min((window for window in windows if window), default=None)
    if (window is None or longest <= window) and reads_forests(model):
        return min(ROW_WIDTH, window or ROW_WIDTH)
    log.warning_once(
        f"{type(model).__name__} cannot compute shared prefixes once: each text is read on its own"
    )
    return 0


def reads_forests(model: PreTrainedModel) -> bool:
    """Return whether a model lets a node see its ancestors alone; tried out once for each model."""
    if getattr(model.config, "_attn_implementation", None) not in ("eager", "sdpa"):
        return False
    if model not in _tried:
        _tried[model] = _reads_forests(model)
    return _tried[model]


@torch.no_grad()
def _reads_forests(model: PreTrainedModel) -> bool:
    """Try out whether a model lets a node see its ancestors alone, wherever its column is.

    Three tokens tell: what follows the first must not depend on its neighbour or on the order.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    rows = [PackedRow(ids, [0, 1, 1], {}) for ids in ([1, 2, 3], [1, 3, 2], [1, 2, 4])]
    try:
        with torch.autocast(model.device.type, enabled=False):
            logits = model(**forest_arguments(model, rows), use_cache=False).logits.float()
    except Exception:
        return False
    differences = torch.stack([logits[0, 1] - logits[1, 2], logits[0, 1] - logits[2, 1]])
    tolerance = max(1e-4, 4 * torch.finfo(model.dtype).eps)
    return bool(differences.abs().max() <= tolerance * logits.std())


class Shared(NamedTuple):
    """Sequences packed for one forward pass.

    Attributes:
        arguments: the model's; ``input_ids`` is ``(n_rows, n_tokens)``.
        nodes: where each sequence's tokens are in the flattened ``input_ids``, 0 behind its end,
            ``(n_sequences, longest)``.
    """

    arguments: dict[str, Tensor]
    nodes: Tensor


def share_prefixes(model: PreTrainedModel, sequences: Sequence[list[int]], width: int) -> Shared:
    """Pack sequences into one forward pass.

    Args:
        model: a causal language model in eval mode.
        sequences: token ids.
        width: from :func:`row_width`; 0 shares whole sequences alone.
    """
    rows = merge_prefixes(sequences, width)
    arguments = forest_arguments(model, rows) if width else {"input_ids": padded(model, rows)}
    n_tokens = arguments["input_ids"].shape[1]
    nodes = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    for number, row in enumerate(rows):
        for index, path in row.paths.items():
            nodes[index, : len(path)] = number * n_tokens + torch.tensor(path)
    return Shared(arguments, nodes.to(model.device))


def padded(model: PreTrainedModel, rows: Sequence[PackedRow]) -> Tensor:
    """Return the ids of rows, padded on the right with token 0, ``(n_rows, n_tokens)``."""
    width = max(len(row.ids) for row in rows)
    return torch.tensor(
        [row.ids + [0] * (width - len(row.ids)) for row in rows], device=model.device
    )


def forest_arguments(model: PreTrainedModel, rows: Sequence[PackedRow]) -> dict[str, Tensor]:
    """Return a model's arguments for packed rows, padded on the right.

    The mask is additive, ``(n_rows, 1, n_tokens, n_tokens)``, as every attention code takes it.
    """
    width = max(len(row.ids) for row in rows)
    ids, depths = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    ends = torch.arange(1, width + 1).repeat(len(rows), 1)  # padding sees itself
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        depths[index, : len(row.ids)] = torch.tensor(row.depths)
        ends[index, : len(row.ids)] = torch.tensor(_descendants_end(row.depths))
    ids, depths, ends = (tensor.to(model.device) for tensor in (ids, depths, ends))
    columns = torch.arange(width, device=model.device)
    seen = (columns <= columns[:, None]) & (columns[:, None] < ends[:, None, :])
    mask = torch.zeros(seen.shape, dtype=model.dtype, device=model.device)
    mask.masked_fill_(~seen, torch.finfo(model.dtype).min)
    return {"input_ids": ids, "position_ids": depths, "attention_mask": mask[:, None]}


def _descendants_end(depths: Sequence[int]) -> list[int]:
    """Return for each node the column after its last descendant."""
    ends = [len(depths)] * len(depths)
    path: list[int] = []
    for column, depth in enumerate(depths):
        for left in path[depth:]:
            ends[left] = column
        path[depth:] = [column]
    return ends
