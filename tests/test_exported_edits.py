"""Every architecture with a row: edited, exported, loaded again, and there the targets are."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch

from blue_callbacks import ClosedFormUpdate
from conftest import ROOT
from helpers import fit
from lightning_blue.__main__ import main
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.optimization import TargetOptimization
from lightning_blue.language_model.architectures import (
    ARCHITECTURES,
    Architecture,
    down_projection,
    find_architecture,
    weight_view,
)
from lightning_blue.language_model.loading import load_language_model
from lightning_blue.metrics.history import RunHistory
from lightning_blue.reporting.export import export_model
from lightning_blue.support.errors import InputError
from random_models import OTHERS, SETTINGS, configuration, random_model, saved, tokenizer

REQUESTS = [
    EditRequest("a", "The mother tongue of {}", "Danielle Darrieux", "French"),
    EditRequest("b", "A twin city of {}", "Lyon", "Beirut"),
]
SHARED = Architecture("model.layers.{}", "mlp.shared_expert.down_proj")


class Case(NamedTuple):
    """How one model is edited.

    Attributes:
        site: at which its targets have to be found.
        layers: critical ones.
        named: modules that the user names.
        multiple: of what its weights write, at its site.
    """

    site: str = "block"
    layers: tuple[int, ...] = (0, 1, 2)
    named: Architecture | None = None
    multiple: float = 1.0


NORM, DENSE = Case("ffn"), Case(layers=(0, 2))
CASES = dict.fromkeys(SETTINGS, Case()) | {
    "opt, norms behind": NORM,
    "gemma2": NORM,
    "gemma3_text": NORM,
    "gemma3 that sees": NORM,
    "exaone4": NORM,
    "glm4": NORM,
    "olmo2": NORM,
    "granite": Case(multiple=0.22),
    "qwen2_moe": DENSE,
    "qwen3_moe": DENSE,
    "deepseek_v2": Case(layers=(0, 1)),
    "deepseek_v3": Case(layers=(0, 1)),
    "stablelm": Case(named=Architecture("model.layers.{}", "mlp.down_proj")),
    "qwen2_moe, all": Case("ffn", named=SHARED),  # behind it is a gate
}


def test_every_row_has_a_case():
    types = {configuration(name).get_text_config().model_type for name in SETTINGS}
    assert types == set(ARCHITECTURES)


def test_the_documented_table_is_the_rows_and_what_auto_finds():
    text = (ROOT / "docs/architectures.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| (\w+)", text, flags=re.MULTILINE))
    del rows["model_type"]  # the header
    assert list(rows) == list(ARCHITECTURES)
    assert rows == {name: CASES[name].site for name in ARCHITECTURES}


def editable(name: str, folder, case: Case) -> EditModule:
    model, words = load_language_model(saved(random_model(name), folder))
    target = TargetOptimization(steps=5, learning_rate=0.5, clamp=4.0)
    module = EditModule(model, words, target=target, contexts=[], architecture=case.named)
    for layer in case.layers:
        d_in = weight_view(down_projection(module.blocks[layer], module.architecture)).shape[1]
        module.set_covariances({layer: torch.eye(d_in)})
    return module


@torch.no_grad()
def outputs(model, name: str) -> torch.Tensor:
    """A module's output at the end of each request's text, by a plain pass; ``(n, d_model)``."""
    found = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda _m, _a, out: found.append((out[0] if isinstance(out, tuple) else out)[..., -1, :])
    )
    for request in REQUESTS:
        model(input_ids=tokenizer(bos=True)(request.text, return_tensors="pt").input_ids)
    hook.remove()
    return torch.stack([each.reshape(-1) for each in found])


@pytest.mark.parametrize("name", CASES)
def test_the_exported_model_reaches_its_targets(name, tmp_path):
    """What is missed is rounding: 1e-3 is thousands of it, and a hundredth of any real fault."""
    case = CASES[name]
    module = editable(name, tmp_path / "model", case)
    written = case.layers[0], case.layers[-1]
    fit(module, ClosedFormUpdate(case.layers, "boundary", covariance_weight=1e-9), [REQUESTS])
    assert module.site.name == case.site
    assert module.site.multiples == pytest.approx(dict.fromkeys(written, case.multiple), rel=1e-4)
    export_model(tmp_path / "edited", module.model, module.tokenizer, RunHistory())
    edited, _ = load_language_model(str(tmp_path / "edited"))
    row = find_architecture(edited, case.named)
    before = random_model(name)
    for layer in written:
        part = "" if case.site == "block" else f".{row.down_projection}"
        site = row.block.format(layer) + part
        reached, target = outputs(edited, site), module.target_values[layer][-1]
        asked = (target - outputs(before, site)).norm(dim=1)
        missed = (target - reached).norm(dim=1) / asked
        assert missed.max() < 1e-3
        assert (asked > 0.1).all()


@pytest.mark.parametrize(
    ("name", "named", "said"),
    [
        ("mixtral", None, r"mixtral is a mixture of experts(.|\n)*choose a dense model"),
        ("gpt_oss", None, r"gpt_oss is a mixture of experts(.|\n)*choose a dense model"),
        ("qwen3_moe, all", None, r"is a mixture of experts(.|\n)*choose a dense model"),
        ("qwen2_moe, all", None, r"mixture(.|\n)*down_projection=mlp.shared_expert.down_proj"),
        ("mixtral", "mlp.experts", r"'mlp.experts' is of type MixtralExperts, which is no linear"),
        ("mixtral", "mlp.gate", r"'mlp.gate' gives out 4 numbers, and the hidden states have 32"),
        ("gpt_oss", "mlp.router", r"'mlp.router' gives out 4 numbers"),
        ("stablelm", "input_layernorm", r"'input_layernorm' is of type LayerNorm, which is no"),
        ("stablelm", "mlp.up_proj", r"'mlp.up_proj' gives out 64 numbers"),
        ("stablelm", "mlp.c_proj", r"stablelm has no module 'model.layers.0.mlp.c_proj'"),
    ],
)
def test_what_cannot_be_edited_is_refused_with_what_can(name, named, said):
    row = None if named is None else Architecture("model.layers.{}", named)
    with pytest.raises(InputError, match=said):
        find_architecture(random_model(name), row)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen3_moe", r"layer 1 cannot be edited: each token(.|\n)*--update.layers=\[0,2\]"),
        ("deepseek_v3", r"layer 2 cannot(.|\n)*=\[0,1\], or name(.|\n)*mlp.shared_experts.down_p"),
    ],
)
def test_every_layer_is_looked_at(name, said):
    module = EditModule(random_model(name), tokenizer(bos=True), contexts=[])
    with pytest.raises(InputError, match=said):
        fit(module, ClosedFormUpdate([0, 1, 2]), [REQUESTS])


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("model.layers", "must end with one"),
        ("model.{}.{}", "must end with one"),
        ("layers.{}", "has no module"),
        ("model.norm.{}", "has no module"),
    ],
)
def test_a_block_that_is_none_of_a_list_is_refused(block, said):
    with pytest.raises(InputError, match=rf"{said}(.|\n)*model\.architecture\.block"):
        find_architecture(random_model("stablelm"), Architecture(block, "mlp.down_proj"))


def test_an_unknown_architecture_is_told_where_its_blocks_are():
    with pytest.raises(InputError, match=r"'stablelm' is not known(.|\n)*'model.layers.{}'"):
        find_architecture(random_model("stablelm"))


def test_names_of_other_models_are_used_by_no_case():
    assert set(OTHERS).isdisjoint(SETTINGS)


def test_a_run_says_where_its_targets_are(tmp_path, capsys):
    """From the command line: on the way, in the report and on the model's card."""
    folder = saved(random_model("gemma3 that sees"), tmp_path / "model")
    facts = tmp_path / "facts.jsonl"
    facts.write_text(
        '{"subject": "Lyon", "prompt": "A twin city of {} is", "target_new": "Beirut"}\n'
    )
    arguments = {
        "model.name_or_path": folder,
        "model.covariance.corpus": ROOT / "README.md",
        "model.covariance.cache": tmp_path,
        "model.target.steps": 2,
        "data.path": facts,
        "update.layers": "[0,1]",
        "measure.generate": "false",
        "run.root": tmp_path,
        "run.wandb": "off",
        "trainer.accelerator": "cpu",
    }
    code = main(["fit", *(f"--{key}={value}" for key, value in arguments.items())])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "targets are the down projection's own output" in said.err
    report = (tmp_path / "edit" / "report.md").read_text()
    card = (tmp_path / "edit" / "model" / "README.md").read_text()
    for written in (report, card):
        assert re.search(r"\| site +\| ffn ", written)
        assert "off by" in written
        assert "AutoModelForImageTextToText.from_pretrained" in written
