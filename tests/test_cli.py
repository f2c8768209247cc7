"""The command line from end to end, and what it says of input that cannot be used."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wandb
import yaml

from conftest import ROOT
from helpers import load_model
from lightning_blue.__main__ import main
from lightning_blue.reporting.text import inline
from test_conf import flags, flat, small_run  # noqa: F401  (a fixture)

BASE = f"--config={ROOT / 'conf' / 'llama3_memit_blue.yaml'}"


@pytest.fixture
def run(small_run, capsys):  # noqa: F811
    """Run fit with flags on top of the small run's; return exit code, output and error."""

    def go(*more: str, command: str = "fit") -> tuple[int, str, str]:
        code = main([command, BASE, *flags(small_run, "llama3"), *more])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return go


def facts_file(tmp_path: Path, text: str, name: str = "facts.jsonl") -> str:
    path = tmp_path / name
    path.write_text(text)
    return f"--data.path={path}"


def fact(**changes: object) -> str:
    record = {"subject": "Lyon", "prompt": "{} is near", "target_new": "Rome"} | changes
    return json.dumps({key: value for key, value in record.items() if value is not None})


def test_what_a_run_leaves_behind(run):
    code, out, err = run("--run.wandb=offline", "--data.batch_size=1")
    assert code == 0, err
    assert wandb.run is None  # nothing is left open for the next run of this process
    assert "efficacy" in out
    folder = Path(out.rpartition("report: ")[2].strip()).parent
    left = {path.name for path in folder.iterdir()}
    assert left >= {
        "config.yaml",
        "edits.jsonl",
        "metrics.csv",
        "model",
        "plots",
        "report.html",
        "report.md",
        "summary.json",
        "wandb",
    }
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    steps = [int(row["step"]) for row in rows if row["batch/efficacy"]]
    assert steps == [1, 2]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"]["batch_size"] == 1
    assert "${" not in (folder / "config.yaml").read_text()


def test_the_saved_configuration_repeats_the_run(run, small_run, capsys):  # noqa: F811
    _, out, _ = run()
    folder = Path(out.rpartition("report: ")[2].strip()).parent
    assert main(["fit", f"--config={folder / 'config.yaml'}"]) == 0
    again = Path(capsys.readouterr().out.rpartition("report: ")[2].strip()).parent
    assert again != folder
    first, second = (load_model(one / "model")[0].state_dict() for one in (folder, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_stats_writes_what_fit_then_reads(run, small_run, tmp_path, monkeypatch):  # noqa: F811
    cache = f"--model.covariance.cache={tmp_path}"
    code, out, err = run(cache, command="stats")
    assert code == 0, err
    (file,) = tmp_path.glob("*.safetensors")
    assert str(file) in out
    monkeypatch.setattr("lightning_blue.editing.covariance.collect_covariance", None)
    assert run(cache)[0] == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such"),
        ("", "no records"),
        (fact() + "\n{broken\n", "facts.jsonl:2"),
        (fact(target_new=None), "target_new"),
        (fact(prompt="Paris is near"), "Lyon"),
        (fact(target_new=" "), "empty"),
        (fact(target_true="Rome"), "current object"),
        (fact() + "\n" + fact(target_new="Oslo"), "contradicted"),
        (fact(prompt="river " * 80 + "{} is near"), "64"),
    ],
)
def test_facts_that_cannot_be_used(run, tmp_path, text, said):
    if text is None:
        path = f"--data.path={tmp_path / 'missing.jsonl'}"
    else:
        path = facts_file(tmp_path, text)
    code, _, err = run(path, "--data.edits=null", "--data.on_unusable=stop")
    assert code == 2
    assert said in err
    assert "hint" in err
    assert "Traceback" not in err


def test_what_is_left_out_is_in_the_report(run, tmp_path):
    """Nothing is dropped in silence: number, reason and line of requests that were skipped."""
    path = facts_file(tmp_path, fact(target_new=None) + "\n" + fact())
    code, out, err = run(path, "--data.edits=null", "--data.on_unusable=skip")
    assert code == 0, err
    folder = Path(out.rpartition("report: ")[2].strip()).parent
    (left_out,) = map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())
    assert "facts.jsonl:1" in left_out["source"]
    report = (folder / "report.md").read_text()
    assert "1 more could not be used" in report
    assert inline(left_out["source"]) in report
    assert inline(left_out["reason"]) in report


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--update.layers=[4,99]", "no layer 99: its 10 layers are 0 to 9"),
        ("--update.layers=[8,4]", "ascending"),
        ("--update.plan=evn", "boundary"),
        ("--update.covarance_weight=3", "did you mean update.covariance_weight?"),
        ("--model.name_or_path=/nowhere/model", "there is no folder '/nowhere'"),
        ("--model.dtype=float8", "choose one of float32"),
        ("--model.target.steps=0", "where: model.target.steps"),
        ("--seed_everything=-1", "where: seed_everything"),
        ("--update.plan=${nothing.there}", "Interpolation key 'nothing.there' not found"),
        ("--update.plan=${update.plan}", "Recursive interpolation"),
        ("--run.project=a\0b", "holds a NUL character"),
        ("--run.project=\udce9", "holds the byte 0xe9, which is not UTF-8"),
        ("--trainer.num_nodes=-3", "trainer.num_nodes"),
        (f"--model.covariance.path={'x' * 300}", "File name too long"),
        ("--model.target.loss_layer=99", "no layer 99: its 10 layers are 0 to 9"),
        ("--model.target.loss_layer=7", "loss_layer 7 lies below the target layer 8"),
        ("--model.covariance.corpus=missing.txt", "no such file"),
        ("--measure.text=missing.txt", "no such file"),
        ("--config=conf/nothing.yaml", "no such run file"),
        ("--data=facts.jsonl", "hint:  give it as --data.path=facts.jsonl"),
        ("--model=gpt2", "hint:  give it as --model.name_or_path=gpt2"),
    ],
)
def test_settings_that_cannot_be_used(run, flag, said):
    code, _, err = run(flag)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--guard.weight_ratio=.nan"], "where: guard.weight_ratio"),
        (["--trainer.max_time=soon"], "where: trainer"),
        (["--trainer.precision=7"], "precision"),
        (["--trainer.max_epochs=2"], "where: trainer.max_epochs"),
        (["--trainer.gradient_clip_val=.nan"], "where: trainer.gradient_clip_val"),
        (["--trainer.accumulate_grad_batches=2"], "where: trainer.accumulate_grad_batches"),
        (["--trainer.val_check_interval=0"], "where: trainer.val_check_interval"),
        (["--trainer.check_val_every_n_epoch=0"], "where: trainer.check_val_every_n_epoch"),
        (["--model.context_tokens=-1"], "where: model.context_tokens"),
        (
            ["--model.architecture.block=model.{}.{}", "--model.architecture.down_projection=x"],
            "{}",
        ),
    ],
)
def test_settings_are_refused_before_the_model_is_loaded(run, flags, said, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_blue.editing.module.load_language_model", None)
    code, _, err = run(*flags, f"--run.root={tmp_path}")
    assert code == 2
    assert said in err
    assert err.count("error: ") == 1
    assert not [*tmp_path.iterdir()]  # a run of the same name still gets it


def test_a_norm_is_no_down_projection(run):
    named = ["--model.architecture.block=model.layers.{}"]
    code, _, err = run(*named, "--model.architecture.down_projection=input_layernorm")
    assert code == 2
    assert "'input_layernorm' is of type LlamaRMSNorm, which is no linear map" in err


def test_a_covariance_of_another_model_is_refused(run, small_run, tmp_path):  # noqa: F811
    cache = f"--model.covariance.cache={tmp_path}"
    assert run(cache, command="stats")[0] == 0
    (file,) = tmp_path.glob("*.safetensors")
    code, _, err = run(
        f"--model.covariance.path={file}", f"--model.name_or_path={small_run / 'gptj'}"
    )
    assert code == 2
    assert "another model" in err


def test_a_full_disk_is_named(run, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, err = run()
    assert code == 2
    assert "No space left on device" in err


def test_usage_and_unknown_commands(capsys):
    assert main([]) == 0
    assert "lightning-blue fit" in capsys.readouterr().out
    assert main(["ft"]) == 2
    assert "did you mean 'fit'" in capsys.readouterr().err


def helped(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main([*args]) == 0
    return capsys.readouterr().out


def defaults(capsys: pytest.CaptureFixture[str], command: str) -> dict[str, object]:
    """Every key of a command with its default, as the parser has them."""
    with pytest.raises(SystemExit):
        main([command, "--print_config"])
    return flat(yaml.safe_load(capsys.readouterr().out))


@pytest.mark.parametrize("command", ["fit", "evaluate", "stats", "pretrain"])
def test_help_gives_every_key_of_the_own_sections_a_line(command, capsys):
    lines = helped(capsys, command, "--help").splitlines()
    assert len(lines) < 140
    assert max(map(len, lines)) <= 100
    shown = [line.split()[0] for line in lines if line.startswith("  --")]
    own = [f"--{key}" for key in defaults(capsys, command) if not key.startswith("trainer.")]
    assert sorted({*own} - {"--base", "--ckpt_path"}) == sorted(
        {*shown} - {"--config", "--print_config", "--ckpt_path"}
    )
    assert ("--ckpt_path" in shown) == (command == "fit")
    assert len(shown) == len(set(shown))
    sections = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert sections[:2] == ["data:", "model:"]


def test_help_of_the_studies_has_their_section(capsys):
    assert "  --study.records" in helped(capsys, "analyze", "--help")


@pytest.mark.parametrize("command", ["fit", "pretrain"])
def test_help_knows_the_defaults_that_the_parser_has(command, capsys):
    expected = {k: v for k, v in defaults(capsys, command).items() if "." in k}
    said = {}
    for section in dict.fromkeys(key.partition(".")[0] for key in expected):
        for line in helped(capsys, command, f"--help.{section}").splitlines():
            if line.startswith("  --"):
                key, _, default = line.strip().removeprefix("--").partition(" ")
                said[key] = default
    assert {key for key in expected if key not in said} == set()
    for key, value in expected.items():
        if value is None:
            assert said[key] in ("", "(required)"), key
        elif not isinstance(value, list | dict):
            shown = str(value).lower() if isinstance(value, bool) else str(value)
            shown = " ".join(shown.split())  # on one line
            assert said[key] == f"[{shown}]" or said[key].endswith("…]"), key


@pytest.mark.parametrize(
    ("started", "named"),
    [
        ("/usr/bin/lightning-blue", "lightning-blue"),
        ("/src/lightning_blue/__main__.py", "python -m lightning_blue"),
        ("/venv/pytest/__main__.py", "lightning-blue"),
    ],
)
def test_help_names_the_program_as_it_was_started(monkeypatch, capsys, started, named):
    monkeypatch.setattr(sys, "argv", [started, "fit", "--help"])
    assert helped(capsys, "fit", "--help").startswith(f"usage: {named} fit [--config FILE] ")


def test_long_help_says_all_about_a_section(capsys):
    trainer = helped(capsys, "fit", "--help.trainer")
    assert "--trainer.max_epochs [1]" in trainer
    assert "--data.path" not in trainer
    assert max(map(len, trainer.splitlines())) <= 100
    update = " ".join(helped(capsys, "fit", "--help.update").split())
    assert "the fraction of entries of a batch's update to keep, 0.4 in its paper" in update
    assert main(["fit", "--help.updates"]) == 2
    err = capsys.readouterr().err
    assert "no section 'updates'" in err
    assert "data, model, update" in err


@pytest.mark.parametrize("args", [[], ["fit", "--help"], ["fit", "--help.trainer"]])
def test_help_answers_without_importing_torch(args):
    code = f"import sys; from lightning_blue.__main__ import main; main({args!r}); "
    code += "assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_run_files_of_an_installed_package_are_found(tmp_path, monkeypatch, capsys):
    packaged = tmp_path / "package" / "conf"
    packaged.mkdir(parents=True)
    (packaged / "own.yaml").write_text("update: {layers: [3]}\n")
    monkeypatch.setattr("lightning_blue.cli.run_files.PACKAGED", packaged)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", "--config=conf/own.yaml", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["update"]["layers"] == [3]


def test_run_files_that_name_each_other_are_refused(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    assert main(["fit", f"--config={tmp_path / 'a.yaml'}"]) == 2
    assert "name each other" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_other_precisions_edit_too(run, precision):
    stronger = [
        "--model.target.learning_rate=0.5",
        "--model.target.clamp=4",
        "--update.covariance_weight=1",
    ]
    code, out, err = run(f"--trainer.precision={precision}", "--run.export=false", *stronger)
    assert code == 0, err
    folder = Path(out.rpartition("report: ")[2].strip()).parent
    edits = [json.loads(line) for line in (folder / "edits.jsonl").read_text().splitlines()]
    for edit in edits:
        found = [losses["loss"] for losses in edit["target_optimization"].values()]
        assert max(found) < edit["before"]["nll_new"]
        assert edit["after"]["nll_new"] != edit["before"]["nll_new"]
    assert not (folder / "model").exists()
