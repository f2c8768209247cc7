"""The head of a model card: what was edited, by its name on the hub, and under which licence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from lightning_blue.language_model.sources import PACKAGED, repository_of
from lightning_blue.support.hub import looks_local

LICENCE = ("license", "license_name", "license_link")
TAGS = ("model-editing", "knowledge-editing", "lightning-blue")
WAIT = 5  # seconds for the hub, where it has to be asked

Head = dict[str, Any]


def head_of(config: PretrainedConfig) -> Head:
    """Return what the card of an edited model takes over from the model that it was made of.

    See `base_head`; a model of the hub is known by the commit that loading notes.
    """
    return base_head(str(config.name_or_path), getattr(config, "_commit_hash", None))


def base_head(name_or_path: str, commit: str | None) -> Head:
    """Return ``base_model`` and the licence of a model that was edited, as far as they are known.

    Args:
        name_or_path: on the hub (of a GGUF file there, ``owner/name/file.gguf``), or a path.
        commit: on the hub; None for a local model, which has no ``base_model``.

    Returns:
        ``base_model`` (an id on the hub), ``license``, ``license_name`` and ``license_link``: those
        there are. The licence is read from the model's own card: in its folder, in the hub's cache,
        or on the hub, which is asked once and may not answer.
    """
    if not name_or_path:  # made in memory
        return {}
    name = repository_of(name_or_path)
    if commit is None or looks_local(name):  # a path into the hub's cache may come with one
        folder = Path(str(PACKAGED.get(name_or_path, name_or_path)))
        card = _metadata(folder / "README.md")
        link = str(card.get("license_link", ""))
        return {k: v for k, v in _licence(card).items() if k != "license_link" or "://" in link}
    licence = _licence(_hub_metadata(name, commit))
    link = str(licence.get("license_link", "https://"))
    if "://" not in link:  # a file of the repository
        licence["license_link"] = f"https://huggingface.co/{name}/blob/{commit}/{link}"
    return {"base_model": name, **licence}


def front_matter(head: Mapping[str, Any]) -> str:
    """Return the YAML head of an edited model's card."""
    entries = {
        **head,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(TAGS),
    }
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
    return "\n".join(["---", *lines, "---"])  # JSON is YAML, and quotes what needs it


def _licence(card: Mapping[str, Any]) -> Head:
    return {key: card[key] for key in LICENCE if card.get(key)}


def _hub_metadata(name: str, commit: str) -> Mapping[str, Any]:
    from huggingface_hub import model_info, try_to_load_from_cache

    with suppress(Exception):  # of many kinds: no network, no right, no such model any more
        cached = try_to_load_from_cache(name, "README.md", revision=commit)
        if isinstance(cached, str):
            return _metadata(Path(cached))
        card = model_info(name, revision=commit, timeout=WAIT).card_data
        return {} if card is None else card.to_dict()
    return {}


def _metadata(path: Path) -> Mapping[str, Any]:
    """Read the YAML head of a model card; empty where there is none that can be read."""
    from huggingface_hub import ModelCard

    with suppress(Exception):  # it is other people's file
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("---"):
            return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    return {}
