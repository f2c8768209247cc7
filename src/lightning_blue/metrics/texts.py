"""Texts that a model writes behind the prompts of requests, and the metrics that read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_blue.data.requests import EditRequest
from lightning_blue.language_model import generation
from lightning_blue.language_model.chat import markers
from lightning_blue.metrics import MeanOverRequests, table
from lightning_blue.metrics import functional as F
from lightning_blue.metrics.table import Measure, MetricSpec
from lightning_blue.support.processes import distribute


def write_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    seed: int,
    progress: bool,
    sent: Callable[[str], str],
) -> list[tuple[int, str]]:
    """Continue all generation prompts; return each whole text with its request.

    A chat template is no part of the text, and neither is what is sent besides the prompt: as much
    is written behind it as without it. Several processes share the prompts, and each gets all
    texts; all of them must call it.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        requests: n edit requests.
        seed: of the sampling.
        progress: whether to show a progress bar.
        sent: what the model is sent for a prompt of the data.
    """
    prompts = [(i, p) for i, request in enumerate(requests) for p in request.generation_prompts]
    continuations = distribute(
        [prompt for _, prompt in prompts],
        lambda part: generation.generate(
            model,
            tokenizer,
            [sent(prompt) for prompt in part],
            lengths_of=part,
            seed=seed,
            progress="texts" if progress else None,
        ),
    )
    known = markers(tokenizer)
    return [
        (i, more if known.carried_by(prompt) else prompt + more)
        for (i, prompt), more in zip(prompts, continuations, strict=True)
    ]


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    tokens: int,
    progress: bool,
    sent: Callable[[str], str],
) -> list[str]:
    """Return the model's greedy continuation of each request's prompt.

    Several processes share the prompts, and each gets all results; all of them must call it.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        requests: n edit requests.
        tokens: length of each continuation; 0 leaves it empty.
        progress: whether to show a progress bar.
        sent: as in `write_texts`.
    """
    if not tokens:
        return [""] * len(requests)
    return distribute(
        [sent(request.text) for request in requests],
        lambda prompts: generation.generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=tokens,
            top_k=1,
            stop_at_end=True,
            progress="continuations" if progress else None,
        ),
    )


def text_metric(
    spec: MetricSpec,
    measure: Measure,
    texts: Sequence[tuple[int, str]],
    requests: Sequence[EditRequest],
    idf_texts: Sequence[str] | None,
) -> MeanOverRequests:
    """Fill a metric that reads generated texts, beside reference texts if it needs them.

    Args:
        spec: the metric's row.
        measure: how it is measured by the protocol.
        texts: of `write_texts`.
        requests: n edit requests.
        idf_texts: texts from which consistency learns how rare words are; None: the reference
            texts of the requests.
    """
    if table.REFERENCE_TEXTS in spec.needs:
        return _compare(measure, texts, requests, idf_texts)
    metric = measure.metric(sync_on_compute=False)
    request = torch.tensor([index for index, _ in texts], dtype=torch.long)
    metric.update([text for _, text in texts], request)
    return metric


def _compare(
    measure: Measure,
    texts: Sequence[tuple[int, str]],
    requests: Sequence[EditRequest],
    idf_texts: Sequence[str] | None,
) -> MeanOverRequests:
    """Compare each request's texts, joined, with its reference texts, joined."""
    written: dict[int, list[str]] = {}
    for index, text in texts:
        if requests[index].reference_texts:
            written.setdefault(index, []).append(text)
    references = [text for request in requests for text in request.reference_texts]
    metric = measure.metric(F.fit_tfidf(idf_texts or references), sync_on_compute=False)
    metric.update(
        [" ".join(parts) for parts in written.values()],
        [" ".join(requests[index].reference_texts) for index in written],
        torch.tensor(list(written), dtype=torch.long),
    )
    return metric
