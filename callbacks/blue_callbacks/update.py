"""The callback that writes edits into weights in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from blue_callbacks.closed_form import KeyMemory, whitening_factor
from blue_callbacks.plans import PlanStep, plan_steps
from blue_callbacks.protocol import EditableModule


class NonFiniteError(RuntimeError):
    """An update would have put NaN or infinity into the weights; they were left as before."""


class ClosedFormUpdate(Callback):
    """Write each edit batch into the critical layers, one layer after the other.

    For every step of the plan it asks the module for targets (once per target layer, on the weights
    as they are then), for keys and for current outputs, solves

        Delta = R K1^T (lambda K0 K0^T + Kp Kp^T + K1 K1^T)^-1

    (Eq. 8; Eq. 5 without past keys), adds Delta to the weight, and goes on with the next step. If
    anything fails, the weights are put back to what they were before the batch.

    Args:
        layers: critical layers, ascending. Without them the callback cannot be used for editing.
        plan: which layers are written with whose residual: ``boundary`` (BLUE), ``even`` (MEMIT),
            ``computed``, ``first`` or ``last``.
        covariance_weight: weight of ordinary text's keys against new ones (lambda).
        past_keys: whether keys of earlier batches are respected too (Eq. 8).
    """

    def __init__(
        self,
        layers: Sequence[int],
        plan: Literal["boundary", "even", "computed", "first", "last"] = "boundary",
        covariance_weight: float = 15000.0,
        past_keys: bool = True,
    ) -> None:
        if covariance_weight <= 0:
            raise ValueError(f"covariance_weight must be positive, not {covariance_weight:g}")
        self.layers = list(layers)
        self.plan = plan
        self.covariance_weight = covariance_weight
        self.past_keys = past_keys
        self.steps = plan_steps(plan, self.layers)
        self.remembered: dict[int, Tensor] = {}  # layer -> keys of earlier batches, (d_in, n)
        self.norms: dict[str, float] = {}  # of the newest batch, for whoever logs them
        self._memory: dict[int, KeyMemory] = {}

    @property
    def written_layers(self) -> list[int]:
        """The layers that the plan writes."""
        return [step.layer for step in self.steps]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the covariances from the unedited model, all of them before the first write."""
        prepare = getattr(pl_module, "prepare", None)
        if prepare is not None:
            prepare(self.layers, self.written_layers)
        with torch.no_grad():
            for layer in self.written_layers:
                self._memory_of(cast(EditableModule, pl_module), layer)

    def on_edit_batch(self, trainer: Trainer, module: EditableModule, batch: Any) -> None:
        """Walk the plan over one edit batch, then remember its keys."""
        with self._restored_on_error(module):
            targets: dict[int, Tensor] = {}
            for step in self.steps:
                if step.target_layer not in targets:
                    targets[step.target_layer] = module.edit_targets(batch, step.target_layer)
                self._write(module, batch, step, targets[step.target_layer])
            if self.past_keys:
                for layer in self.written_layers:
                    self._remember(module, batch, layer)

    def _write(self, module: EditableModule, batch: Any, step: PlanStep, target: Tensor) -> None:
        keys = module.edit_keys(batch, step.layer)  # (d_in, n)
        residual = step.share * (target - module.edit_outputs(batch, step.target_layer))
        _require_finite(module, batch, step.layer, keys=keys, residual=residual)
        with torch.autocast(keys.device.type, enabled=False):
            delta = self._memory_of(module, step.layer).update(residual, keys)
        weight = module.editable_weight(step.layer)
        edited = (weight.to(delta) + delta).to(weight.dtype)
        if not bool(torch.isfinite(edited).all()):
            raise NonFiniteError(
                f"the update of layer {step.layer} is not finite in {weight.dtype}"
            )
        weight.copy_(edited)
        self.norms[f"layer{step.layer}/delta_norm"] = float(delta.norm())
        self.norms[f"layer{step.layer}/residual_norm"] = float(residual.norm(dim=0).mean())

    def _remember(self, module: EditableModule, batch: Any, layer: int) -> None:
        keys = module.edit_keys(batch, layer).detach().float()
        with torch.autocast(keys.device.type, enabled=False):
            self._memory_of(module, layer).remember(keys)
        earlier = self.remembered.get(layer, keys[:, :0])
        self.remembered[layer] = torch.cat((earlier.to(keys), keys), dim=1)

    def _memory_of(self, module: EditableModule, layer: int) -> KeyMemory:
        """Return the layer's memory, built on first use and after a restart."""
        if layer not in self._memory:
            covariance = module.key_covariance(layer).to(module.editable_weight(layer).device)
            memory = KeyMemory(whitening_factor(covariance, self.covariance_weight))
            if layer in self.remembered:
                memory.remember(self.remembered[layer])
            self._memory[layer] = memory
        return self._memory[layer]

    @contextmanager
    def _restored_on_error(self, module: EditableModule) -> Iterator[None]:
        before = {layer: module.editable_weight(layer).clone() for layer in self.written_layers}
        try:
            yield
        except BaseException:
            for layer, weight in before.items():
                module.editable_weight(layer).copy_(weight)
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return the keys of earlier batches, float32, ``(d_in, n)`` for each written layer."""
        return {"past_keys": {str(layer): keys for layer, keys in self.remembered.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the keys of earlier batches."""
        self.remembered = {int(layer): keys for layer, keys in state_dict["past_keys"].items()}
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
