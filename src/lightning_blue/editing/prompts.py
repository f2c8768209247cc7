"""The prompts behind each edit: contexts around it, token ids, and where the subject ends."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blue_callbacks.ranges import SEED, Range, check_ranges
from lightning_blue.data.requests import EditRequest
from lightning_blue.language_model.chat import markers
from lightning_blue.language_model.generation import generate
from lightning_blue.language_model.tokens import (
    Encoded,
    encode_targets,
    encode_with_subject,
    target_prefixes,
)
from lightning_blue.support.errors import InputError
from lightning_blue.support.processes import distribute

CONTEXT_STARTS = ("The", "Therefore", "Because", "I", "You")
KL_PROMPT = "{} is a"
MAX_CONTEXT_TOKENS = 10_000  # where the model does not say how many tokens it reads


class EditPrompts(NamedTuple):
    """The prompts that one edit's target is optimised on.

    Attributes:
        rewriting: the request in every context, the bare one first, followed by the target's
            tokens but the last.
        target: ids of the new object, with what stands between it and the prompt, and with an
            end-of-text token behind it where that is asked for.
        subject: "{subject} is a", cut after the subject: what is said next must stay as it is.
    """

    rewriting: list[Encoded]
    target: list[int]
    subject: Encoded

    @property
    def length(self) -> int:
        """Tokens of the longest prompt from the subject's last token on."""
        return max(len(row.ids) - row.lookup for row in self.rewriting)

    @property
    def prefix_length(self) -> int:
        """Tokens of the longest prompt before the subject's last token."""
        return max(row.lookup for row in self.rewriting)


def context_templates(prefixes: Sequence[str]) -> list[str]:
    """Return the bare template and one for each prefix, with ``{}`` for the prompt."""
    return ["{}", *(f"{prefix.replace('{', ' ').replace('}', ' ')} {{}}" for prefix in prefixes)]


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Sequence[str],
) -> list[list[Encoded]]:
    """Encode every request in every template with one tokenizer call: requests, then templates.

    In a prompt with a chat template the context stands before the user's own words.
    """
    known = markers(tokenizer)
    places = [known.opening(request.prompt) for request in requests]
    texts = [
        request.prompt[:place] + template.replace("{}", request.prompt[place:], 1)
        for request, place in zip(requests, places, strict=True)
        for template in templates
    ]
    subjects = [r.subject for r in requests for _ in templates]
    encoded = encode_with_subject(tokenizer, texts, subjects)
    width = len(templates)
    return [encoded[i : i + width] for i in range(0, len(encoded), width)]


def edit_prompts(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Sequence[str],
    end_of_text: bool = False,
) -> list[EditPrompts]:
    """Tokenise the rewriting prompts, each followed by its target but the last token, and KL's.

    With ``end_of_text`` the tokenizer's end-of-text token is the last one of each target.
    """
    given = [r.target_prefix for r in requests]
    prefixes = target_prefixes(tokenizer, [r.text for r in requests], given)
    targets = encode_targets(tokenizer, [r.target_new for r in requests], prefixes)
    if end_of_text:
        targets = [[*target, int(tokenizer.eos_token_id)] for target in targets]
    subjects = [r.subject for r in requests]
    kl = encode_with_subject(tokenizer, [KL_PROMPT] * len(requests), subjects)
    groups = _encode(tokenizer, requests, templates)
    return [
        EditPrompts(
            [Encoded(row.ids + target[:-1], row.lookup) for row in group],
            target,
            Encoded(kl_row.ids[: kl_row.lookup + 1], kl_row.lookup),
        )
        for group, target, kl_row in zip(groups, targets, kl, strict=True)
    ]


def require_end_of_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that there is a token to end targets with.

    Raises:
        InputError: if the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end-of-text token to end targets with",
            where="model.target.end_of_text",
            hint="leave it out",
        )


def written_contexts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int
) -> list[str]:
    """Let the model write a context for each of `CONTEXT_STARTS`.

    Args:
        model: a causal language model in eval mode, not yet edited.
        tokenizer: its tokenizer.
        tokens: length of each context.
        seed: of the sampling.
    """
    write = partial(generate, model, tokenizer, max_new_tokens=tokens, top_k=5, seed=seed)
    texts = distribute(list(CONTEXT_STARTS), write)
    whole = [start + text for start, text in zip(CONTEXT_STARTS, texts, strict=True)]
    return [f"{' '.join(text.split())}." for text in whole]


def check_contexts(
    context_tokens: int | None, seed: int | None, most: int = MAX_CONTEXT_TOKENS
) -> None:
    """Check the numbers by which a model writes contexts.

    Args:
        context_tokens: length of the prefixes that the model writes.
        seed: of their sampling.
        most: tokens that a prefix may have.

    Raises:
        InputError: naming the one that is out of its range.
    """
    given = {"context_tokens": context_tokens, "seed": seed}
    check_ranges("model", given, context_tokens=Range(1, most, whole=True), seed=SEED)
