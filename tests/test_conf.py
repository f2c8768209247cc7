"""Every shipped run file: its values are the published ones, and it edits a random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from conftest import ROOT, byte_level_tokenizer
from lightning_blue.__main__ import main

CONF = ROOT / "conf"
PAPER = sorted(path.name for path in CONF.glob("*_memit*.yaml"))

# Critical layers, v learning rate, gradient steps and lambda of the paper's Table of settings.
PUBLISHED = {
    "gpt2xl": ([13, 14, 15, 16, 17], 0.5, 20, 20_000),
    "gptj": ([3, 4, 5, 6, 7, 8], 0.5, 25, 15_000),
    "llama3": ([4, 5, 6, 7, 8], 0.1, 25, 15_000),
}

FACTS = [
    {
        "subject": "Danielle Darrieux",
        "prompt": "The mother tongue of {} is",
        "target_new": "English",
        "target_true": "French",
        "paraphrases": ["Danielle Darrieux speaks"],
        "neighborhood_prompts": ["The mother tongue of José is"],
    },
    {
        "subject": "Lyon",
        "prompt": "{} is a twin city of",
        "target_new": "Rome",
        "target_true": "Beirut",
    },
]


def random_model(name: str) -> PreTrainedModel:
    """A model of the same architecture, as deep as its critical layers need."""
    torch.manual_seed(0)
    size = {"vocab_size": 480, "bos_token_id": 0, "eos_token_id": 0}
    if name == "gpt2xl":
        small = {"n_positions": 64, "n_embd": 16, "n_layer": 19, "n_head": 2, "n_inner": 48}
        return GPT2LMHeadModel(GPT2Config(**size, **small, initializer_range=0.4))
    if name == "gptj":
        small = {"n_positions": 64, "n_embd": 16, "n_layer": 10, "n_head": 2, "n_inner": 48}
        return GPTJForCausalLM(GPTJConfig(**size, **small, rotary_dim=4, initializer_range=0.4))
    small = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 10}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**size, **small, **heads, initializer_range=0.4))


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Flags that put a random model and two facts in place of the real ones."""
    folder = tmp_path_factory.mktemp("small_run")
    (folder / "facts.json").write_text(json.dumps(FACTS))
    (folder / "text.txt").write_text("The river runs through the town of Basel. " * 40)
    for name in PUBLISHED:
        random_model(name).save_pretrained(folder / name)
        byte_level_tokenizer(bos=name == "llama3").save_pretrained(folder / name)
    return folder


def flags(folder: Path, name: str) -> list[str]:
    return [
        f"--model.name_or_path={folder / name}",
        "--model.context_tokens=4",
        f"--model.covariance.corpus={folder / 'text.txt'}",
        "--model.covariance.tokens_per_dim=4",
        f"--model.covariance.cache={folder / 'stats'}",
        f"--data.path={folder / 'facts.json'}",
        "--data.edits=2",
        "--data.controls=0",
        "--measure.text=null",
        f"--run.root={folder / 'runs'}",
        "--run.wandb=off",
        "--trainer.accelerator=cpu",
    ]


@pytest.mark.parametrize("file", PAPER)
def test_runs_one_batch_with_the_published_settings(file, small_run, capsys):
    name = file.partition("_")[0]
    assert main(["fit", f"--config={CONF / file}", *flags(small_run, name)]) == 0
    report = Path(capsys.readouterr().out.rpartition("report: ")[2].strip())
    config = yaml.safe_load((report.parent / "config.yaml").read_text())
    layers, learning_rate, steps, weight = PUBLISHED[name]
    assert config["update"]["layers"] == layers
    assert config["update"]["covariance_weight"] == weight
    assert config["update"]["past_keys"] is True
    assert config["update"]["plan"] == ("boundary" if file.endswith("_blue.yaml") else "even")
    target = config["model"]["target"]
    assert (target["learning_rate"], target["steps"]) == (learning_rate, steps)
    assert (target["clamp"], target["kl_weight"], target["weight_decay"]) == (0.75, 0.0625, 0.5)
    assert config["run"]["name"] == f"{name}_memit_{config['update']['plan']}"
    summary = json.loads((report.parent / "summary.json").read_text())
    assert (summary["edits/applied"], summary["edits/requested"]) == (2, 2)
    edits = [json.loads(line) for line in (report.parent / "edits.jsonl").read_text().splitlines()]
    assert all(e["after"]["nll_new"] != e["before"]["nll_new"] for e in edits)
    found = [losses["loss"] for e in edits for losses in e["target_optimization"].values()]
    assert len(found) == 2 * (2 if file.endswith("_blue.yaml") else 1)
    assert max(found) < max(e["before"]["nll_new"] for e in edits)


def test_every_run_file_is_tested():
    assert len(PAPER) == 2 * len(PUBLISHED)
    others = {"quickstart.yaml", "pretrain_almanac.yaml", "pretrain_counterfact.yaml"}
    assert {path.name for path in CONF.glob("**/*.yaml")} == {*PAPER, *others}


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("fit", "quickstart.yaml"),
        ("pretrain", "pretrain_almanac.yaml"),
        ("pretrain", "pretrain_counterfact.yaml"),
    ],
)
def test_prints_its_whole_configuration(command, file, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, f"--config={CONF / file}", "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    own = yaml.safe_load((CONF / file).read_text())
    assert all(printed["model"][key] is not None for key in own["model"])
    assert len(printed["trainer"]) > 30
