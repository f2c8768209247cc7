"""Models of the hub, as its cache holds them: the commit that was loaded is known ever after."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants

from conftest import CORPUS, LanguageModel, byte_level_tokenizer
from helpers import fit
from histories import small_history
from lightning_blue.__main__ import main
from lightning_blue.editing.covariance import CovarianceSource
from lightning_blue.editing.module import edit_module
from lightning_blue.editing.optimization import TargetOptimization
from lightning_blue.language_model.loading import checkpoint_dtype, load_language_model
from lightning_blue.reporting.base_card import base_head, head_of
from lightning_blue.reporting.export import export_model
from lightning_blue.runs.journal import EditJournal, Journal
from runs_made import BATCHES, save, small_update
from test_gguf import TEXT, write_gguf

OLD, NEW = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"
Store = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Return what makes a snapshot of ``me/base`` in a cache of our own; no hub answers."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--me--base"

    def snapshot(commit: str, ref: str) -> Path:
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
        return folder

    return snapshot


def other_than(model: LanguageModel) -> LanguageModel:
    """The same model with one weight of another value."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        next(changed.model.parameters())[0, 0] += 1.0
    return changed


def two_commits(store: Store, model: LanguageModel) -> None:
    """``v1`` holds a model and its card, ``main`` another one without."""
    old = save(model, store(OLD, "v1"))
    (old / "README.md").write_text("---\nlicense: mit\n---\n")
    save(other_than(model), store(NEW, "main"))


def test_a_run_knows_its_commit_when_its_model_is_needed_again(
    store: Store, gpt2: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_commits(store, gpt2)
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("\n".join(CORPUS * 12))
    module = edit_module(
        "me/base",
        revision="v1",
        target=TargetOptimization(steps=2, learning_rate=0.5, clamp=4.0),
        contexts=["It is said."],
        covariance=CovarianceSource(
            str(text), tokens_per_dim=3, cache=str(tmp_path / "stats"), report_change=False
        ),
    )
    fit(module, small_update("memit"), BATCHES[:1], callbacks=[EditJournal(run)])
    assert Journal(run).header.model.revision == OLD

    assert main(["ask", str(run), "Lyon is", "--before", "--tokens=1"]) == 0, capsys.readouterr()
    undone = [f"--output={tmp_path / 'undone'}", "--batch=0"]
    assert main(["undo", str(run), *undone]) == 0, capsys.readouterr().err
    again, _ = load_language_model(str(tmp_path / "undone"))
    for name, weight in gpt2.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    for form in ("model", "adapter"):
        assert main(["export", str(run), f"--as={form}", f"--output={tmp_path / form}"]) == 0
    card = ModelCard.load(tmp_path / "model" / "README.md").data
    assert (card.base_model, card.license) == ("me/base", "mit")
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("me/base", OLD)


@pytest.mark.parametrize(("revision", "commit"), [(None, NEW), ("v1", OLD), (OLD, OLD)])
def test_the_card_of_an_edited_model_has_its_base(
    store: Store, gpt2: LanguageModel, tmp_path: Path, revision: str | None, commit: str
) -> None:
    two_commits(store, gpt2)
    model, tokenizer = load_language_model("me/base", revision=revision)
    licence = {"license": "mit"} if commit == OLD else {}
    assert head_of(model.config) == {"base_model": "me/base", **licence}
    folder = export_model(tmp_path / "model", model, tokenizer, small_history())
    said = "No licence was found" in (folder / "README.md").read_text()
    assert said == (commit == NEW)
    assert commit not in (folder / "config.json").read_text()  # it is another model's


def test_a_gguf_file_is_read_at_its_revision(store: Store, llama: LanguageModel) -> None:
    """What ``main`` points to is not in the cache, or is another model with another tokenizer."""
    old = store(OLD, "v2")
    write_gguf(old / "tiny.gguf", *llama, "F16")
    (old / "README.md").write_text("---\nlicense: mit\n---\n")

    def require_old(revision: str) -> None:
        model, tokenizer = load_language_model("me/base/tiny.gguf", revision=revision)
        assert tokenizer(TEXT)["input_ids"] == llama.tokenizer(TEXT)["input_ids"]
        assert checkpoint_dtype(model) == torch.float16
        assert head_of(model.config) == {"base_model": "me/base", "license": "mit"}

    require_old("v2")
    tokenizer = byte_level_tokenizer(bos=True, vocab_size=300)
    smaller = copy.deepcopy(llama.model)
    smaller.resize_token_embeddings(len(tokenizer))
    write_gguf(store(NEW, "main") / "tiny.gguf", smaller, tokenizer, "F32")
    require_old(OLD)
    model, tokenizer = load_language_model("me/base/tiny.gguf")
    assert checkpoint_dtype(model) == torch.float32
    assert len(tokenizer(TEXT)["input_ids"]) > len(llama.tokenizer(TEXT)["input_ids"])


@pytest.mark.parametrize("name", ["a/b/file.gguf", "a--b/c", "name with spaces", "a/b/c/d"])
def test_a_name_that_the_hub_could_not_have_costs_the_licence_alone(store: Store, name) -> None:
    assert "license" not in base_head(name, OLD)


def test_a_path_into_the_cache_is_no_name(store: Store) -> None:
    folder = store(OLD, "main")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert base_head(str(folder), OLD) == {"license": "mit"}
