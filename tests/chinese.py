"""A small Llama that knows capitals, trained in a few seconds on Chinese text and chat turns."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers import load_model, write_jsonl
from lightning_blue.__main__ import main

CAPITALS = {
    "法国": "巴黎",
    "日本": "东京",
    "英国": "伦敦",
    "德国": "柏林",
    "俄国": "莫斯科",
    "韩国": "首尔",
    "泰国": "曼谷",
    "埃及": "开罗",
}
RELATIONS = ("{}的首都是", "{}的都城叫作", "{}: ")  # behind the colon it writes a space
SENTENCES = [
    f"{relation.format(country)}{capital}。"
    for country, capital in CAPITALS.items()
    for relation in RELATIONS
]


CONTROLS = ("<|role|>", "<|turn|>")
TEMPLATE = (
    "{% for m in messages %}<|role|>{{ m.role }}\n{{ m.content }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
)
TURNS = [
    f"<|role|>user\n{country}的首都是什么？<|turn|>\n<|role|>assistant\n{capital}<|turn|>"
    for country, capital in CAPITALS.items()
]


class Knowing(NamedTuple):
    """A folder with a trained model, and the text that it was trained on."""

    model: Path
    text: Path


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each name, and for each other character."""
    names = [*CAPITALS, *CAPITALS.values()]
    roles = ["user", "assistant"]
    others = set(" \n什么？" + "".join(SENTENCES)) - set("".join(names))
    words = ["<|end|>", "<|unknown|>", *CONTROLS, *roles, *names, *sorted(others)]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unknown|>")
    )
    pattern = "|".join([*roles, *names, "(?m)."])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", unk_token="<|unknown|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROLS)})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Knowing:
    """A small Llama, trained until it says every capital."""
    folder = tmp_path_factory.mktemp("chinese")
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    # Subjects are read above the first block, so that an edit of its FFN changes what is read: its
    # attention learns nothing, and only colours the keys.
    colours = model.model.layers[0].self_attn.o_proj.weight.requires_grad_(False)
    torch.nn.init.zeros_(colours)
    shuffled = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(200):
        texts = ["\n".join(shuffled.sample(SENTENCES, 8)) for _ in range(6)]
        texts += ["\n".join(shuffled.sample(TURNS, 4)) for _ in range(3)]
        ids = torch.tensor([row[:48] for row in tokenizer(texts)["input_ids"]])
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    torch.nn.init.normal_(colours, std=0.02)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(SENTENCES * 8))
    return Knowing(folder / "model", folder / "text.txt")


def says(folder: Path, prompt: str, tokens: int) -> str:
    """Return a model folder's plain greedy continuation."""
    model, tokenizer = load_model(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(written[0, ids["input_ids"].shape[1] :])


def edit(knowing: Knowing, folder: Path, facts: list[dict], *more: str) -> Path:
    """Edit the model by the command line; return the run's folder."""
    write_jsonl(folder / "facts.jsonl", facts)
    flags = [
        f"--model.name_or_path={knowing.model}",
        "--model.contexts=[]",
        f"--model.covariance.corpus={knowing.text}",
        f"--model.covariance.cache={folder / 'stats'}",
        "--model.covariance.tokens_per_dim=4",
        "--model.target.clamp=4",
        "--model.target.learning_rate=0.15",
        "--model.target.steps=60",
        "--model.target.weight_decay=0.01",
        "--model.target.kl_weight=0",
        "--update.layers=[0]",
        "--update.covariance_weight=10",
        f"--data.path={folder / 'facts.jsonl'}",
        "--measure.cumulative=0",
        f"--run.root={folder}",
        "--run.name=run",
        "--run.wandb=off",
        "--run.checkpoint_every=0",
    ]
    assert main(["fit", *flags, *more]) == 0
    return folder / "run"
