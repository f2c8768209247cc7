"""What every use of a language model needs: its limits, and batches that respect them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel

from lightning_blue.support.errors import InputError

_LOGITS = 2**26  # of a batch: 256 MiB in float32, and as much for their softmax


def context_length(model: PreTrainedModel) -> int | None:
    """Return how many tokens the model can read at once, where its config says so."""
    config = model.config.get_text_config()
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((limit for limit in limits if limit), None)


def attention_width(model: PreTrainedModel) -> int:
    """Return how many values all heads of a block together have of a token, about."""
    config = model.config.get_text_config()
    heads, each = (getattr(config, name, None) for name in ("num_attention_heads", "head_dim"))
    known = heads * each if isinstance(heads, int) and isinstance(each, int) else 0
    return max(int(config.hidden_size), known)


def check_prompts(
    model: PreTrainedModel, prompts: Sequence[str], starts: Sequence[int], lengths: Sequence[int]
) -> None:
    """Refuse prompts that the model cannot read.

    Args:
        model: any language model.
        prompts: n texts, to be named in messages.
        starts: tokens of each prompt.
        lengths: the same with what follows the prompt.

    Raises:
        InputError: if a prompt is empty or does not fit the model's context.
    """
    limit = context_length(model)
    for prompt, start, length in zip(prompts, starts, lengths, strict=True):
        if start == 0:
            raise InputError("a prompt is empty", hint="give every prompt some text")
        if limit is not None and length > limit:
            raise InputError(
                f"a prompt takes {length} tokens, its target included; "
                f"the model's context holds {limit}",
                where=repr(prompt[:80]),
                hint="shorten the prompt, or leave it out",
            )


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


def row_weights(
    model: PreTrainedModel,
    lengths: Sequence[int],
    head_positions: Sequence[int],
    tokens_per_batch: int,
) -> list[int]:
    """Weigh rows by what they take of two budgets, tokens and logits; in tokens, for `batches`.

    Args:
        model: whose vocabulary makes logits large.
        lengths: tokens of each row.
        head_positions: number of positions of each row that the head runs on.
        tokens_per_batch: the budget of tokens.
    """
    positions = max(1, _LOGITS // model.config.get_text_config().vocab_size)
    return [
        max(length, math.ceil(count * tokens_per_batch / positions))
        for length, count in zip(lengths, head_positions, strict=True)
    ]


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off, and restore the model's mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
