"""What kind of model a checkpoint is, and why it cannot be edited or loaded, said as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import GatedRepoError
from transformers import PretrainedConfig
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from lightning_blue.language_model.multimodal import auto_class
from lightning_blue.language_model.sources import Source, adapter_refused, config_of
from lightning_blue.support.errors import InputError, first_line

OTHER_HEADS = {
    "ForMaskedLM": "a masked language model, which reads texts in both directions",
    "ForPreTraining": "a model as it was pretrained, without a head that continues texts",
    "ForSequenceClassification": "a classifier of texts",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a model that marks answers in texts",
    "ForMultipleChoice": "a model that chooses among answers",
    "ForImageClassification": "a classifier of images",
    "VisionModel": "a vision model",
    "ForCTC": "a speech model",
    "ForObjectDetection": "a vision model",
}
DECODERS_OF_TRANSFORMERS = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
DECODERS = "choose a decoder-only language model (GPT, Llama, Qwen, Mistral, ...)"
MESSAGE = 300  # characters of a message from elsewhere
GGUF_INSTALL = "pip install 'lightning-blue[gguf]'"


def decoder_class(config: PretrainedConfig, source: Source) -> Any:
    """Return the class that loads a decoder-only model: a causal one, or one that sees images too.

    Raises:
        InputError: if the model does not continue texts from left to right, saying what it is.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise source.refused(
            f"{config.model_type} is an encoder-decoder; editing needs a decoder-only model",
            DECODERS,
        )
    names = config.architectures or []
    heads = [what for name in names for end, what in OTHER_HEADS.items() if name.endswith(end)]
    if heads:
        raise source.refused(f"the checkpoint is {heads[0]} ({names[0]})", DECODERS)
    if any(type(config) in mapping for mapping in DECODERS_OF_TRANSFORMERS):
        return auto_class(config)
    named = f" ({names[0]})" if names else ""
    raise source.refused(
        f"{config.model_type}{named} is no language model that continues texts", DECODERS
    )


def why_not_loaded(source: Source, error: Exception) -> InputError:
    """Say why transformers could not read a model's configuration or weights.

    Args:
        source: where it was looked for.
        error: what was raised.
    """
    text = str(error)
    if source.gguf_file is not None:
        return _why_no_gguf(source, error)
    if any(isinstance(cause, GatedRepoError) for cause in _causes(error)) or "gated repo" in text:
        return source.refused(
            "access to the model is restricted, and this account does not have it",
            f"ask for it at https://huggingface.co/{source.path}, then run `hf auth login`",
        )
    if "trust_remote_code" in text or "custom code" in text:
        return source.refused(
            "the model brings code of its own, and code from a model is never run here",
            "choose a model whose architecture is part of transformers; some makers offer one as a "
            "second version (-hf)",
        )
    if "adapter_config.json" in text:
        return adapter_refused(source, "BASE")
    folder = source.folder
    if folder is not None and "model_type" not in config_of(folder):
        return source.refused(
            "config.json names no model_type, or is no valid JSON"
            if (folder / "config.json").stat().st_size
            else "config.json is empty",
            "take the config.json that belongs to the weights",
        )
    if "does not recognize this architecture" in text or "KeyError" in text:
        kind = config_of(folder).get("model_type", source.path) if folder else source.path
        return source.refused(
            f"the architecture of {kind!r} is not part of transformers {transformers_version}",
            "a newer release may have it: pip install -U transformers",
        )
    reason = " ".join(text.split())[:MESSAGE]
    return source.refused(
        f"the model cannot be loaded: {type(error).__name__}: {reason}", _last_hint(source)
    )


def _why_no_gguf(source: Source, error: Exception) -> InputError:
    text = first_line(error)
    if isinstance(error, ImportError) or "is required" in text or "pip install" in text:
        return source.refused("reading a GGUF file needs the packages of an extra", GGUF_INSTALL)
    if "not supported" in text or "Unknown gguf" in text or "Cannot rebuild" in text:
        return source.refused(
            f"transformers {transformers_version} cannot read this GGUF file: {text}",
            "take the Hugging Face version of the model (config.json and safetensors)",
        )
    return source.refused(
        f"the GGUF file cannot be read: {type(error).__name__}: {text}",
        "download the file again; it was perhaps cut off on the way",
    )


def _last_hint(source: Source) -> str:
    if source.folder is None:
        return "check the name on the hub and the revision, or give a folder"
    return "config.json and the weights must belong together; download or save the model again"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
