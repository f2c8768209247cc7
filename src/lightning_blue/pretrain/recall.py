"""Recall: whether the model puts the right object first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_blue.data.requests import Probe
from lightning_blue.pretrain.world import KnownFact


@dataclass(frozen=True)
class RecallRow:
    """One line of the table: which prompts, how many, and the share answered right."""

    prompts: str
    count: int
    top1: float


def answered_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Say for each row whether every labelled token is the most probable one in its place.

    Args:
        logits: (batch, length, vocabulary), position t predicts token t + 1.
        labels: (batch, length), -100 where nothing is asked.

    Returns:
        (batch,) booleans.
    """
    wanted = labels[:, 1:]
    right = logits[:, :-1].argmax(-1) == wanted
    return (right | (wanted == -100)).all(-1)


@torch.no_grad()
def object_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    *,
    batch_size: int = 128,
    description: str = "recall",
) -> Tensor:
    """Ask each prompt and compare the answer, all its tokens, with the most probable ones.

    Answers of several tokens are read under teacher forcing. Returns (len(probes),) booleans in
    the order of ``probes``.
    """
    rows = [_row(tokenizer, probe) for probe in probes]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    right = torch.zeros(len(rows), dtype=torch.bool)
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc=description, leave=False, disable=len(starts) < 4):
        chosen = order[start : start + batch_size]
        ids, mask, labels = _pad([rows[index] for index in chosen], model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        right[chosen] = answered_right(logits, labels).cpu()
    return right


def recall_table(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[KnownFact]
) -> list[RecallRow]:
    """Measure recall on trained wordings, on held-out wordings and on neighbours.

    A kind of prompt of which there is none has no row.
    """
    kinds: dict[str, Iterable[Probe]] = {
        "trained wordings": (Probe(text, fact.answer) for fact in facts for text in fact.trained),
        "held-out wordings": (Probe(text, fact.answer) for fact in facts for text in fact.held_out),
        "neighbours": (probe for fact in facts for probe in fact.neighbours),
    }
    table = []
    for kind, probes in kinds.items():
        distinct = list(dict.fromkeys(probes))
        if distinct:
            right = object_recall(model, tokenizer, distinct, description=kind)
            table.append(RecallRow(kind, len(distinct), right.float().mean().item()))
    return table


def as_markdown(table: Sequence[RecallRow]) -> str:
    """Lay the table out for a person.

    >>> print(as_markdown([RecallRow("trained wordings", 40, 0.975)]))
    | prompts | number | top-1 recall |
    |---|---|---|
    | trained wordings | 40 | 97.5% |
    """
    lines = ["| prompts | number | top-1 recall |", "|---|---|---|"]
    lines += [f"| {row.prompts} | {row.count} | {row.top1:.1%} |" for row in table]
    return "\n".join(lines)


def _row(tokenizer: PreTrainedTokenizerBase, probe: Probe) -> tuple[list[int], int]:
    """Tokens of prompt and answer, and how many of them are the answer's."""
    prompt = tokenizer(probe.prompt, add_special_tokens=False).input_ids
    answer = tokenizer(f" {probe.answer}", add_special_tokens=False).input_ids
    return prompt + answer, len(answer)


def _pad(
    rows: Sequence[tuple[list[int], int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad on the right; labels are -100 except on the answers. All (batch, length)."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for index, (row, answer) in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
        labels[index, len(row) - answer : len(row)] = torch.tensor(row[-answer:])
    return ids.to(device), mask.to(device), labels.to(device)
