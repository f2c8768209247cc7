"""Save an edited model in the dtype of its checkpoint, and say what rounding to it costs.

Edits are summed in float32 whatever the checkpoint's dtype. What was never edited is in the saved
folder as it was in the checkpoint, to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_blue.language_model.loading import checkpoint_dtype
from lightning_blue.support.storage import write_atomic


def save_language_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | None = None,
    edited: Collection[str] = (),
) -> None:
    """Save a model and its tokenizer as a Hugging Face folder.

    Args:
        folder: where to; it exists.
        model: on any device. It stays as it is.
        tokenizer: its tokenizer.
        dtype: of the saved weights; None: the model's.
        edited: names of the weights that were edited. In the checkpoint's own dtype these alone are
            rounded: a norm, say, that the checkpoint keeps in another one is saved as it is.
    """
    dtype = dtype or model.dtype
    if dtype == model.dtype:
        model.save_pretrained(folder)
    else:
        own = dtype == checkpoint_dtype(model)
        state_dict = converted(model, dtype, edited if own else None)
        model.save_pretrained(folder, state_dict=state_dict)
        _state_dtype(folder / "config.json", model.dtype, dtype)
    tokenizer.save_pretrained(folder)


def converted(
    model: PreTrainedModel, dtype: torch.dtype, edited: Collection[str] | None
) -> dict[str, Tensor]:
    """Return a model's weights in another dtype, on the CPU.

    Weights that share their memory, as a tied head does, still share it. What is larger than the
    dtype holds stays as it is, with a warning.

    Args:
        model: on any device.
        dtype: of the weights.
        edited: names of those that may be rounded; others which the dtype does not hold to the bit
            stay as they are. None: all may be.
    """
    done: dict[tuple[Any, ...], Tensor] = {}
    weights: dict[str, Tensor] = {}
    too_large = []
    for name, weight in model.state_dict().items():
        place = (weight.device, weight.data_ptr(), weight.shape, weight.stride())
        if place not in done:
            value = weight.to("cpu", dtype) if weight.is_floating_point() else weight.cpu()
            exact = edited is not None and name not in edited
            if exact and not torch.equal(value.to(weight), weight):
                value = weight.cpu()
            elif value.isinf().any():
                too_large.append(name)
                value = weight.cpu()
            done[place] = value
        weights[name] = done[place]
    if too_large:
        rank_zero_warn(
            f"{', '.join(too_large)}: larger than {_name(dtype)} holds, and so saved in "
            f"{_name(model.dtype)}"
        )
    return weights


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight with the values that it has when it is saved, in its own dtype."""
    value = weight.to(dtype).to(weight)
    return value if bool(value.isfinite().all()) else weight


def rounding_loss(original: Tensor, edited: Tensor, dtype: torch.dtype) -> float:
    """Return the part of an update that is lost when weights are rounded to a dtype.

    Args:
        original: the unedited weight, of any shape.
        edited: the same with the update, in float32 or better.
        dtype: to which both are rounded.

    Returns:
        ``|(round(W) - round(W0)) - (W - W0)| / |W - W0|`` in Frobenius norms; 0 without an update.
        Near 1 for an update whose entries are below half a last place of the weight's.

    >>> old = torch.tensor([1.0, 1.0])
    >>> rounding_loss(old, torch.tensor([1.0, 1.25]), torch.bfloat16)
    0.0
    >>> rounding_loss(old, torch.tensor([1.0, 1.001]), torch.bfloat16)
    1.0
    """
    original = original.to(edited)
    update = edited - original
    size = float(update.norm())
    if size == 0:
        return 0.0
    written = edited.to(dtype).to(edited) - original.to(dtype).to(edited)
    return float((written - update).norm()) / size


def _state_dtype(path: Path, was: torch.dtype, dtype: torch.dtype) -> None:
    """Let ``config.json`` and its parts state the dtype in which the weights were saved."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) == _name(was):
                part[key] = _name(dtype)
    write_atomic(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
