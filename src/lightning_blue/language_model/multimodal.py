"""Models that read more than text: their text part is edited, all of them is loaded and saved."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

LOADER = AutoModelForCausalLM.__name__  # of models of text alone


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the class whose ``from_pretrained`` loads every weight of a checkpoint.

    A model of images and text is loaded whole: as a causal language model some types would lose
    the part that sees, and others are not known.
    """
    wrapped = config.get_text_config() is not config
    if wrapped and type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM
