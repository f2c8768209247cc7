"""What a language model makes of texts: probabilities of targets, perplexity, generation."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_blue.errors import InputError
from lightning_blue.metrics import Perplexity, numbers
from lightning_blue.subjects import encode_targets

WINDOW = 512


@dataclass(frozen=True)
class TargetScore:
    """How a model rates one target after one prompt.

    ``nll`` is the mean negative log-likelihood in nats per target token; ``correct`` says of each
    target token whether it is the most probable one given the true tokens before it.
    """

    nll: float
    correct: tuple[bool, ...]


class Row(NamedTuple):
    """Token ids of which those from ``start`` on are scored (``start`` is at least 1)."""

    ids: list[int]
    start: int


def context_length(model: PreTrainedModel) -> int | None:
    """Return how many tokens the model can read at once, where its config says so."""
    return getattr(model.config, "max_position_embeddings", None)


@torch.no_grad()
def score_targets(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    tokens_per_batch: int = 4096,
    progress: str | None = None,
) -> list[TargetScore]:
    """Score each target behind its prompt under teacher forcing.

    Args:
        model: a causal language model on any device, in any dtype.
        tokenizer: its tokenizer; a pad token is not needed.
        prompts: n texts, tokenised with the special tokens that the tokenizer adds (BOS).
        targets: n texts without a leading space.
        tokens_per_batch: tokens in one forward pass, padding included.
        progress: the label of a progress bar; none is shown without it.

    Raises:
        InputError: for an empty target, or a prompt that does not fit the model's context.
    """
    if not prompts:
        return []
    if not all(target.strip() for target in targets):
        raise InputError("a target is empty", mend="give every prompt an object to score")
    encoded = tokenizer(list(prompts))["input_ids"]
    rows = [
        Row(prompt + target, len(prompt))
        for prompt, target in zip(encoded, encode_targets(tokenizer, targets), strict=True)
    ]
    _check_lengths(model, prompts, rows)
    return [
        TargetScore(float(nll.mean()), tuple(correct.tolist()))
        for nll, correct in score_rows(model, rows, tokens_per_batch, progress)
    ]


def score_rows(
    model: PreTrainedModel, rows: Sequence[Row], tokens_per_batch: int, progress: str | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Return nats (float32) and top-1 flags of each row's scored tokens, on the CPU, in order."""
    scores: dict[int, tuple[Tensor, Tensor]] = {}
    with (
        inference(model),
        tqdm(total=len(rows), desc=progress, disable=progress is None or None, leave=False) as bar,
    ):
        for batch in batches([len(row.ids) for row in rows], tokens_per_batch):
            scores.update(zip(batch, _score_batch(model, [rows[i] for i in batch]), strict=True))
            bar.update(len(batch))
    return [scores[index] for index in range(len(rows))]


def _score_batch(model: PreTrainedModel, rows: Sequence[Row]) -> list[tuple[Tensor, Tensor]]:
    ids = torch.zeros(len(rows), max(len(row.ids) for row in rows), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        mask[index, : len(row.ids)] = 1
    counts = [len(row.ids) - row.start for row in rows]
    # A token is predicted at the position before it.
    positions = torch.cat([torch.arange(row.start, len(row.ids)) - 1 for row in rows])
    row_index = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
    labels = ids[row_index, positions + 1].to(model.device)
    kept, kept_index = positions.unique(return_inverse=True)  # the head runs on these only
    logits = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        logits_to_keep=kept.to(model.device),
        use_cache=False,
    ).logits
    chosen = logits[row_index.to(model.device), kept_index.to(model.device)].float()
    nll = cross_entropy(chosen, labels, reduction="none").cpu()
    correct = (chosen.argmax(-1) == labels).cpu()
    return list(zip(nll.split(counts), correct.split(counts), strict=True))


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    max_length: int | None = None,
    max_tokens: int | None = None,
    tokens_per_batch: int = 1024,
    progress: str | None = None,
) -> dict[str, float]:
    """Measure perplexity on a text, exp of the mean nats per token.

    The text is cut into windows so that each token is predicted exactly once. A window begins
    with the special tokens that the tokenizer puts before a text; with a tokenizer that puts
    none, with the last token of the window before, and the first token of all is not predicted.

    Args:
        model: a causal language model on any device, in any dtype.
        tokenizer: its tokenizer.
        text: held-out text.
        max_length: tokens in a window; the model's context, at most 512, by default.
        max_tokens: read only so many tokens of the text.
        tokens_per_batch: tokens in one forward pass; logits of all of them are in memory.
        progress: the label of a progress bar; none is shown without it.

    Returns:
        ``value``, ``standard_error`` (over windows, where there are two or more), ``count`` (of
        windows) and ``tokens`` (predicted).

    Raises:
        InputError: if the text is too short to predict a token.
    """
    start_ids = tokenizer("")["input_ids"]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    length = min(max_length or WINDOW, context_length(model) or WINDOW)
    rows = _windows(ids, start_ids, length)
    if not rows:
        raise InputError(
            "the text for perplexity is too short", mend="give a text of at least two tokens"
        )
    nats = [nll for nll, _ in score_rows(model, rows, tokens_per_batch, progress)]
    metric = Perplexity(sync_on_compute=False)
    metric.update(
        torch.stack([nll.double().sum() for nll in nats]), torch.tensor([len(nll) for nll in nats])
    )
    return numbers(metric.compute())


def _windows(ids: list[int], start_ids: list[int], length: int) -> list[Row]:
    if start_ids:
        step = length - len(start_ids)
        return [
            Row(start_ids + ids[begin : begin + step], len(start_ids))
            for begin in range(0, len(ids), step)
        ]
    return [Row(ids[begin : begin + length], 1) for begin in range(0, len(ids) - 1, length - 1)]


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
    tokens_per_batch: int = 8192,
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
        tokens_per_batch: tokens generated together, prompts included.
        progress: the label of a progress bar; none is shown without it.

    Returns:
        The continuations without their prompts. Both end at the model's context length.

    Raises:
        InputError: if a prompt is empty or does not fit the model's context.
    """
    encoded = tokenizer(list(prompts))["input_ids"] if prompts else []
    _check_lengths(model, prompts, [Row(ids, len(ids)) for ids in encoded])
    totals = [_total_length(model, len(ids), max_length, max_new_tokens) for ids in encoded]
    continued: dict[int, list[int]] = {}
    with (
        inference(model),
        tqdm(
            total=len(encoded), desc=progress, disable=progress is None or None, leave=False
        ) as bar,
    ):
        for batch in _equally_long(encoded, totals, tokens_per_batch):
            steps = totals[batch[0]] - len(encoded[batch[0]])
            uniform = torch.stack([prompt_noise(prompts[i], seed, steps) for i in batch])
            new = _sample(model, torch.tensor([encoded[i] for i in batch]), uniform, top_k)
            continued.update(zip(batch, new.tolist(), strict=True))
            bar.update(len(batch))
    end = tokenizer.eos_token_id if stop_at_end else None
    return [_continuation(tokenizer, ids, continued[i], end) for i, ids in enumerate(encoded)]


def _total_length(
    model: PreTrainedModel, prompt: int, max_length: int, max_new_tokens: int | None
) -> int:
    """Return how many tokens a text may have, given the number of its prompt's tokens."""
    total = max_length if max_new_tokens is None else prompt + max_new_tokens
    return max(prompt, min(total, context_length(model) or total))


def _equally_long(
    encoded: Sequence[list[int]], totals: Sequence[int], tokens_per_batch: int
) -> Iterator[list[int]]:
    """Group the indices of prompts of one length.

    They need no padding, so that a batch gives what each prompt alone gives.
    """
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    for _, group in groupby(order, key=lambda index: len(encoded[index])):
        members = list(group)
        for batch in batches([totals[index] for index in members], tokens_per_batch):
            yield [members[position] for position in batch]


def prompt_noise(prompt: str, seed: int, steps: int) -> Tensor:
    """Return the uniform numbers from [0, 1) that a prompt's sampling uses; (steps,)."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{prompt}".encode()))
    return torch.rand(steps, generator=generator)


def _sample(model: PreTrainedModel, ids: Tensor, uniform: Tensor, top_k: int) -> Tensor:
    """Extend equally long prompts (n, t) by one token for each column of ``uniform`` (n, steps)."""
    tokens = ids.to(model.device)
    new, cache = [tokens[:, :0]], None
    for draw in uniform.to(model.device).T:
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens, cache = next_token(output.logits[:, -1], draw, top_k), output.past_key_values
        new.append(tokens)
    return torch.cat(new, 1)


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


def batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Group the indices of sequences so that a padded group stays within ``tokens_per_batch``.

    Longest first: memory that does not suffice shows at once. A longer sequence stands alone.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens_per_batch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off, and restore the model's mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check_lengths(model: PreTrainedModel, prompts: Sequence[str], rows: Sequence[Row]) -> None:
    limit = context_length(model)
    for prompt, row in zip(prompts, rows, strict=True):
        if row.start == 0:
            raise InputError("a prompt is empty", mend="give every prompt some text")
        if limit is not None and len(row.ids) > limit:
            raise InputError(
                f"a prompt takes {len(row.ids)} tokens, its target included; "
                f"the model's context holds {limit}",
                where=repr(prompt[:80]),
                mend="shorten the prompt, or leave it out",
            )
