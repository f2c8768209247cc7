"""Pretraining of a small causal language model until it knows given facts."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from blue_callbacks.ranges import COUNT, NOT_NEGATIVE, POSITIVE, WHOLE, Range, check_ranges
from lightning_blue.pretrain.data import FactCorpusModule, Rows
from lightning_blue.pretrain.export import export
from lightning_blue.pretrain.recall import RecallRow, as_markdown, recall_table
from lightning_blue.support.errors import InputError

log = logging.getLogger(__name__)

SMOOTHING = 0.95
UNKNOWN = 4.0  # object loss (nats) from which the smoothed one starts for facts just added


def weighted_loss(
    logits: Tensor, ids: Tensor, is_object: Tensor, other_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Next-token loss in which tokens other than objects count less.

    Args:
        logits: (rows, length, vocabulary).
        ids: (rows, length) token ids.
        is_object: (rows, length) booleans.
        other_weight: weight of tokens that are no object; an object's token weighs 1.

    Returns:
        The weighted mean, the plain mean over object tokens (both nats per token), and the share
        of object tokens that are the most probable ones.
    """
    wanted, hit = ids[:, 1:].flatten(), is_object[:, 1:].flatten()
    flat = logits[:, :-1].flatten(0, 1)
    nll = F.cross_entropy(flat, wanted, reduction="none")
    weight = torch.where(hit, 1.0, other_weight)
    right = flat.detach()[hit].argmax(-1) == wanted[hit]
    return (weight * nll).sum() / weight.sum(), nll.detach()[hit].mean(), right.float().mean()


def rate_at(step: int, *, warmup: int, decay: int, total: int) -> float:
    """Share of the learning rate at a step: linear warm-up, plateau, linear decay at the end.

    >>> [rate_at(step, warmup=2, decay=4, total=10) for step in (0, 1, 5, 8, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.25]
    """
    return min(1.0, (step + 1) / max(warmup, 1), (total - step) / max(decay, 1))


class PretrainModule(LightningModule):
    """Trains a Llama type model from scratch, with facts added as earlier ones are known.

    The set of facts grows by ``grow`` whenever the smoothed loss of object tokens falls below
    ``grow_below``. At the end recall is measured and the model is written to ``output``.

    Args:
        output: folder to write; what stood there before is replaced.
        n_layers: number of layers.
        d_model: width of the residual stream.
        d_in: width of the FFN; wide, because edits live there (edits / d_in near 0.14).
        n_heads: number of attention heads.
        learning_rate: peak learning rate of AdamW.
        weight_decay: of weight matrices; biases and norms have none.
        warmup: steps of linear warm-up.
        decay: steps of linear decay before the last one (``trainer.max_steps``).
        other_weight: loss weight of tokens that are no object of a fact.
        grow: factor by which the set of facts grows.
        grow_below: object loss (nats per token) below which it grows.
    """

    model: LlamaForCausalLM

    def __init__(
        self,
        output: str = "runs/pretrain",
        n_layers: int = 6,
        d_model: int = 128,
        d_in: int = 1792,
        n_heads: int = 4,
        learning_rate: float = 1.5e-3,
        weight_decay: float = 0.05,
        warmup: int = 150,
        decay: int = 500,
        other_weight: float = 0.3,
        grow: float = 2.0,
        grow_below: float = 0.6,
    ) -> None:
        super().__init__()
        self.output = Path(output)
        self.n_layers, self.d_model, self.d_in, self.n_heads = n_layers, d_model, d_in, n_heads
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup, self.decay = warmup, decay
        self.other_weight = other_weight
        self.grow, self.grow_below = grow, grow_below
        self._check_numbers()
        self.table: list[RecallRow] = []
        self._smoothed = UNKNOWN
        self._started = time.monotonic()

    def _check_numbers(self) -> None:
        """Refuse numbers of which no model or no training can be made."""
        check_ranges(
            "model",
            vars(self),
            n_layers=COUNT,
            d_model=COUNT,
            d_in=COUNT,
            n_heads=COUNT,
            learning_rate=POSITIVE,
            weight_decay=NOT_NEGATIVE,
            warmup=WHOLE,
            decay=WHOLE,
            other_weight=NOT_NEGATIVE,
            grow=Range(1, above=True),
            grow_below=NOT_NEGATIVE,
        )
        if self.d_model % (2 * self.n_heads):
            raise InputError(
                f"d_model is {self.d_model}, and {self.n_heads} heads of an even width do not make "
                "it up",
                where="model.d_model",
                hint=f"give a multiple of {2 * self.n_heads}, or another model.n_heads",
            )

    @property
    def corpus(self) -> FactCorpusModule:
        """The data module of the running trainer."""
        corpus = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(corpus, FactCorpusModule):
            raise TypeError(f"needs a FactCorpusModule, got {type(corpus).__name__}")
        return corpus

    def configure_model(self) -> None:
        """Build the model once the tokenizer is known."""
        if hasattr(self, "model"):
            return
        tokenizer = self.corpus.tokenizer
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=self.corpus.length,
            hidden_size=self.d_model,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            intermediate_size=self.d_in,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.model = LlamaForCausalLM(config)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a schedule per step.

        Raises:
            InputError: the trainer has no number of steps.
        """
        total = self.trainer.max_steps
        if total < 1:
            raise InputError(
                "pretraining needs a number of steps",
                where="trainer.max_steps",
                hint="set it, to 3000 for instance",
            )
        matrices = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": self.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: rate_at(step, warmup=self.warmup, decay=self.decay, total=total),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_fit_start(self) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def training_step(self, batch: Rows, batch_idx: int) -> Tensor:
        """One step on one batch of rows."""
        logits = self.model(input_ids=batch.ids, use_cache=False).logits
        loss, object_loss, recall = weighted_loss(
            logits, batch.ids, batch.is_object, self.other_weight
        )
        self._advance(object_loss.item())
        self.log("loss", loss.detach(), prog_bar=True)
        self.log("object_loss", object_loss, prog_bar=True)
        self.log("recall", recall, prog_bar=True)
        self.log("facts", float(self.corpus.stream.active), prog_bar=True)
        return loss

    def _advance(self, object_loss: float) -> None:
        """Activate more facts when the active ones are mostly known."""
        self._smoothed = SMOOTHING * self._smoothed + (1 - SMOOTHING) * object_loss
        if self._smoothed < self.grow_below and self.corpus.stream.active < self.corpus.total:
            count = self.corpus.grow(self.grow)
            self._smoothed = UNKNOWN
            log.info("step %d: %d active facts", self.global_step, count)

    def recall_table(self) -> str:
        """Recall as measured at the end, as a table for people."""
        return as_markdown(self.table)

    def on_train_end(self) -> None:
        """Measure recall, show the table and write the folder."""
        corpus, minutes = self.corpus, (time.monotonic() - self._started) / 60
        if corpus.stream.active < corpus.total:
            log.warning(
                "only %d of %d facts were active at the end: raise trainer.max_steps",
                corpus.stream.active,
                corpus.total,
            )
        self.model.eval()
        self.table = recall_table(self.model, corpus.tokenizer, corpus.world.facts)
        log.info("recall after %d steps:\n%s", self.global_step, self.recall_table())
        if self.trainer.is_global_zero:
            record: dict[str, Any] = {
                "facts": corpus.total,
                "steps": self.global_step,
                "minutes": round(minutes, 1),
                "parameters": self.model.num_parameters(),
            }
            export(self.output, self.model, corpus.tokenizer, corpus.world, self.table, record)
            log.info("written: %s", self.output)
