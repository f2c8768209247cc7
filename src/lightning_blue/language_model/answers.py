"""Answers: what a model says when it simply goes on after a prompt, up to where it stops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_blue.language_model.generation import continue_until


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation.

    Attributes:
        ids: the new tokens, the one that completes the first stop string included.
        cuts: the text up to the first stop string, and up to each later one to which it was to go
            on, without that stop string at its end; all of it where there is none.
        ended_by: a stop string (``stop``), an end-of-text token (``end``), or the limit of tokens
            (``limit``).
    """

    ids: tuple[int, ...]
    cuts: tuple[str, ...]
    ended_by: Literal["stop", "end", "limit"]

    @property
    def answer(self) -> str:
        """The text of ``ids``, without the stop string at its end."""
        return self.cuts[0]


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    passed_over: Sequence[int],
    *,
    stops: Sequence[str],
    max_new_tokens: int,
    tokens_per_batch: int | None = None,
    progress: str | None = None,
) -> list[Continuation]:
    """Continue prompts greedily, all together, each until its text holds a stop string.

    Args:
        model: a causal language model on any device, in any dtype.
        tokenizer: its tokenizer.
        prompts: n texts.
        passed_over: for each, after how many stop strings it still goes on, for its later cuts.
        stops: stop strings; an end-of-text token ends a text in any case.
        max_new_tokens: after which a text ends.
        tokens_per_batch: as in `generation.generate`.
        progress: the label of a progress bar; none is shown without it.

    Raises:
        InputError: if a prompt is empty, does not fit the model's context, or has a token that the
            model has no embedding of.
    """
    most: dict[str, int] = {}
    for prompt, count in zip(prompts, passed_over, strict=True):
        most[prompt] = max(most.get(prompt, 0), count)
    texts = _Texts(model, tokenizer, stops)
    allowed = list(most.values())
    written = continue_until(
        model,
        tokenizer,
        list(most),
        lambda place, ids: texts.stops_in(ids) > allowed[place],
        max_new_tokens=max_new_tokens,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )
    ids = dict(zip(most, written, strict=True))
    return [
        texts.continuation(ids[prompt], count)
        for prompt, count in zip(prompts, passed_over, strict=True)
    ]


class _Texts:
    """What new tokens say, decoded by themselves with special tokens, and where they stop."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]
    ) -> None:
        self.tokenizer, self.stops = tokenizer, list(stops)
        config = getattr(model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)  # a chat model has several
        listed = ends if isinstance(ends, list) else [ends]
        self.end_ids = {end for end in (tokenizer.eos_token_id, *listed) if end is not None}
        self.ends = [text for text in (self.text([end]) for end in self.end_ids) if text]

    def text(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def stops_in(self, ids: Sequence[int]) -> float:
        """Count the stop strings in a text; infinitely many where it has come to its end."""
        text = self.text(ids)
        if ids[-1] in self.end_ids or any(end in text for end in self.ends):
            return math.inf
        return sum(map(text.count, self.stops))

    def continuation(self, ids: Sequence[int], passed_over: int) -> Continuation:
        """Cut new tokens at the first stop, and at each later one as far as they were to go on."""
        counts = [self.stops_in(ids[:n]) for n in range(1, len(ids) + 1)]
        ends = [
            next((n for n, count in enumerate(counts, 1) if count > most), len(ids))
            for most in range(passed_over + 1)
        ]
        first = ends[0]
        last = counts[first - 1] if first else 0
        reason: Literal["stop", "end", "limit"] = "stop" if last else "limit"
        return Continuation(
            tuple(ids[:first]),
            tuple(self._cut(ids[:end]) for end in ends),
            "end" if last == math.inf else reason,
        )

    def _cut(self, ids: Sequence[int]) -> str:
        """Take each stop string off the end of a text, at most once, and in their order."""
        text = self.text(ids)
        for stop in (*self.stops, *self.ends):
            text = text.removesuffix(stop)
        return text
