"""What a model that is in memory keeps while it is edited, and what it gets back if that fails."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from lightning_blue.support.errors import InputError

_MEANT = re.compile(  # what Lightning says of things that are meant here
    "does not have many workers|overridden `transfer_batch_to_device`|args parameter is intended|"
    "in eval mode|isinstance\\(treespec|validation_step|`?train_dataloader`? yielded|"
    "GPU available but not used|available but not used|log_every_n_steps|sync_dist"
)
_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric", "lightning_blue")


class WeightSnapshot:
    """Copies of some of a model's weights, on the CPU, to be put back to the bit.

    Args:
        model: whose weights they are.
        names: of the weights, as ``named_parameters`` has them.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        self._model = model
        weights = dict(model.named_parameters())
        self._values: dict[str, Tensor] = {
            name: weights[name].detach().to("cpu", copy=True) for name in names
        }

    def restore(self) -> None:
        """Put the copies back; the parameters stay the objects that they are."""
        weights = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, value in self._values.items():
                weights[name].data.copy_(value)


def require_editable(model: object) -> PreTrainedModel:
    """Return the model if it is one that can be edited in memory.

    Raises:
        InputError: if it is no model of transformers, or not all of it is on one device.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"a {type(model).__name__} is no language model of transformers",
            where="edit(model)",
            hint="give what AutoModelForCausalLM.from_pretrained or load_language_model returns; "
            "of a pipeline its .model, of a PEFT model what merge_and_unload() returns",
        )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        raise InputError(
            f"the model is spread over {', '.join(devices)}",
            where="edit(model)",
            hint="load it onto one device: without device_map, or with device_map={'': 0}",
        )
    return model


@contextmanager
def left_as_found(model: PreTrainedModel) -> Iterator[None]:
    """Give back to a model its flags, modes, gradients and device, whatever comes of the block."""
    device = model.device
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    gradients = {name: p.grad for name, p in model.named_parameters()}  # Lightning drops them
    training = {name: module.training for name, module in model.named_modules()}
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        if model.device != device:
            model.to(device)  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
            parameter.grad = gradients[name]
        for name, module in model.named_modules():
            module.training = training[name]


@contextmanager
def quietly(notes: list[str]) -> Iterator[None]:
    """Print nothing inside the block; what should be known is added to the notes."""
    handler = _Notes(notes)
    others = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(each.level, each.propagate, each.handlers) for each in loggers]
    for each in loggers:
        each.setLevel(logging.WARNING)
        each.propagate, each.handlers = False, [handler]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        transformers_logging.set_verbosity(others)
        for each, (level, propagate, handlers) in zip(loggers, before, strict=True):
            each.setLevel(level)
            each.propagate, each.handlers = propagate, handlers
        told = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
        handler.add([text for text in told if not _MEANT.search(text)])


class _Notes(logging.Handler):
    """Collects messages, each once."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.notes = notes

    def add(self, texts: Sequence[str]) -> None:
        self.notes += [text for text in dict.fromkeys(texts) if text not in self.notes]

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if not _MEANT.search(text):
            self.add([text])
