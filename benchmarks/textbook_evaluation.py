"""Evaluation as published evaluators do it: one record at a time, logits of every position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.textbook import at_least_float32, pad, target_tokens
from lightning_blue.data.requests import EditRequest
from lightning_blue.language_model.scoring import prompt_noise
from lightning_blue.metrics.functional import fluency


class Score(NamedTuple):
    """Mean nats per target token, and whether each of them is the most probable one."""

    nll: float
    correct: list[bool]


@torch.no_grad()
def score_record(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: EditRequest
) -> list[tuple[Score, Score]]:
    """Score the new and the true object behind each prompt of a record, as one padded batch.

    Prompts in order: the request's own, its paraphrases, its neighbours.
    """
    prompts = [request.text, *request.paraphrases, *(n.prompt for n in request.neighborhood)]
    new, true = request.target_new, request.target_true or ""
    pairs = [(new, true)] * (1 + len(request.paraphrases))
    pairs += [(new, probe.answer) for probe in request.neighborhood]
    starts = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    rows = [
        (start, target_tokens(tokenizer, target))
        for start, pair in zip(starts, pairs, strict=True)
        for target in pair
    ]
    inputs = pad([start + target for start, target in rows], model.device)
    logits = at_least_float32(model(**inputs, use_cache=False).logits)
    log_probs = F.log_softmax(logits, dim=-1)
    scores = []
    for row, (start, target) in enumerate(rows):
        at = log_probs[row, len(start) - 1 : len(start) + len(target) - 1]
        labels = torch.tensor(target, device=model.device)
        nll = -at.gather(1, labels[:, None]).mean()
        scores.append(Score(float(nll), (at.argmax(-1) == labels).tolist()))
    return list(zip(scores[::2], scores[1::2], strict=True))


@torch.no_grad()
def write_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_length: int = 100,
    top_k: int = 5,
    seed: int = 0,
) -> list[str]:
    """Continue prompts up to ``max_length`` tokens with a KV cache, one prompt at a time."""
    return [
        _write_together(model, tokenizer, [prompt], max_length, top_k, seed)[0]
        for prompt in prompts
    ]


@torch.no_grad()
def write_texts_of_record(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_length: int = 100,
    top_k: int = 5,
    seed: int = 0,
) -> list[str]:
    """Continue a record's prompts as one left-padded batch with a KV cache: the tougher rival."""
    return _write_together(model, tokenizer, prompts, max_length, top_k, seed)


def _write_together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_length: int,
    top_k: int,
    seed: int,
) -> list[str]:
    starts: list[list[int]] = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, starts))
    blanks = torch.tensor([width - len(start) for start in starts], device=model.device)
    ids = torch.tensor([[0] * (width - len(s)) + s for s in starts], device=model.device)
    shortest = min(map(len, starts))
    noise = torch.zeros(len(prompts), max_length - shortest)
    for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        steps = max_length - len(start)
        noise[row, :steps] = prompt_noise(prompt, seed, steps)
    written = [ids]
    tokens, cache = ids, None
    for step in range(max_length - shortest):
        columns = torch.arange(width + step, device=model.device)
        output = model(
            input_ids=tokens,
            attention_mask=(columns >= blanks[:, None]).long(),
            position_ids=(columns - blanks[:, None]).clamp(min=0)[:, -tokens.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        tokens = _sample(output.logits[:, -1], noise[:, step].to(model.device), top_k)
        cache = output.past_key_values
        written.append(tokens)
    whole = torch.cat(written, dim=1).tolist()
    return [
        str(tokenizer.decode(row[width - len(s) :][:max_length], skip_special_tokens=True))
        for row, s in zip(whole, starts, strict=True)
    ]


def _sample(logits: Tensor, uniform: Tensor, top_k: int) -> Tensor:
    """Pick one of the most probable tokens by inverting their distribution function, ``(n, 1)``."""
    values, candidates = logits.float().topk(top_k)
    cumulated = values.softmax(-1).cumsum(-1)
    picked = (cumulated[:, :-1] < uniform[:, None]).sum(1, keepdim=True)
    return candidates.gather(1, picked)


def evaluate_record(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: EditRequest,
    *,
    texts: str | None = None,
) -> dict[str, float]:
    """Measure one record; ``texts`` is None, ``one prompt`` or ``one record`` at a time."""
    scores = score_record(model, tokenizer, request)
    paraphrased = 1 + len(request.paraphrases)
    better = [new.nll < true.nll for new, true in scores]
    measured = {
        "efficacy": float(better[0]),
        "generalization": _mean(better[1:paraphrased]),
        "specificity": _mean([not b for b in better[paraphrased:]]),
    }
    if texts is not None and request.generation_prompts:
        write = write_texts if texts == "one prompt" else write_texts_of_record
        written = write(model, tokenizer, request.generation_prompts)
        measured["fluency"] = 100 * _mean([fluency(text) for text in written])
    return measured


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
