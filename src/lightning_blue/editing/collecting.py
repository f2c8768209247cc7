"""The second moment of keys over ordinary text, collected in one pass over packed documents.

K0 K0^T of Eq. 4 is estimated as the mean of k k^T over tokens. Documents follow each other in the
rows without padding and without a border but what the tokenizer itself puts before a text (BOS), as
in the model's own training: a token sees the end of the document before its own. Products are
formed and summed in float64: rounded to float32, directions that ordinary text uses a millionth as
much as others would be noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blue_callbacks.precision import in_float64
from lightning_blue.editing.covariance_file import mirrored
from lightning_blue.language_model.batching import inference
from lightning_blue.language_model.states import read_states
from lightning_blue.language_model.tokens import encode_prompts
from lightning_blue.support.processes import progress_bar

_BLOCKS = 4  # of columns, in which the upper triangle of a product is formed


def collect_covariance(
    model: PreTrainedModel,
    projections: Mapping[int, nn.Module],
    sequences: Iterable[Sequence[int]],
    n_tokens: int,
    batch_tokens: int = 8192,
    on_doubling: Callable[[int, Mapping[int, Tensor]], None] | None = None,
) -> tuple[dict[int, Tensor], int]:
    """Average k k^T over the tokens of packed sequences, for all layers in one pass.

    Products are formed and summed in float64; the forward pass stops after the last layer that is
    wanted.

    Args:
        model: a causal language model.
        projections: layer -> the down projection whose input is the key.
        sequences: token ids, all of one length but the last.
        n_tokens: how many tokens to use.
        batch_tokens: tokens in a forward pass.
        on_doubling: called with the tokens so far and the covariances from them, where a pass ends
            nearest to a quarter and a half of the tokens, and after all of them. Where one pass
            holds all tokens, it is taken in two halves.

    Returns:
        layer -> ``(d_in, d_in)`` float64, and the number of tokens used.
    """
    sums: dict[int, Tensor] = {}
    seen, milestones = 0, [n_tokens / 4, n_tokens / 2] if on_doubling else []
    with (
        inference(model),
        progress_bar(n_tokens, "covariance", unit="token") as bar,
    ):
        for batch in _batches(sequences, n_tokens, batch_tokens):
            keys = read_keys(model, projections, batch)
            for piece in _pieces(sum(map(len, batch)), n_tokens):
                for layer, rows in keys.items():
                    _add_product(sums, layer, rows[piece])
                count = piece.stop - piece.start
                seen += count
                bar.update(count)
                reached = seen + count / 2
                if on_doubling and milestones and milestones[0] < reached and seen < n_tokens:
                    milestones = [each for each in milestones if each > reached]
                    on_doubling(seen, _means(sums, seen))
    means = _means(sums, seen)
    if on_doubling:
        on_doubling(seen, means)
    return means, seen


def read_keys(
    model: PreTrainedModel, projections: Mapping[int, nn.Module], batch: Sequence[Sequence[int]]
) -> dict[int, Tensor]:
    """Return layer -> keys of all tokens of equally long sequences, ``(n_tokens, d_in)``."""
    modules = {str(layer): module for layer, module in projections.items()}
    ids = torch.tensor(batch, device=model.device)
    states = read_states(model, {"input_ids": ids}, inputs_of=modules)
    return {layer: states[str(layer)].flatten(0, 1).float() for layer in projections}


def _pieces(count: int, n_tokens: int) -> list[slice]:
    """Divide the tokens of a pass: in two where it holds all, so that half of them can be seen."""
    middle = count // 2 if count >= n_tokens > 1 else 0
    return [slice(0, middle), slice(middle, count)] if middle else [slice(0, count)]


def _add_product(sums: dict[int, Tensor], layer: int, keys: Tensor) -> None:
    """Add K^T K of keys (n_tokens, d_in); it is symmetric, so that its upper triangle is enough."""
    d_in = keys.shape[1]
    keys = in_float64(keys)
    total = sums.setdefault(layer, keys.new_zeros(d_in, d_in))
    edges = [d_in * block // _BLOCKS for block in range(_BLOCKS + 1)]
    with torch.autocast(keys.device.type, enabled=False):
        for first, last in pairwise(edges):
            total[first:last, first:] += keys[:, first:last].T @ keys[:, first:]


def _means(sums: Mapping[int, Tensor], seen: int) -> dict[int, Tensor]:
    """Divide, and mirror the upper triangles; layer -> ``(d_in, d_in)``."""
    return {layer: mirrored(total / seen) for layer, total in sums.items()}


def _batches(
    sequences: Iterable[Sequence[int]], n_tokens: int, batch_tokens: int
) -> Iterator[list[Sequence[int]]]:
    """Group sequences of equal length into forward passes until there are enough tokens."""
    batch: list[Sequence[int]] = []
    taken = 0
    for whole in sequences:
        sequence = whole[: n_tokens - taken]
        if batch and (
            len(sequence) != len(batch[0]) or (len(batch) + 1) * len(sequence) > batch_tokens
        ):
            yield batch
            batch = []
        batch.append(sequence)
        taken += len(sequence)
        if taken >= n_tokens:
            break
    if batch:
        yield batch


def pack(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    length: int,
    starts: list[int] | None = None,
) -> Iterator[list[int]]:
    """Join the token ids of documents and cut them into sequences of ``length``, the last shorter.

    Args:
        tokenizer: a document is tokenised by itself, with what the tokenizer puts before a text.
        documents: see :func:`lightning_blue.data.corpus.corpus_texts`.
        length: tokens in a sequence.
        starts: takes up at which token each document begins that was read so far.
    """
    joined: list[int] = []
    read, documents = 0, iter(documents)
    while chunk := list(islice(documents, 64)):
        for ids in encode_prompts(tokenizer, chunk):
            if starts is not None:
                starts.append(read)
            joined += ids
            read += len(ids)
        for first in range(0, len(joined) - length + 1, length):
            yield joined[first : first + length]
        joined = joined[len(joined) // length * length :]
    if joined:
        yield joined
