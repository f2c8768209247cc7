"""A run as a PEFT LoRA adapter: the factors of its batches are the adapter's A and B.

Written without peft; any program that reads LoRA adapters can load it on the unedited model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from blue_callbacks import WeightId
from blue_callbacks.solvers import CLOSED_FORMS
from lightning_blue.runs.base import UneditedModel
from lightning_blue.runs.journal import Journal
from lightning_blue.runs.journal_header import JournalHeader
from lightning_blue.runs.undo import transformed
from lightning_blue.runs.weights import solvable, with_changes
from lightning_blue.support.storage import whole_folder, write_atomic, writing


class LowRank(NamedTuple):
    """A change of a weight as ``up @ down``.

    Attributes:
        up: LoRA's B, ``(d_out, r)``, float32.
        down: LoRA's A, ``(r, d_in)``, float32.
        error: what was cut off, as a fraction of the change's Frobenius norm; None: nothing, the
            factors are the run's.
    """

    up: Tensor
    down: Tensor
    error: float | None


def write_adapter(
    folder: Path,
    journal: Journal,
    base: Callable[[], UneditedModel],
    rank: int | None = None,
) -> dict[WeightId, LowRank]:
    """Write a run as an adapter folder, whole or not at all.

    Args:
        folder: where to.
        journal: of the run.
        base: loads the unedited model; called only where RECT, PRUNE or fine-tuning made the
            change more than a product of factors.
        rank: the highest rank allowed; None: any.

    Returns:
        What was written, by weight.

    Raises:
        InputError: if a record is damaged, or the disk is full or may not be written.
    """
    header = journal.header
    plain = header.update["rect_keep"] is None and header.update["post_edit_transform"] is None
    if plain and header.update["solver"] in CLOSED_FORMS:
        found = {weight: _from_factors(journal, weight, rank) for weight in header.weights}
    else:
        unedited = base()
        found = {
            weight: _from_weights(journal, weight, unedited, rank) for weight in header.weights
        }
    tensors = {}
    for weight, low in found.items():
        name = f"base_model.model.{header.weights[weight].module}"
        tensors[f"{name}.lora_A.weight"] = low.down.contiguous()
        tensors[f"{name}.lora_B.weight"] = low.up.contiguous()
    with writing(folder), whole_folder(folder) as building:
        save_file(tensors, building / "adapter_model.safetensors", metadata={"format": "pt"})
        write_atomic(building / "adapter_config.json", adapter_config(header, found))
    return found


def adapter_config(header: JournalHeader, found: dict[WeightId, LowRank]) -> str:
    """Return ``adapter_config.json``: full module names, and scales of one."""
    ranks = {header.weights[weight].module: low.down.shape[0] for weight, low in found.items()}
    highest = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": header.model.name_or_path,
        "revision": header.model.revision,
        "r": highest,
        "lora_alpha": highest,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,  # alpha / rank is the scale
        "target_modules": sorted(ranks),
        "fan_in_fan_out": any(weight.transposed for weight in header.weights.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
    return json.dumps(config, indent=2) + "\n"


def truncated(left: Tensor, right: Tensor, rank: int) -> LowRank:
    """Return the best approximation of ``left @ right`` of a rank, without forming the product.

    Args:
        left: ``(d_out, n)``.
        right: ``(n, d_in)``.
        rank: r, at most n.
    """
    basis, up = torch.linalg.qr(left.double())
    other, down = torch.linalg.qr(right.double().T)
    small = _best(up @ down.T, rank)
    return LowRank((basis @ small.up).float(), (small.down @ other.T).float(), small.error)


def _from_factors(journal: Journal, weight: WeightId, rank: int | None) -> LowRank:
    """Stack the factors of all batches; cut their product where the rank is too high."""
    changes = [change for _, change in journal.changes(weight)]
    left = torch.cat([change.left for change in changes], dim=1)
    right = torch.cat([change.right for change in changes])
    if rank is None or left.shape[1] <= rank:
        return LowRank(left.float(), right.float(), None)
    return truncated(left, right, rank)


def _from_weights(
    journal: Journal, weight: WeightId, base: UneditedModel, rank: int | None
) -> LowRank:
    """Decompose the actual difference of a weight that RECT or PRUNE has a hand in."""
    original = base.weights.read(weight)
    edited = with_changes(original, journal.changes(weight), {})
    with solvable(f"the change of {weight}"):
        difference = transformed(journal.header, original, edited) - original
        low = _best(difference.double(), rank)
    return LowRank(low.up.float(), low.down.float(), low.error)


def _best(matrix: Tensor, rank: int | None) -> LowRank:
    """Cut a singular value decomposition: to a rank, or to what float32 holds of it."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    if rank is None:
        noise = values[0] * max(matrix.shape) * torch.finfo(torch.float32).eps
        rank = max(1, int((values > noise).sum()))
    roots = values[:rank].sqrt()
    error = float(values[rank:].norm() / values.norm().clamp(min=1e-300))
    return LowRank(left[:, :rank] * roots, roots[:, None] * right[:rank], error)
