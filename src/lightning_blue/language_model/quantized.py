"""Quantised weights, which no closed form can be added to: recognised and refused, with a way out.

An edit is a small change of real numbers. Four or eight bits with scales hold no such change, and
what packs them keeps no matrix that could be written to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lightning_blue.language_model.checkpoint_files import FLOATS, StoredTensor
from lightning_blue.language_model.sources import Source
from lightning_blue.support.errors import InputError

DEQUANTIZING_CONFIGS = {
    "fp8": "FineGrainedFP8Config",
    "mxfp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
    "metal": "MetalConfig",
}  # transformers' classes that unpack while loading
DEQUANTIZING_MODELS = ("bitsandbytes", "higgs")  # whose loaded model has a method for it
PACKING_LIBRARIES = (
    "bitsandbytes",
    "torchao",
    "torch.ao.nn",
    "gptqmodel",
    "auto_gptq",
    "awq",
    "hqq",
    "quanto",
    "optimum.quanto",
    "compressed_tensors",
)
_PACKED = (
    "W_q",
    "_blocks",
    "qweight",
    "weight_packed",
)  # names of tensors that are weights, packed


def require_unquantized_config(config: PretrainedConfig, source: Source) -> None:
    """Refuse a checkpoint whose configuration says that it is quantised.

    Raises:
        InputError: saying by what, and how a copy is made that can be edited.
    """
    stated = _stated(config)
    if not stated:
        return
    method = _method(stated)
    raise source.refused(
        f"the checkpoint is quantised ({_described(stated)}), and an edit cannot be added to "
        "quantised weights",
        _way_out(method, source.path),
    )


def require_floats(tensors: Mapping[str, StoredTensor], source: Source) -> None:
    """Refuse a checkpoint whose weights are integers or 8-bit floats without saying so.

    Raises:
        InputError: naming the dtype and one of the weights.
    """
    packed = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.dtype not in FLOATS and _is_weight(name)
    }
    if not packed:
        return
    name, tensor = next(iter(packed.items()))
    raise source.refused(
        f"{len(packed)} weights of the checkpoint are stored as {tensor.dtype} ({name} for one): "
        "they are quantised, though config.json does not say by what, and an edit cannot be added "
        "to them",
        "give an unquantised copy of the model (float32, bfloat16 or float16)",
    )


def require_unquantized_model(model: PreTrainedModel) -> None:
    """Refuse a model in memory whose weights are packed.

    Raises:
        InputError: saying by what they are, and how to have them as plain numbers.
    """
    stated = _stated(model.config) if getattr(model, "hf_quantizer", None) is not None else {}
    how = _described(stated) if stated else _packed_by(model)
    if how is None:
        return
    method = _method(stated) if stated else how
    hint = "load the model without quantisation"
    if any(name in method for name in DEQUANTIZING_MODELS):
        hint += ", or call model.dequantize() first"
    raise InputError(
        f"the model is quantised ({how}), and an edit cannot be added to quantised weights",
        where=type(model).__name__,
        hint=hint,
    )


def _stated(config: PretrainedConfig) -> dict[str, Any]:
    """Return the quantisation that a configuration states; empty if it states none."""
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            stated = getattr(part, name, None)
            if stated:
                return dict(stated) if isinstance(stated, Mapping) else dict(stated.to_dict())
    return {}


def _method(stated: Mapping[str, Any]) -> str:
    if stated.get("load_in_4bit") or stated.get("load_in_8bit"):
        return "bitsandbytes"
    method = stated.get("quant_method") or stated.get("quant_algo") or "an unnamed method"
    return str(getattr(method, "value", method))


def _described(stated: Mapping[str, Any]) -> str:
    """Spell the method and its number of bits, e.g. ``gptq, 4 bits``."""
    bits = stated.get("bits") or stated.get("w_bit") or stated.get("nbits")
    if stated.get("load_in_4bit") or stated.get("load_in_8bit"):
        bits = 4 if stated.get("load_in_4bit") else 8
    return _method(stated) + (f", {bits} bits" if bits else "")


def _way_out(method: str, path: str) -> str:
    """Say how to come by a copy that can be edited."""
    copy = "give an unquantised copy of the model"
    load = f"AutoModelForCausalLM.from_pretrained({path!r}"
    save = "save_pretrained('FOLDER', save_original_format=False)"  # else it is packed again
    rest = f"{save}, save the tokenizer there too, and give FOLDER"
    if method in DEQUANTIZING_CONFIGS:
        config = f"quantization_config={DEQUANTIZING_CONFIGS[method]}(dequantize=True)"
        return f"{copy}, or make one: {load}, {config}, dtype='bfloat16').{rest}"
    if method in DEQUANTIZING_MODELS:
        return f"{copy}, or make one where {method} is installed: {load}).dequantize().{rest}"
    return f"{copy}; most quantised models name the one that they were made of on their page"


def _is_weight(name: str) -> bool:
    return any("weight" in part for part in name.split(".")[-2:]) or name.endswith(_PACKED)


def _packed_by(model: PreTrainedModel) -> str | None:
    """Say what has packed a model's weights; None if nothing has."""
    for _, module in model.named_modules():
        kind = type(module).__module__
        for library in PACKING_LIBRARIES:
            if kind == library or kind.startswith(f"{library}."):
                return library
    plain = tuple(FLOATS.values())
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        library = type(tensor).__module__.partition(".")[0]
        if library in PACKING_LIBRARIES:
            return library
        if tensor.dtype not in plain and _is_weight(name):
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
    return None
