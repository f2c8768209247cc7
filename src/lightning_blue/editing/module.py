"""The LightningModule that edits a language model: one training step is one edit batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blue_callbacks import EditStepOptimizer, NonFiniteError, apply_edit_batch
from lightning_blue.editing.architectures import (
    Architecture,
    blocks,
    check_layers,
    down_projection,
    find_architecture,
    weight_view,
)
from lightning_blue.editing.contexts import (
    LookupRows,
    context_templates,
    lookup_rows,
    target_prompts,
)
from lightning_blue.editing.covariance import CovarianceSource, load_or_collect
from lightning_blue.editing.forward import (
    AlignedRows,
    logits_from_block,
    read_from_column,
    read_states,
)
from lightning_blue.editing.targets import Targets, TargetSearch, search_targets
from lightning_blue.loading import load_language_model
from lightning_blue.requests import EditRequest
from lightning_blue.scoring import context_length, generate

CONTEXT_STARTS = ("The", "Therefore", "Because", "I", "You")


class EditModule(LightningModule):
    """Edit the facts of a causal language model.

    Offers the protocol of :class:`blue_callbacks.EditableModule`: keys are inputs of the FFN's down
    projection at the subject's last token, averaged over contexts; outputs and targets are hidden
    states behind the block.

    Args:
        model: a causal language model, in eval mode.
        tokenizer: its fast tokenizer.
        target: settings of the inner optimisation.
        contexts: prefixes put before each prompt. None: the model writes one for each of
            "The", "Therefore", "Because", "I", "You". An empty list: the bare prompt only.
        context_tokens: length of the prefixes that the model writes.
        covariance: where the covariance of keys comes from.
        architecture: module names, for a model whose architecture has no row.
        seed: of the contexts that the model writes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        target: TargetSearch = TargetSearch(),  # noqa: B008  (frozen)
        contexts: list[str] | None = None,
        context_tokens: int = 10,
        covariance: CovarianceSource = CovarianceSource(),  # noqa: B008  (frozen)
        architecture: Architecture | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.target = target
        self.contexts = contexts
        self.context_tokens = context_tokens
        self.covariance = covariance
        self.architecture = find_architecture(model, architecture)
        self.seed = seed
        self.blocks = blocks(model, self.architecture)  # a plain list: already in self.model
        self.target_losses: dict[int, Tensor] = {}  # of the newest batch, by target layer
        self.preparation_seconds = 0.0
        self._covariances: dict[int, Tensor] = {}
        self._templates: list[str] | None = None

    # Lightning

    def configure_optimizers(self) -> EditStepOptimizer:
        """One optimizer step is one edit batch."""
        return EditStepOptimizer(self.parameters())

    def training_step(self, batch: list[EditRequest], batch_idx: int) -> None:
        """Apply one edit batch."""
        apply_edit_batch(self, batch)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Leave requests as they are: they are text."""
        return batch

    def on_fit_start(self) -> None:
        """Stay in eval mode: editing must see the model as it is used."""
        self.model.eval()

    # What the callbacks ask for

    def editable_weight(self, layer: int) -> Tensor:
        """Return the layer's down projection as a ``(d_model, d_in)`` view."""
        return weight_view(self._projection(layer))

    def key_covariance(self, layer: int) -> Tensor:
        """Return the layer's covariance, ``(d_in, d_in)``; see :meth:`prepare`."""
        if layer not in self._covariances:
            self.prepare([layer], [layer])
        return self._covariances[layer]

    @torch.no_grad()
    def edit_keys(self, batch: Sequence[EditRequest], layer: int) -> Tensor:
        """Return the key of each edit, ``(d_in, n)``.

        Averaged inside each kind of context first, then over kinds: the bare prompt weighs one
        half, all prefixed ones together the other half.
        """
        rows = self._lookup_rows(batch, self.templates)
        module = {"key": self._projection(layer)}
        states = read_states(self.model, rows.input_ids, inputs_of=module)["key"]
        keys = _at(states, rows).view(len(batch), len(self.templates), -1)
        bare, prefixed = keys[:, 0], keys[:, 1:]
        mean = (bare + prefixed.mean(1)) / 2 if prefixed.shape[1] else bare
        return mean.T

    @torch.no_grad()
    def edit_outputs(self, batch: Sequence[EditRequest], layer: int) -> Tensor:
        """Return the hidden state behind the block at the bare lookup, ``(d_model, n)``."""
        rows = self._lookup_rows(batch, ["{}"])
        module = {"output": self.blocks[layer]}
        states = read_states(self.model, rows.input_ids, outputs_of=module)["output"]
        return _at(states, rows).T

    def edit_targets(self, batch: Sequence[EditRequest], layer: int) -> Tensor:
        """Optimise the hidden states that make the model say the new objects, ``(d_model, n)``.

        Raises:
            NonFiniteError: naming the request whose loss was not finite.
        """
        found: list[Targets] = []
        with tqdm(
            total=len(batch), desc=f"targets, layer {layer}", leave=False, disable=None
        ) as bar:
            for start in range(0, len(batch), at_once := self._edits_at_once(batch)):
                some = batch[start : start + at_once]
                found.append(self._search(some, layer))
                bar.update(len(some))
        losses = torch.cat([one.losses for one in found])
        self._require_finite(batch, layer, losses)
        self.target_losses[layer] = losses
        return torch.cat([one.initial + one.delta for one in found]).T

    def edit_name(self, batch: Sequence[EditRequest], column: int) -> str:
        """Name an edit of the batch in a message."""
        request = batch[column]
        return f"request {request.case_id} ({request.text!r} -> {request.target_new!r})"

    # Set-up

    @property
    def templates(self) -> list[str]:
        """Context templates, the bare one first; written by the model as it was at first use."""
        if self._templates is None:
            prefixes = self.contexts
            if prefixes is None:
                prefixes = self._written_contexts()
            self._templates = context_templates(prefixes)
        return self._templates

    def prepare(self, critical: Sequence[int], written: Sequence[int]) -> None:
        """Load or collect what must come from the unedited model: contexts and covariances.

        Args:
            critical: all critical layers of the method, to be checked against the model.
            written: the layers whose covariance is needed.

        Raises:
            InputError: if the model has no such layer, or a covariance file is another model's.
        """
        started = time.perf_counter()
        check_layers(list(critical), len(self.blocks))
        _ = self.templates
        missing = sorted(set(written) - set(self._covariances))
        if missing:
            projections = {layer: self._projection(layer) for layer in missing}
            self._covariances |= load_or_collect(
                self.model, self.tokenizer, projections, self.covariance
            )
        self.preparation_seconds = time.perf_counter() - started

    @property
    def contexts_length(self) -> int:
        """How many tokens the longest context adds to a prompt, about."""
        if self.contexts is None:
            return self.context_tokens + 2
        texts = ["", *self.contexts]
        return max(map(len, self.tokenizer(texts, add_special_tokens=False)["input_ids"]))

    @property
    def max_length(self) -> int:
        """The most tokens the model can read."""
        return context_length(self.model) or 2**31

    def _projection(self, layer: int) -> torch.nn.Module:
        return down_projection(self.blocks[layer], self.architecture)

    def _lookup_rows(self, batch: Sequence[EditRequest], templates: Sequence[str]) -> LookupRows:
        return lookup_rows(self.tokenizer, batch, templates, self.device)

    def _written_contexts(self) -> list[str]:
        texts = generate(
            self.model,
            self.tokenizer,
            list(CONTEXT_STARTS),
            max_new_tokens=self.context_tokens,
            top_k=5,
            seed=self.seed,
        )
        whole = [start + text for start, text in zip(CONTEXT_STARTS, texts, strict=True)]
        return [f"{' '.join(text.split())}." for text in whole]

    def _edits_at_once(self, batch: Sequence[EditRequest]) -> int:
        """Return how many edits fit into the token budget of the target search."""
        prompts = target_prompts(self.tokenizer, batch, self.templates, self.device)
        n_rows, n_tokens = prompts.input_ids.shape[1:]
        return max(1, self.target.tokens_per_batch // (n_rows * (n_tokens - prompts.lookup)))

    def _search(self, batch: Sequence[EditRequest], layer: int) -> Targets:
        prompts = target_prompts(self.tokenizer, batch, self.templates, self.device)
        n, n_rows, _ = prompts.input_ids.shape
        whole = AlignedRows(
            prompts.input_ids.flatten(0, 1), prompts.starts.flatten(), prompts.lookup
        )
        hidden, before = read_from_column(self.model, self.blocks[layer], whole)

        def logits_at(edits: Tensor, changed: Tensor) -> Tensor:
            rows = (edits[:, None] * n_rows + torch.arange(n_rows, device=edits.device)).flatten()
            logits = logits_from_block(
                self.model,
                self.blocks,
                layer,
                AlignedRows(whole.input_ids[rows], whole.starts[rows], whole.column),
                [(keys[rows], values[rows]) for keys, values in before],
                changed.flatten(0, 1),
                prompts.positions.flatten(0, 1)[rows],
                returns_tuple=self.architecture.returns_tuple,
            )
            return logits.unflatten(0, (len(edits), n_rows))

        with torch.enable_grad():
            return search_targets(
                hidden.unflatten(0, (n, n_rows)), prompts.labels, logits_at, self.target
            )

    def _require_finite(self, batch: Sequence[EditRequest], layer: int, losses: Tensor) -> None:
        total = losses[..., 0]
        bad = (torch.isinf(total) | torch.isnan(total[:, :1])).any(1)
        if bool(bad.any()):
            column = int(bad.nonzero()[0])
            raise NonFiniteError(
                f"the loss of {self.edit_name(batch, column)} at layer {layer} is not finite; "
                "the weights are as they were before this batch"
            )


def edit_module(
    name_or_path: str = "almanac",
    dtype: str = "float32",
    revision: str | None = None,
    **settings: Any,
) -> EditModule:
    """Load a language model and wrap it for editing.

    Args:
        name_or_path: ``almanac`` (in the package), a folder, or a name on the hub.
        dtype: of the weights: ``float32``, ``bfloat16`` or ``float16``.
        revision: branch, tag or commit on the hub.
        **settings: see :class:`EditModule`.
    """
    model, tokenizer = load_language_model(name_or_path, dtype, revision)
    return EditModule(model, tokenizer, **settings)


def _at(states: Tensor, rows: LookupRows) -> Tensor:
    """Pick the state at each row's lookup: ``(n_rows, n_tokens, d)`` to ``(n_rows, d)`` float32."""
    index = torch.arange(states.shape[0], device=states.device)
    return states[index, rows.lookups].float()
