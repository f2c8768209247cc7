"""A model of one's own: what belongs to the model in the package is refused, one command works."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from conftest import ROOT
from lightning_blue.__main__ import main
from lightning_blue.cli.own_model import require_model
from lightning_blue.editing.depth import layers_by_depth
from lightning_blue.language_model.loading import PACKAGED
from lightning_blue.support.errors import InputError
from runs_made import save
from test_conf import flags, small_run  # noqa: F401  (a fixture)
from test_gguf import write_gguf

QUICKSTART = f"--config={ROOT / 'conf' / 'quickstart.yaml'}"
OWN = f"--config={ROOT / 'conf' / 'own_model.yaml'}"


@pytest.fixture
def run(small_run, capsys):  # noqa: F811
    """Run a command on a random model and two facts; return exit code, output and error."""

    def go(command: str, config: str, *more: str) -> tuple[int, str, str]:
        quick = ["--model.target.steps=2", "--run.checkpoint_every=0"]
        code = main([command, config, *flags(small_run, "gptj"), *quick, *more])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return go


@pytest.mark.parametrize("command", ["fit", "stats"])
def test_the_quick_starts_settings_are_refused_for_another_model(
    run,
    small_run,  # noqa: F811
    monkeypatch,
    command,
):
    monkeypatch.setattr("lightning_blue.editing.module.load_language_model", None)
    code, out, err = run(command, QUICKSTART)
    assert code == 2
    assert not out
    assert err.startswith("error: the settings of this run file")
    assert f"model.name_or_path = {small_run / 'gptj'}" in err
    given = f"--model.name_or_path={small_run / 'gptj'} --data.path={small_run / 'facts.json'}"
    assert f"lightning-blue fit {given};" in err


def test_its_text_is_refused_where_its_settings_are_insisted_on(run, small_run):  # noqa: F811
    insisting = ["--for_model=null", "--model.covariance.corpus=almanac"]
    for command in ("fit", "stats"):
        code, _, err = run(command, QUICKSTART, *insisting)
        assert code == 2
        assert "the text 'almanac' belongs to the small model in the package" in err
        assert "Traceback" not in err


def test_a_model_of_the_same_build_is_taken(tmp_path):
    """As an edited copy is, or one that was trained anew."""
    config = AutoConfig.from_pretrained(str(PACKAGED["almanac"]))
    config.save_pretrained(tmp_path)
    require_model("almanac", str(tmp_path), None, "facts.csv")
    require_model("almanac", "almanac", None, "facts.csv")
    config.num_hidden_layers -= 1
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"--data\.path=facts\.csv"):
        require_model("almanac", str(tmp_path), None, "facts.csv")


def test_a_model_that_is_not_there_is_not_one_of_another_build(run, tmp_path):
    code, _, err = run("fit", QUICKSTART, f"--model.name_or_path={tmp_path / 'nothing'}")
    assert code == 2
    assert "no such file or folder" in err


def test_a_model_is_known_however_it_is_named(llama, tmp_path, monkeypatch):
    """By a path from the home folder, and as a GGUF file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    save(llama, tmp_path / "llama")
    packed = write_gguf(tmp_path / "llama.gguf", *llama, "F32")
    for given in ("~/llama", str(packed), "~/llama.gguf"):
        with pytest.raises(InputError, match="belong to the model 'almanac'"):
            require_model("almanac", given, None, "facts.csv")
        for same in (str(tmp_path / "llama"), "~/llama", str(packed)):
            require_model(same, given, None, "facts.csv")


def test_of_a_multimodal_model_the_text_part_counts(tmp_path):
    config = AutoConfig.for_model("gemma3")
    config.save_pretrained(tmp_path / "one")
    config.text_config.intermediate_size *= 2
    config.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="would be ruined"):
        require_model(str(tmp_path / "one"), str(tmp_path / "other"), None, "facts.csv")


def test_settings_of_a_model_that_is_not_here_are_taken_with_a_warning(tmp_path, monkeypatch):
    """It may be the same one under another name."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    AutoConfig.from_pretrained(str(PACKAGED["almanac"])).save_pretrained(tmp_path / "almanac")
    given = str(tmp_path / "almanac")
    with pytest.warns(UserWarning, match="belong to the model 'nobody/almanac', which cannot be"):
        require_model("nobody/almanac", given, None, "facts.csv")


def test_measuring_another_model_is_allowed(run):
    code, out, err = run("evaluate", QUICKSTART, "--update.layers=[0,1]")
    assert code == 0, err
    assert "covariance text" not in Path(out.rpartition("report: ")[2].strip()).read_text()


def test_one_command_edits_a_model_of_ones_own(run, small_run):  # noqa: F811
    code, out, err = run("fit", OWN, "--update.layers=[2,4]")
    assert code == 0, err
    folder = Path(out.rpartition("report: ")[2].strip()).parent
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["edits/applied"] == 2
    text = str(small_run / "text.txt")
    assert summary["settings/covariance_text"] == text
    assert (summary["settings/covariance_tokens"], summary["settings/covariance_documents"]) == (
        192,
        1,
    )
    for page in ("report.md", "model/README.md"):
        text = unpadded(folder / page)
        assert "| covariance tokens | 192 |" in text
        assert "| covariance text | text.txt |" in text


def test_a_model_and_data_are_enough(small_run, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Layers, the text and the units are decided, said, written down, and the same again."""
    monkeypatch.chdir(tmp_path)
    facts = [("Lyon", "{} is a twin city of", "Rome"), ("Basel", "{} lies in", "Italy")]
    lines = ["subject,prompt,target_new", *(",".join(fact) for fact in facts)]
    Path("facts.csv").write_text("\n".join(lines))
    given = [f"--model.name_or_path={small_run / 'gptj'}", "--data.path=facts.csv"]
    assert main(["fit", *given, "--run.wandb=off"]) == 0
    _, err = capsys.readouterr()
    summary = json.loads(Path("runs/edit/summary.json").read_text())
    n_layers = AutoConfig.from_pretrained(small_run / "gptj").num_hidden_layers
    layers = layers_by_depth(n_layers)
    assert f"decided: critical layers {', '.join(map(str, layers))} of {n_layers}, by depth" in err
    assert "decided: text of the covariance: plain_english" in err
    assert summary["edits/applied"] == 2
    assert summary["settings/covariance_text"] == "plain_english"
    assert summary["settings/covariance_tokens"] == 480
    report = unpadded(Path("runs/edit/report.md"))
    assert f"| layers | {', '.join(map(str, layers))} |" in report
    assert "| covariance weight | 48 |" in report
    decided = "layers, covariance weight, learning rate, covariance text"
    assert f"| decided by default | {decided} |" in report
    config = yaml.safe_load(Path("runs/edit/config.yaml").read_text())
    assert config["update"]["layers"] == layers
    assert (
        main(["fit", "--config=runs/edit/config.yaml", "--run.name=again", "--run.wandb=off"]) == 0
    )
    first, again = (load_file(f"runs/{name}/model/model.safetensors") for name in ("edit", "again"))
    assert all(torch.equal(again[name], value) for name, value in first.items())


def unpadded(page: Path) -> str:
    """Return a page with the cells of its tables as they are, not as wide as their column."""
    return re.sub(" +", " ", page.read_text())


def test_stats_says_what_it_collected(run, tmp_path, small_run):  # noqa: F811
    args = ["--update.layers=[2,4]", f"--model.covariance.cache={tmp_path}"]
    code, out, err = run("stats", OWN, *args)
    assert code == 0, err
    (file,) = tmp_path.glob("*.safetensors")
    assert out.splitlines()[:4] == [
        f"covariance of layers 2, 4: {file}",
        f"text: {small_run / 'text.txt'}",
        "tokens: 192",
        "documents: 1",
    ]
    for layer, line in zip((2, 4), out.splitlines()[4:], strict=True):
        assert line.startswith(f"layer {layer}: from about half to 192 tokens, an update moved by ")


def test_statistics_from_elsewhere_edit_and_are_named(run, tmp_path):
    torch.manual_seed(0)
    keys = torch.randn(48, 200)
    save_file({f"layer{n}": keys @ keys.T / 200 for n in (2, 4)}, tmp_path / "mine.safetensors")
    brought = [f"--model.covariance.path={tmp_path / 'mine.safetensors'}"]
    args = ["--update.layers=[2,4]", "--data.batch_size=1", *brought]
    code, out, err = run("fit", OWN, *args, "--model.covariance.trust=true")
    assert code == 0, err
    folder = Path(out.rpartition("report: ")[2].strip()).parent
    for page in ("report.md", "model/README.md"):
        assert "| covariance trusted | brought from elsewhere" in unpadded(folder / page)
    header = json.loads((folder / "records" / "journal.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    digest = header["covariance"]["identity"]["brought"]
    assert summary["settings/covariance_sha256"] == digest
    replay = ["undo", str(folder), "--batch=0", "--replay"]
    assert main(replay) == 0
    save_file({f"layer{n}": torch.eye(48) for n in (2, 4)}, tmp_path / "mine.safetensors")
    assert main([*replay, "--force"]) == 2


def test_statistics_of_another_size_stop_the_run_before_any_edit(run, tmp_path):
    save_file({f"layer{n}": torch.eye(47) for n in (2, 4)}, tmp_path / "mine.safetensors")
    brought = f"--model.covariance.path={tmp_path / 'mine.safetensors'}"
    code, _, err = run(
        "fit", OWN, "--update.layers=[2,4]", brought, "--model.covariance.trust=true"
    )
    assert code == 2
    assert "layer 2 cannot be used: its shape is (47, 47); the model needs (48, 48)" in err


def test_an_empty_null_space_names_its_layer_and_key(run):
    methods = f"--config={ROOT / 'conf' / 'methods' / 'alphaedit.yaml'}"
    code, _, err = run("fit", OWN, methods, "--update.layers=[2,4]", "--update.threshold=1e-30")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: layer2: the null space is empty")
    assert "update.threshold keeps what is below 1e-30; raise it, or give update.energy" in err
