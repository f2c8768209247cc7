from __future__ import annotations

import copy
import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCardData
from transformers import AutoModelForCausalLM

from conftest import LanguageModel
from helpers import load_model
from histories import small_history
from lightning_blue.data.requests import EditRequest
from lightning_blue.metrics.history import RunHistory
from lightning_blue.reporting.base_card import base_head
from lightning_blue.reporting.export import caution, export_model, model_card
from lightning_blue.support.errors import InputError

TEXT = "The mother tongue of Danielle Darrieux is French"


@torch.no_grad()
def logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits


def test_the_exported_model_is_the_edited_one(
    language_model: LanguageModel, tmp_path: Path
) -> None:
    model, tokenizer = copy.deepcopy(language_model.model), language_model.tokenizer
    weight = next(p for name, p in model.named_parameters() if "2.mlp" in name and p.ndim == 2)
    weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    folder = export_model(tmp_path / "model", model, tokenizer, small_history())
    assert folder == tmp_path / "model"
    assert (folder / "model.safetensors").exists()
    assert os.listdir(tmp_path) == ["model"]  # noqa: PTH208

    loaded, loaded_tokenizer = load_model(folder)
    ids = tokenizer(TEXT)["input_ids"]
    assert loaded_tokenizer(TEXT)["input_ids"] == ids
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=0)
    assert not torch.equal(logits(model, ids), logits(language_model.model, ids))


def test_the_dtype_is_kept(gpt2: LanguageModel, tmp_path: Path) -> None:
    model = copy.deepcopy(gpt2.model).to(torch.bfloat16)
    folder = export_model(tmp_path / "model", model, gpt2.tokenizer, small_history())
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_no_path_of_the_source_remains(language_model: LanguageModel, tmp_path: Path) -> None:
    source = tmp_path / "site-packages" / "bundled"
    language_model.model.save_pretrained(source)
    language_model.tokenizer.save_pretrained(source)
    model, tokenizer = load_model(source)
    assert str(source) in model.config.name_or_path
    folder = export_model(tmp_path / "model", model, tokenizer, small_history())
    for file in folder.iterdir():
        assert b"site-packages" not in file.read_bytes(), file.name
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_an_older_folder_is_replaced_as_a_whole(gpt2: LanguageModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "stale.bin").write_text("")
    export_model(folder, gpt2.model, gpt2.tokenizer, small_history())
    assert not (folder / "stale.bin").exists()
    assert (folder / "README.md").exists()


def test_a_full_disk_leaves_nothing_half_written(
    gpt2: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        (Path(folder) / "vocab").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gpt2.tokenizer, "save_pretrained", full)
    with pytest.raises(InputError, match="model could not be written: No space left"):
        export_model(tmp_path / "model", gpt2.model, gpt2.tokenizer, small_history())
    assert list(tmp_path.iterdir()) == []


def front_matter(card: str) -> dict[str, object]:
    _, head, _ = card.split("---\n", maxsplit=2)
    return yaml.safe_load(head)


def test_the_card_says_what_was_edited_and_how() -> None:
    card = model_card(small_history())
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["model-editing", "knowledge-editing", "lightning-blue"],
    }
    assert "# almanac with 3 facts edited\n" in card
    assert "- Tower 2 lies in … Paris → **Bern**\n" in card
    assert "Tower 3" not in card  # was never applied
    for row in ("| layers            | 1, 3        |", "| past keys         | on          |"):
        assert row in card
    assert "| efficacy           |    4.5 ± 1.5 |  100.0 ± 0.0 |" in card
    assert "- retained knowledge: the object of a control fact" in card
    assert "- fluency:" not in card  # was not measured


def test_the_card_warns_of_what_was_measured() -> None:
    text = caution(small_history())
    assert "specificity went from 93.2 ± 0.6 to 80.0 ± 1.2" in text
    assert "retained knowledge went from 98.0 ± 0.9 to 97.0 ± 1.1" in text
    assert "perplexity went from 12.35 ± 0.04 to 15.00 ± 0.05" in text
    assert "fluency" not in text
    assert "None were measured here." in caution(RunHistory())


def test_the_card_names_a_local_model_without_its_path() -> None:
    history = small_history()
    history.settings |= {"model": "/home/me/Llama: 3", "data": "/home/me/facts.jsonl"}
    card = model_card(history)
    assert "# Llama: 3 with 3 facts edited\n" in card
    assert "base_model" not in front_matter(card)
    assert "/home" not in card


COMMIT = "0123456789abcdef" * 2 + "01234567"
CARD = (
    "---\nlicense: other\nlicense_name: rules\nlicense_link: LICENSE\nlanguage: de\n---\n# Base\n"
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache that holds one model's card, and no network."""
    snapshot = tmp_path / "hub" / "models--me--base" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text(CARD)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.model_info", unreachable)
    return snapshot


def test_a_model_of_the_hub_is_named_and_its_licence_carried_over(hub: Path) -> None:
    assert base_head("me/base", COMMIT) == {
        "base_model": "me/base",
        "license": "other",
        "license_name": "rules",
        "license_link": f"https://huggingface.co/me/base/blob/{COMMIT}/LICENSE",
    }
    assert base_head("me/other", COMMIT) == {"base_model": "me/other"}  # the hub does not answer


def test_the_hub_is_asked_for_a_licence_that_the_cache_lacks(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model_info(name: str, revision: str, timeout: float) -> SimpleNamespace:
        assert (name, revision) == ("me/other", COMMIT)
        assert timeout <= 10
        return SimpleNamespace(card_data=ModelCardData(license="mit"))

    monkeypatch.setattr("huggingface_hub.model_info", model_info)
    assert base_head("me/other", COMMIT) == {"base_model": "me/other", "license": "mit"}


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (CARD, {"license": "other", "license_name": "rules"}),  # the link leads nowhere from here
        ("---\nlicense: mit\nbase_model: me/base\n---\n", {"license": "mit"}),
        ("# no head\n", {}),
        ("---\n: [broken\n---\n", {}),
        (None, {}),
    ],
)
def test_a_local_model_has_a_licence_and_no_name_on_the_hub(
    tmp_path: Path, card: str | None, expected: dict[str, str]
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert base_head(str(tmp_path), None) == expected


def test_the_licence_is_in_the_exported_folder(gpt2: LanguageModel, tmp_path: Path) -> None:
    source = tmp_path / "source"
    gpt2.model.save_pretrained(source)
    gpt2.tokenizer.save_pretrained(source)
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    folder = export_model(tmp_path / "model", *load_model(source), small_history())
    written = (folder / "README.md").read_text()
    assert front_matter(written)["license"] == "mit"
    assert "base_model" not in front_matter(written)
    assert base_head("almanac", None) == {"license": "apache-2.0"}


def test_the_card_lists_at_most_200_edits() -> None:
    requests = [EditRequest(str(i), "{} is", f"Subject {i}", "new") for i in range(230)]
    card = model_card(RunHistory(requests=requests, batches={0: list(range(230))}))
    assert card.count("- Subject ") == 200
    assert "- Subject 199 is … **new**\n\nand 30 facts more." in card
