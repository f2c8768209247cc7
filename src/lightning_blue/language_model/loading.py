"""Load a causal language model and its tokenizer, by name, path, or from the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import cast

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_blue.language_model.multimodal import auto_class
from lightning_blue.language_model.states import is_finite
from lightning_blue.support.errors import InputError, first_line
from lightning_blue.support.hub import asked, looks_local, missing_path, no_source

PACKAGED = {"almanac": resources.files("lightning_blue") / "assets" / "almanac" / "model"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_language_model(
    name_or_path: str, dtype: str = "float32", revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in eval mode, frozen, and its tokenizer; remote code is never run.

    Args:
        name_or_path: ``almanac`` for the model in the package, a folder, or a name on the hub.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: if there is no such model, it is not a decoder-only language model, or a weight
            is NaN or infinite; that is looked for in one pass over the weights.
    """
    if dtype not in DTYPES:
        raise InputError(
            f"unknown dtype {dtype!r}",
            where="model.dtype",
            hint=f"choose one of {', '.join(DTYPES)}",
        )
    source = str(PACKAGED.get(name_or_path, name_or_path))
    where = f"model.name_or_path = {name_or_path}"
    if looks_local(source) and not Path(source).exists():
        raise missing_path(name_or_path, where)
    with asked("model", source, revision) as reason:
        try:
            config = AutoConfig.from_pretrained(source, revision=revision)
            model = auto_class(config).from_pretrained(
                source, config=config, dtype=DTYPES[dtype], revision=revision
            )
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        except (OSError, ValueError) as error:
            what, hint = f"the model cannot be loaded: {first_line(error)}", _hint(name_or_path)
            if reason is not None:
                what, hint = no_source("model", name_or_path, reason, PACKAGED)
            raise InputError(what, where=where, hint=hint) from error
    if config.is_encoder_decoder:
        raise InputError(
            f"{config.model_type} is an encoder-decoder; editing needs a decoder-only model",
            where=f"model.name_or_path = {name_or_path}",
        )
    _require_finite(model, name_or_path)
    model.requires_grad_(False).eval()
    return cast(PreTrainedModel, model), tokenizer


def loaded_name(model: PreTrainedModel) -> str:
    """Return the name by which `load_language_model` finds a model that it has loaded."""
    source = str(model.config.name_or_path)
    return next((name for name, path in PACKAGED.items() if str(path) == source), source)


def _require_finite(model: PreTrainedModel, name_or_path: str) -> None:
    """Refuse a model with NaN or infinity in its weights, before any work is spent on it."""
    bad = [name for name, weight in model.named_parameters() if not is_finite(weight)]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise InputError(
            f"NaN or infinity in the weights {', '.join(bad[:3])}{more}",
            where=f"model.name_or_path = {name_or_path}",
            hint="the file may be damaged; float16 holds nothing above 65504, bfloat16 does",
        )


def _hint(name_or_path: str) -> str:
    if Path(name_or_path).is_dir():
        return "the folder needs config.json, model.safetensors and the tokenizer's files"
    return "give an existing folder or a name on the hub (gated models need `hf auth login`)"
