"""The prompts behind each edit: contexts around it, token ids, and where the subject ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from lightning_blue.editing.forward import AlignedRows
from lightning_blue.requests import EditRequest
from lightning_blue.subjects import Encoded, encode_targets, encode_with_subject

KL_PROMPT = "{} is a"


class EditPrompts(NamedTuple):
    """What one edit's target search reads.

    Attributes:
        rewriting: the request in every context, the bare one first, followed by the target's
            tokens but the last.
        target: ids of the new object.
        subject: "{subject} is a", cut after the subject: what is said next must stay as it is.
    """

    rewriting: list[Encoded]
    target: list[int]
    subject: Encoded

    @property
    def length(self) -> int:
        """Tokens of the longest prompt from the subject's last token on."""
        return max(len(row.ids) - row.lookup for row in self.rewriting)


def context_templates(prefixes: Sequence[str]) -> list[str]:
    """Return the bare template and one for each prefix, with ``{}`` for the prompt."""
    return ["{}", *(f"{prefix.replace('{', ' ').replace('}', ' ')} {{}}" for prefix in prefixes)]


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Sequence[str],
) -> list[list[Encoded]]:
    """Encode every request in every template with one tokenizer call: requests, then templates."""
    texts = [template.replace("{}", r.prompt, 1) for r in requests for template in templates]
    subjects = [r.subject for r in requests for _ in templates]
    encoded = encode_with_subject(tokenizer, texts, subjects)
    width = len(templates)
    return [encoded[i : i + width] for i in range(0, len(encoded), width)]


def edit_prompts(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Sequence[str],
) -> list[EditPrompts]:
    """Tokenise the rewriting prompts, each followed by its target but the last token, and KL's."""
    targets = encode_targets(tokenizer, [r.target_new for r in requests])
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


def align(rows: Sequence[Encoded], device: torch.device) -> AlignedRows:
    """Put the rows' lookups into one column; token 0 pads them on both sides."""
    column = max(row.lookup for row in rows)
    starts = [column - row.lookup for row in rows]
    ends = [start + len(row.ids) for start, row in zip(starts, rows, strict=True)]
    ids = torch.zeros(len(rows), max(ends), dtype=torch.long)
    for row, start, end, padded in zip(rows, starts, ends, ids, strict=True):
        padded[start:end] = torch.tensor(row.ids)
    first, after = torch.tensor([starts, ends], device=device)
    return AlignedRows(ids.to(device), first, after, column)
