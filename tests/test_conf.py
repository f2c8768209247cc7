"""Every shipped run file: its values are the published ones, and it edits a random model."""

from __future__ import annotations

import contextlib
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

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
from lightning_blue.reporting.settings import run_settings

CONF = ROOT / "conf"
ROWS = CONF / "methods"

# Of each model: critical layers, learning rate and steps of the target search, lambda (the paper's
# table of settings), and AlphaEdit's ridge with BLUE.
MODELS = {
    "gpt2xl": ("openai-community/gpt2-xl", [13, 14, 15, 16, 17], 0.5, 20, 20_000, 80),
    "gptj": ("EleutherAI/gpt-j-6b", [3, 4, 5, 6, 7, 8], 0.5, 25, 15_000, 95),
    "llama3": ("meta-llama/Meta-Llama-3-8B", [4, 5, 6, 7, 8], 0.1, 25, 15_000, 1),
}

# Of each method: what makes it, beside what all of them share.
SHARED = {
    "update.plan": "even",  # classic; BLUE's is boundary
    "update.solver": "least_squares",
    "update.past_keys": True,
    "update.threshold": 0.02,
    "update.energy": None,
    "update.ridge": 10,
    "update.rect_keep": None,
    "update.post_edit_transform": None,
    "model.target.site": "auto",
    "model.target.early_stop": None,
}
METHODS: dict[str, dict[str, Any]] = {
    "memit": {},
    "rect": {"update.rect_keep": 0.4, "update.past_keys": False},
    "prune": {"update.post_edit_transform": "prune", "update.past_keys": False},
    "alphaedit": {"update.solver": "null_space", "update.threshold": 0.02, "update.ridge": 10},
    "pmet": {
        "update.plan": "square_root",
        "model.target.site": "attention_and_ffn",
        "model.target.early_stop": "pmet",
    },
}
BASELINES: dict[str, dict[str, Any]] = {  # their plans belong to them
    "locft_bf": {"update.solver": "fine_tuning", "update.plan": "last"},
    "in_context": {"update.solver": "in_context", "update.plan": "none"},
}
# LocFT-BF's published code: Adam's rate, epochs, edits of a step, loss that ends it.
LOCFT_BF = {"lr": 5e-4, "epochs": 25, "mini_batch": 100, "converged": 0.01, "norm_constraint": None}
PAPER = ("memit", "rect", "prune", "alphaedit", "pmet")  # with run files for every model

RUNS = {
    f"{model}_{method}{ending}.yaml": (model, method, ending == "_blue")
    for model in MODELS
    for method in PAPER
    for ending in ("", "_blue")
}
OTHERS = {
    "quickstart.yaml",
    "own_model.yaml",
    "pretrain_almanac.yaml",
    "pretrain_counterfact.yaml",
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


def expected(model: str, method: str, blue: bool) -> dict[str, Any]:
    """The row of the tables above, by key of the configuration."""
    name, layers, learning_rate, steps, covariance_weight, ridge = MODELS[model]
    row = SHARED | METHODS[method]
    if blue:
        row |= {"update.plan": "boundary"} | (
            {"update.ridge": ridge} if method == "alphaedit" else {}
        )
    return row | {
        "model.name_or_path": name,
        "model.target.learning_rate": learning_rate,
        "model.target.steps": steps,
        "model.target.clamp": 0.75,
        "model.target.kl_weight": 0.0625,
        "model.target.weight_decay": 0.5,
        "data.edits": 2000,
        "data.batch_size": 100,
        "update.layers": layers,
        "update.covariance_weight": covariance_weight,
        "run.name": f"{model}_{method}_{row['update.plan']}",
    }


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        leaves |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return leaves


@cache
def resolved(*args: str) -> dict[str, Any]:
    """What the parser makes of run files and flags; nothing is loaded."""
    printed = io.StringIO()
    files = [f"--config={CONF / a}" if a.endswith(".yaml") else a for a in args]
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stopped:
        main(["fit", *files, "--print_config"])
    assert stopped.value.code == 0
    return flat(yaml.safe_load(printed.getvalue()))


def test_every_run_file_is_in_the_tables():
    rows = {f"methods/{method}.yaml" for method in (*METHODS, *BASELINES)}
    there = {
        str(path.relative_to(CONF))
        for path in CONF.glob("**/*.yaml")
        if path.parent.name not in ("paper", "real")  # sweeps, see test_sweep.py
    }
    assert there == {*RUNS, *OTHERS, *rows}


@pytest.mark.parametrize("file", RUNS)
def test_resolves_to_its_row_and_to_nothing_else(file):
    first = resolved("llama3_memit_blue.yaml")
    assert resolved(file) == first | expected(*RUNS[file])


@pytest.mark.parametrize("file", sorted(set(RUNS) - {"llama3_memit_blue.yaml"}))
def test_says_only_what_differs_from_its_bases(file):
    own = yaml.safe_load((CONF / file).read_text())
    bases = own.pop("base")
    before = resolved(*([bases] if isinstance(bases, str) else bases))
    copied = [key for key, value in flat(own).items() if before[key] == value]
    assert not copied, f"{copied} are what {bases} say already"


@pytest.mark.parametrize(
    ("method", "plan"),
    [(method, "boundary") for method in METHODS]
    + [("rect", plan) for plan in ("even", "square_root", "computed", "first", "last")],
)
def test_one_flag_switches_the_quick_start(method, plan):
    before = resolved("quickstart.yaml")
    after = resolved("quickstart.yaml", f"methods/{method}.yaml", f"--update.plan={plan}")
    assert after == before | SHARED | METHODS[method] | {"update.plan": plan}


@pytest.mark.parametrize("method", BASELINES)
def test_a_baseline_stands_where_the_closed_form_stood(method):
    before = resolved("quickstart.yaml")
    after = resolved("quickstart.yaml", f"methods/{method}.yaml")
    assert after == before | BASELINES[method]
    how = {name: after[f"update.fine_tuning.{name}"] for name in LOCFT_BF}
    assert how == LOCFT_BF


def test_a_report_names_the_method_and_the_settings_in_force():
    def shown(*args: str, command: str = "fit") -> dict[str, Any]:
        return run_settings(resolved(*args), command)

    memit = shown("quickstart.yaml")
    assert memit == {
        "method": "MEMIT + BLUE",
        "model": "almanac",
        "site": "auto",  # until the run has measured which
        "data": "almanac",
        "batch_size": 20,
        "plan": "boundary",
        "layers": [0, 1, 2, 3],
        "solver": "least_squares",
        "past_keys": True,
        "covariance_weight": 1000.0,
        "seed": 0,
    }
    alphaedit = shown("llama3_alphaedit.yaml")
    assert alphaedit["method"] == "AlphaEdit"
    assert (alphaedit["threshold"], alphaedit["ridge"]) == (0.02, 10.0)
    assert not {"covariance_weight", "energy", "rect_keep"} & set(alphaedit)
    energy = shown("llama3_alphaedit.yaml", "--update.energy=0.1")
    assert energy["energy"] == 0.1
    assert "threshold" not in energy
    assert shown("llama3_rect.yaml")["rect_keep"] == 0.4
    both = shown("gptj_pmet_blue.yaml", "methods/prune.yaml")
    assert (both["method"], both["post_edit_transform"]) == ("PMET + PRUNE + BLUE", "prune")
    tuned = shown("quickstart.yaml", "methods/locft_bf.yaml")
    assert (tuned["method"], tuned["plan"], tuned["fine_tuning_lr"]) == ("LocFT-BF", "last", 5e-4)
    told = shown("quickstart.yaml", "methods/in_context.yaml")
    assert (told["method"], told["in_context_lead"]) == ("in-context", "Prompt: ")
    unused = {"covariance_weight", "past_keys", "site"}
    assert not unused & {*tuned, *told}
    measured = shown("quickstart.yaml", command="evaluate")
    assert measured == {"model": "almanac", "data": "almanac", "seed": 0}


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
    for name in MODELS:
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
        "--measure.generate=false",
        f"--run.root={folder / 'runs'}",
        "--run.wandb=off",
        "--trainer.accelerator=cpu",
    ]


@pytest.mark.parametrize(
    "file", [f for f, (m, k, _) in RUNS.items() if m == "llama3" or k == "memit"]
)
def test_edits_one_batch(file, small_run, capsys):
    model, method, blue = RUNS[file]
    args = flags(small_run, model)
    if method == "alphaedit":  # so small a model has no eigenvalue below the threshold
        args.append("--update.energy=0.05")
    assert main(["fit", f"--config={CONF / file}", *args]) == 0
    report = Path(capsys.readouterr().out.rpartition("report: ")[2].strip())
    summary = json.loads((report.parent / "summary.json").read_text())
    assert (summary["edits/applied"], summary["edits/requested"]) == (2, 2)
    assert summary["settings/site"] == ("attention_and_ffn" if method == "pmet" else "block")
    edits = [json.loads(line) for line in (report.parent / "edits.jsonl").read_text().splitlines()]
    assert all(e["after"]["nll_new"] != e["before"]["nll_new"] for e in edits)
    found = [losses["loss"] for e in edits for losses in e["target_optimization"].values()]
    assert len(found) == 2 * (2 if blue else 1)
    assert max(found) < max(e["before"]["nll_new"] for e in edits)


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("fit", "quickstart.yaml"),
        ("fit", "own_model.yaml"),
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
