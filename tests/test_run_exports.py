"""Models, adapters and patches made from runs, against the run's own weights; and what is shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, LanguageModel
from lightning_blue.__main__ import MODEL_COMMANDS, RUN_COMMANDS, main
from lightning_blue.runs.adapter import LowRank, adapter_config, truncated, write_adapter
from lightning_blue.runs.journal import Journal
from runs_made import (  # noqa: F401
    KINDS,
    WEIGHTS,
    Made,
    made,
    rounded,
    same,
    save,
    small_module,
    weights_in,
)
from test_conf import flags, small_run  # noqa: F401

TEXT = "The mother tongue of Danielle Darrieux is"
EPS = torch.finfo(torch.float32).eps


@torch.no_grad()
def logits(model, tokenizer) -> torch.Tensor:
    return model(torch.tensor([tokenizer(TEXT)["input_ids"]])).logits


def export(run: Made, form: str, output, *more: str) -> int:
    return main(["export", str(run.folder), f"--as={form}", f"--output={output}", *more])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_model_and_patch_are_the_edited_model(made, model, kind, tmp_path):  # noqa: F811
    """To the bit: half precision is summed in float32 and rounded once, as in the run."""
    run = made(model, kind)
    expected = rounded(run.watch.final, run)
    assert export(run, "model", tmp_path / "model") == 0
    assert same(weights_in(tmp_path / "model", run), expected)
    patch, applied = tmp_path / "patch.safetensors", tmp_path / "patch-model"
    assert export(run, "patch", patch) == 0
    assert main(["apply", str(patch), f"--model={run.base}"]) == 0
    assert same(weights_in(applied, run), expected)
    whole = run.module.model.state_dict()
    saved = small_module(applied, str(run.module.model.dtype)[6:]).model.state_dict()
    assert all(torch.equal(saved[name], whole[name]) for name in whole)


def test_a_patch_takes_the_smaller_form(made, tmp_path):  # noqa: F811
    """6 edits of (32, 96): 6 * 128 * 4 = 3,072 bytes of factors, 12,288 or 6,144 of the weight."""
    for kind, form, n_bytes in (("memit", "left", 3072), ("half", "left", 3072)):
        assert export(made("llama", kind), "patch", tmp_path / kind) == 0
        tensors = load_file(tmp_path / kind)
        assert any(name.endswith(form) for name in tensors)
        assert sum(t.numel() * t.itemsize for t in tensors.values()) == n_bytes * len(WEIGHTS)
    assert export(made("llama", "prune"), "patch", tmp_path / "prune") == 0
    assert set(load_file(tmp_path / "prune")) == {f"{weight}/whole" for weight in WEIGHTS}


def test_a_patch_refuses_another_base_and_damage(made, tmp_path, capsys):  # noqa: F811
    run, patch = made("llama", "memit"), tmp_path / "p.safetensors"
    assert export(run, "patch", patch) == 0
    edited = save(LanguageModel(run.module.model, run.module.tokenizer), tmp_path / "edited")
    others = [edited, made("gpt2", "memit").base]
    for base in others:
        capsys.readouterr()
        assert main(["apply", str(patch), f"--model={base}"]) == 2
        error = capsys.readouterr().err
        assert error.count("error: ") == 1
        assert "not the unedited model" in error
        assert "llama" in error
    content = bytearray(patch.read_bytes())
    content[-3] ^= 4
    patch.write_bytes(content)
    assert main(["apply", str(patch), f"--model={run.base}"]) == 2
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "p-model").exists()
    (record, *_) = (run.folder / "records").glob("batch*")
    assert main(["apply", str(record), f"--model={run.base}"]) == 2
    assert "no lightning-blue patch" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_an_adapter_is_the_factors_and_peft_loads_it(made, model, tmp_path, capsys):  # noqa: F811
    """Both models sum the same products in another order. A sum of d_in + n float32 products is off
    by at most (d_in + n) * eps of its terms' size, in each of the layers from the first edit on.
    """
    peft = pytest.importorskip("peft")
    run, folder = made(model, "memit"), tmp_path / "adapter"
    assert export(run, "adapter", folder) == 0
    assert "rank 6, the run's factors" in capsys.readouterr().out
    tensors = load_file(folder / "adapter_model.safetensors")
    for weight, written in Journal(run.folder).header.weights.items():
        name = f"base_model.model.{written.module}.lora_"
        changes = [c for r in run.watch.records for c in r.changes if c.weight == weight]
        assert torch.equal(tensors[f"{name}A.weight"], torch.cat([c.right for c in changes]))
        assert torch.equal(tensors[f"{name}B.weight"], torch.cat([c.left for c in changes], 1))
    module = small_module(run.base)
    before = logits(module.model, module.tokenizer)
    loaded = peft.PeftModel.from_pretrained(module.model, folder)
    found, expected = (logits(m, module.tokenizer) for m in (loaded, run.module.model))
    limit = (96 + 6) * EPS * 4 * float(expected.abs().max())
    assert float((found - expected).abs().max()) < limit
    assert float((before - expected).abs().max()) > 1000 * limit
    merged = loaded.merge_and_unload()
    assert float((logits(merged, module.tokenizer) - expected).abs().max()) < limit


@pytest.mark.parametrize("kind", ["memit", "rect", "prune"])
def test_a_decomposed_adapter_says_its_error(made, kind, tmp_path, capsys):  # noqa: F811
    """Of the actual difference, also where RECT and PRUNE make it other than the factors."""
    run, folder = made("gpt2", kind), tmp_path / "adapter"
    assert export(run, "adapter", folder, "--rank=3") == 0
    said = capsys.readouterr().out
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    for weight, written in Journal(run.folder).header.weights.items():
        name = f"base_model.model.{written.module}.lora_"
        low = tensors[f"{name}B.weight"].double() @ tensors[f"{name}A.weight"].double()
        difference = (run.watch.final[weight] - run.watch.states[0][weight]).double()
        error = float((low - difference).norm() / difference.norm())
        best = torch.linalg.svdvals(difference)
        assert error == pytest.approx(float(best[3:].norm() / best.norm()), rel=1e-3)
        assert f"{weight}: rank 3, by SVD, relative error {error:.2g}" in said
        assert config["rank_pattern"][written.module] == 3
    assert config["fan_in_fan_out"]
    assert config["r"] == config["lora_alpha"] == 3


@pytest.mark.parametrize("kind", ["rect", "prune"])
def test_a_decomposed_adapter_is_whole_without_a_rank(made, kind, tmp_path):  # noqa: F811
    run, folder = made("llama", kind), tmp_path / "adapter"
    assert export(run, "adapter", folder) == 0
    tensors = load_file(folder / "adapter_model.safetensors")
    for weight, written in Journal(run.folder).header.weights.items():
        name = f"base_model.model.{written.module}.lora_"
        low = tensors[f"{name}B.weight"] @ tensors[f"{name}A.weight"]
        edited, original = run.watch.final[weight], run.watch.states[0][weight]
        assert torch.dist(original + low, edited) < 100 * EPS * edited.norm()
    if kind == "prune":
        assert low.shape == (32, 96)
        assert len(tensors[f"{name}A.weight"]) == 6  # the transform leaves the rank


def test_weights_of_other_ranks_have_scales_of_one_all_the_same(made):  # noqa: F811
    """PEFT divides a module's alpha by its rank: its own, or the general one where it has none."""
    header = Journal(made("llama", "memit").folder).header
    ranks = dict(zip(header.weights, (2, 5), strict=True))
    low = {w: LowRank(torch.zeros(32, r), torch.zeros(r, 96), None) for w, r in ranks.items()}
    config = json.loads(adapter_config(header, low))
    for weight, rank in ranks.items():
        module = header.weights[weight].module
        assert config["rank_pattern"].get(module, config["r"]) == rank
        assert config["alpha_pattern"].get(module, config["lora_alpha"]) == rank


def test_a_rank_that_the_factors_do_not_exceed_cuts_nothing(made, tmp_path):  # noqa: F811
    journal = Journal(made("llama", "memit").folder)
    found = write_adapter(tmp_path / "adapter", journal, pytest.fail, rank=6)  # 3 batches of 2
    assert [low.error for low in found.values()] == [None, None]


def test_truncation_needs_no_product():
    """Against a decomposition of the product."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*s, generator=generator) for s in ((40, 9), (9, 70)))
    whole = left.double() @ right.double()
    low = truncated(left, right, 4)
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    torch.testing.assert_close(
        low.up.double() @ low.down.double(), (u[:, :4] * s[:4]) @ v[:4], rtol=1e-5, atol=1e-5
    )
    assert low.error == pytest.approx(float(s[4:].norm() / s.norm()))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["export", "RUN"], "--as"),
        (["export", "RUN", "--as=else"], "invalid choice"),
        (["export", "RUN", "--as=adapter", "--rank=0"], "invalid"),
        (["export", "RUN", "--as=patch", "--rank=3"], "--rank is for an adapter"),
        (["export", "nowhere", "--as=patch"], "no such run"),
        (["export", "EMPTY", "--as=patch"], "no records"),
        (["show", "nowhere"], "no such run"),
        (["show", "EMPTY"], "no such run"),
        (["show"], "RUN"),
        (["apply", "nowhere", "--model=x"], "there is no such"),
        (["apply", "nowhere"], "--model"),
        (["show", "RUN", "--nothing"], "--nothing"),
    ],
)
def test_what_cannot_be_done(made, tmp_path, capsys, args, said):  # noqa: F811
    (tmp_path / "empty").mkdir()
    places = {"RUN": str(made("llama", "memit").folder), "EMPTY": str(tmp_path / "empty")}
    assert main([places.get(arg, arg) for arg in args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error


def test_outputs_are_kept_unless_forced(made, tmp_path, capsys):  # noqa: F811
    run, patch = made("llama", "memit"), tmp_path / "p.safetensors"
    patch.write_text("mine")
    assert export(run, "patch", patch) == 2
    assert "--force" in capsys.readouterr().err
    assert patch.read_text() == "mine"
    assert export(run, "patch", patch, "--force") == 0
    assert patch.stat().st_size > 3072


def test_a_full_disk_is_named(made, tmp_path, capsys, monkeypatch):  # noqa: F811
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    run = made("llama", "memit")
    for module, form in (("record_files", "patch"), ("adapter", "adapter")):
        monkeypatch.setattr(f"lightning_blue.runs.{module}.save_file", full)
        assert export(run, form, tmp_path / form) == 2
        assert "No space left on device" in capsys.readouterr().err
        assert not (tmp_path / form).exists()


@pytest.mark.parametrize("command", [*RUN_COMMANDS, *MODEL_COMMANDS])
def test_help_comes_without_torch(command):
    code = f"""
import sys
from lightning_blue.__main__ import main
try:
    main([{command!r}, "--help"])
except SystemExit as stopped:
    assert stopped.code == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert f"usage: lightning-blue {command}" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def test_from_fit_to_apply(small_run, tmp_path, capsys):  # noqa: F811
    """The commands in the order in which a user meets them, on a run of the command line."""
    base = f"--config={ROOT / 'conf' / 'llama3_memit_blue.yaml'}"
    args = [*flags(small_run, "llama3"), "--data.batch_size=1", "--run.wandb=off"]
    assert main(["fit", base, *args, f"--run.root={tmp_path}"]) == 0
    (run,) = (path for path in tmp_path.iterdir() if (path / "records").is_dir())
    capsys.readouterr()
    assert main(["show", str(run)]) == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "2 edits in 2 batches" in shown
    assert "efficacy at the end" in shown
    assert "Danielle Darrieux" in shown
    assert main(["export", str(run), "--as=patch"]) == 0
    assert main(["apply", str(run / "patch.safetensors"), f"--model={small_run / 'llama3'}"]) == 0
    weights = "model.safetensors"
    assert (run / "patch-model" / weights).read_bytes() == (run / "model" / weights).read_bytes()
    assert main(["undo", str(run)]) == 0
    assert (run / "undo-batch-1" / weights).read_bytes() != (run / "model" / weights).read_bytes()


def test_show_fits_and_lists_all(made, capsys):  # noqa: F811
    run = made("gpt2", "rect")
    assert main(["show", str(run.folder), "--all"]) == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert all(f"r{i}" in shown for i in range(6))
    assert "rect_keep 0.4" in shown
    assert "records/" in shown
