"""Leave a folder behind that other programs load, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_blue.pretrain.recall import RecallRow
from lightning_blue.pretrain.world import World
from lightning_blue.support.storage import whole_folder, writing


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Hugging Face folder with float16 weights that load as float32.

    The weights take half the space; the configuration names float32, so that
    ``from_pretrained`` converts and a CPU computes at full speed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared = set(model.all_tied_weights_keys)
    weights = {
        name: tensor.detach().half().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name not in shared
    }
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"
    model.config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def export(
    target: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    table: Sequence[RecallRow],
    facts: dict[str, Any],
) -> None:
    """Write ``model/``, the world's own files and ``recall.json`` to ``target``, all or nothing.

    Args:
        target: the folder; what stood there before is replaced.
        model: the trained model.
        tokenizer: its tokenizer.
        world: writes its files beside the model.
        table: recall as measured.
        facts: what else belongs into ``recall.json``: steps, minutes and the like.

    Raises:
        NotWritten: if the disk is full or may not be written.
    """
    record = {**facts, "recall": [asdict(row) for row in table]}
    with writing(target), whole_folder(target) as folder:
        save_model(model, tokenizer, folder / "model")
        world.write_files(folder)
        (folder / "recall.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
