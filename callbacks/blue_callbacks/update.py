"""The callback that writes edits into weights in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from blue_callbacks.closed_form import KeyMemory, Whitening, least_squares, null_space
from blue_callbacks.plans import LayerUpdate, layer_updates
from blue_callbacks.protocol import EditableModule
from blue_callbacks.transforms import POST_EDIT_TRANSFORMS, rect

NEARLY_ALL, NEARLY_NONE = 0.98, 0.02  # share of key dimensions in a null space worth a warning


class NonFiniteError(RuntimeError):
    """An update would have put NaN or infinity into the weights; they were left as before."""


class ClosedFormUpdate(Callback):
    """Write each edit batch into the critical layers, one layer after the other.

    For every step of the plan it asks the module for targets (once per target layer, on the weights
    as they are then), for keys and for current outputs, solves

        Delta = R K1^T (lambda K0 K0^T + Kp Kp^T + K1 K1^T)^-1

    (Eq. 8; Eq. 5 without past keys), adds Delta to the weight, and goes on with the next step. If
    anything fails, the weights are put back to what they were before the batch. Weights in half
    precision are accumulated in float32, so that small updates are not lost to rounding.

    Args:
        layers: critical layers, ascending. Without them the callback cannot be used for editing.
        plan: which layers are written with whose residual: ``boundary`` (BLUE), ``even`` (MEMIT),
            ``square_root`` (PMET), ``computed``, ``first`` or ``last``.
        covariance_weight: least squares: weight of ordinary text's keys against new ones (lambda).
        past_keys: whether keys of earlier batches are respected too (Eq. 8).
        solver: ``least_squares`` weighs ordinary text's keys; ``null_space`` (AlphaEdit) does not
            touch them at all.
        threshold: null space: directions whose eigenvalue in the covariance is below it are kept.
        energy: null space: instead of a threshold, the share of the covariance's trace that the
            kept directions may hold.
        ridge: null space: AlphaEdit's L2.
        rect_keep: RECT: the share of entries of a batch's update to keep, 0.4 in its paper. None:
            all of them. The batch's layers are solved on whole updates, and cut when all are done.
        post_edit_transform: what is done once, after the last batch: ``prune`` compresses the singular values
            of the whole update; ``prune_official`` reproduces BLUE's published code.
    """

    def __init__(
        self,
        layers: Sequence[int],
        plan: Literal["boundary", "even", "square_root", "computed", "first", "last"] = "boundary",
        covariance_weight: float = 15000.0,
        past_keys: bool = True,
        solver: Literal["least_squares", "null_space"] = "least_squares",
        threshold: float = 0.02,
        energy: float | None = None,
        ridge: float = 10.0,
        rect_keep: float | None = None,
        post_edit_transform: Literal["prune", "prune_official"] | None = None,
    ) -> None:
        for name, value in (("covariance_weight", covariance_weight), ("ridge", ridge)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, not {value:g}")
        for name, share in (("energy", energy), ("rect_keep", rect_keep)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name} is a share, above 0 and at most 1, not {share:g}")
        self.layers = list(layers)
        self.plan = plan
        self.solver = solver
        self.covariance_weight = covariance_weight
        self.past_keys = past_keys
        self.threshold, self.energy, self.ridge = threshold, energy, ridge
        self.rect_keep = rect_keep
        self.post_edit_transform = post_edit_transform
        self.steps = layer_updates(plan, self.layers)
        self._remembered: dict[int, list[Tensor]] = {}  # layer -> keys of each earlier batch
        self.original: dict[
            int, Tensor
        ] = {}  # layer -> unedited weight, kept for the post-edit transform
        self.norms: dict[str, float] = {}  # of the newest batch, for whoever logs them
        self.notes: list[str] = []  # what a user should be told of the method's set-up
        self._precise: dict[int, Tensor] = {}  # layer -> float32 version of a half-precision weight
        self._memory: dict[int, KeyMemory] = {}

    @property
    def written_layers(self) -> list[int]:
        """The layers that the plan writes."""
        return [step.layer for step in self.steps]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the covariances from the unedited model, all of them before the first write."""
        prepare = getattr(pl_module, "prepare", None)
        if prepare is not None:
            prepare(self.layers, self.written_layers, self.covariance_weight)
        module = cast(EditableModule, pl_module)
        with torch.no_grad():
            for layer in self.written_layers:
                self._memory_of(module, layer)
                if self.post_edit_transform is not None and layer not in self.original:
                    self.original[layer] = self._weight(module, layer).clone()

    def on_edit_batch(self, trainer: Trainer, module: EditableModule, batch: Any) -> None:
        """Walk the plan over one edit batch, then remember its keys."""
        with self._restored_on_error(module) as before:
            targets: dict[int, Tensor] = {}
            keys: dict[int, Tensor] = {}  # no later step changes them: plans go up the layers
            for step in self.steps:
                if step.target_layer not in targets:
                    targets[step.target_layer] = module.edit_targets(batch, step.target_layer)
                keys[step.layer] = module.edit_keys(batch, step.layer).detach()
                self._write(module, batch, step, targets[step.target_layer], keys[step.layer])
            if self.rect_keep is not None:
                for layer, weight in before.items():
                    delta = rect(weight, self._weight(module, layer) - weight, self.rect_keep)
                    self._set_weight(module, layer, weight + delta)
            if self.past_keys:
                if self.rect_keep is not None:
                    keys = {layer: module.edit_keys(batch, layer).detach() for layer in keys}
                self._remember(module, keys)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the whole update, where the method does."""
        if self.post_edit_transform is None:
            return
        module = cast(EditableModule, pl_module)
        for layer, original in self.original.items():
            edited = self._weight(module, layer)
            transformed = POST_EDIT_TRANSFORMS[self.post_edit_transform](
                original.to(edited), edited
            )
            with torch.no_grad():
                self._set_weight(module, layer, transformed)

    def _write(
        self, module: EditableModule, batch: Any, step: LayerUpdate, target: Tensor, keys: Tensor
    ) -> None:
        residual = step.share * (target - module.edit_outputs(batch, step.target_layer))
        _require_finite(module, batch, step.layer, keys=keys, residual=residual)
        with torch.autocast(keys.device.type, enabled=False):
            left, right = self._memory_of(module, step.layer).update(residual, keys)
            weight = self._weight(module, step.layer)
            weight.addmm_(left.to(weight), right.to(weight))
        self._publish(module, step.layer, weight)
        squared = ((left.T @ left) * (right @ right.T)).sum()
        self.norms[f"layer{step.layer}/delta_norm"] = float(squared.clamp(min=0).sqrt())
        self.norms[f"layer{step.layer}/residual_norm"] = float(residual.norm(dim=0).mean())

    def _remember(self, module: EditableModule, keys: dict[int, Tensor]) -> None:
        for layer, newest in keys.items():
            self._memory_of(module, layer).remember(newest)
        for layer, newest in keys.items():
            self._remembered.setdefault(layer, []).append(newest)

    def _memory_of(self, module: EditableModule, layer: int) -> KeyMemory:
        """Return the layer's memory, built on first use and after a restart."""
        if layer not in self._memory:
            covariance = module.key_covariance(layer).to(module.editable_weight(layer).device)
            memory = KeyMemory(self._whitening(covariance, layer))
            for keys in self._remembered.get(layer, []):
                memory.remember(keys.to(covariance.device))
            self._memory[layer] = memory
        return self._memory[layer]

    def _whitening(self, covariance: Tensor, layer: int) -> Whitening:
        if self.solver == "least_squares":
            return least_squares(covariance, self.covariance_weight)
        whitening = null_space(covariance, self.ridge, self.threshold, self.energy)
        kept, every = cast(Tensor, whitening.basis).shape[1], covariance.shape[0]
        self.norms[f"layer{layer}/null_space"] = kept
        said = f"layer {layer}: the null space keeps {kept} of {every} key dimensions"
        if not NEARLY_NONE < kept / every < NEARLY_ALL:
            rank_zero_warn(f"{said}; choose another update.threshold, or give update.energy")
        self.notes = list(dict.fromkeys([*self.notes, said]))
        return whitening

    def _weight(self, module: EditableModule, layer: int) -> Tensor:
        """Return the layer's weight in float32 or better, ``(d_out, d_in)``."""
        weight = module.editable_weight(layer)
        if weight.dtype in (torch.float32, torch.float64):
            return weight
        if layer not in self._precise:
            self._precise[layer] = weight.float()
        return self._precise[layer]

    def _set_weight(self, module: EditableModule, layer: int, edited: Tensor) -> None:
        weight = self._weight(module, layer).copy_(edited)
        self._publish(module, layer, weight)

    def _publish(self, module: EditableModule, layer: int, weight: Tensor) -> None:
        """Let the model see a weight that was changed, if it is finite in the model's precision."""
        seen = module.editable_weight(layer)
        if seen.dtype != weight.dtype:
            seen.copy_(weight)
        if not bool(torch.isfinite(seen.sum(dtype=weight.dtype))):
            raise NonFiniteError(f"the update of layer {layer} is not finite in {seen.dtype}")

    @contextmanager
    def _restored_on_error(self, module: EditableModule) -> Iterator[dict[int, Tensor]]:
        """Give the weights as they are now, and put them back if anything goes wrong."""
        before = {layer: self._weight(module, layer).clone() for layer in self.written_layers}
        try:
            yield before
        except BaseException:
            for layer, weight in before.items():
                self._weight(module, layer).copy_(weight)
                module.editable_weight(layer).copy_(weight)
            self._memory = {}  # built again from what is remembered
            raise

    @property
    def remembered(self) -> dict[int, Tensor]:
        """Keys of all earlier batches by layer, ``(d_in, n)``."""
        return {
            layer: torch.cat([some.to(keys[-1]) for some in keys], dim=1)
            for layer, keys in self._remembered.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what earlier batches left, by layer.

        ``past_keys`` are ``(d_in, n)``; ``precise`` holds the float32 version of weights
        in half precision, ``original`` the unedited weights that the end of the run needs.
        """
        kept = {"past_keys": self.remembered, "precise": self._precise, "original": self.original}
        return {
            name: {str(layer): tensor for layer, tensor in tensors.items()}
            for name, tensors in kept.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what earlier batches left."""
        past, self._precise, self.original = (
            {int(layer): tensor for layer, tensor in state_dict[name].items()}
            for name in ("past_keys", "precise", "original")
        )
        self._remembered = {layer: [keys] for layer, keys in past.items()}
        self._memory = {}


def _require_finite(module: EditableModule, batch: Any, layer: int, **columns: Tensor) -> None:
    for what, values in columns.items():
        bad = (~torch.isfinite(values)).any(dim=0).nonzero().flatten().tolist()
        if bad:
            name = getattr(module, "edit_name", lambda _, column: f"edit {column} of the batch")
            raise NonFiniteError(
                f"{what} at layer {layer} not finite for {name(batch, bad[0])}"
                + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
                + "; the weights are as they were before this batch"
            )
