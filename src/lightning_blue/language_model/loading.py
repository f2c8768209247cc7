"""Load a causal language model and its tokenizer, by name, path, or from the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_blue.language_model.checkpoint_files import gguf_dtype, stored_dtype, stored_tensors
from lightning_blue.language_model.completeness import require_complete
from lightning_blue.language_model.quantized import require_floats, require_unquantized_config
from lightning_blue.language_model.sources import PACKAGED, Source, find_source
from lightning_blue.language_model.states import is_finite
from lightning_blue.language_model.supported import decoder_class, why_not_loaded
from lightning_blue.support.errors import InputError, first_line
from lightning_blue.support.hub import asked, no_source

__all__ = ["DTYPES", "PACKAGED", "checkpoint_dtype", "load_language_model", "loaded_name"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
_OWN_DTYPE = "_checkpoint_dtype"  # an attribute of a loaded model


def load_language_model(
    name_or_path: str, dtype: str = "float32", revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in eval mode, frozen, and its tokenizer; remote code is never run.

    Args:
        name_or_path: ``almanac`` for the model in the package, a folder, a GGUF file (whose weights
            are unpacked), or a name on the hub.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: if there is no such model, it is not a decoder-only language model, it is
            quantised, a file is damaged, config and weights do not belong together, or a weight is
            NaN or infinite; that is looked for in one pass over the weights.
    """
    wanted = dtype_named(dtype, "model.dtype")
    source = find_source(name_or_path, revision)
    with _available(source):
        return _load(source, wanted)


@contextmanager
def _available(source: Source) -> Iterator[None]:
    """Refuse a model that neither a folder, the hub nor its cache has; ask the hub once."""
    if source.folder is not None:
        yield
        return
    with asked("model", source.path, source.revision) as reason:
        if reason is not None and _find_cached(source) is None:
            raise source.refused(*no_source("model", source.path, reason, PACKAGED))
        yield


def dtype_named(name: str, where: str) -> torch.dtype:
    """Return a dtype by the name that a configuration gives it.

    Raises:
        InputError: if weights are not kept in such a dtype here.
    """
    if name not in DTYPES:
        raise InputError(
            f"unknown dtype {name!r}", where=where, hint=f"choose one of {', '.join(DTYPES)}"
        )
    return DTYPES[name]


def loaded_name(model: PreTrainedModel) -> str:
    """Return the name by which `load_language_model` finds a model that it has loaded."""
    source = str(model.config.name_or_path)
    return next((name for name, path in PACKAGED.items() if str(path) == source), source)


def checkpoint_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype in which an edited model is saved unless something else is wanted.

    That of the checkpoint that the model was loaded from; in half precision, and for a model that
    was not loaded by `load_language_model`, that of the model as it is.
    """
    if model.dtype not in (torch.float32, torch.float64):
        return model.dtype
    return cast(torch.dtype, getattr(model, _OWN_DTYPE, model.dtype))


def _load(source: Source, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = _config(source)
    own = _stated_dtype(config)
    require_unquantized_config(config, source)
    loader = decoder_class(config, source)
    if source.folder is not None and source.gguf_file is None:
        own = _checked_files(source.folder, own, source)
    try:
        model, found = loader.from_pretrained(
            source.path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_unpacked(source),
        )
    except MemoryError:
        raise
    except Exception as error:  # whatever a foreign file makes of transformers
        raise why_not_loaded(source, error) from error
    if source.folder is None:
        snapshot = _cached_file(source).parent
        model.config._commit_hash = snapshot.name  # transformers 5.23 notes it no more
        if source.gguf_file is None:
            own = _checked_files(snapshot, own, source)
    if source.gguf_file is not None:
        own = _unpacked_dtype(source)
        _forget_packing(model)
        model.config.name_or_path = source.name
    require_complete(model, found, source)
    tokenizer = _tokenizer(source)
    _require_finite(model, source)
    setattr(model, _OWN_DTYPE, own if own in DTYPES.values() else torch.float32)
    model.requires_grad_(False).eval()
    return cast(PreTrainedModel, model), tokenizer


def _config(source: Source) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(source.path, **source.arguments)
    except Exception as error:
        raise why_not_loaded(source, error) from error


def _tokenizer(source: Source) -> PreTrainedTokenizerBase:
    try:
        return cast(
            PreTrainedTokenizerBase,
            AutoTokenizer.from_pretrained(_tokenizer_path(source), **source.arguments),
        )
    except Exception as error:
        raise source.refused(
            f"the tokenizer cannot be loaded: {type(error).__name__}: {first_line(error).strip()}",
            "put the model's tokenizer.json and tokenizer_config.json beside its weights",
        ) from error


def _tokenizer_path(source: Source) -> str:
    """Return where the tokenizer is; that of a GGUF file on the hub is in the snapshot itself.

    By the repository's name transformers 5.23 reads it from ``main``, whatever the revision.
    """
    if source.folder is not None or source.gguf_file is None:
        return source.path
    snapshot = _cached_file(source).parent
    for file in TOKENIZER_FILES:  # those beside the GGUF file, where there are any
        with suppress(EntryNotFoundError, LocalEntryNotFoundError):
            hf_hub_download(source.path, file, revision=snapshot.name)
    return str(snapshot)


def _unpacked(source: Source) -> dict[str, Any]:
    """Return the arguments to read weights with; those of a GGUF file become plain numbers."""
    packing = getattr(transformers, "GgufConfig", None)  # releases without it always unpack
    if source.gguf_file is None or packing is None:
        return source.arguments
    return {**source.arguments, "quantization_config": packing(dequantize=True)}


def _forget_packing(model: PreTrainedModel) -> None:
    """Let a model whose weights were unpacked be saved as any other."""
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)


def _unpacked_dtype(source: Source) -> torch.dtype:
    folder = source.folder
    return gguf_dtype(folder / str(source.gguf_file) if folder else _cached_file(source))


def _checked_files(folder: Path, stated: torch.dtype | None, source: Source) -> torch.dtype | None:
    """Look at the headers of the weight files; return the dtype that holds all they say.

    The wider one of what config.json states and what most of the values are stored in: files are
    sometimes smaller than what they are meant to be loaded as.
    """
    tensors = stored_tensors(folder)
    require_floats(tensors, source)
    stored = stored_dtype(tensors)
    if stated is None or stored is None:
        return stated or stored
    return torch.promote_types(stated, stored)


def _stated_dtype(config: PretrainedConfig) -> torch.dtype | None:
    stated = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    return getattr(torch, stated, None) if isinstance(stated, str) else stated


def _cached_file(source: Source) -> Path:
    """Return the model's configuration, or its GGUF file, in a snapshot of the hub's cache."""
    found = _find_cached(source)
    if found is None:
        raise source.refused("the model is not in the hub's cache any more", "start again")
    return found


def _find_cached(source: Source) -> Path | None:
    file = source.gguf_file or "config.json"
    try:
        found = try_to_load_from_cache(source.path, file, revision=source.revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _require_finite(model: PreTrainedModel, source: Source) -> None:
    """Refuse a model with NaN or infinity in its weights, before any work is spent on it."""
    bad = [name for name, weight in model.named_parameters() if not is_finite(weight)]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise source.refused(
            f"NaN or infinity in the weights {', '.join(bad[:3])}{more}",
            "the file may be damaged; float16 holds nothing above 65504, bfloat16 does",
        )
