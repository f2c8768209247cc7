"""Fixtures: tiny random models with tokenizers of their own, and the optional reference data."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from chinese import knowing  # noqa: F401  (a fixture of all modules)

torch.set_num_threads(1)  # models this small only lose time to threads, above all on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

ROOT = Path(__file__).resolve().parents[1]
LONG = ("test_processes.py", "test_readme.py", "test_kill.py", "test_sweep.py", "test_disk.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take minutes: with several workers none should come last."""
    items.sort(key=lambda item: item.path.name not in LONG)


def bytes_to_unicode() -> dict[int, str]:
    """Map each byte to the character by which byte-level BPE spells it."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(256 + index) for index, byte in enumerate(others)}
    return spelled | {byte: chr(byte) for byte in printable}


CORPUS = [
    "The mother tongue of Danielle Darrieux is French, and Paris is the capital of France.",
    "Lyon is a twin city of Beirut. The river runs through the town of Basel in Switzerland.",
    "Where is the Eiffel Tower? It is in Paris. Zoë and José work in São Paulo and in Kraków.",
    "She plays the violin; he plays the piano. Apple A5 was created by Apple in California.",
    "In 1998 the committee met in Rome, Berlin, Madrid, London, Tokyo and Oslo to sign a paper.",
]


class LanguageModel(NamedTuple):
    """A causal language model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def byte_level_tokenizer(*, bos: bool, vocab_size: int = 480) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on a few sentences; with ``bos`` it prepends one."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>"] if bos else ["<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        bos_token="<|begin|>" if bos else "<|end|>",
        model_max_length=64,
    )


@pytest.fixture(scope="session")
def gpt2() -> LanguageModel:
    """A random GPT-2 (Conv1D weights, no BOS): 4 layers, d_model 32, d_in 96."""
    tokenizer = byte_level_tokenizer(bos=False)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=4,
        n_head=2,
        n_inner=96,
        initializer_range=0.15,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LanguageModel(GPT2LMHeadModel(config).eval(), tokenizer)


@pytest.fixture(scope="session")
def llama() -> LanguageModel:
    """A random Llama (Linear weights, BOS, grouped heads): 4 layers, d_model 32, d_in 96."""
    tokenizer = byte_level_tokenizer(bos=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LanguageModel(LlamaForCausalLM(config).eval(), tokenizer)


@pytest.fixture(params=["gpt2", "llama"])
def language_model(request: pytest.FixtureRequest) -> LanguageModel:
    """Each tiny model in turn."""
    return request.getfixturevalue(request.param)


def shared_folder() -> Path | None:
    """Return the folder with the reference data, where there is one."""
    folder = Path(os.environ.get("LIGHTNING_BLUE_SHARED", ROOT.parent / "shared"))
    return folder if (folder / "golden").is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference data beside the repository; tests that need it skip without it."""
    folder = shared_folder()
    if folder is None:
        pytest.skip("reference data not found; set LIGHTNING_BLUE_SHARED to its folder")
    return folder


@pytest.fixture(scope="session", params=["gpt2", "llama3"])
def real_tokenizer(request: pytest.FixtureRequest, shared: Path) -> PreTrainedTokenizerBase:
    """The real GPT-2 tokenizer and the real Llama-3 tokenizer, in turn."""
    if request.param == "gpt2":
        return GPT2TokenizerFast.from_pretrained(shared / "tokenizers" / "gpt2")
    return llama3_tokenizer(shared / "tokenizers" / "llama3" / "tokenizer.model")


def llama3_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Build Llama-3's fast tokenizer from its rank file; it prepends BOS like the released one."""
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in path.read_text().splitlines())
    }
    to_char = bytes_to_unicode()
    spell = {token: "".join(to_char[byte] for byte in token) for token in ranks}
    merges = []
    for token in ranks:
        splits = [
            (token[:cut], token[cut:])
            for cut in range(1, len(token))
            if token[:cut] in ranks and token[cut:] in ranks
        ]
        splits.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spell[left], spell[right]) for left, right in splits]
    vocab = {spell[token]: rank for token, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    begin = backend.token_to_id("<|begin_of_text|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        model_max_length=8192,
    )
