"""An edited model is saved in the dtype of its checkpoint, and the cost of it is known."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from blue_callbacks import WeightId
from conftest import LanguageModel
from helpers import fit
from lightning_blue.__main__ import main
from lightning_blue.editing.module import EditModule, edit_module
from lightning_blue.language_model.loading import load_language_model
from lightning_blue.language_model.saving import rounded, rounding_loss, save_language_model
from lightning_blue.reporting.disk_space import estimate
from lightning_blue.runs.journal import EditJournal, Journal
from lightning_blue.support.errors import InputError
from runs_made import BATCHES, save, small_module, small_update

WEIGHTS = "model.safetensors"
DOWN = "model.layers.{}.mlp.down_proj.weight"


def checkpoint(llama: LanguageModel, folder: Path, dtype: torch.dtype, **kept: Tensor) -> Path:
    """Save a checkpoint whose weights are of a dtype, but for some."""
    model = copy.deepcopy(llama.model).to(dtype)
    for name, value in kept.items():
        model.get_parameter(name.replace("__", ".")).data = value
    return save(LanguageModel(model, llama.tokenizer), folder)


def saved(folder: Path) -> tuple[dict[str, Tensor], str]:
    stated = json.loads((folder / "config.json").read_text())["dtype"]
    return load_file(folder / WEIGHTS), stated


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_was_not_edited_is_saved_as_it_was(dtype, llama: LanguageModel, tmp_path) -> None:
    norm = torch.rand(32, generator=torch.Generator().manual_seed(0))  # no half precision holds it
    base = checkpoint(llama, tmp_path / "base", dtype, model__norm__weight=norm)
    before, stated = saved(base)
    model, tokenizer = load_language_model(str(base))
    edited = DOWN.format(1)
    with torch.no_grad():
        model.get_parameter(edited).add_(0.01)
    (tmp_path / "out").mkdir()
    save_language_model(tmp_path / "out", model, tokenizer, dtype, [edited])
    after, now_stated = saved(tmp_path / "out")
    assert now_stated == stated == str(dtype).removeprefix("torch.")
    assert after.keys() == before.keys()
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype
        assert torch.equal(after[name], weight) == (name != edited), name
    assert torch.equal(after[edited], (before[edited].float() + 0.01).to(dtype))
    assert model.dtype == torch.float32  # the model itself stays
    there, here = ((each / WEIGHTS).stat().st_size for each in (base, tmp_path / "out"))
    assert abs(there - here) < 1000


def test_another_dtype_is_everywhere(llama: LanguageModel, tmp_path: Path) -> None:
    model, tokenizer = load_language_model(str(save(llama, tmp_path / "base")))
    save_language_model(tmp_path / "base", model, tokenizer, torch.bfloat16, [DOWN.format(1)])
    weights, stated = saved(tmp_path / "base")
    assert stated == "bfloat16"
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_a_tied_head_is_saved_once(gpt2: LanguageModel, tmp_path: Path) -> None:
    save_language_model(tmp_path, *gpt2, torch.bfloat16)
    assert "lm_head.weight" not in saved(tmp_path)[0]
    model, _ = load_language_model(str(tmp_path))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_what_a_dtype_cannot_hold_stays(llama: LanguageModel, tmp_path: Path) -> None:
    model = copy.deepcopy(llama.model)
    name = DOWN.format(2)
    model.get_parameter(name).data[0, 0] = 1e5  # float16 ends at 65504
    with pytest.warns(UserWarning, match=f"{name}: larger than float16 holds"):
        save_language_model(tmp_path, model, llama.tokenizer, torch.float16, [name])
    weights, _ = saved(tmp_path)
    assert torch.equal(weights[name], model.get_parameter(name))
    assert weights[DOWN.format(1)].dtype == torch.float16
    assert rounded(model.get_parameter(name).data, torch.float16)[0, 0] == 1e5


def test_the_loss_is_that_of_the_update_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(40, 50, generator=generator)  # float32: rounding it is no loss
    update = 0.1 * torch.randn(40, 50, generator=generator)
    written = (original + update).bfloat16().float() - original.bfloat16().float()
    expected = (written - update).norm() / update.norm()
    found = rounding_loss(original, original + update, torch.bfloat16)
    assert found == pytest.approx(float(expected), rel=1e-3)  # W0 + Delta rounds Delta too
    assert rounding_loss(original, original, torch.bfloat16) == 0
    assert rounding_loss(original, original + update, torch.float32) == 0


def run(base: Path, folder: Path) -> tuple[EditModule, dict[str, Tensor]]:
    """Edit in three batches; return the module, and its edited weights at the end."""
    module = small_module(base)
    module.rounding.active = True
    fit(module, small_update("memit"), BATCHES, callbacks=[EditJournal(folder)])
    names = (DOWN.format(0), DOWN.format(2))
    return module, {name: module.model.get_parameter(name).data.clone() for name in names}


def test_a_bfloat16_checkpoint_is_edited_in_float32_and_saved_as_it_was(
    llama: LanguageModel, tmp_path: Path
) -> None:
    """Measured, exported, undone and applied: the same bits, rounded once."""
    base = checkpoint(llama, tmp_path / "base", torch.bfloat16)
    module, measured = run(base, tmp_path / "run")
    assert module.model.dtype == torch.float32
    assert module.edited_names == [DOWN.format(0), DOWN.format(2)]
    assert set(module.rounding.losses) == {"layer0", "layer2"}
    assert all(0 < loss < 0.5 for loss in module.rounding.losses.values())
    assert Journal(tmp_path / "run").header.model.export_dtype == "bfloat16"
    for command in (
        ["export", str(tmp_path / "run"), "--as", "model"],
        ["export", str(tmp_path / "run"), "--as", "patch"],
        ["apply", str(tmp_path / "run/patch.safetensors"), "--model", str(base)],
        ["undo", str(tmp_path / "run"), "--to", "0"],
    ):
        assert main(command) == 0
    for folder in ("model", "patch-model"):
        weights, stated = saved(tmp_path / "run" / folder)
        assert stated == "bfloat16"
        for name, value in measured.items():
            assert torch.equal(weights[name].float(), value), folder
    unedited, _ = saved(base)
    undone, _ = saved(tmp_path / "run" / "undo-to-0")
    assert all(torch.equal(undone[name], weight) for name, weight in unedited.items())
    assert not torch.equal(unedited[DOWN.format(0)].float(), measured[DOWN.format(0)])


def test_a_rounding_that_costs_much_is_warned_of(llama: LanguageModel, tmp_path: Path) -> None:
    """An update a thousand times smaller than the weight is mostly rounded away."""
    module = small_module(checkpoint(llama, tmp_path / "base", torch.bfloat16))
    module.rounding.active = True
    weight = WeightId(2)
    module.rounding.keep([weight])
    original = module.editable_weights.read(weight).clone()
    module.editable_weights.write(weight, original * (1 + 2**-11))  # a quarter of half a last place
    with pytest.warns(UserWarning, match="saved, loses much of the update: layer2 100%; --model"):
        module.on_train_epoch_end()
    assert torch.equal(module.editable_weights.read(weight), original)


def test_a_run_says_what_it_saved_in_and_what_that_cost(
    llama: LanguageModel, tmp_path: Path, monkeypatch, capsys
) -> None:
    """From the command line; another dtype on demand."""
    base = checkpoint(llama, tmp_path / "base", torch.bfloat16)
    facts, text = tmp_path / "facts.jsonl", tmp_path / "text.txt"
    request = {"subject": "Lyon", "prompt": "{} is a twin city of", "target_new": "Rome"}
    facts.write_text(json.dumps(request))
    text.write_text("Lyon is a twin city of Beirut. She plays the violin in Rome.\n" * 200)
    monkeypatch.chdir(tmp_path)
    command = ["fit", f"--model.name_or_path={base}", "--model.contexts=[]", "--run.wandb=off"]
    command += [f"--model.covariance.corpus={text}", "--model.covariance.tokens_per_dim=3"]
    command += ["--update.layers=[1,2]", "--update.covariance_weight=0.01", "--data.controls=0"]
    command += [f"--data.path={facts}", f"--measure.text={text}", "--model.target.steps=4"]
    assert main(command) == 0, capsys.readouterr().err
    assert main([*command, "--model.export_dtype=float32"]) == 0, capsys.readouterr().err
    own, wide = tmp_path / "runs/edit", tmp_path / "runs/edit-2"
    assert saved(own / "model")[1] == "bfloat16"
    assert saved(wide / "model")[1] == "float32"
    summary = json.loads((own / "summary.json").read_text())
    assert summary["export/dtype"] == "bfloat16"
    assert 0 < summary["export/rounding_loss/layer1"] < 1
    assert "Saved in bfloat16; edits were computed and summed in float32." in (
        own / "report.md"
    ).read_text().replace("\n", " ")
    assert "Saved in" not in (wide / "report.md").read_text()
    assert not any("export" in key for key in json.loads((wide / "summary.json").read_text()))
    neighbour = (own / "report.md").stat().st_mode
    assert all(path.stat().st_mode == neighbour for path in (own / "model").iterdir())


def test_a_dtype_that_is_none_is_refused(llama: LanguageModel, tmp_path: Path) -> None:
    base = save(llama, tmp_path / "base")
    with pytest.raises(InputError, match="unknown dtype 'int8'") as caught:
        edit_module(str(base), export_dtype="int8")
    assert "model.export_dtype" in str(caught.value)


def test_the_room_that_is_asked_for_is_that_of_what_is_saved(llama, tmp_path: Path) -> None:
    class Data:
        requests, batch_size = [0], 1

    class Trainer:
        callbacks, datamodule = [], Data()

    module = small_module(checkpoint(llama, tmp_path / "base", torch.bfloat16))
    n = sum(weight.numel() for weight in module.model.parameters())
    assert estimate(Trainer(), module, export=True).model == 2 * n
    assert estimate(Trainer(), module, export=False).model == 0
