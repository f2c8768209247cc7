"""What is measured: models of known shapes, real-looking requests and ordinary text."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM as AutoModel
from transformers import (  # type: ignore[attr-defined]
    GPT2Config,
    GPT2TokenizerFast,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_blue.data import read_requests
from lightning_blue.data.corpus import PACKAGED, read_text
from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.language_model.loading import load_language_model

ROOT = Path(__file__).resolve().parents[1]
COVARIANCE_TEXT = str(PACKAGED["almanac"])  # by its path: any text will do for random weights
N_NEIGHBOURS = 10  # of a record, as in CounterFact's full form

# As long as those that the reference code lets the model write: ten tokens and a full stop.
CONTEXTS = (
    "The old station was rebuilt after the war ended.",
    "Therefore many of them decided to leave the town early.",
    "Because of the heavy rain nobody came to the game.",
    "I have never seen so many birds in one place.",
    "You can find out more about this on our website.",
)


class Workload(NamedTuple):
    """A model, its tokenizer, edit requests with full records, and token sequences of text."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    requests: list[EditRequest]
    source: str


_FEW = 256  # entries of a tiny model's vocabulary, if the tokenizer has no more
SHAPES = ("gpt2-small", "llama3-8b", "tiny", "tiny-llama")


def config_of(
    shape: str, n_layers: int | None = None, d_model: int | None = None
) -> PretrainedConfig:
    """Return the configuration of a shape, depth and width replaced on demand."""
    if shape == "gpt2-small":
        width = d_model or 768
        return GPT2Config(n_layer=n_layers or 12, n_embd=width, n_head=max(1, width // 64))
    if shape == "tiny":
        width = d_model or 32
        return GPT2Config(
            vocab_size=_FEW,
            n_positions=128,
            n_embd=width,
            n_layer=n_layers or 4,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    if shape == "llama3-8b":
        width = d_model or 4096
        return LlamaConfig(
            vocab_size=128256,
            hidden_size=width,
            intermediate_size=7 * width // 2,
            num_hidden_layers=n_layers or 32,
            num_attention_heads=width // 128,
            num_key_value_heads=8,
            max_position_embeddings=8192,
        )
    width = d_model or 32
    return LlamaConfig(
        vocab_size=_FEW,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=n_layers or 4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )


def build_model(
    config: PretrainedConfig, dtype: torch.dtype, device: str, vocabulary: int, seed: int = 0
) -> PreTrainedModel:
    """Build a random model on the device; its vocabulary never shrinks below the tokenizer's."""
    config.vocab_size = max(config.vocab_size, vocabulary)
    torch.manual_seed(seed)
    with torch.device(device):
        model: PreTrainedModel = AutoModel.from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval()


def shared_folder() -> Path | None:
    """Return the folder with real tokenizers and CounterFact, where there is one."""
    folder = Path(os.environ.get("LIGHTNING_BLUE_SHARED", ROOT.parent / "shared"))
    return folder if (folder / "data" / "counterfact").is_dir() else None


def load_tokenizer(folder: Path | None) -> PreTrainedTokenizerBase:
    """Return GPT-2's tokenizer, or else the one in the package."""
    if folder is None:
        return load_language_model("almanac")[1]
    tokenizer: PreTrainedTokenizerBase = GPT2TokenizerFast.from_pretrained(
        folder / "tokenizers" / "gpt2"
    )
    return tokenizer


def load_records(n: int, folder: Path | None) -> tuple[list[EditRequest], str]:
    """Return n edit requests with paraphrases, neighbours and prompts to continue, and a source.

    CounterFact's flat form has one paraphrase and one neighbour a record. Records of the full size
    (1 + 2 + 10 prompts, three distinct texts to continue) are put together from other records.
    """
    if folder is None:
        requests, _ = read_requests("almanac")
        return _cycled(requests, n), "the package's almanac"
    found, _ = read_requests(folder / "data" / "counterfact" / "counterfact-edit.json")
    return _cycled(_full_records(found, n), n), "CounterFact"


def _cycled(requests: Sequence[EditRequest], n: int) -> list[EditRequest]:
    if not requests:
        raise ValueError("there are no requests")
    copies = -(-n // len(requests))
    return (list(requests) * copies)[:n]


def _full_records(found: Sequence[EditRequest], n: int) -> list[EditRequest]:
    by_fact: dict[tuple[str, str | None], list[str]] = defaultdict(list)
    by_object: dict[str | None, list[str]] = defaultdict(list)
    for request in found:
        by_fact[request.prompt, request.target_true].append(request.text)
        by_object[request.target_true].append(request.text)
    records = []
    for index, request in enumerate(found[:n]):
        near = by_fact[request.prompt, request.target_true]
        near = [text for text in [*near, *by_object[request.target_true]] if text != request.text]
        probes = [Probe(text, request.target_true or "") for text in dict.fromkeys(near)]
        context = CONTEXTS[index % len(CONTEXTS)]
        second = f"{context} {request.text}"
        records.append(
            replace(
                request,
                paraphrases=(*request.paraphrases, second),
                neighborhood=(*request.neighborhood, *probes)[:N_NEIGHBOURS],
                generation_prompts=(
                    request.text,
                    f"{request.subject} is known for",
                    f"The friends of {request.subject} often talk about",
                ),
            )
        )
    return records


def load_texts(folder: Path | None) -> list[str]:
    """Return paragraphs of ordinary text: WikiText-2's, or else the package's corpus."""
    if folder is None:
        return read_text("almanac").splitlines(keepends=True)
    file = folder / "data" / "wikitext-2" / "valid.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if len(line) > 100]


def load_workload(
    shape: str,
    n_requests: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    n_layers: int | None = None,
    d_model: int | None = None,
) -> Workload:
    """Build the model and read requests for it."""
    folder = shared_folder()
    tokenizer = load_tokenizer(folder)
    config = config_of(shape, n_layers, d_model)
    model = build_model(config, dtype, device, len(tokenizer))
    requests, source = load_records(n_requests, folder)
    return Workload(model, tokenizer, requests, source)
