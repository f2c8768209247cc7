"""MEMIT and MEMIT + BLUE against reference numbers, two sequential batches on two architectures.

Adam amplifies float32 rounding, hence 1e-3 for targets and weights and 1e-4 for keys and losses
(norm of the difference over the norm).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from safetensors.torch import load_file

from blue_callbacks import ClosedFormUpdate, KeyMemory, least_squares
from helpers import fit, load_model
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.targets import TargetSearch
from lightning_blue.requests import EditRequest

CASES = [
    (method, variant, model)
    for method in ("MEMIT", "MEMIT_seq")
    for variant in ("classic", "blue")
    for model in ("tiny-gpt2", "tiny-llama")
]


def deviation(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


def golden_requests(shared: Path) -> list[EditRequest]:
    common = json.loads((shared / "golden/edits/common.json").read_text())
    return [
        EditRequest(
            case_id=str(r["case_id"]),
            prompt=r["prompt"],
            subject=r["subject"],
            target_new=r["target_new"]["str"],
            target_true=r["target_true"]["str"],
        )
        for r in common["requests"]
    ]


def golden_module(shared: Path, name: str, hparams: dict) -> EditModule:
    common = json.loads((shared / "golden/edits/common.json").read_text())
    model, tokenizer = load_model(shared / "golden/models" / name)
    module = EditModule(
        model,
        tokenizer,
        target=TargetSearch(
            steps=hparams["v_num_grad_steps"],
            learning_rate=hparams["v_lr"],
            weight_decay=hparams["v_weight_decay"],
            clamp=hparams["clamp_norm_factor"],
            kl_weight=hparams["kl_factor"],
        ),
        contexts=[template.removesuffix(" {}") for template in common["context_templates"][1]],
    )
    covariances = load_file(shared / "golden/cov" / f"{name}.safetensors")
    module._covariances = {layer: covariances[f"mom2.layer{layer}"] for layer in (1, 2, 3, 4)}
    return module


class Recorder(ClosedFormUpdate):
    """Keep what each solve saw and what the batch left behind, by the reference's names."""

    def on_edit_batch(self, trainer, module, batch):
        b = f"b{trainer.global_step + 1}"
        self.seen = getattr(self, "seen", {})
        real = (module.edit_targets, KeyMemory.update)

        def targets(batch, layer):
            found = real[0](batch, layer)
            self.seen[f"{b}.zs.layer{layer}"] = found
            self.seen[f"{b}.loss.layer{layer}"] = module.target_losses[layer]
            return found

        order = iter(self.written_layers)

        def update(memory, residual, keys):
            layer = next(order)
            self.seen[f"{b}.keys.layer{layer}"] = keys
            self.seen[f"{b}.resid.layer{layer}"] = residual
            return real[1](memory, residual, keys)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "edit_targets", targets)
            patch.setattr(KeyMemory, "update", update)
            super().on_edit_batch(trainer, module, batch)
        for layer in self.written_layers:
            weight = module._projection(layer).weight.detach().clone()
            self.seen[f"{b}.weight.layer{layer}"] = weight
            self.seen[f"{b}.post_keys.layer{layer}"] = module.edit_keys(batch, layer)


@pytest.mark.parametrize(("method", "variant", "name"), CASES)
def test_two_batches_equal_the_reference(shared, method, variant, name):
    seed_everything(0)
    stem = shared / "golden/edits" / name / f"{method}_{variant}"
    golden = load_file(f"{stem}.safetensors")
    hparams = json.loads(Path(f"{stem}.json").read_text())["hparams"]
    requests = golden_requests(shared)
    update = Recorder(
        layers=[1, 2, 3, 4],
        plan="boundary" if variant == "blue" else "even",
        covariance_weight=hparams["mom2_update_weight"],
        past_keys=method.endswith("_seq"),
    )
    fit(golden_module(shared, name, hparams), update, [requests[:4], requests[4:]])
    limits = {"keys": 1e-4, "post_keys": 1e-4, "zs": 1e-3, "resid": 1e-3, "weight": 1e-3}
    for key in (key for key in golden if key.split(".")[1] in limits):
        assert deviation(update.seen[key], golden[key]) < limits[key.split(".")[1]], key
    for key in (key for key in golden if ".loss." in key):
        ours, reference = update.seen[key], golden[key]
        assert torch.equal(ours.isnan(), reference.isnan()), f"{key}: number of forward passes"
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_closed_form_alone_equals_the_reference(shared, name):
    """Given the golden keys, residuals and covariance, both batches with past keys."""
    golden = load_file(shared / "golden/edits" / name / "MEMIT_seq_blue.safetensors")
    covariances = load_file(shared / "golden/cov" / f"{name}.safetensors")
    _, tokenizer = load_model(shared / "golden/models" / name)
    model, _ = load_model(shared / "golden/models" / name)
    module = EditModule(model, tokenizer, contexts=[])
    for layer in (1, 4):
        memory = KeyMemory(least_squares(covariances[f"mom2.layer{layer}"], 15.0))
        weight = module.editable_weight(layer).double()
        for b in ("b1", "b2"):
            weight = weight + memory.update(
                golden[f"{b}.resid.layer{layer}"], golden[f"{b}.keys.layer{layer}"]
            )
            native = golden[f"{b}.weight.layer{layer}"]
            reference = native if native.shape == weight.shape else native.T
            assert deviation(weight, reference.double()) < 1e-5
            memory.remember(golden[f"{b}.post_keys.layer{layer}"])
