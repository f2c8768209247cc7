"""Shared prefixes: what is packed, what each token sees, and that no architecture's scores move."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from lightning_blue.language_model.scoring import Row, score_rows
from lightning_blue.language_model.shared_prefixes import (
    ROW_WIDTH,
    forest_arguments,
    merge_prefixes,
    row_width,
)

SIZE = {
    "vocab_size": 480,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = {**SIZE, "num_key_value_heads": 2}
NEO = {**SIZE, "num_hidden_layers": 2, "attention_types": [[["global", "local"], 1]]}
# Models are float64. Its rounding (1e-16) grows by the width, depth and |logits| of a model to less
# than 1e-12. Some codes round to float32 on the way whatever the model's type (RMSNorm, Bloom's and
# GPT-J's attention): 6e-8 there is amplified by the blocks above to nats that differ by 1e-6 or so.
# Which of the two it is, the architecture decides; how much is seen of it, the processor.
EXACT, ROUNDED = 1e-9, 1e-4
CAN: dict[str, tuple[dict[str, Any], float]] = {
    "gpt2": (SIZE, EXACT),
    "gpt_neox": (SIZE, EXACT),
    "opt": ({**SIZE, "ffn_dim": 64, "word_embed_proj_dim": 32}, EXACT),
    "llama": (GROUPED, ROUNDED),
    "qwen2": (GROUPED, ROUNDED),
    "mistral": ({**GROUPED, "sliding_window": 64}, ROUNDED),
    "gptj": ({**SIZE, "rotary_dim": 4}, ROUNDED),
    "gpt_neo": ({**NEO, "window_size": 16}, ROUNDED),
    "gemma2": ({**GROUPED, "head_dim": 8, "final_logit_softcapping": 2.0}, ROUNDED),
}
CANNOT: dict[str, tuple[dict[str, Any], float]] = {
    "mistral": ({**GROUPED, "sliding_window": 4}, ROUNDED),  # the mask would open the window
    "bloom": (SIZE, ROUNDED),  # positions are distances between columns; a softmax in float32
    "falcon": ({**SIZE, "alibi": True}, EXACT),
}


def build(kind: str, settings: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    return transformers.AutoModelForCausalLM.from_config(config).double().eval()


def random_rows() -> list[Row]:
    """Prompts that share beginnings of all lengths, with targets of one to three tokens."""
    generator = torch.Generator().manual_seed(1)

    def some(n: int) -> list[int]:
        return torch.randint(1, 480, (n,), generator=generator).tolist()

    prompts = [stem + some(n) for stem in (some(4), some(1), some(6)) for n in (0, 2, 5)]
    prompts += [prompts[0] + some(3), prompts[0]]
    return [Row(prompt + some(n), len(prompt)) for prompt in prompts for n in (1, 2, 3)]


def assert_scores_are_plain(model: PreTrainedModel, rows: list[Row], tolerance: float) -> None:
    scores = score_rows(model, rows, 100, share_prefixes=True)
    for row, (nll, correct) in zip(rows, scores, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row.ids])).logits[0, row.start - 1 : -1]
        target = torch.tensor(row.ids[row.start :])
        expected = -logits.double().log_softmax(-1).gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(nll.double(), expected, rtol=0, atol=tolerance)
        assert torch.equal(correct, logits.argmax(-1) == target)


@pytest.mark.parametrize("kind", CAN)
def test_scores_equal_one_row_at_a_time(kind: str) -> None:
    settings, tolerance = CAN[kind]
    model = build(kind, settings)
    windows = [settings[key] for key in ("window_size", "sliding_window") if key in settings]
    assert row_width(model, longest=12) == min([ROW_WIDTH, *windows])
    assert_scores_are_plain(model, random_rows(), tolerance)


@pytest.mark.parametrize("kind", CANNOT)
def test_what_cannot_share_is_scored_all_the_same(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings, tolerance = CANNOT[kind]
    model = build(kind, settings)
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        assert_scores_are_plain(model, random_rows(), tolerance)
        assert_scores_are_plain(model, random_rows()[:4], tolerance)
    said = [r.message for r in caplog.records if "shared prefixes" in r.message]
    assert len(said) == 1
    assert type(model).__name__ in said[0]


def prefixes(sequences: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}


@pytest.mark.parametrize("width", [0, 8, 20, 1000])
def test_packing_holds_each_sequence_and_no_prefix_twice(width: int) -> None:
    sequences = [row.ids for row in random_rows()]
    rows = merge_prefixes(sequences, width)
    assert sorted(i for row in rows for i in row.paths) == list(range(len(sequences)))
    for row in rows:
        own = [sequences[i] for i in row.paths]
        for index, columns in row.paths.items():
            assert [row.ids[c] for c in columns] == sequences[index]
            assert [row.depths[c] for c in columns] == list(range(len(columns)))
        assert len(row.ids) == len(prefixes(own))
        assert len(row.ids) <= max(width, max(map(len, own)))
        if width == 0:
            assert row.ids in own
    if width == 1000:
        assert sum(len(row.ids) for row in rows) == len(prefixes(sequences))


def test_each_token_sees_the_tokens_before_it_on_its_path() -> None:
    sequences = [row.ids for row in random_rows()]
    rows = merge_prefixes(sequences, 40)
    arguments = forest_arguments(build("gpt2", SIZE), rows)
    seen = arguments["attention_mask"][:, 0] == 0
    for number, row in enumerate(rows):
        expected = torch.eye(seen.shape[1], dtype=torch.bool)
        for columns in row.paths.values():
            for depth, column in enumerate(columns):
                expected[column, columns[:depth]] = True
        assert torch.equal(seen[number], expected)
        assert arguments["position_ids"][number, : len(row.ids)].tolist() == row.depths
