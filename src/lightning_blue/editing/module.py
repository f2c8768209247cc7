"""The LightningModule that edits a language model: one training step is one edit batch."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
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
from blue_callbacks.ranges import SEED, Range, check_ranges
from lightning_blue.data.checks import by_subject
from lightning_blue.data.corpus import require_own_text
from lightning_blue.data.datamodule import EditDataModule
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.covariance import CovarianceSource, load_or_collect
from lightning_blue.editing.depth import proposed_layers, trained_layer
from lightning_blue.editing.fine_tuning import losses_and_gradient
from lightning_blue.editing.fingerprints import model_fingerprint
from lightning_blue.editing.health import first_texts, known, percent_known, text_loss
from lightning_blue.editing.in_context import Fact, FactMemory, InContext
from lightning_blue.editing.lookups import keys_at_lookups, outputs_at_lookups
from lightning_blue.editing.optimization import TargetOptimization, Targets
from lightning_blue.editing.prompts import (
    EditPrompts,
    context_templates,
    edit_prompts,
    require_end_of_text,
    written_contexts,
)
from lightning_blue.editing.rounding import FinalRounding
from lightning_blue.editing.target_site import PROMPTS
from lightning_blue.editing.target_store import TargetStore, place, target_identity
from lightning_blue.editing.targets import TargetFinder, losses_not_finite
from lightning_blue.language_model.architectures import (
    Architecture,
    check_layers,
    check_site,
    down_projection,
    find_architecture,
    hidden_size,
    projection_fault,
    site_modules,
    weight_view,
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
from lightning_blue.language_model.tokens import plain_ids, target_prefixes
from lightning_blue.language_model.vocabulary import check_vocabulary, vocabulary
from lightning_blue.support.errors import InputError
from lightning_blue.support.seeds import run_seed

log = logging.getLogger(__name__)

MAX_CONTEXT_TOKENS = 10_000  # where the model does not say how many tokens it reads


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
        self.target_finder = TargetFinder(model, self.architecture, target)
        self.site = self.target_finder.site
        self.blocks = self.target_finder.blocks  # a plain list: already in self.model
        self.editable_weights = EditableWeights(self._weight_view)
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
        self.statistics: dict[str, Any] = {}  # what the covariances are from, for the report
        self._covariances: dict[int, Tensor] = {}
        self._edited: list[WeightId] = []  # by the run, as far as is known
        self._identity: str | None = None
        self._templates: list[str] | None = None
        self._tokenised: tuple[Sequence[EditRequest], list[EditPrompts]] | None = None
        self._ordinary_text: str | None = ""  # read at first use
        self._warned_of: set[str] = set()  # subjects that several requests of a batch were about
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
                    self._check_loss_layer(part.target_layer)
            closed = all(
                each.solver.closed_form for each in callbacks if isinstance(each, ClosedFormUpdate)
            )
            if not self._covariances and closed:
                self._require_own_text()

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
        if weight.layer not in self._covariances:
            self.prepare([weight.layer], [weight])
        return self._covariances[weight.layer].to(float64_device(self.device))

    def edit_keys(self, batch: Sequence[EditRequest], weight: WeightId) -> Tensor:
        """Return the key of each edit, averaged over contexts, ``(d_in, n)``."""
        return keys_at_lookups(self.model, self._projection(weight), self._prompts(batch))

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
        self._check_loss_layer(layer)
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
        return losses_and_gradient(self.model, self._projection(weight), chosen)

    def remembering(self, batch: Sequence[EditRequest]) -> AbstractContextManager[None]:
        """Put the facts of a batch before the prompts about them; no more if the block raises."""
        prefixes = target_prefixes(
            self.tokenizer, [r.shown for r in batch], [r.target_prefix for r in batch]
        )
        return self.memory.holding(
            [
                Fact(r.case_id, r.subject, r.shown, f"{r.shown}{prefix}{r.target_new}")
                for r, prefix in zip(batch, prefixes, strict=True)
            ]
        )

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
        for layer, covariance in covariances.items():
            size = weight_view(self._projection(WeightId(layer))).shape[1]
            if covariance.shape != (size, size):
                raise InputError(
                    f"a covariance of layer {layer} is ({size}, {size}), not "
                    f"{tuple(covariance.shape)}: one row and column for each key dimension",
                    where="covariances",
                    hint="give the second moment of the inputs of the layer's down projection",
                )
        self._covariances |= covariances
        given = ", ".join(map(str, sorted(covariances)))
        self.statistics["covariance_trusted"] = (
            f"given in memory for layers {given}; what model and text they are of was not checked"
        )

    def propose_layers(self) -> list[int]:
        """Return critical layers by depth, for an update that was given none.

        Raises:
            InputError: if none of them can be edited.
        """
        return proposed_layers(len(self.blocks), self.editable_layers)

    def propose_trained_layers(self) -> list[int]:
        """Return the one layer that fine-tuning trains where none is given.

        Raises:
            InputError: if no layer can be edited.
        """
        return [trained_layer(len(self.blocks), self.editable_layers or self.propose_layers())]

    @property
    def editable_layers(self) -> list[int]:
        """Layers with a down projection that can be written, ascending."""
        d_model = hidden_size(self.model)
        faults = [projection_fault(block, self.architecture, d_model) for block in self.blocks]
        return [layer for layer, fault in enumerate(faults) if fault is None]

    def go_on_from(self, earlier: EditModule) -> None:
        """Take over what was found on the unedited model by the module that edited it before.

        Args:
            earlier: of the same model, with its edits in the weights.
        """
        self._identity, self._templates = earlier.identity, earlier.templates
        self._covariances, self.statistics = {**earlier._covariances}, {**earlier.statistics}
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
        missing = sorted(set(self._written) - set(self._covariances))
        if missing and covariances:
            self._require_own_text()
            projections = {layer: self._projection(WeightId(layer)) for layer in missing}
            found = load_or_collect(
                self.model, self.tokenizer, projections, self.covariance, weight
            )
            self._covariances |= found.covariances
            self.statistics |= found.about
        self._edited = list(dict.fromkeys([*self._edited, *written]))
        self.note_unedited(self._edited)
        if self.export_dtype != self.model.dtype:
            self.rounding.keep(written)
        self.preparation_seconds = time.perf_counter() - started

    def note_unedited(self, weights: Sequence[WeightId]) -> None:
        """Let the store of targets know the weights as they are, before any is edited."""
        if self.target_store is not None and not self.edit_batches_held:
            self.target_store.note_unedited(self._values_of(weights))

    def target_identity(self, batch: Sequence[EditRequest], layer: int) -> dict[str, str]:
        """Return what the targets of a batch depend on while the weights are unedited."""
        prompts, groups = self._prompts(batch), self._edits_by_target(batch)
        described = target_identity(self.target_finder, prompts, groups, layer)
        return {"model": self.identity, **described}

    @property
    def found_settings(self) -> dict[str, Any]:
        """Settings that were measured, under the names that a report shows them by."""
        found = dict(self.statistics)
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
            places = {n: (self.blocks[n], self._projection(WeightId(n))) for n in layers}
            self.site.measure(self.model, places, [row.ids[: row.lookup + 1] for row in rows])

    @property
    def edited_names(self) -> list[str]:
        """Full names of the weights that :meth:`prepare` was told of."""
        return self.weight_names(self._edited)

    def weight_names(self, weights: Sequence[WeightId]) -> list[str]:
        """Return the full names of weights, as ``model.named_parameters()`` has them."""
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        return [names[id(self._projection(weight).weight)] for weight in weights]

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
        check_layers(layers, self.blocks, self.architecture, hidden_size(self.model))

    @property
    def embeddings(self) -> int:
        """How many tokens the model has an embedding of."""
        return vocabulary(self.model, self.tokenizer).embeddings

    def _require_own_text(self) -> None:
        if not self.covariance.trust:
            require_own_text(self.covariance.corpus, self.tokenizer)

    def _projection(self, weight: WeightId) -> nn.Module:
        self.check_layers([weight.layer])
        return down_projection(self.blocks[weight.layer], self.architecture)

    def _weight_view(self, weight: WeightId) -> Tensor:
        return weight_view(self._projection(weight))

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
            "edited": json.dumps(store.edited(self._values_of(self._edited)), sort_keys=True),
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
        found = self.target_finder.find(prompts, self._edits_by_target(batch), layer)
        bad = losses_not_finite(found.losses)
        if bad:
            alone = [i for i in bad if self._fails_alone(prompts[i], layer)]
            raise NonFiniteError(
                f"the loss of {edit_names(self, batch, alone or bad)} at layer {layer} is not "
                "finite; the weights are as they were before this batch"
            )
        return Targets(found.values.contiguous(), found.losses.contiguous())

    def _values_of(self, weights: Sequence[WeightId]) -> dict[str, Tensor]:
        """Return the weights that the model computes with, as it stores them."""
        return {
            str(weight): cast(Tensor, self._projection(weight).weight).detach()
            for weight in weights
        }

    def _fails_alone(self, prompts: EditPrompts, layer: int) -> bool:
        """Say whether an edit's loss is not finite when no other is computed with it."""
        return bool(losses_not_finite(self.target_finder.find([prompts], [[0]], layer).losses))

    def _edits_by_target(self, batch: Sequence[EditRequest]) -> list[list[int]]:
        """Group the edits that have one target; name edits that ought to have one together."""
        groups = by_subject(batch)
        if self.target.merge_subjects:
            return list(groups.values())
        for subject, edits in groups.items():
            if len(edits) > 1 and subject not in self._warned_of:
                self._warned_of.add(subject)
                names = ", ".join(batch[i].case_id for i in edits)
                rank_zero_warn(
                    f"requests {names} of one batch are about {subject!r}, and one key cannot "
                    "hold several targets; --model.target.merge_subjects=true gives them one"
                )
        return [[index] for index in range(len(batch))]

    def _check_loss_layer(self, layer: int) -> None:
        if self.target.loss_layer is None:
            return
        if self.target.loss_layer >= len(self.blocks):
            raise InputError(
                f"the model has no layer {self.target.loss_layer}: its {len(self.blocks)} layers "
                f"are 0 to {len(self.blocks) - 1}",
                where="model.target.loss_layer",
                hint="choose one of them, or null for the last one",
            )
        if self.target.loss_layer < layer:
            raise InputError(
                f"loss_layer {self.target.loss_layer} lies below the target layer {layer}, where "
                "no delta can change the loss",
                where="model.target.loss_layer",
                hint="choose a higher layer, or null for the last one",
            )


def check_contexts(
    context_tokens: int | None, seed: int | None, most: int = MAX_CONTEXT_TOKENS
) -> None:
    """Check the numbers that `EditModule` takes.

    Args:
        context_tokens: length of the prefixes that the model writes.
        seed: of their sampling.
        most: tokens that a prefix may have.

    Raises:
        InputError: naming the one that is out of its range.
    """
    given = {"context_tokens": context_tokens, "seed": seed}
    check_ranges("model", given, context_tokens=Range(1, most, whole=True), seed=SEED)


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
