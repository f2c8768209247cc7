"""Texts that a language model writes: all prompts together, the same text for each as alone."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from lightning_blue.language_model.batching import (
    batches,
    check_prompts,
    context_length,
    inference,
    row_weights,
)
from lightning_blue.language_model.shared_prefixes import reads_forests
from lightning_blue.language_model.tokens import encode_prompts
from lightning_blue.language_model.vocabulary import check_vocabulary
from lightning_blue.support.processes import progress_bar

_CACHE_BYTES = 2**31  # of keys and values on the CPU, which needs no larger batches


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_length: int = 100,
    max_new_tokens: int | None = None,
    top_k: int = 5,
    seed: int = 0,
    stop_at_end: bool = False,
    lengths_of: Sequence[str] | None = None,
    tokens_per_batch: int | None = None,
    progress: str | None = None,
) -> list[str]:
    """Continue each prompt by sampling among the most probable tokens.

    A prompt's random numbers depend on the prompt and the seed alone: batching, order and device
    do not matter, texts before and after an edit are comparable, and no global generator is used.

    Args:
        model: a causal language model on any device, in any dtype.
        tokenizer: its tokenizer; a pad token is not needed.
        prompts: n texts.
        max_length: tokens of a text including its prompt, as in ROME's evaluation.
        max_new_tokens: where given, the number of new tokens instead of the total.
        top_k: how many tokens to sample from; 1 is greedy.
        seed: of the sampling.
        stop_at_end: cut each text at its first end-of-text token. ROME's evaluation goes on, so
            that all texts are equally long.
        lengths_of: n texts that count towards ``max_length`` in the prompts' place, where what is
            sent to the model holds more than the prompt.
        tokens_per_batch: tokens written together, prompts included; by default as many as
            their keys and values take 2 GiB, or half of what is free on a GPU.
        progress: the label of a progress bar; none is shown without it.

    Returns:
        The continuations without their prompts. Both end at the model's context length.

    Raises:
        InputError: if a prompt is empty, does not fit the model's context, or has a token that the
            model has no embedding of.
    """
    distinct = list(dict.fromkeys(prompts))
    encoded = _encoded(model, tokenizer, distinct)
    lengths = [len(ids) for ids in encoded]
    counted = dict(zip(prompts, prompts if lengths_of is None else lengths_of, strict=True))
    more = [0] * len(distinct)
    if lengths_of is not None:
        plain = encode_prompts(tokenizer, [counted[prompt] for prompt in distinct])
        more = [length - len(ids) for length, ids in zip(lengths, plain, strict=True)]
    totals = [
        _total_length(model, length, max_length + extra, max_new_tokens)
        for length, extra in zip(lengths, more, strict=True)
    ]
    continued: dict[int, list[int]] = {}
    with (
        inference(model),
        progress_bar(len(encoded), progress) as bar,
    ):
        for batch in _similar(model, lengths, totals, tokens_per_batch or _fitting_tokens(model)):
            counts = [totals[i] - lengths[i] for i in batch]
            uniform = torch.stack([prompt_noise(distinct[i], seed, max(counts)) for i in batch])
            new = _sample(model, [encoded[i] for i in batch], uniform, top_k).tolist()
            for i, ids, count in zip(batch, new, counts, strict=True):
                continued[i] = ids[:count]
            bar.update(len(batch))
    end = tokenizer.eos_token_id if stop_at_end else None
    texts = {
        prompt: _continuation(tokenizer, ids, continued[i], end)
        for i, (prompt, ids) in enumerate(zip(distinct, encoded, strict=True))
    }
    return [texts[prompt] for prompt in prompts]


@torch.no_grad()
def continue_until(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    done: Callable[[int, list[int]], bool],
    *,
    max_new_tokens: int,
    tokens_per_batch: int | None = None,
    progress: str | None = None,
) -> list[list[int]]:
    """Continue each prompt by its most probable tokens until it is done.

    Args:
        model: a causal language model on any device, in any dtype.
        tokenizer: its tokenizer; a pad token is not needed.
        prompts: n texts, each of them once.
        done: called after each token with the place of a prompt and all its new tokens; says
            whether the last one ends the text.
        max_new_tokens: after which a text ends in any case; the context length may end it before.
        tokens_per_batch: as in `generate`.
        progress: the label of a progress bar; none is shown without it.

    Returns:
        The new tokens of each prompt, the last one included.

    Raises:
        InputError: as `generate`.
    """
    encoded = _encoded(model, tokenizer, prompts)
    lengths = [len(ids) for ids in encoded]
    totals = [_total_length(model, length, 0, max_new_tokens) for length in lengths]
    continued: dict[int, list[int]] = {}
    with inference(model), progress_bar(len(encoded), progress) as bar:
        for batch in _similar(model, lengths, totals, tokens_per_batch or _fitting_tokens(model)):
            growing = _GrowingTexts(batch, [totals[i] - lengths[i] for i in batch], done)
            draws = torch.zeros(len(batch), max(growing.limits))
            _sample(model, [encoded[i] for i in batch], draws, 1, growing.add)
            continued |= dict(zip(batch, growing.written, strict=True))
            bar.update(len(batch))
    return [continued[i] for i in range(len(prompts))]


class _GrowingTexts:
    """Texts that are written together, and which of them go on."""

    def __init__(
        self, prompts: list[int], limits: list[int], done: Callable[[int, list[int]], bool]
    ) -> None:
        self.prompts, self.limits, self.done = prompts, limits, done
        self.written: list[list[int]] = [[] for _ in prompts]
        self.open = [limit > 0 for limit in limits]

    def add(self, rows: list[int], tokens: list[int]) -> list[bool]:
        """Add a token to the text of each row; say which of them are still open."""
        for row, token in zip(rows, tokens, strict=True):
            if self.open[row]:
                text = self.written[row]
                text.append(token)
                full = len(text) >= self.limits[row]
                self.open[row] = not (self.done(self.prompts[row], text) or full)
        return [self.open[row] for row in rows]


def _encoded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[list[int]]:
    """Encode prompts, and make sure that the model can read them."""
    encoded = encode_prompts(tokenizer, list(prompts))
    check_vocabulary(model, tokenizer, prompts, encoded)
    lengths = [len(ids) for ids in encoded]
    check_prompts(model, prompts, lengths, lengths)
    return encoded


def _total_length(
    model: PreTrainedModel, prompt: int, max_length: int, max_new_tokens: int | None
) -> int:
    """Return how many tokens a text may have, given the number of its prompt's tokens."""
    total = max_length if max_new_tokens is None else prompt + max_new_tokens
    return max(prompt, min(total, context_length(model) or total))


def _fitting_tokens(model: PreTrainedModel) -> int:
    """Return how many tokens' keys and values fit into free memory."""
    config = model.config.get_text_config()
    query_heads = getattr(config, "num_attention_heads", 1)
    heads = getattr(config, "num_key_value_heads", None) or query_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    token = 2 * config.num_hidden_layers * heads * size * torch.finfo(model.dtype).bits // 8
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] // 2 if on_gpu else _CACHE_BYTES
    return int(free // token)


def _similar(
    model: PreTrainedModel, lengths: Sequence[int], totals: Sequence[int], tokens_per_batch: int
) -> Iterator[list[int]]:
    """Group the indices of prompts of similar length; of equal length, where padding would matter.

    Args:
        model: which tells whether it sees the tokens of a row alone.
        lengths: tokens of each prompt.
        totals: the same with what is written.
        tokens_per_batch: longest text times texts, at most.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    together = len(set(lengths)) <= 1 or reads_forests(model)
    for _, group in groupby(order, key=lambda index: together or lengths[index]):
        members = list(group)
        texts = [totals[index] for index in members]
        weights = row_weights(model, texts, [1] * len(members), tokens_per_batch)
        for batch in batches(weights, tokens_per_batch):
            yield [members[position] for position in batch]


def prompt_noise(prompt: str, seed: int, n_new: int) -> Tensor:
    """Return the uniform numbers from [0, 1) that a prompt's sampling uses; (n_new,)."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{prompt}".encode()))
    return torch.rand(n_new, generator=generator)


def _sample(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    uniform: Tensor,
    top_k: int,
    going_on: Callable[[list[int], list[int]], list[bool]] | None = None,
) -> Tensor:
    """Extend n prompts, padded on the left, by one token for each column of ``uniform``.

    ``going_on`` is told after each column which rows got which tokens, and says of each row whether
    it goes on. Rows that do not are left out of the passes once they are half of those that are in.

    Returns:
        ``(n, n_new)``; 0 where a row was left out. A text that is complete before the others goes
        on, in a last position that the model has.
    """
    width, n_new = max(map(len, prompts)), uniform.shape[1]
    padding = torch.tensor([width - len(ids) for ids in prompts], device=model.device)
    tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    columns = torch.arange(width + n_new, device=model.device) - padding[:, None]
    positions = columns.clamp(0, (context_length(model) or width + n_new) - 1)
    placed = bool(padding.any())  # whether the model must be told where the tokens stand
    cache = growing_cache(model, width + n_new)
    rows = torch.arange(len(prompts), device=model.device)
    new, first = tokens.new_zeros(len(prompts), n_new), 0
    for step, draw in enumerate(uniform.to(model.device).T):
        last = first + tokens.shape[1]
        where = {
            "attention_mask": (columns[rows, :last] >= 0).long(),
            "position_ids": positions[rows, first:last],
        }
        output = model(
            input_ids=tokens,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **(where if placed else {}),
        )
        tokens, first = next_token(output.logits[:, -1], draw[rows], top_k), last
        new[rows, step] = tokens[:, 0]
        if going_on is None:
            continue
        going = torch.tensor(going_on(rows.tolist(), tokens[:, 0].tolist()), device=model.device)
        if not going.any():
            break
        if 2 * int(going.sum()) <= len(rows) and _has_rows(cache):
            cache.batch_select_indices(going.nonzero()[:, 0])
            rows, tokens, placed = rows[going], tokens[going], True
    return new


def _has_rows(cache: DynamicCache) -> bool:
    """Whether rows can be taken out of a cache: its layers hold keys and values alone."""
    return all(isinstance(layer, DynamicLayer) for layer in cache.layers)


def growing_cache(model: PreTrainedModel, length: int) -> DynamicCache:
    """Return a cache whose plain layers hold ``length`` tokens from the start."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        _GrowingLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


class _GrowingLayer(DynamicLayer):
    """Keys and values that are written where they stay, not copied with each new token."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``(n_rows, n_heads, n_tokens, d_head)``; return all that there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._all = [
                new.new_empty(*new.shape[:2], self.length, new.shape[3])
                for new in (key_states, value_states)
            ]
        first = self.get_seq_length()
        last = first + key_states.shape[2]
        for buffer, new in zip(self._all, (key_states, value_states), strict=True):
            buffer[:, :, first:last] = new
        self.keys, self.values = (buffer[:, :, :last] for buffer in self._all)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the rows."""
        if self.is_initialized:
            length = self.get_seq_length()
            self._all = [buffer[indices] for buffer in self._all]
            self.keys, self.values = (buffer[:, :, :length] for buffer in self._all)


def next_token(logits: Tensor, uniform: Tensor, top_k: int) -> Tensor:
    """Sample from the ``top_k`` most probable tokens by inverting their distribution function.

    Args:
        logits: (n, vocabulary)
        uniform: one number from [0, 1) per row; (n,)
        top_k: number of candidates; 1 is greedy.

    Returns:
        Token ids; (n, 1).
    """
    values, candidates = logits.float().topk(min(top_k, logits.shape[-1]))
    reached = values.softmax(-1).cumsum(-1) < uniform[:, None]
    return candidates.gather(1, reached[:, :-1].sum(1, keepdim=True))


def _continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int], end: int | None
) -> str:
    """Decode new tokens in the place where they stand, which keeps their leading space."""
    if end in new:
        new = new[: new.index(end)]
    texts = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (prompt, prompt + new)
    )
    before, whole = texts
    return str(whole)[len(before) :]
