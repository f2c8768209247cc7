"""What kind of model it is that is to be edited: names and shapes found, additivity measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.additivity import Reach
from lightning_blue.editing.module import EditModule
from lightning_blue.language_model.architectures import (
    down_projection,
    hidden_size,
    projection_fault,
    weight_view,
)
from lightning_blue.language_model.batching import context_length
from lightning_blue.language_model.loading import checkpoint_dtype, loaded_name
from lightning_blue.language_model.tokens import encode_targets, leading_ids
from lightning_blue.support.errors import InputError

EXAMPLE = "Paris"  # an object, to show what a token behind a space looks like


@dataclass(frozen=True)
class Arrival:
    """How a known change of a layer's weight arrived; None where nothing could be measured.

    Attributes:
        layer: its index.
        multiple: what arrived at the block's output, as a multiple of the change.
        follows: whether that is the same multiple at every token.
        missed: the largest part of the change by which what arrived differed from it.
        own_missed: the same at the output of the weight's own module.
    """

    layer: int
    multiple: float | None = None
    follows: bool | None = None
    missed: float | None = None
    own_missed: float | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What was found in a model.

    Attributes:
        name: by which it was loaded.
        model_type: its architecture, e.g. ``llama``.
        parameters: how many.
        dtype: of the weights while they are edited.
        saved_dtype: of the edited model as it is saved.
        context: the most tokens that it reads; None: it does not say.
        block, down_projection, attention_output: names of modules.
        n_layers: decoder blocks.
        editable: those with a down projection that can be written.
        d_model, d_in: shape of a down projection, from d_in to d_model.
        vocabulary: tokens of the tokenizer.
        embeddings: rows of the embedding.
        tied_head: whether the head is the embedding.
        before_text: special tokens that the tokenizer puts before a text.
        chat_template: whether it has one.
        spaced: the tokens of an object behind a space, and
        unspaced: behind none, e.g. of ``Paris``.
    """

    name: str
    model_type: str
    parameters: int
    dtype: str
    saved_dtype: str
    context: int | None
    block: str
    down_projection: str
    attention_output: str | None
    n_layers: int
    editable: list[int]
    d_model: int
    d_in: int
    vocabulary: int
    embeddings: int
    tied_head: bool
    before_text: list[str]
    chat_template: bool
    spaced: list[str]
    unspaced: list[str]


def look_at(module: EditModule, layer: int) -> ModelFacts:
    """Find out what there is to know of a model without running it.

    Args:
        module: the model, wrapped for editing.
        layer: whose weight's shape is told, one that can be edited.
    """
    model, tokenizer, row = module.model, module.tokenizer, module.architecture
    d_model = hidden_size(model)
    d_in = weight_view(down_projection(module.blocks[layer], row)).shape[1]
    faults = [projection_fault(block, row, d_model) for block in module.blocks]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    spaced, unspaced = encode_targets(tokenizer, [EXAMPLE, EXAMPLE], [" ", ""])

    def names(ids: Sequence[int]) -> list[str]:
        return [str(name) for name in tokenizer.convert_ids_to_tokens(list(ids))]

    return ModelFacts(
        name=loaded_name(model),
        model_type=model.config.model_type,
        parameters=sum(weight.numel() for weight in model.parameters()),
        dtype=_spelled(model.dtype),
        saved_dtype=_spelled(module.export_dtype or checkpoint_dtype(model)),
        context=context_length(model),
        block=row.block,
        down_projection=row.down_projection,
        attention_output=row.attention_output,
        n_layers=len(module.blocks),
        editable=[place for place, fault in enumerate(faults) if fault is None],
        d_model=d_model,
        d_in=d_in,
        vocabulary=len(tokenizer),
        embeddings=module.embeddings,
        tied_head=head.weight is embedding.weight,
        before_text=names(leading_ids(tokenizer)),
        chat_template=bool(getattr(tokenizer, "chat_template", None)),
        spaced=names(spaced),
        unspaced=names(unspaced),
    )


def measure_additivity(
    module: EditModule, layers: Sequence[int], requests: Sequence[EditRequest]
) -> tuple[list[Arrival], str | None]:
    """Change the weight of each layer by a known bit and look at what arrives, as `fit` does.

    Args:
        module: the model, unedited.
        layers: that are to be measured.
        requests: whose prompts it is measured on.

    Returns:
        What arrived, by layer, and why the closed form cannot be right; None if it can. The
        module's target site is chosen if so.
    """
    fault = None
    try:
        module.measure_site(layers, requests)
    except InputError as error:
        fault = str(error)
    return [_arrival(layer, module.site.reaches.get(layer)) for layer in layers], fault


def _arrival(layer: int, reach: Mapping[str, Reach] | None) -> Arrival:
    if reach is None:
        return Arrival(layer)
    block, own = reach["block"], reach["ffn"]
    return Arrival(layer, block.multiple, block.fixed, block.missed, own.missed)


def _spelled(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
