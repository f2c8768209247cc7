"""The prompts behind each edit: contexts around it, token ids, and where the subject ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_blue.editing.targets import IGNORED, TargetPrompts
from lightning_blue.requests import EditRequest
from lightning_blue.subjects import Encoded, encode_with_subject, target_ids

KL_PROMPT = "{} is a"


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
    rows = [e for group in _encode(tokenizer, requests, templates) for e in group]
    lookups = torch.tensor([row.lookup for row in rows], device=device)
    return LookupRows(_pad([row.ids[: row.lookup + 1] for row in rows], device), lookups)


def target_prompts(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Sequence[str],
    device: torch.device,
) -> TargetPrompts:
    """Tokenise the rewriting prompts, each followed by its target but the last token, and KL's."""
    targets = [target_ids(tokenizer, r.target_new) for r in requests]
    width = max(map(len, targets))
    kl = encode_with_subject(tokenizer, [KL_PROMPT] * len(requests), [r.subject for r in requests])
    rows: list[Encoded] = []
    reads: list[list[int]] = []  # where logits are read, counted from the lookup
    labels: list[list[int]] = []
    groups = _encode(tokenizer, requests, templates)
    for group, target, kl_row in zip(groups, targets, kl, strict=True):
        blank = width - len(target)
        for row in group:
            first = len(row.ids) - 1 - row.lookup
            rows.append(Encoded(row.ids + target[:-1], row.lookup))
            reads.append([*range(first, first + len(target)), *[first] * blank])
            labels.append([*target, *[IGNORED] * blank])
        rows.append(kl_row)
        reads.append([0] * width)
        labels.append([IGNORED] * width)
    lookup = max(row.lookup for row in rows)
    starts = [lookup - row.lookup for row in rows]
    ids = [[0] * start + row.ids for start, row in zip(starts, rows, strict=True)]
    shape = (len(requests), len(templates) + 1, -1)
    return TargetPrompts(
        _pad(ids, device).view(shape),
        torch.tensor(starts, device=device).view(shape[:2]),
        torch.tensor(reads, device=device).view(shape) + lookup,
        torch.tensor(labels, device=device).view(shape),
        lookup,
    )


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Right-pad with token 0; with causal attention no position that is read sees the padding."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
