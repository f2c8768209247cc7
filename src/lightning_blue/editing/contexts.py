"""The prompts behind each edit: contexts around it, token ids, and where the subject ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
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


class LookupRows(NamedTuple):
    """Prompts cut after the subject's last token.

    Attributes:
        input_ids: right padded, ``(n_rows, n_tokens)``.
        lookups: index of the subject's last token, ``(n_rows,)``.
    """

    input_ids: Tensor
    lookups: Tensor


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


def lookup_rows(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Sequence[str],
    device: torch.device,
) -> LookupRows:
    """Tokenise requests in contexts up to the subject: nothing after it changes its key."""
    groups = _encode(tokenizer, requests, templates)
    rows = [row for group in groups for row in group]
    lookups = torch.tensor([row.lookup for row in rows], device=device)
    return LookupRows(_pad([row.ids[: row.lookup + 1] for row in rows], device), lookups)


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
    """Put the rows' lookups into one column."""
    column = max(row.lookup for row in rows)
    starts = [column - row.lookup for row in rows]
    ids = [[0] * start + row.ids for start, row in zip(starts, rows, strict=True)]
    return AlignedRows(_pad(ids, device), torch.tensor(starts, device=device), column)


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Right-pad with token 0; with causal attention no position that is read sees the padding."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
