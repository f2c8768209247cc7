"""Hashes by which statistics and runs know a model and its tokenizer."""

from __future__ import annotations

import hashlib
import json

from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SAMPLED_VALUES = 4096  # of each weight, for the fingerprint of a model


def model_fingerprint(model: PreTrainedModel) -> str:
    """Hash the names, shapes and an even sample of the values of all weights."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        stride = max(1, weight.numel() // _SAMPLED_VALUES)
        sample = weight.detach().flatten()[::stride].float().cpu()
        digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash a tokenizer's vocabulary and special tokens."""
    described = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer("a b")["input_ids"]])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def marks_documents(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether it matters to the tokens where a text is cut at ends of lines."""
    whole, first, rest = tokenizer(["a\nb", "a\n", "b"])["input_ids"]
    return bool(whole != first + rest)
