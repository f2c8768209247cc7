"""Tokens that a tokenizer knows and the model's embedding does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lightning_blue.support.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAMED_LENGTH = 200  # characters of a text in a message
HINT = (
    "leave out what is written with it, or add rows to the model's embedding "
    "(model.resize_token_embeddings(len(tokenizer))), train them, and save model and tokenizer "
    "together"
)


class Vocabulary(NamedTuple):
    """What a tokenizer can write and what a model can read, in tokens."""

    tokenizer: PreTrainedTokenizerBase
    embeddings: int

    def fault(self, ids: Sequence[int]) -> str | None:
        """Say which of some token ids has no embedding, and both sizes; None if all have one."""
        token = max(ids, default=0)
        if token < self.embeddings:
            return None
        return (
            f"the token {self.tokenizer.convert_ids_to_tokens(token)!r} ({token}) has no "
            f"embedding: the tokenizer has {len(self.tokenizer):,} tokens, the model's embedding "
            f"{self.embeddings:,} rows"
        )


def vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Return a tokenizer with the number of rows of its model's embedding."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index, assignment]
    return Vocabulary(tokenizer, rows)


def check_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    sequences: Sequence[Sequence[int]],
) -> None:
    """Refuse texts with a token that the model has no embedding of.

    Args:
        model: a language model.
        tokenizer: its tokenizer.
        texts: n texts or names of texts, for the message.
        sequences: n sequences of token ids.

    Raises:
        InputError: naming the token, both sizes and the text.
    """
    known = vocabulary(model, tokenizer)
    for text, ids in zip(texts, sequences, strict=True):
        fault = known.fault(ids)
        if fault:
            named = text if len(text) <= NAMED_LENGTH else f"{text[:NAMED_LENGTH]}…"
            raise InputError(fault, where=repr(named), hint=HINT)
