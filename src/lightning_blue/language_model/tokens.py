"""Token positions: where a prompt's subject ends, and which tokens spell an object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lightning_blue.support.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLOT = "{}"
ANCHOR = "."


class Encoded(NamedTuple):
    """A prompt as token ids, BOS included where the tokenizer adds one.

    ``lookup`` is the index in ``ids`` of the subject's last token.
    """

    ids: list[int]
    lookup: int


def place_in_context(context: str, template: str) -> str:
    """Put a request's template into the slot of a context template.

    ``place_in_context("So it is. {}", "The capital of {} is")`` gives
    ``"So it is. The capital of {} is"``. The last ``{}`` of ``context`` is its slot, because a
    context that a model wrote may hold braces of its own.
    """
    before, slot, after = context.rpartition(SLOT)
    if not slot:
        raise ValueError(f"the context template {context!r} has no {SLOT}")
    return before + template + after


def fill(template: str, subject: str) -> tuple[str, int]:
    """Put the subject into the template's last ``{}``.

    Returns the text and the index of the first character of the subject in it.
    """
    before, slot, after = template.rpartition(SLOT)
    if not slot:
        raise ValueError(f"the template {template!r} has no {SLOT} for the subject {subject!r}")
    return before + subject + after, len(before)


def last_token(offsets: Sequence[tuple[int, int]], start: int, end: int) -> int | None:
    """Index of the last token that covers a character of ``text[start:end]``, if there is one.

    ``offsets`` holds (first character, one after the last) of each token. A character of several
    bytes may be split over several tokens, which then share its offsets: the last of them counts.
    Special tokens have empty offsets and never count.
    """
    for index in range(len(offsets) - 1, -1, -1):
        first, stop = offsets[index]
        if first < stop and first < end and stop > start:
            return index
    return None


def encode_with_subject(
    tokenizer: PreTrainedTokenizerBase, templates: Sequence[str], subjects: Sequence[str]
) -> list[Encoded]:
    """Encode each template with its subject in the ``{}``; one tokenizer call for all.

    A template may be a request's prompt, or that prompt inside a context
    (:func:`place_in_context`), and text may follow, as the first tokens of a target do. If the
    subject stands in the text a second time, the one in the slot counts.

    Raises InputError if the tokenizer has no offsets or spells a subject with no token at all.
    """
    if len(templates) != len(subjects):
        raise ValueError(f"{len(templates)} templates but {len(subjects)} subjects")
    filled = [
        fill(template, subject) for template, subject in zip(templates, subjects, strict=True)
    ]
    ids, offsets = _encode(tokenizer, [text for text, _ in filled])
    encoded = []
    for i, (text, start) in enumerate(filled):
        lookup = last_token(offsets[i], start, start + len(subjects[i]))
        if lookup is None:
            raise InputError(
                f"The tokenizer does not encode the subject {subjects[i]!r}",
                where=f"prompt {text!r}",
                hint="leave this request out, or take a model whose tokenizer knows the script",
            )
        encoded.append(Encoded(ids[i], lookup))
    return encoded


def encode_targets(tokenizer: PreTrainedTokenizerBase, targets: Sequence[str]) -> list[list[int]]:
    """Token ids of each object as it continues a prompt: a space before it, never a BOS.

    Each object is encoded after a full stop, whose own tokens are then cut off, because tokenizers
    that put a symbol at the start of a text (Llama-2, Mistral) would put it before a lone object
    too. Where the full stop does not keep its tokens, the object is encoded alone.
    """
    if not targets:
        return []
    anchor, *rows = _ids(tokenizer, [ANCHOR, *(f"{ANCHOR} {target}" for target in targets)])
    alone = _ids(tokenizer, [f" {target}" for target in targets])
    return [
        row[len(anchor) :] if row[: len(anchor)] == anchor else lone
        for row, lone in zip(rows, alone, strict=True)
    ]


def target_ids(tokenizer: PreTrainedTokenizerBase, target: str) -> list[int]:
    """Token ids of one object as it continues a prompt; see :func:`encode_targets`."""
    return encode_targets(tokenizer, [target])[0]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Token ids, special ones included, and character offsets of each text."""
    if not tokenizer.is_fast:
        raise InputError(
            f"The tokenizer {type(tokenizer).__name__} does not tell which characters a token "
            "covers",
            hint="take the model's fast tokenizer (a tokenizer.json beside the weights)",
        )
    if not texts:
        return [], []
    batch = tokenizer(
        texts, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    return batch["input_ids"], batch["offset_mapping"]
