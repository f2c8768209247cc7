"""Small steps that several test modules share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def load_model(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model folder in float32."""
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def fit(
    module: LightningModule, update: Callback, batches: Sequence[Any], **kwargs: Any
) -> Trainer:
    """Apply the edit batches in order with a silent Trainer on the CPU."""
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[update, *kwargs.pop("callbacks", [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    trainer.fit(module, DataLoader(list(batches), batch_size=None, collate_fn=lambda x: x))
    return trainer
