"""MEMIT and MEMIT + BLUE against reference numbers, two sequential batches on two architectures.

Adam amplifies float32 rounding, hence 1e-3 for targets and weights and 1e-4 for keys and losses
(norm of the difference over the norm).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from safetensors.torch import load_file

from blue_callbacks import (
    ClosedFormUpdate,
    KeyMemory,
    WeightId,
    Whitening,
    least_squares,
    null_space,
    prune,
    prune_official,
)
from helpers import fit, load_model
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.optimization import TargetOptimization
from lightning_blue.language_model.architectures import down_projection
from lightning_blue.support.errors import InputError

METHODS = ("MEMIT", "MEMIT_seq", "MEMIT_rect", "MEMIT_prune", "AlphaEdit", "PMET", "PMET_seq")
CASES = [
    (method, variant, model)
    for method in METHODS
    for variant in ("classic", "blue")
    for model in ("tiny-gpt2", "tiny-llama")
]


LIMITS = {
    "keys": 1e-4,
    "post_keys": 1e-4,
    "zs": 1e-3,
    "zs_attn": 1e-3,
    "resid": 1e-3,
    "weight": 1e-3,
    "weight_unpruned": 1e-3,
    "weight_corrected": 1e-3,
}


def deviation(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


TIES = 4  # entries of a weight that RECT's cut may decide otherwise; see `without_ties`


def without_ties(ours: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Take over the reference's entries where RECT's cut went the other way; say if it did.

    Entries whose relative change differs from the quantile by less than float32's rounding (1e-7,
    amplified to 1e-5 by what comes before) are kept or cut by chance: about 0.05 of the 10,240
    entries of a weight. One on either side of the cut then changes places with another.
    """
    changed = (ours - reference).abs() > 1e-3 * reference.abs().mean()
    if not 0 < int(changed.sum()) <= TIES:
        return ours, False
    return torch.where(changed, reference, ours), True


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


def golden_search(method: str, hparams: dict) -> TargetOptimization:
    pmet = method.startswith("PMET")
    return TargetOptimization(
        steps=hparams["v_num_grad_steps"],
        learning_rate=hparams["v_lr"],
        weight_decay=hparams["v_weight_decay"],
        clamp=hparams["clamp_norm_factor"],
        kl_weight=hparams["kl_factor"],
        loss_layer=hparams["v_loss_layer"],
        site="attention_and_ffn" if pmet else "block",
        early_stop="pmet" if pmet else None,
    )


def golden_update(method: str, variant: str, hparams: dict) -> dict:
    spread = "square_root" if method.startswith("PMET") else "even"
    own: dict = {}
    if method == "AlphaEdit":
        own = {
            "solver": "null_space",
            "threshold": hparams["nullspace_threshold"],
            "ridge": hparams["L2"],
        }
    return own | {
        "layers": [1, 2, 3, 4],
        "plan": "boundary" if variant == "blue" else spread,
        "covariance_weight": hparams["mom2_update_weight"],
        "past_keys": method.endswith("_seq") or method == "AlphaEdit",
        "rect_keep": 0.4 if method == "MEMIT_rect" else None,
        "post_edit_transform": "prune" if method == "MEMIT_prune" else None,
    }


def projection(module: EditModule, layer: int) -> torch.nn.Module:
    return down_projection(module.blocks[layer], module.architecture)


def golden_module(shared: Path, name: str, search: TargetOptimization) -> EditModule:
    common = json.loads((shared / "golden/edits/common.json").read_text())
    model, tokenizer = load_model(shared / "golden/models" / name)
    module = EditModule(
        model,
        tokenizer,
        target=search,
        contexts=[template.removesuffix(" {}") for template in common["context_templates"][1]],
    )
    covariances = load_file(shared / "golden/cov" / f"{name}.safetensors")
    module.set_covariances({layer: covariances[f"mom2.layer{layer}"] for layer in (1, 2, 3, 4)})
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
            self.seen[f"{b}.zs_attn.layer{layer}"] = module.target_values[layer][0].T
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
            weight = projection(module, layer).weight.detach().clone()
            self.seen[f"{b}.weight.layer{layer}"] = weight
            weight = WeightId(layer)
            past = self._past.batches[weight][-1].respected if self.past_keys else None
            left = module.edit_keys(batch, weight) if past is None else past
            self.seen[f"{b}.post_keys.layer{layer}"] = left


@pytest.mark.parametrize(("method", "variant", "name"), CASES)
def test_two_batches_equal_the_reference(shared, method, variant, name):
    seed_everything(0)
    stem = shared / "golden/edits" / name / f"{method}_{variant}"
    golden = load_file(f"{stem}.safetensors")
    hparams = json.loads(Path(f"{stem}.json").read_text())["hparams"]
    requests = golden_requests(shared)
    update = Recorder(**golden_update(method, variant, hparams))
    module = golden_module(shared, name, golden_search(method, hparams))
    fit(module, update, [requests[:4], requests[4:]])
    for layer in update.written_layers:  # PRUNE's reference keeps other things than the others'
        update.seen[f"b2.weight_unpruned.layer{layer}"] = update.seen[f"b2.weight.layer{layer}"]
        final = projection(module, layer).weight.detach()
        update.seen[f"final.weight_corrected.layer{layer}"] = final
    compared = [key for key in golden if key.split(".")[1] in LIMITS]
    assert {key.split(".")[1] for key in compared} >= (
        {"weight_unpruned", "weight_corrected"} if method == "MEMIT_prune" else {"weight", "keys"}
    )
    loosened = 1.0  # once an entry was cut otherwise, what follows is computed on other weights
    for key in sorted(compared):  # the first batch first
        ours, reference = update.seen[key], golden[key]
        if method == "MEMIT_rect" and ".weight." in key:
            ours, tied = without_ties(ours, reference)
            loosened = 10.0 if tied else loosened
        assert deviation(ours, reference) < loosened * LIMITS[key.split(".")[1]], key
    for key in (key for key in golden if ".loss." in key):
        ours, reference = update.seen[key], golden[key]
        assert torch.equal(ours.isnan(), reference.isnan()), f"{key}: number of forward passes"
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("method", ["MEMIT_seq", "AlphaEdit"])
@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_closed_form_alone_equals_the_reference(shared, name, method):
    """Given the golden keys, residuals and covariance, both batches with past keys."""
    stem = shared / "golden/edits" / name / f"{method}_blue"
    golden = load_file(f"{stem}.safetensors")
    hparams = json.loads(Path(f"{stem}.json").read_text())["hparams"]
    covariances = load_file(shared / "golden/cov" / f"{name}.safetensors")
    _, tokenizer = load_model(shared / "golden/models" / name)
    model, _ = load_model(shared / "golden/models" / name)
    module = EditModule(model, tokenizer, contexts=[])
    for layer in (1, 4):
        covariance = covariances[f"mom2.layer{layer}"]
        if method == "AlphaEdit":
            # The reference's projector, since its float32 SVD turns the space near the threshold.
            projector = covariances[f"P.layer{layer}"].double()
            ours = null_space(covariance, hparams["L2"], hparams["nullspace_threshold"]).basis
            assert ours.shape[1] == round(float(projector.trace()))
            assert deviation(ours @ ours.T, projector) < 1e-3
            basis = torch.linalg.eigh(projector).eigenvectors[:, -ours.shape[1] :]
            memory = KeyMemory(Whitening(hparams["L2"] ** 0.5, basis))
        else:
            memory = KeyMemory(least_squares(covariance, 15.0))
        weight = module.editable_weights.read(WeightId(layer)).double()
        for b in ("b1", "b2"):
            left, right = memory.update(
                golden[f"{b}.resid.layer{layer}"], golden[f"{b}.keys.layer{layer}"]
            )
            weight = weight + left @ right
            native = golden[f"{b}.weight.layer{layer}"]
            reference = native if native.shape == weight.shape else native.T
            assert deviation(weight, reference.double()) < 1e-5
            memory.remember(golden[f"{b}.post_keys.layer{layer}"])


@pytest.mark.parametrize("variant", ["classic", "blue"])
@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_prune_equals_the_reference(shared, name, variant):
    """Both readings, from the golden edited weights."""
    golden = load_file(shared / "golden/edits" / name / f"MEMIT_prune_{variant}.safetensors")
    module = golden_module(shared, name, TargetOptimization())
    for layer in (1, 4):
        original = projection(module, layer).weight.detach()
        edited = golden[f"b2.weight_unpruned.layer{layer}"]
        for ours, reading in ((prune, "corrected"), (prune_official, "official")):
            reference = golden[f"final.weight_{reading}.layer{layer}"]
            assert deviation(ours(original, edited), reference) < 1e-5
        assert deviation(edited, reference) > 1e-3  # the official reading always moves it


OPTIONS = {
    "v_num_grad_steps": "steps",
    "v_lr": "learning_rate",
    "v_weight_decay": "weight_decay",
    "clamp_norm_factor": "clamp",
    "kl_factor": "kl_weight",
    "v_loss_layer": "loss_layer",
}


@pytest.mark.parametrize("method", ["MEMIT", "PMET"])
@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_target_searches_under_other_settings_equal_the_reference(shared, name, method):
    extra = json.loads((shared / f"golden/compute_z_extra/{name}.json").read_text())
    golden = load_file(shared / f"golden/compute_z_extra/{name}.safetensors")
    base = json.loads((shared / f"golden/edits/{name}/{method}_blue.json").read_text())["hparams"]
    requests = {
        r["case_id"]: EditRequest(
            str(r["case_id"]), r["prompt"], r["subject"], r["target_new"]["str"].strip()
        )
        for r in extra["requests"]
    }
    prefixes = [template.removesuffix(" {}") for template in extra["context_templates"][1]]
    model, tokenizer = load_model(shared / "golden/models" / name)
    # Two settings look up other tokens than the subject's last; no method of the paper does, and
    # the reference's indices for the subject's first token are wrong.
    cases = [
        case
        for case in extra["cases"]
        if case["method"] == method and "fact_token" not in case["overrides"]
    ]
    for case in cases:
        changed = {OPTIONS[key]: value for key, value in case["overrides"].items()}
        search = dataclasses.replace(golden_search(method, base), **changed)
        module = EditModule(model, tokenizer, target=search, contexts=prefixes)
        if search.loss_layer < case["layer"]:  # the reference's NLL cannot see delta there
            with pytest.raises(InputError, match="below the target layer"):
                module.edit_targets([requests[case["case"]]], case["layer"])
            continue
        found = module.edit_targets([requests[case["case"]]], case["layer"])[:, 0]
        losses = module.target_losses[case["layer"]][0]
        reference = golden[f"{case['key']}.loss"]
        losses = losses[~losses[:, 0].isnan()]
        assert len(losses) == case["forward_passes"], case["key"]
        torch.testing.assert_close(losses, reference, rtol=1e-3, atol=1e-3, msg=case["key"])
        assert deviation(found, golden[f"{case['key']}.z"]) < 1e-3, case["key"]
    assert len(cases) >= 12
