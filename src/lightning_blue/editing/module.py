"""The LightningModule that edits a language model: one training step is one edit batch."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blue_callbacks import EditStepOptimizer, NonFiniteError, apply_edit_batch
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.covariance import CovarianceSource, load_or_collect
from lightning_blue.editing.fast.frozen import Shortcuts
from lightning_blue.editing.fast.reader import PromptReader, micro_batches, usable_shortcuts
from lightning_blue.editing.optimization import TargetOptimization, Targets, optimize_targets
from lightning_blue.editing.prompts import EditPrompts, context_templates, edit_prompts
from lightning_blue.language_model.architectures import (
    Architecture,
    blocks,
    check_layers,
    check_site,
    down_projection,
    feed_forward,
    find_architecture,
    site_modules,
    weight_view,
)
from lightning_blue.language_model.batching import context_length
from lightning_blue.language_model.generation import generate
from lightning_blue.language_model.loading import load_language_model
from lightning_blue.language_model.shared_prefixes import row_width, share_prefixes
from lightning_blue.language_model.states import precise, read_states
from lightning_blue.language_model.tokens import Encoded
from lightning_blue.support.errors import InputError
from lightning_blue.support.processes import distribute, n_processes, progress_bar

MIN_TOKENS, MAX_TOKENS = 512, 8192  # of a micro-batch; more at once is no faster
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
        target: TargetOptimization = TargetOptimization(),  # noqa: B008  (frozen)
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
        check_site(target.site, self.architecture)
        self.shortcuts: Shortcuts | None = None  # found out at the first target search
        self.blocks = blocks(model, self.architecture)  # a plain list: already in self.model
        self.target_losses: dict[int, Tensor] = {}  # of the newest batch, by target layer
        self.target_values: dict[int, Tensor] = {}  # (n_sites, n, d_model), by target layer
        self.preparation_seconds = 0.0
        self._covariances: dict[int, Tensor] = {}
        self._templates: list[str] | None = None
        self._tokenised: tuple[Sequence[EditRequest], list[EditPrompts]] | None = None
        self._named: set[str] = set()  # subjects that several requests of a batch were about

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

        def read(prompts: Sequence[EditPrompts]) -> list[Tensor]:
            rows = [row for prompt in prompts for row in prompt.rewriting]
            states = self._at_lookups(rows, inputs_of={"key": self._projection(layer)})
            keys = states.view(len(prompts), len(self.templates), -1)
            bare, prefixed = keys[:, 0], keys[:, 1:]
            mean = (bare + prefixed.mean(1)) / 2 if prefixed.shape[1] else bare
            return [key.clone() for key in mean.cpu()]

        return torch.stack(distribute(self._prompts(batch), read), dim=1).to(self.device)

    @torch.no_grad()
    def edit_outputs(self, batch: Sequence[EditRequest], layer: int) -> Tensor:
        """Return the output at the target site at the bare lookup, ``(d_model, n)``."""

        def read(prompts: Sequence[EditPrompts]) -> list[Tensor]:
            rows = [prompt.rewriting[0] for prompt in prompts]
            outputs = self._at_lookups(rows, outputs_of={"output": self._written_module(layer)})
            return [output.clone() for output in outputs.cpu()]

        return torch.stack(distribute(self._prompts(batch), read), dim=1).to(self.device)

    def edit_targets(self, batch: Sequence[EditRequest], layer: int) -> Tensor:
        """Optimise the site's outputs that make the model say the new objects, ``(d_model, n)``.

        Raises:
            NonFiniteError: naming the request whose loss was not finite.
        """
        if self.target.loss_layer is not None and self.target.loss_layer < layer:
            raise InputError(
                f"loss_layer {self.target.loss_layer} lies below the target layer {layer}, where "
                "no delta can change the loss",
                where="model.target.loss_layer",
                hint="choose a higher layer, or null for the last one",
            )
        prompts, members = self._prompts(batch), self._members(batch)
        if self.shortcuts is None:
            farthest = max(prompts, key=lambda one: one.rewriting[-1].lookup)
            self.shortcuts = usable_shortcuts(partial(self._reader, [farthest], layer))
        found = distribute(members, partial(self._search, prompts, layer))
        order = torch.tensor([i for some in members for i in some]).argsort()
        losses = torch.cat([one.losses for one in found])[order].to(self.device)
        self._require_finite(batch, layer, losses)
        self.target_losses[layer] = losses
        values = torch.cat([one.values for one in found], dim=1)[:, order].to(self.device)
        self.target_values[layer] = values
        return values[-1].T

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

    def prepare(
        self, critical: Sequence[int], written: Sequence[int], weight: float = 15_000.0
    ) -> None:
        """Load or collect what must come from the unedited model: contexts and covariances.

        Args:
            critical: all critical layers of the method, to be checked against the model.
            written: the layers whose covariance is needed.
            weight: of the covariance in the update, for the report on whether its text was enough.

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
                self.model, self.tokenizer, projections, self.covariance, weight
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

    def _projection(self, layer: int) -> nn.Module:
        return down_projection(self.blocks[layer], self.architecture)

    def _written_module(self, layer: int) -> nn.Module:
        return site_modules(self.target.site, self.blocks[layer], self.architecture)[-1]

    def _prompts(self, batch: Sequence[EditRequest]) -> list[EditPrompts]:
        """Tokenise a batch, once for all that is asked about it."""
        if self._tokenised is None or self._tokenised[0] is not batch:
            self._tokenised = batch, edit_prompts(self.tokenizer, batch, self.templates)
        return self._tokenised[1]

    def _at_lookups(self, rows: Sequence[Encoded], **module: Mapping[str, nn.Module]) -> Tensor:
        """Read one module at each row's lookup, ``(n_rows, d)``; what follows changes nothing."""
        sequences = [row.ids[: row.lookup + 1] for row in rows]
        longest = max(map(len, sequences))
        width, step = row_width(self.model, longest), max(1, MAX_TOKENS // longest)
        found = []
        for first in range(0, len(rows), step):
            some = sequences[first : first + step]
            shared = share_prefixes(self.model, some, width)
            (states,) = read_states(self.model, shared.arguments, **module).values()
            last = torch.tensor([[len(ids) - 1] for ids in some], device=self.device)
            found.append(states.flatten(0, 1)[shared.nodes.gather(1, last)[:, 0]])
        return precise(torch.cat(found))

    def _written_contexts(self) -> list[str]:
        write = partial(
            generate,
            self.model,
            self.tokenizer,
            max_new_tokens=self.context_tokens,
            top_k=5,
            seed=self.seed,
        )
        texts = distribute(list(CONTEXT_STARTS), write)
        whole = [start + text for start, text in zip(CONTEXT_STARTS, texts, strict=True)]
        return [f"{' '.join(text.split())}." for text in whole]

    def _members(self, batch: Sequence[EditRequest]) -> list[list[int]]:
        """Group the edits that have one target; name edits that ought to share one."""
        together: dict[str, list[int]] = {}
        for index, request in enumerate(batch):
            together.setdefault(request.subject, []).append(index)
        if self.target.share_subjects:
            return list(together.values())
        for subject, group in together.items():
            if len(group) > 1 and subject not in self._named:
                self._named.add(subject)
                names = ", ".join(batch[i].case_id for i in group)
                rank_zero_warn(
                    f"requests {names} of one batch are about {subject!r}, and one key cannot "
                    "hold several targets; --model.target.share_subjects=true gives them one"
                )
        return [[i] for i in range(len(batch))]

    def _reader(
        self, prompts: Sequence[EditPrompts], layer: int, shortcuts: Shortcuts
    ) -> PromptReader:
        sites = site_modules(self.target.site, self.blocks[layer], self.architecture)
        return PromptReader(
            self.model,
            self.blocks,
            layer,
            sites,
            self.target.site != "block",
            prompts,
            self.target.loss_layer,
            partial(feed_forward, architecture=self.architecture),
            shortcuts,
        )

    def _search(
        self, prompts: Sequence[EditPrompts], layer: int, members: Sequence[Sequence[int]]
    ) -> list[Targets]:
        """Optimise a target for each group of edits, as many at once as memory holds.

        What is found is on the CPU.
        """
        groups = micro_batches(
            [max(prompts[i].length for i in edits) for edits in members],
            [len(edits) * len(self.templates) for edits in members],
            self._tokens_at_once(layer),
        )
        found: dict[int, Targets] = {}
        with progress_bar(sum(map(len, members)), f"targets, layer {layer}") as bar:
            for group in groups:
                sizes = [len(members[member]) for member in group]
                edits = [i for member in group for i in members[member]]
                owner = torch.arange(len(group)).repeat_interleave(torch.tensor(sizes))
                reader = self._reader(
                    [prompts[i] for i in edits], layer, self.shortcuts or Shortcuts()
                )
                with torch.enable_grad():
                    values, losses = optimize_targets(
                        reader.initial, reader, self.target, owner.to(self.device)
                    )
                parts = values.cpu().split(sizes, dim=1), losses.cpu().split(sizes)
                for member, value, course in zip(group, *parts, strict=True):
                    found[member] = Targets(value.clone(), course.clone())
                bar.update(len(edits))
        return [found[member] for member in range(len(members))]

    def _tokens_at_once(self, layer: int) -> int:
        """Return how many tokens the target search may hold at once."""
        if self.target.tokens_per_batch is not None:
            return self.target.tokens_per_batch
        d_model, d_in = self.editable_weight(layer).shape
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        floats = (len(self.blocks) - layer) * (16 * d_model + 4 * d_in) + 4 * vocabulary
        return max(MIN_TOKENS, min(MAX_TOKENS, free_memory(self.device) // (2 * 4 * floats)))

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


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device, for each process on it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not hasattr(os, "sysconf"):
        return 4 * 2**30
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // n_processes()
