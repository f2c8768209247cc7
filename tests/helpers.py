"""Small steps that several test modules share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from blue_callbacks import CommittedBatches


def write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> str:
    """Write a record a line; return the path as a command takes it."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def brief_run(text: Path, stats: Path) -> list[str]:
    """Flags with which a command takes little time: short contexts, few steps, a little text."""
    return [
        "--model.context_tokens=4",
        "--model.target.steps=3",
        f"--model.covariance.corpus={text}",
        "--model.covariance.tokens_per_dim=4",
        f"--model.covariance.cache={stats}",
        "--measure.generate=false",
        "--trainer.accelerator=cpu",
    ]


def load_model(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model folder in float32."""
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


class Batches(CommittedBatches[Any]):
    """Batches that were made before."""

    def __iter__(self) -> Iterator[Any]:
        return (batch for (batch,) in super().__iter__())


def fit(
    module: LightningModule, update: Callback, batches: Sequence[Any], **kwargs: Any
) -> Trainer:
    """Apply the edit batches in order with a silent Trainer on the CPU.

    With ``ckpt_path`` the run goes on from a checkpoint.
    """
    resumed = kwargs.pop("ckpt_path", None)
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
    committed = torch.load(resumed, weights_only=True)["global_step"] if resumed else 0
    trainer.fit(
        module,
        Batches(batches, 1, committed),
        ckpt_path=resumed,
        weights_only=True if resumed else None,
    )
    return trainer
