"""From texts to token ids: prompts, objects behind them, and where a prompt's subject ends.

Every text that a model reads is encoded here, so that all of them begin alike: with the special
tokens that the tokenizer puts before a text, and without those that it puts behind one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from lightning_blue.language_model.chat import markers
from lightning_blue.language_model.joining import SPACE, joint
from lightning_blue.support.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLOT = "{}"
ANCHOR = "."  # before an object that a space precedes
OTHER_ANCHORS = ("\n", ".", "a")  # before any other, the first that keeps its tokens
_PROBES = ("a", ".", "1", "的")


class Encoded(NamedTuple):
    """A prompt as token ids, BOS included where the tokenizer adds one; nothing is added behind.

    ``lookup`` is the index in ``ids`` of the subject's last token.
    """

    ids: list[int]
    lookup: int


class SubjectSpan(NamedTuple):
    """A prompt as token ids, and which of them are its subject: from ``first`` to ``last``."""

    ids: list[int]
    first: int
    last: int


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


def encode_with_span(
    tokenizer: PreTrainedTokenizerBase, templates: Sequence[str], subjects: Sequence[str]
) -> list[SubjectSpan]:
    """Encode as :func:`encode_with_subject` does, and say which tokens cover the subject.

    A token that reaches across an end of the subject is one of them, special tokens are not.
    """
    encoded = encode_with_subject(tokenizer, templates, subjects)
    filled = [fill(*pair) for pair in zip(templates, subjects, strict=True)]
    _, offsets = _encode(tokenizer, [text for text, _ in filled])
    return [
        SubjectSpan(
            ids,
            next(i for i, (begin, stop) in enumerate(spans) if begin < stop and stop > start),
            lookup,
        )
        for (ids, lookup), (_, start), spans in zip(encoded, filled, offsets, strict=True)
    ]


def target_prefixes(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    given: Sequence[str | None] | None = None,
) -> list[str]:
    """Return what stands between each prompt and its object: :func:`joint`'s prefixes."""
    known = markers(tokenizer)
    fixed = [None] * len(prompts) if given is None else given
    return [joint(*pair, known).prefix for pair in zip(prompts, fixed, strict=True)]


def encode_targets(
    tokenizer: PreTrainedTokenizerBase,
    targets: Sequence[str],
    prefixes: Sequence[str] | None = None,
) -> list[list[int]]:
    """Token ids of each object as it continues a prompt: with its prefix, never a BOS.

    Each object is encoded after a full stop, whose own tokens are then cut off, because tokenizers
    that put a symbol at the start of a text (Llama-2, Mistral) would put it before a lone object
    too. Where no anchor keeps its tokens, the object is encoded alone.

    Args:
        tokenizer: of the model.
        targets: n objects without white space around them.
        prefixes: what stands before each, see :func:`target_prefixes`; a space by default.
    """
    befores = [SPACE] * len(targets) if prefixes is None else list(prefixes)
    texts = [before + target for before, target in zip(befores, targets, strict=True)]
    spaced = {i: text for i, text in enumerate(texts) if befores[i] == SPACE}
    encoded = _behind(tokenizer, ANCHOR, spaced)
    for anchor in OTHER_ANCHORS:
        others = (i for i in range(len(texts)) if i not in spaced and i not in encoded)
        encoded |= _behind(tokenizer, anchor, {i: texts[i] for i in others})
    left = [i for i in range(len(texts)) if i not in encoded]
    encoded |= dict(zip(left, plain_ids(tokenizer, [texts[i] for i in left]), strict=True))
    return [encoded[i] for i in range(len(texts))]


def target_ids(tokenizer: PreTrainedTokenizerBase, target: str) -> list[int]:
    """Token ids of one object behind a space; see :func:`encode_targets`."""
    return encode_targets(tokenizer, [target])[0]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts as a model reads them before it goes on.

    Special tokens that the tokenizer puts before a text (BOS) are there, unless the text brings
    them along (:class:`Markers`); those that it puts behind one (EOS) are not.
    """
    start, known = leading_ids(tokenizer), markers(tokenizer)
    return [
        ids if known.carried_by(text) else start + ids
        for text, ids in zip(texts, plain_ids(tokenizer, texts), strict=True)
    ]


def token_texts(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """Return how a text is cut: the part of it that each token of :func:`encode_prompts` covers.

    White space that the tokenizer counts to no token belongs to the next one. A token that covers
    nothing of the text, as a BOS does, is spelled by its name; tokens that share a character all
    show it.

    Raises InputError if the tokenizer has no offsets.
    """
    [ids], [offsets] = _encode(tokenizer, [text])
    parts, read = [], 0
    for name, (first, stop) in zip(tokenizer.convert_ids_to_tokens(ids), offsets, strict=True):
        skipped = read < first and text[read:first].isspace()
        parts.append(text[read if skipped else first : stop] if first < stop else str(name))
        read = max(read, stop)
    return parts


def written_texts(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]
) -> list[str]:
    """Return what each token adds to a text when it is written behind those before it.

    A tokenizer may write a first token without its space, hence ``before``. A token that adds no
    whole character, or is a special one, is spelled by its name.
    """

    def text(some: Sequence[int]) -> str:
        return str(
            tokenizer.decode(
                list(some), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    texts = [text([*before, *ids[:count]]) for count in range(len(ids) + 1)]
    names = tokenizer.convert_ids_to_tokens(list(ids))
    added = [whole[len(start) :] for start, whole in pairwise(texts)]
    return [
        piece if piece and "\ufffd" not in piece else str(name)
        for piece, name in zip(added, names, strict=True)
    ]


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text."""
    for probe in _PROBES:
        [bare], [whole] = plain_ids(tokenizer, [probe]), tokenizer([probe])["input_ids"]
        places = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        if bare:
            return list(whole[: next(places, len(whole) - len(bare))])
    return []


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens around it."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return ids


def _behind(
    tokenizer: PreTrainedTokenizerBase, anchor: str, texts: dict[int, str]
) -> dict[int, list[int]]:
    """Encode texts behind an anchor; return those behind which the anchor keeps its tokens."""
    if not texts:
        return {}
    own, *rows = plain_ids(tokenizer, [anchor, *(anchor + text for text in texts.values())])
    pairs = zip(texts, rows, strict=True)
    return {i: row[len(own) :] for i, row in pairs if row[: len(own)] == own}


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Token ids of each prompt (:func:`encode_prompts`), and the character offsets of each."""
    if not tokenizer.is_fast:
        raise InputError(
            f"The tokenizer {type(tokenizer).__name__} does not tell which characters a token "
            "covers",
            hint="take the model's fast tokenizer (a tokenizer.json beside the weights)",
        )
    if not texts:
        return [], []
    batch = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    start, known = leading_ids(tokenizer), markers(tokenizer)
    before = [[] if known.carried_by(text) else start for text in texts]
    ids = [special + row for special, row in zip(before, batch["input_ids"], strict=True)]
    offsets = [
        [(0, 0)] * len(special) + row
        for special, row in zip(before, batch["offset_mapping"], strict=True)
    ]
    return ids, offsets
