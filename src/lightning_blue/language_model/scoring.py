"""What a language model makes of texts: probabilities of targets, and perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_blue.language_model.batching import (
    batches,
    check_prompts,
    context_length,
    inference,
    row_weights,
)
from lightning_blue.language_model.generation import generate, prompt_noise
from lightning_blue.language_model.shared_prefixes import (
    PackedRow,
    forest_arguments,
    merge_prefixes,
    padded,
    row_width,
)
from lightning_blue.language_model.tokens import (
    encode_prompts,
    encode_targets,
    leading_ids,
    plain_ids,
    target_prefixes,
)
from lightning_blue.language_model.vocabulary import check_vocabulary
from lightning_blue.metrics import Perplexity, numbers
from lightning_blue.support.errors import InputError
from lightning_blue.support.processes import progress_bar

__all__ = [
    "Row",
    "TargetScore",
    "context_length",
    "generate",
    "perplexity",
    "prompt_noise",
    "score_rows",
    "score_targets",
]

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


@torch.no_grad()
def score_targets(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    prefixes: Sequence[str | None] | None = None,
    tokens_per_batch: int = 4096,
    progress: str | None = None,
) -> list[TargetScore]:
    """Score each target behind its prompt under teacher forcing.

    Args:
        model: a causal language model on any device, in any dtype.
        tokenizer: its tokenizer; a pad token is not needed.
        prompts: n texts, see :func:`lightning_blue.language_model.tokens.encode_prompts`.
        targets: n texts without a leading space.
        prefixes: what stands between each prompt and its target, where that is given; None leaves
            it to :func:`lightning_blue.language_model.joining.joint`. It is scored with the target.
        tokens_per_batch: tokens in one forward pass, padding included.
        progress: the label of a progress bar; none is shown without it.

    Raises:
        InputError: for an empty target, a prompt that does not fit the model's context, or a token
            that the model has no embedding of.
    """
    if not prompts:
        return []
    if not all(target.strip() for target in targets):
        raise InputError("a target is empty", hint="give every prompt an object to score")
    objects = encode_targets(tokenizer, targets, target_prefixes(tokenizer, prompts, prefixes))
    rows = [
        Row(prompt + target, len(prompt))
        for prompt, target in zip(encode_prompts(tokenizer, prompts), objects, strict=True)
    ]
    check_vocabulary(model, tokenizer, prompts, [row.ids for row in rows])
    check_prompts(model, prompts, [row.start for row in rows], [len(row.ids) for row in rows])
    return [
        TargetScore(float(nll.mean()), tuple(correct.tolist()))
        for nll, correct in score_rows(model, rows, tokens_per_batch, progress, share_prefixes=True)
    ]


@torch.no_grad()
def score_rows(
    model: PreTrainedModel,
    rows: Sequence[Row],
    tokens_per_batch: int,
    progress: str | None = None,
    *,
    share_prefixes: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """Return nats and top-1 flags of each row's scored tokens, on the CPU, in order.

    Nats are in float32, or in the model's precision where that is higher. Of equal rows one is
    computed; with ``share_prefixes``, of all common beginnings.
    """
    sequences = [row.ids[:-1] for row in rows]  # what follows the last token is not read
    scores: dict[int, tuple[Tensor, Tensor]] = {}
    with (
        inference(model),
        progress_bar(len(rows), progress) as bar,
    ):
        width = row_width(model, max(map(len, sequences), default=0)) if share_prefixes else 0
        packed = merge_prefixes(sequences, width)
        head_positions = [
            len({column for i in row.paths for column in _read_columns(row, rows, i)})
            for row in packed
        ]
        lengths = [len(row.ids) for row in packed]
        weights = row_weights(model, lengths, head_positions, tokens_per_batch)
        for batch in batches(weights, tokens_per_batch):
            scored = _score_batch(model, [packed[index] for index in batch], rows, masked=width > 0)
            scores.update(scored)
            bar.update(len(scored))
    return [scores[index] for index in range(len(rows))]


def _read_columns(packed: PackedRow, rows: Sequence[Row], index: int) -> list[int]:
    """Return the columns that predict the scored tokens of a row: each stands before its token."""
    return packed.paths[index][rows[index].start - 1 :]


def _score_batch(
    model: PreTrainedModel, batch: Sequence[PackedRow], rows: Sequence[Row], *, masked: bool
) -> dict[int, tuple[Tensor, Tensor]]:
    arguments = forest_arguments(model, batch) if masked else _padded(model, batch)
    width = arguments["input_ids"].shape[1]
    members = [(number, index) for number, packed in enumerate(batch) for index in packed.paths]
    positions = [
        number * width + column
        for number, index in members
        for column in _read_columns(batch[number], rows, index)
    ]
    labels = [token for _, index in members for token in rows[index].ids[rows[index].start :]]
    kept, which = torch.tensor(positions, device=model.device).unique(return_inverse=True)
    logits = logits_at(model, arguments, kept)
    target = torch.tensor(labels, device=model.device)
    nll = -logits.log_softmax(-1)[which, target]
    correct = logits.argmax(-1)[which] == target
    counts = [len(rows[index].ids) - rows[index].start for _, index in members]
    pairs = zip(nll.cpu().split(counts), correct.cpu().split(counts), strict=True)
    return dict(zip([index for _, index in members], pairs, strict=True))


def _padded(model: PreTrainedModel, rows: Sequence[PackedRow]) -> dict[str, Tensor]:
    ids = padded(model, rows)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row.ids) for row in rows])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long().to(model.device)}


def logits_at(model: PreTrainedModel, arguments: Mapping[str, Any], positions: Tensor) -> Tensor:
    """Run a model, and its head on few positions.

    Args:
        model: a causal language model in eval mode.
        arguments: of its forward pass; ``input_ids`` is ``(n_rows, n_tokens)``. No cache is used
            unless they say so.
        positions: indices into the flattened tokens; (n,).

    Returns:
        Logits in float32, or in the model's precision where that is higher; (n, vocabulary).
    """

    def gather(_head: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, 1)[positions][None], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        logits = model(**{"use_cache": False, **arguments}).logits[0]
    finally:
        hook.remove()
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


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
    with the special tokens that the tokenizer puts before a text (:func:`leading_ids`); with a
    tokenizer that puts none, with the last token of the window before, and the first token of all
    is not predicted.

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
        InputError: if the text is too short to predict a token, or has one without an embedding.
    """
    start_ids = leading_ids(tokenizer)
    ids = plain_ids(tokenizer, [text])[0][:max_tokens]
    check_vocabulary(model, tokenizer, [text], [ids])
    length = min(max_length or WINDOW, context_length(model) or WINDOW)
    rows = _windows(ids, start_ids, length)
    if not rows:
        raise InputError(
            "the text for perplexity is too short", hint="give a text of at least two tokens"
        )
    nats = [nll for nll, _ in score_rows(model, rows, tokens_per_batch, progress)]
    metric = Perplexity(sync_on_compute=False)
    metric.update(
        torch.stack([nll.double().sum() for nll in nats]), torch.tensor([len(nll) for nll in nats])
    )
    return numbers(metric.compute())


def _windows(ids: list[int], start_ids: list[int], length: int) -> list[Row]:
    if start_ids:
        stride = length - len(start_ids)
        return [
            Row(start_ids + ids[begin : begin + stride], len(start_ids))
            for begin in range(0, len(ids), stride)
        ]
    return [Row(ids[begin : begin + length], 1) for begin in range(0, len(ids) - 1, length - 1)]
