"""What a model says next: its greedy continuation, and how probable each next token is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_blue.language_model.batching import inference
from lightning_blue.language_model.generation import generate
from lightning_blue.language_model.scoring import logits_at
from lightning_blue.language_model.tokens import encode_prompts, written_texts


class Answer(NamedTuple):
    """What a model says behind a prompt.

    Attributes:
        continuation: its greedy one, up to an end of text.
        probabilities: of each token to come next, ``(vocabulary,)``, on the CPU.
    """

    continuation: str
    probabilities: Tensor

    def top(self, count: int) -> list[int]:
        """Return the ids of the most probable tokens, the most probable first."""
        order = self.probabilities.argsort(descending=True, stable=True)
        return [int(token) for token in order[:count]]


@torch.no_grad()
def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tokens: int
) -> list[Answer]:
    """Let a model go on behind each prompt, as it stands there; BOS as everywhere.

    Args:
        model: a causal language model on any device.
        tokenizer: its tokenizer.
        prompts: n texts.
        tokens: of a continuation.

    Raises:
        InputError: if a prompt is empty, does not fit the model's context, or has a token that the
            model has no embedding of.
    """
    continuations = generate(
        model, tokenizer, prompts, max_new_tokens=tokens, top_k=1, stop_at_end=True
    )
    answers = []
    with inference(model):
        for ids, continuation in zip(
            encode_prompts(tokenizer, prompts), continuations, strict=True
        ):
            last = torch.tensor([len(ids) - 1], device=model.device)
            arguments = {"input_ids": torch.tensor([ids], device=model.device)}
            logits = logits_at(model, arguments, last)[0]
            answers.append(Answer(continuation, logits.softmax(-1).cpu()))
    return answers


def spelled(tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: Sequence[int]) -> list[str]:
    """Return how each of some tokens is written behind a prompt, its space included."""
    [ids] = encode_prompts(tokenizer, [prompt])
    return [written_texts(tokenizer, ids, [token])[0] for token in tokens]
