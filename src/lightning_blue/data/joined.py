"""Requests with what a run says about all of them: a target prefix, a chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_blue.data.requests import EditRequest
from lightning_blue.language_model.chat import markers, wrap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def with_prefix(request: EditRequest, target_prefix: str) -> EditRequest:
    """Return a request with a prefix before its objects, unless it brings its own."""
    if request.target_prefix is not None:
        return request
    neighborhood, portability = (
        tuple(replace(probe, target_prefix=target_prefix) for probe in probes)
        for probes in (request.neighborhood, request.portability)
    )
    return replace(
        request, target_prefix=target_prefix, neighborhood=neighborhood, portability=portability
    )


def in_chat(
    requests: Sequence[EditRequest], tokenizer: PreTrainedTokenizerBase, system: str | None
) -> list[EditRequest]:
    """Put the tokenizer's chat template around every prompt that carries none.

    Raises:
        InputError: if there is no template, or it refuses or changes a prompt.
    """
    known = markers(tokenizer)

    def wrapped(text: str) -> str:
        return wrap(tokenizer, text, system, known)

    return [_in_chat(request, wrapped) for request in requests]


def _in_chat(request: EditRequest, wrapped: Callable[[str], str]) -> EditRequest:
    prompt = wrapped(request.prompt)
    neighborhood, portability = (
        tuple(replace(probe, prompt=wrapped(probe.prompt)) for probe in probes)
        for probes in (request.neighborhood, request.portability)
    )
    return replace(
        request,
        prompt=prompt,
        question="" if prompt == request.prompt else request.text,
        paraphrases=tuple(map(wrapped, request.paraphrases)),
        neighborhood=neighborhood,
        portability=portability,
        generation_prompts=tuple(map(wrapped, request.generation_prompts)),
    )
