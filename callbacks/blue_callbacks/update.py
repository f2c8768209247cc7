"""The callback that writes edits into weights in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any, Literal, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from blue_callbacks.closed_form import Whitening
from blue_callbacks.errors import InputError, UnsolvableError, first_line
from blue_callbacks.fine_tuning import FineTuning, check_baseline, fine_tuned_change
from blue_callbacks.finite import require_finite_keys, require_finite_residual
from blue_callbacks.past_keys import PastKeys, solving
from blue_callbacks.plans import LayerUpdate, layer_updates
from blue_callbacks.protocol import (
    EditableModule,
    edit_hooks,
    edit_name,
    output_multiple,
    request_ids,
    weights_of,
)
from blue_callbacks.ranges import FRACTION, check_ranges
from blue_callbacks.records import EditRecord, WeightChange, pack_bits
from blue_callbacks.solvers import Solver, kept_dimensions, unused_note, worth_a_warning
from blue_callbacks.trainer_checks import check_trainer, leave_gradients_unscaled
from blue_callbacks.transforms import POST_EDIT_TRANSFORMS, rect_kept
from blue_callbacks.weights import WeightId, restored_on_error

EDITED_WEIGHTS = "edited_weights"  # in a checkpoint


class ClosedFormUpdate(Callback):
    """Write each edit batch into the critical layers, one layer after the other.

    For every layer update of the plan it asks the module for targets (once per target layer, on the
    weights as they are then), for keys and for current outputs, solves

        Delta = R K1^T (lambda K0 K0^T + Kp Kp^T + K1 K1^T)^-1

    (Eq. 8; Eq. 5 without past keys), adds Delta to the weight, and goes on. If anything fails, the
    weights are put back to what they were before the batch. Where a layer has several edited
    weights, they are written one after the other, each with an even share of what is left of the
    residual.

    Other callbacks follow the batches: ``on_edit_written(trainer, module, record)`` is called when
    the weights are written and may raise :class:`EditRejected` to have them put back;
    ``on_edit_committed(trainer, module, record)`` when the batch is committed.

    Args:
        layers: critical layers, ascending. None: those that the module proposes.
        plan: which layers are written with whose residual: ``boundary`` (BLUE), ``even`` (MEMIT),
            ``square_root`` (PMET), ``computed``, ``first`` or ``last``; ``none`` writes no layer.
        covariance_weight: least squares: weight lambda of the covariance (mom2_update_weight).
            None: as many as the weight has key dimensions. It counts tokens of ordinary text that
            a key is weighed against, and published values (15,000 for 14,336 and for 16,384
            dimensions, 20,000 for 6,400) are of that size.
        past_keys: whether keys of earlier batches are respected too (Eq. 8).
        solver: ``least_squares`` lets outputs at keys of ordinary text change, at a price;
            ``null_space`` (AlphaEdit) leaves them as they are. Two baselines solve nothing:
            ``fine_tuning`` trains the one layer of the plan ``first`` or ``last`` on the edits, and
            ``in_context``, with the plan ``none``, has facts put before prompts.
        threshold: null space: directions whose eigenvalue in the covariance is below it are kept.
        energy: null space: instead of a threshold, the fraction of the covariance's trace that the
            kept directions may hold.
        ridge: null space: AlphaEdit's L2.
        rect_keep: RECT: the fraction of entries of a batch's update to keep, 0.4 in its paper;
            None: all of them. The batch's layers are solved on whole updates, then cut.
        post_edit_transform: what is done once, after the last batch: ``prune`` compresses the
            singular values of the whole update; ``prune_official`` is what BLUE's published code
            does.
        fine_tuning: how the solver ``fine_tuning`` trains.
    """

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        plan: Literal[
            "boundary", "even", "square_root", "computed", "first", "last", "none"
        ] = "boundary",
        covariance_weight: float | None = None,
        past_keys: bool = True,
        solver: Literal[
            "least_squares", "null_space", "fine_tuning", "in_context"
        ] = "least_squares",
        threshold: float = 0.02,
        energy: float | None = None,
        ridge: float = 10.0,
        rect_keep: float | None = None,
        post_edit_transform: Literal["prune", "prune_official"] | None = None,
        fine_tuning: FineTuning = FineTuning(),  # noqa: B008  (frozen)
    ) -> None:
        check_ranges("update", {"rect_keep": rect_keep}, rect_keep=FRACTION)
        self.plan = plan
        self.solver = Solver(solver, covariance_weight, threshold, energy, ridge)
        self.fine_tuning = fine_tuning
        self.past_keys = past_keys and self.solver.closed_form
        self.rect_keep = rect_keep
        self.post_edit_transform = post_edit_transform
        self.layers: list[int] = []
        self.layer_updates: list[LayerUpdate] = []
        self.proposed = layers is None  # by the module, as soon as there is one
        check_baseline(solver, plan, rect_keep, post_edit_transform)
        if layers is not None:
            self._choose(layers)
        else:
            layer_updates(plan, [0])  # refuses an unknown plan at once
        self.committed = 0  # batches whose edits are in the weights
        self.original: dict[WeightId, Tensor] = {}  # unedited, kept for the post-edit transform
        self.norms: dict[str, float] = {}  # of the newest batch, for whoever logs them
        self.notes: list[str] = []  # what a user should be told of the method's set-up
        self._edits: list[list[str]] = []  # of each committed batch, as `_spelled` has them
        self._past = PastKeys(self.solver, self._note)
        self._resumed: dict[WeightId, Tensor] | None = None  # of a checkpoint, until they fit
        self._resuming = False  # until the first batch after a resume is seen to be a new one

    def find_layers(self, module: Any) -> None:
        """Take the critical layers that the module proposes, where none were given.

        Raises:
            InputError: if it proposes none.
        """
        if self.layers or self.plan == "none":
            return
        trained = self.solver.kind == "fine_tuning"
        name = "propose_trained_layers" if trained else "propose_layers"
        propose = getattr(module, name, None)
        if propose is None:
            raise InputError(
                "no critical layers are given, and the module proposes none",
                where="update.layers",
                hint="give them, ascending: ClosedFormUpdate(layers=[4, 5, 6, 7, 8])",
            )
        self._choose(propose())

    def _choose(self, layers: Sequence[int]) -> None:
        self.layer_updates = layer_updates(self.plan, list(layers))
        self.layers = list(layers)

    @property
    def written_layers(self) -> list[int]:
        """The layers that the plan writes."""
        return [update.layer for update in self.layer_updates]

    def written_weights(self, module: EditableModule) -> list[WeightId]:
        """Return the ids of the weights that the plan writes, in order."""
        return [weight for layer in self.written_layers for weight in weights_of(module, layer)]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would edit wrongly, before anything is computed.

        Raises:
            InputError: for settings of the Trainer that cannot be right, see `check_trainer`; for a
                module that holds edits of another callback.
        """
        if stage != "fit":
            return
        self.find_layers(pl_module)
        check_trainer(trainer)
        leave_gradients_unscaled(trainer)
        held = getattr(pl_module, "edit_batches_held", 0)
        if held != self.committed:
            raise InputError(
                f"the module holds {held} edit batches, and this callback knows the keys of "
                f"{self.committed}: past keys would be forgotten",
                hint="go on with the callback that wrote them, or load the model anew",
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the covariances from the unedited model, all of them before the first write."""
        module = cast(EditableModule, pl_module)
        weights = self.written_weights(module)
        prepare = getattr(pl_module, "prepare", None)
        if prepare is not None and self.solver.closed_form:
            prepare(self.layers, weights, self.solver.covariance_weight)
        elif prepare is not None:
            prepare(self.layers, weights, covariances=False)
        with torch.no_grad():
            for weight in weights:
                if self.solver.closed_form:
                    self._past.require_same_covariance(weight, module.key_covariance(weight))
                    self._past.memory_of(module, weight)
                if self.post_edit_transform is not None and weight not in self.original:
                    self.original[weight] = module.editable_weights.read(weight).clone()
            for weight, value in (self._resumed or {}).items():
                module.editable_weights.write(weight, value)
        if self._resumed is not None:
            self._resumed, self._resuming = None, True
            cast(Any, module).edit_batches_held = self.committed

    def on_edit_batch(self, trainer: Trainer, module: EditableModule, batch: Any) -> None:
        """Walk the plan over one edit batch, then remember its keys."""
        weights = self.written_weights(module)
        self._refuse_a_second_time(module, batch)
        with (
            self._past.rebuilt_on_error(),
            restored_on_error(module.editable_weights, weights) as before,
            self._remembering(module, batch),
        ):
            changes = self._changes(trainer, module, batch)
            if self.rect_keep is not None:
                changes = self._cut(module, before, changes, self.rect_keep)
            if self.past_keys and self.rect_keep is not None:
                changes = self._keys_read_again(module, batch, changes)
            ids = request_ids(module, batch, changes[0].keys.shape[1] if changes else 0)
            record = EditRecord(self.committed, ids, tuple(changes))
            self.norms |= _norms(changes)
            for hook in edit_hooks(trainer, "on_edit_written"):
                hook(trainer, module, record)
            if self.past_keys:
                self._past.remember(record)
        self._commit(module, batch, record)
        for hook in edit_hooks(trainer, "on_edit_committed"):
            hook(trainer, module, record)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Transform the whole update, where the method does.

        Before ``on_train_end``, in which other callbacks measure and save, in whatever order.
        """
        if self.post_edit_transform is None:
            return
        store = cast(EditableModule, pl_module).editable_weights
        transform = POST_EDIT_TRANSFORMS[self.post_edit_transform]
        with torch.no_grad(), restored_on_error(store, list(self.original)):
            for weight, original in self.original.items():
                edited = store.read(weight)
                try:
                    store.write(weight, transform(original.to(edited), edited))
                except torch.linalg.LinAlgError as error:
                    raise UnsolvableError(
                        f"{self.post_edit_transform} of {weight} cannot be computed: "
                        f"{first_line(error)}\n"
                        "  hint:  the weights are as the last batch left them; go on without "
                        "update.post_edit_transform"
                    ) from error

    def _refuse_a_second_time(self, module: EditableModule, batch: Any) -> None:
        """Refuse the first batch after a resume if it is one that was applied before."""
        resuming, self._resuming = self._resuming, False
        if not resuming or not hasattr(module, "request_ids"):
            return
        edits = _spelled(module, batch)
        if edits in self._edits:
            raise InputError(
                f"the run goes on with batch {self._edits.index(edits)}, which was applied "
                f"before: the dataloader starts at its beginning, not behind the {self.committed} "
                "batches that were committed",
                where="the dataloader",
                hint="let it start at batch trainer.global_step, as CommittedBatches does",
            )

    def _remembering(self, module: EditableModule, batch: Any) -> AbstractContextManager[Any]:
        """Hold a batch's facts where they are retrieved from, if that is the method."""
        if self.solver.kind != "in_context":
            return nullcontext()
        if not hasattr(module, "remembering"):
            raise InputError(
                "the module retrieves no facts, which in-context editing needs",
                where="update.solver = in_context",
                hint="choose least_squares, null_space or fine_tuning",
            )
        return cast("AbstractContextManager[Any]", cast(Any, module).remembering(batch))

    def _changes(self, trainer: Trainer, module: EditableModule, batch: Any) -> list[WeightChange]:
        """Write a batch by the chosen solver."""
        if self.solver.closed_form:
            return self._write_all(module, batch)
        changes = []
        for weight in self.written_weights(module):
            how, number = self.fine_tuning, self.committed
            change, norms = fine_tuned_change(trainer, module, batch, weight, how, number)
            changes.append(change)
            self.norms |= norms
        return changes

    def _write_all(self, module: EditableModule, batch: Any) -> list[WeightChange]:
        """Write every layer of the plan; a target layer's targets are found when first needed."""
        targets: dict[int, Tensor] = {}
        changes: list[WeightChange] = []
        for update in self.layer_updates:
            if update.target_layer not in targets:
                targets[update.target_layer] = module.edit_targets(batch, update.target_layer)
            ids = weights_of(module, update.layer)
            for place, weight in enumerate(ids):
                share = update.share / (len(ids) - place)
                part = update._replace(share=share)
                target = targets[update.target_layer]
                changes.append(self._write(module, batch, part, weight, target))
        return changes

    def _write(
        self,
        module: EditableModule,
        batch: Any,
        update: LayerUpdate,
        weight: WeightId,
        target: Tensor,
    ) -> WeightChange:
        """Solve for one weight and add the update to it."""
        keys = module.edit_keys(batch, weight).detach()
        missing = update.share * (target - module.edit_outputs(batch, update.target_layer))
        multiple = output_multiple(module, weight)
        residual = missing if multiple == 1 else missing / multiple
        require_finite_keys(module, batch, weight, keys)
        require_finite_residual(module, batch, weight, residual, target, update.target_layer)
        memory = self._past.memory_of(module, weight)
        with torch.autocast(keys.device.type, enabled=False), solving(weight):
            left, right = memory.update(residual, keys)
            module.editable_weights.add(weight, left, right)
            squared = ((left.T @ left) * (right @ right.T)).sum()
        dtype = module.editable_weights.read(weight).dtype
        return WeightChange(
            weight=weight,
            target_layer=update.target_layer,
            share=update.share,
            left=left.to("cpu", dtype),
            right=right.to("cpu", dtype),
            keys=keys.cpu(),
            residual=residual.cpu(),
            past_keys=None,
            kept=None,
            change_norm=float(squared.clamp(min=0).sqrt()),
            residual_norm=float(missing.norm(dim=0).mean()),
        )

    def _cut(
        self,
        module: EditableModule,
        before: dict[WeightId, Tensor],
        changes: Sequence[WeightChange],
        keep: float,
    ) -> list[WeightChange]:
        """Leave of each weight's change what RECT keeps."""
        store, cut = module.editable_weights, []
        for change in changes:
            weight = before[change.weight]
            whole = store.read(change.weight) - weight
            kept = rect_kept(weight, whole, keep)
            delta = torch.where(kept, whole, 0)
            store.write(change.weight, weight + delta)
            cut.append(replace(change, kept=pack_bits(kept), change_norm=float(delta.norm())))
        return cut

    def _keys_read_again(
        self, module: EditableModule, batch: Any, changes: Sequence[WeightChange]
    ) -> list[WeightChange]:
        """Note the keys as they are when layers below were changed after a layer was solved."""
        read = [(change, module.edit_keys(batch, change.weight)) for change in changes]
        return [replace(change, past_keys=keys.detach().cpu()) for change, keys in read]

    def _commit(self, module: EditableModule, batch: Any, record: EditRecord) -> None:
        """Note that the batch is there to stay."""
        self.committed += 1
        self._edits.append(_spelled(module, batch))
        cast(Any, module).edit_batches_held = self.committed
        if self.past_keys:
            self._past.commit(record)

    def _note(self, weight: WeightId, whitening: Whitening) -> None:
        """Keep for the report what the covariance knows nothing of, or leaves to write in."""
        unused = unused_note(whitening)
        if unused is not None:
            self.notes = list(dict.fromkeys([*self.notes, f"{weight}: {unused}"]))
        dimensions = kept_dimensions(whitening)
        if dimensions is None:
            return
        kept, total = dimensions
        note = f"{weight}: the null space keeps {kept} of {total} key dimensions"
        if worth_a_warning(kept, total):
            rank_zero_warn(f"{note}; choose another update.threshold, or give update.energy")
        self.norms[f"{weight}/null_space"] = kept
        self.notes = list(dict.fromkeys([*self.notes, note]))

    @property
    def past_keys_by_weight(self) -> dict[WeightId, Tensor]:
        """Keys of all earlier batches that are respected, ``(d_in, n)``, on the CPU."""
        return {
            weight: torch.cat([batch.respected for batch in past], dim=1)
            for weight, past in self._past.batches.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what earlier batches left behind, as tensors and plain values."""
        return {
            "settings": self._settings(),
            "committed": self.committed,
            "edits": [*self._edits],
            "original": {str(weight): tensor for weight, tensor in self.original.items()},
            **self._past.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what earlier batches left behind.

        Raises:
            InputError: if they were applied under other settings, naming which.
        """
        for name, value in self._settings().items():
            before = state_dict["settings"][name]
            if before != value:
                raise InputError(
                    f"the run was started with {name} {before}, not {value}",
                    where=f"update.{name}",
                    hint=f"resume it with {name} {before}, or start a new run",
                )
        self.committed = state_dict["committed"]
        self._edits = [*state_dict["edits"]]
        self._past.load_state_dict(state_dict)
        self.original = {
            WeightId.parse(name): tensor for name, tensor in state_dict["original"].items()
        }

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the edited weights into the checkpoint, in the precision they are accumulated in."""
        module = cast(EditableModule, pl_module)
        checkpoint[EDITED_WEIGHTS] = {
            str(weight): module.editable_weights.read(weight).cpu()
            for weight in dict.fromkeys(self.written_weights(module))
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the edited weights until the covariances are taken from the unedited model."""
        self._resumed = {
            WeightId.parse(name): value for name, value in checkpoint[EDITED_WEIGHTS].items()
        }

    def _settings(self) -> dict[str, Any]:
        """Return what must not change within a run, as plain values."""
        kind = self.solver.kind
        return {
            "layers": self.layers,
            "plan": self.plan,
            "past_keys": self.past_keys,
            "rect_keep": self.rect_keep,
            "post_edit_transform": self.post_edit_transform,
            **{"solver" if k == "kind" else k: v for k, v in asdict(self.solver).items()},
            **({"fine_tuning": asdict(self.fine_tuning)} if kind == "fine_tuning" else {}),
        }


def _spelled(module: EditableModule, batch: Any) -> list[str]:
    """Tell a batch from others: by its ids, and, as several edits may share one, their names."""
    ids = request_ids(module, batch, 0)
    return [f"{name}: {edit_name(module, batch, column)}" for column, name in enumerate(ids)]


def _norms(changes: Sequence[WeightChange]) -> dict[str, float]:
    """Return the norms of a batch's changes under flat names."""
    return {
        f"{change.weight}/{name}": value
        for change in changes
        for name, value in (
            ("delta_norm", change.change_norm),
            ("residual_norm", change.residual_norm),
        )
        if change.whole is None or name == "delta_norm"  # what is not solved has no residual
    }
