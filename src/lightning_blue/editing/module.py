"""The LightningModule that edits a language model: one training step is one edit batch."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blue_callbacks import (
    ClosedFormUpdate,
    EditableWeights,
    EditStepOptimizer,
    NonFiniteError,
    WeightId,
    apply_edit_batch,
)
from blue_callbacks.precision import float64_device
from blue_callbacks.protocol import edit_names
from lightning_blue.data.datamodule import EditDataModule
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.covariance import CovarianceSource
from lightning_blue.editing.fine_tuning import losses_and_gradient
from lightning_blue.editing.fingerprints import model_fingerprint
from lightning_blue.editing.health import first_texts, known, percent_known, text_loss
from lightning_blue.editing.in_context import FactMemory, InContext, facts_of
from lightning_blue.editing.key_covariances import KeyCovariances
from lightning_blue.editing.layers import EditableLayers
from lightning_blue.editing.lookups import keys_at_lookups, outputs_at_lookups
from lightning_blue.editing.optimization import TargetOptimization, Targets
from lightning_blue.editing.prompts import (
    MAX_CONTEXT_TOKENS,
    EditPrompts,
    check_contexts,
    context_templates,
    edit_prompts,
    require_end_of_text,
    written_contexts,
)
from lightning_blue.editing.rounding import FinalRounding
from lightning_blue.editing.target_site import PROMPTS
from lightning_blue.editing.target_store import TargetStore, place, target_identity
from lightning_blue.editing.targets import TargetFinder, TargetGroups
from lightning_blue.language_model.architectures import (
    Architecture,
    check_site,
    find_architecture,
    site_modules,
)
from lightning_blue.language_model.batching import context_length
from lightning_blue.language_model.chat import markers
from lightning_blue.language_model.frozen_model import FrozenModel
from lightning_blue.language_model.loading import (
    checkpoint_dtype,
    dtype_named,
    load_language_model,
)
from lightning_blue.language_model.multimodal import LOADER, auto_class
from lightning_blue.language_model.quantized import require_unquantized_model
from lightning_blue.language_model.tokens import plain_ids
from lightning_blue.language_model.vocabulary import check_vocabulary, vocabulary
from lightning_blue.support.errors import InputError
from lightning_blue.support.seeds import run_seed

log = logging.getLogger(__name__)


class EditModule(LightningModule):
    """Edit the facts of a causal language model.

    Offers the protocol of :class:`blue_callbacks.EditableModule`: keys are inputs of the FFN's down
    projection at the subject's last token, averaged over contexts; outputs and targets are hidden
    states behind the block.

    Args:
        model: a causal language model, in eval mode.
        tokenizer: its fast tokenizer.
        target: settings of the target optimisation.
        contexts: prefixes put before each prompt. None: the model writes one for each of
            "The", "Therefore", "Because", "I", "You". An empty list: the bare prompt only.
        context_tokens: length of the prefixes that the model writes.
        covariance: where the covariance of keys comes from.
        architecture: module names, for a model whose architecture has no row.
        seed: of the contexts that the model writes; None: the one of ``seed_everything``.
        export_dtype: of the edited model as it is saved: ``float32``, ``bfloat16`` or ``float16``.
            None: that of its checkpoint.
        in_context: how facts stand before prompts, where the update's solver is ``in_context``.
        cache_targets: whether to keep the targets of the first batch beside the covariances
            (``covariance.cache``), and to take those that another run has kept there; a sweep does.

    The model is frozen and in eval mode until the end of ``fit``, ``validate`` or ``test``; then it
    is as it was found, but for the edits.
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
        seed: int | None = None,
        export_dtype: str | None = None,
        in_context: InContext = InContext(),  # noqa: B008  (frozen)
        cache_targets: bool = False,
    ) -> None:
        super().__init__()
        check_contexts(context_tokens, seed, most=(context_length(model) or MAX_CONTEXT_TOKENS) - 1)
        require_unquantized_model(model)
        self.automatic_optimization = False
        self.strict_loading = False
        self.model = model
        self.tokenizer = tokenizer
        self.target = target
        self.contexts = contexts
        self.context_tokens = context_tokens
        self.covariance = covariance.fitting(tokenizer)
        self.chose_text = covariance.corpus != self.covariance.corpus
        self.architecture = find_architecture(model, architecture)
        check_site(target.site, self.architecture)
        if target.end_of_text:
            require_end_of_text(tokenizer)
        self.seed = seed
        self.export_dtype = checkpoint_dtype(model)
        if export_dtype is not None:
            self.export_dtype = dtype_named(export_dtype, "model.export_dtype")
        self.layers = EditableLayers(model, self.architecture)
        self.blocks = self.layers.blocks  # a plain list: already in self.model
        self.target_finder = TargetFinder(model, self.architecture, target)
        self.target_groups = TargetGroups(target.merge_subjects)
        self.site = self.target_finder.site
        self.editable_weights = EditableWeights(self.layers.weight)
        self.rounding = FinalRounding(self.editable_weights, self.export_dtype)
        self.in_context = in_context
        self.memory = FactMemory(in_context, markers(tokenizer))  # empty: prompts stay as they are
        self.edit_batches_held = 0  # by the weights; counted by the callback that writes them
        self.target_losses: dict[int, Tensor] = {}  # of the newest batch, by target layer
        self.target_values: dict[int, Tensor] = {}  # (n_sites, n, d_model), by target layer
        self.targets_read: dict[int, bool] = {}  # whether these are from a file
        self.cache_targets = cache_targets
        self.target_store: TargetStore | None = None
        if cache_targets and covariance.cache is not None:
            self.target_store = TargetStore(Path(covariance.cache))
        self.preparation_seconds = 0.0
        self.key_covariances = KeyCovariances(self.layers)
        self._edited: list[WeightId] = []  # by the run, as far as is known
        self._identity: str | None = None
        self._templates: list[str] | None = None
        self._tokenised: tuple[Sequence[EditRequest], list[EditPrompts]] | None = None
        self._ordinary_text: str | None = ""  # read at first use
        self._written: list[int] = []  # layers that the run writes, as far as is known
        self.frozen = FrozenModel(model)  # last: what is refused above leaves the model alone

    # Lightning

    def setup(self, stage: str) -> None:
        """Refuse layers that cannot be and a text of another model, before any work.

        Raises:
            InputError: if a critical layer cannot be edited, the model has no such loss layer, a
                target layer lies above it, or the covariance's text belongs to another model.
        """
        if stage == "fit":
            callbacks: list[Any] = [] if self._trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
            for update in (each for each in callbacks if isinstance(each, ClosedFormUpdate)):
                self.check_layers(update.layers)
                for part in update.layer_updates:
                    self.target_finder.check_loss_layer(part.target_layer)
            closed = all(
                each.solver.closed_form for each in callbacks if isinstance(each, ClosedFormUpdate)
            )
            if not self.key_covariances.by_layer and closed:
                self.covariance.require_own_text(self.tokenizer)

    def configure_callbacks(self) -> list[Callback]:
        """Leave the model as it was found, also where a run fails."""
        return [self.frozen]

    def configure_optimizers(self) -> EditStepOptimizer:
        """One optimizer step is one edit batch."""
        return EditStepOptimizer(self.parameters())

    def training_step(self, batch: list[EditRequest], batch_idx: int) -> None:
        """Apply one edit batch."""
        apply_edit_batch(self, batch)

    def validation_step(self, batch: list[EditRequest], batch_idx: int) -> None:
        """Leave measuring to the callback that is there for it."""

    def test_step(self, batch: list[EditRequest], batch_idx: int) -> None:
        """Leave measuring to the callback that is there for it."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what cannot be found out again once the model is edited; not the model itself.

        The edited weights are put into the checkpoint by the callback that writes them.
        """
        checkpoint["state_dict"] = {}
        checkpoint["edit_module"] = {
            "model": self.identity,
            "templates": self.templates,
            "site": self.site.state_dict(),
            "memory": self.memory.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what was found on the unedited model: its contexts, and where targets are.

        Raises:
            InputError: if this is not the model that the run was started with.
        """
        saved = checkpoint["edit_module"]
        if saved["model"] != self.identity:
            raise InputError(
                "the run was started with another model: its unedited weights differ from these",
                where="model.name_or_path",
                hint="resume it with the model, revision and dtype that it was started with",
            )
        self._templates = saved["templates"]
        if "site" in saved:
            self.site.load_state_dict(saved["site"])
        if "memory" in saved:
            self.memory.load_state_dict(saved["memory"])

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Leave requests as they are: they are text."""
        return batch

    def on_fit_start(self) -> None:
        """Stay in eval mode: editing must see the model as it is used."""
        self.model.eval()

    def on_train_epoch_end(self) -> None:
        """Round the edited weights to what is saved of them; after the callbacks' own last step."""
        self.rounding.apply()

    # What the callbacks ask for

    def key_covariance(self, weight: WeightId) -> Tensor:
        """Return the covariance of the weight's keys, ``(d_in, d_in)``; see :meth:`prepare`."""
        if weight.layer not in self.key_covariances.by_layer:
            self.prepare([weight.layer], [weight])
        return self.key_covariances.by_layer[weight.layer].to(float64_device(self.device))

    def edit_keys(self, batch: Sequence[EditRequest], weight: WeightId) -> Tensor:
        """Return the key of each edit, averaged over contexts, ``(d_in, n)``."""
        return keys_at_lookups(self.model, self.layers.projection(weight), self._prompts(batch))

    def edit_outputs(self, batch: Sequence[EditRequest], layer: int) -> Tensor:
        """Return the output at the target site at the bare lookup, ``(d_model, n)``."""
        self.measure_site([*self._written, layer], batch)
        site = site_modules(self.site.name, self.blocks[layer], self.architecture)[-1]
        return outputs_at_lookups(self.model, site, self._prompts(batch))

    def output_multiple(self, weight: WeightId) -> float:
        """Return what the outputs at the weight's layer move by for a unit of the weight's own."""
        return self.site.multiples.get(weight.layer, 1.0)

    def edit_targets(self, batch: Sequence[EditRequest], layer: int) -> Tensor:
        """Optimise the site's outputs that make the model say the new objects, ``(d_model, n)``.

        Raises:
            InputError: if the loss is read below the target layer, or the weight does not move the
                target site's output in proportion.
            NonFiniteError: naming the requests whose own loss was not finite.
        """
        self.target_finder.check_loss_layer(layer)
        self.measure_site([*self._written, layer], batch)
        values, losses = self._found_targets(batch, layer)
        self.target_losses[layer] = losses.to(self.device)
        self.target_values[layer] = values.to(self.device)
        return self.target_values[layer][-1].T

    def edit_gradient(
        self, batch: Sequence[EditRequest], columns: Sequence[int], weight: WeightId
    ) -> tuple[Tensor, Tensor]:
        """Return losses of edits, ``(k,)``, and the gradient of their mean."""
        prompts = self._prompts(batch)
        chosen = [prompts[column] for column in columns]
        return losses_and_gradient(self.model, self.layers.projection(weight), chosen)

    def remembering(self, batch: Sequence[EditRequest]) -> AbstractContextManager[None]:
        """Put the facts of a batch before the prompts about them; no more if the block raises."""
        return self.memory.holding(facts_of(self.tokenizer, batch))

    def request_ids(self, batch: Sequence[EditRequest]) -> list[str]:
        """Return the id of each request of a batch."""
        return [request.case_id for request in batch]

    def single_edit(self, batch: Sequence[EditRequest], column: int) -> list[EditRequest]:
        """Return a batch of one edit."""
        return [batch[column]]

    def edit_name(self, batch: Sequence[EditRequest], column: int) -> str:
        """Name an edit of the batch in a message."""
        request = batch[column]
        return f"request {request.case_id} ({request.shown!r} -> {request.target_new!r})"

    def ordinary_loss(self) -> float | None:
        """Return the loss on the first 1,024 tokens of the covariance's text, nats per token.

        None where that text cannot be read.
        """
        if self._ordinary_text == "":
            source = self.covariance
            self._ordinary_text = first_texts(self.tokenizer, source.corpus, source.split)
        if self._ordinary_text is None:
            return None
        return text_loss(self.model, self.tokenizer, self._ordinary_text)

    def retained_knowledge(self) -> float | None:
        """Return the top-1 recall of the first 100 control facts in percent; None without any."""
        self.settle_controls()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        facts = data.controls if isinstance(data, EditDataModule) else []
        return percent_known(self.model, self.tokenizer, facts, sent=self.memory)

    def settle_controls(self) -> None:
        """Keep those control facts that the model answers, if they are to be asked for.

        It is done once in a run, before any edit; a checkpoint brings what was found then.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, EditDataModule) and data.controls_open:
            found = known(self.model, self.tokenizer, data.controls)
            data.keep_known(self.trainer.strategy.broadcast(found))

    # Set-up

    @property
    def identity(self) -> str:
        """A hash of the unedited weights, by which covariances and checkpoints are known."""
        if self._identity is None:
            self._identity = model_fingerprint(self.model)
        return self._identity

    @property
    def templates(self) -> list[str]:
        """Context templates, the bare one first; written by the model as it was at first use."""
        if self._templates is None:
            prefixes = self.contexts
            if prefixes is None:
                seed = run_seed(self.seed)
                prefixes = written_contexts(self.model, self.tokenizer, self.context_tokens, seed)
            self._templates = context_templates(prefixes)
        return self._templates

    def set_covariances(self, covariances: Mapping[int, Tensor]) -> None:
        """Take the covariances of layers' keys as they are; no text is read for these layers.

        Args:
            covariances: layer -> ``(d_in, d_in)``, of keys of this model, unedited.

        Raises:
            InputError: for a layer that the model does not have, or a matrix of another size.
        """
        self.key_covariances.give(covariances)

    def propose_layers(self) -> list[int]:
        """Return critical layers by depth, for an update that was given none.

        Raises:
            InputError: if none of them can be edited.
        """
        return self.layers.proposed()

    def propose_trained_layers(self) -> list[int]:
        """Return the one layer that fine-tuning trains where none is given.

        Raises:
            InputError: if no layer can be edited.
        """
        return self.layers.proposed_for_training()

    @property
    def editable_layers(self) -> list[int]:
        """Layers with a down projection that can be written, ascending."""
        return self.layers.editable

    def go_on_from(self, earlier: EditModule) -> None:
        """Take over what was found on the unedited model by the module that edited it before.

        Args:
            earlier: of the same model, with its edits in the weights.
        """
        self._identity, self._templates = earlier.identity, earlier.templates
        self.key_covariances.go_on_from(earlier.key_covariances)
        self._edited = [*earlier._edited]
        self.edit_batches_held = earlier.edit_batches_held
        self.site.load_state_dict(earlier.site.state_dict())
        self.editable_weights.go_on_from(earlier.editable_weights)

    def prepare(
        self,
        critical: Sequence[int],
        written: Sequence[WeightId],
        weight: float | None = None,
        covariances: bool = True,
    ) -> None:
        """Find out what must come from the unedited model: contexts, target site, covariances.

        Args:
            critical: all critical layers of the method, to be checked against the model.
            written: the weights whose covariance is needed.
            weight: of the covariance in the update, for the report on whether its text was enough;
                None: one for each key dimension.
            covariances: whether the method needs covariances, and targets at the site.

        Raises:
            InputError: if the model has no such layer, the weights do not move the target site's
                output in proportion, or a covariance file or a text of the package is another
                model's.
        """
        started = time.perf_counter()
        self.check_layers(critical)
        _ = self.identity, self.templates
        self._written = sorted({each.layer for each in written})
        data = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        if covariances and isinstance(data, EditDataModule):
            self.measure_site(self._written, data.requests[:PROMPTS])
        if covariances:
            self.key_covariances.complete(self.tokenizer, self._written, self.covariance, weight)
        self._edited = list(dict.fromkeys([*self._edited, *written]))
        self.note_unedited(self._edited)
        if self.export_dtype != self.model.dtype:
            self.rounding.keep(written)
        self.preparation_seconds = time.perf_counter() - started

    def note_unedited(self, weights: Sequence[WeightId]) -> None:
        """Let the store of targets know the weights as they are, before any is edited."""
        if self.target_store is not None and not self.edit_batches_held:
            self.target_store.note_unedited(self.layers.stored(weights))

    def target_identity(self, batch: Sequence[EditRequest], layer: int) -> dict[str, str]:
        """Return what the targets of a batch depend on while the weights are unedited."""
        prompts, groups = self._prompts(batch), self.target_groups(batch)
        described = target_identity(self.target_finder, prompts, groups, layer)
        return {"model": self.identity, **described}

    @property
    def found_settings(self) -> dict[str, Any]:
        """Settings that were measured, under the names that a report shows them by."""
        found = dict(self.key_covariances.about)
        if self.target.end_of_text:
            found["end_of_text"] = True
        if not self.site.multiples:
            return found
        found["site"] = self.site.name
        if self.site.note is not None:
            found["site_note"] = self.site.note
        loader = auto_class(self.model.config).__name__
        return found if loader == LOADER else {**found, "loaded_with": loader}

    def measure_site(self, layers: Sequence[int], requests: Sequence[EditRequest]) -> None:
        """Measure the target site for layers that are new to it, on prompts of the run.

        Raises:
            InputError: if the closed form cannot be right for one of them.
        """
        if requests and not set(layers) <= set(self.site.multiples):
            rows = [prompt.rewriting[0] for prompt in self._prompts(requests)[:PROMPTS]]
            places = {n: (self.blocks[n], self.layers.projection(WeightId(n))) for n in layers}
            self.site.measure(self.model, places, [row.ids[: row.lookup + 1] for row in rows])

    @property
    def edited_names(self) -> list[str]:
        """Full names of the weights that :meth:`prepare` was told of."""
        return self.weight_names(self._edited)

    def weight_names(self, weights: Sequence[WeightId]) -> list[str]:
        """Return the full names of weights, as ``model.named_parameters()`` has them."""
        return self.layers.names(weights)

    @property
    def contexts_length(self) -> int:
        """How many tokens the longest context adds to a prompt, about, and an end of text."""
        if self.contexts is None:
            return self.context_tokens + 2 + self.target.end_of_text
        texts = ["", *self.contexts]
        return max(map(len, plain_ids(self.tokenizer, texts))) + self.target.end_of_text

    @property
    def max_length(self) -> int:
        """The most tokens the model can read."""
        return context_length(self.model) or 2**31

    def check_layers(self, layers: Sequence[int]) -> None:
        """Refuse layers that cannot be edited.

        Raises:
            InputError: naming them, and those that can be.
        """
        self.layers.check(layers)

    @property
    def embeddings(self) -> int:
        """How many tokens the model has an embedding of."""
        return vocabulary(self.model, self.tokenizer).embeddings

    def _prompts(self, batch: Sequence[EditRequest]) -> list[EditPrompts]:
        """Tokenise a batch, once for all that is asked about it."""
        if self._tokenised is None or self._tokenised[0] is not batch:
            prompts = edit_prompts(self.tokenizer, batch, self.templates, self.target.end_of_text)
            for request, prompt in zip(batch, prompts, strict=True):
                ids = [token for row in prompt.rewriting for token in row.ids] + prompt.target
                check_vocabulary(self.model, self.tokenizer, [request.text], [ids])
            self._tokenised = batch, prompts
        return self._tokenised[1]

    def _found_targets(self, batch: Sequence[EditRequest], layer: int) -> Targets:
        """Optimise the targets of a batch; those of the first may be in the store."""
        self.targets_read[layer] = False
        store = self.target_store
        if store is None or not store.ready or self.edit_batches_held:
            return self._optimised(batch, layer)
        self.target_finder.get_ready(self._prompts(batch), layer)
        trainer = self._trainer
        strategy, precision = (
            (None, "32-true") if trainer is None else (trainer.strategy, str(trainer.precision))
        )
        identity = {
            **self.target_identity(batch, layer),
            "edited": json.dumps(store.edited(self.layers.stored(self._edited)), sort_keys=True),
            "site": self.site.name,
            **place(self.device, precision),
        }
        optimise = partial(self._optimised, batch, layer)
        found, file = store.shared(identity, strategy, optimise)
        self.targets_read[layer] = file is not None
        if file is not None:
            log.info("targets of batch 0, layer %d, are read from %s", layer, file)
        return found

    def _optimised(self, batch: Sequence[EditRequest], layer: int) -> Targets:
        prompts = self._prompts(batch)
        found = self.target_finder.find(prompts, self.target_groups(batch), layer)
        bad = self.target_finder.not_finite(prompts, found.losses, layer)
        if bad:
            raise NonFiniteError(
                f"the loss of {edit_names(self, batch, bad)} at layer {layer} is not finite; "
                "the weights are as they were before this batch"
            )
        return Targets(found.values.contiguous(), found.losses.contiguous())


def edit_module(
    name_or_path: str = "almanac",
    dtype: str = "float32",
    revision: str | None = None,
    **settings: Any,
) -> EditModule:
    """Load a language model and wrap it for editing.

    Args:
        name_or_path: ``almanac`` (in the package), a folder, a GGUF file, or a name on the hub.
        dtype: of the weights while they are edited: ``float32``, ``bfloat16`` or ``float16``.
        revision: branch, tag or commit on the hub.
        **settings: see :class:`EditModule`.
    """
    check_contexts(settings.get("context_tokens"), settings.get("seed"))
    model, tokenizer = load_language_model(name_or_path, dtype, revision)
    return EditModule(model, tokenizer, **settings)
