"""Scoring, perplexity and generation against one plain forward pass at a time."""

from __future__ import annotations

import copy
import math
import statistics
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, DynamicCache

from conftest import LanguageModel
from lightning_blue.language_model import batching, generation, shared_prefixes
from lightning_blue.language_model.batching import batches
from lightning_blue.language_model.generation import (
    generate,
    growing_cache,
    next_token,
    prompt_noise,
)
from lightning_blue.language_model.scoring import (
    Row,
    perplexity,
    score_rows,
    score_targets,
)
from lightning_blue.support.errors import InputError

PROMPTS = [
    "The mother tongue of Danielle Darrieux is",
    "Lyon",
    "The mother tongue of Danielle Darrieux is",
    "Apple A5 was created by Apple, and the river runs through the town of",
    "In",
    "José works in",
    "She plays the violin in",
]
TARGETS = ["French", "Beirut and Kraków", "English", "Basel", "1998", "São Paulo", "Rome"]
TEXT = " ".join(
    ["Lyon is a twin city of Beirut. The river runs through the town.", "In 1998 they met."] * 8
)


def log_probs(lm: LanguageModel, ids: list[int]) -> torch.Tensor:
    """Log-probabilities after each token of one sequence, without padding or cache; (t, v)."""
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([ids], device=lm.model.device)).logits
    return logits[0].float().log_softmax(-1).cpu()


def naive_score(lm: LanguageModel, prompt: str, target: str) -> tuple[float, list[bool]]:
    before = lm.tokenizer(prompt)["input_ids"]
    ids = lm.tokenizer(f"{prompt} {target}")["input_ids"]
    rows = log_probs(lm, ids)
    pairs = [(rows[i - 1], ids[i]) for i in range(len(before), len(ids))]
    nll = statistics.mean(-float(row[token]) for row, token in pairs)
    return nll, [bool(row.argmax() == token) for row, token in pairs]


def greedy(lm: LanguageModel, prompt: str, steps: int) -> str:
    ids = lm.tokenizer(prompt)["input_ids"]
    text = lm.tokenizer.decode(ids, skip_special_tokens=True)
    for _ in range(steps):
        ids = [*ids, int(log_probs(lm, ids)[-1].argmax())]
    return lm.tokenizer.decode(ids, skip_special_tokens=True)[len(text) :]


@pytest.mark.parametrize("tokens_per_batch", [1, 64, 4096])
def test_scores_equal_one_prompt_at_a_time(
    language_model: LanguageModel, tokens_per_batch: int
) -> None:
    scores = score_targets(*language_model, PROMPTS, TARGETS, tokens_per_batch=tokens_per_batch)
    for prompt, target, score in zip(PROMPTS, TARGETS, scores, strict=True):
        nll, correct = naive_score(language_model, prompt, target)
        assert score.nll == pytest.approx(nll, rel=1e-5)
        assert list(score.correct) == correct


def test_greedy_tokens_are_flagged_as_correct(language_model: LanguageModel) -> None:
    rows, expected = [], []
    for wrong, prompt in enumerate(PROMPTS):  # the first three rows get one wrong token each
        ids = language_model.tokenizer(prompt)["input_ids"]
        start, flags = len(ids), []
        for step in range(3):
            best = int(log_probs(language_model, ids)[-1].argmax())
            flags.append(step != wrong)
            ids = [*ids, best if flags[-1] else best + 1]
        rows.append(Row(ids, start))
        expected.append(flags)
    scores = score_rows(language_model.model, rows, tokens_per_batch=4096)
    assert [correct.tolist() for _, correct in scores] == expected


def test_scores_without_prompts_are_empty(gpt2: LanguageModel) -> None:
    assert score_targets(*gpt2, [], []) == []
    assert generate(*gpt2, []) == []


def test_dropout_is_off_and_the_mode_restored(gpt2: LanguageModel) -> None:
    expected = score_targets(*gpt2, PROMPTS, TARGETS)
    gpt2.model.train()
    try:
        assert score_targets(*gpt2, PROMPTS, TARGETS) == expected
        assert gpt2.model.training
    finally:
        gpt2.model.eval()


def test_half_precision_is_scored_in_float32(language_model: LanguageModel) -> None:
    half = LanguageModel(
        copy.deepcopy(language_model.model).to(torch.bfloat16), language_model.tokenizer
    )
    for score, prompt, target in zip(
        score_targets(*half, PROMPTS, TARGETS), PROMPTS, TARGETS, strict=True
    ):
        assert score.nll == pytest.approx(naive_score(half, prompt, target)[0], rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_scores_and_texts_on_a_gpu_equal_those_on_the_cpu(language_model: LanguageModel) -> None:
    gpu = LanguageModel(copy.deepcopy(language_model.model).cuda(), language_model.tokenizer)
    for ours, reference in zip(
        score_targets(*gpu, PROMPTS, TARGETS),
        score_targets(*language_model, PROMPTS, TARGETS),
        strict=True,
    ):
        assert ours.nll == pytest.approx(reference.nll, rel=1e-3)
    assert perplexity(*gpu, TEXT) == pytest.approx(perplexity(*language_model, TEXT), rel=1e-3)
    assert len(generate(*gpu, PROMPTS, max_length=40)) == len(PROMPTS)


@pytest.mark.parametrize(
    ("prompt", "target", "message"),
    [("Lyon " * 70, "Rome", "context holds 64"), ("Lyon is", " ", "empty")],
)
def test_bad_input_is_refused(
    language_model: LanguageModel, prompt: str, target: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        score_targets(*language_model, ["Lyon is", prompt], ["Rome", target])


def test_an_empty_prompt_is_refused_where_nothing_precedes_the_target(gpt2: LanguageModel) -> None:
    with pytest.raises(InputError, match="prompt is empty"):
        score_targets(*gpt2, [""], ["Rome"])


@pytest.mark.parametrize(("length", "max_tokens"), [(None, None), (16, None), (16, 45), (2, 5)])
def test_perplexity_predicts_each_token_once(
    language_model: LanguageModel, length: int | None, max_tokens: int | None
) -> None:
    tokenizer = language_model.tokenizer
    start = tokenizer("")["input_ids"]
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][:max_tokens]
    window = length or 64
    sums, counts = [], []
    position = 0 if start else 1
    while position < len(ids):
        context = start or [ids[position - 1]]
        predicted = ids[position : position + window - len(context)]
        rows = log_probs(language_model, context + predicted)[len(context) - 1 :]
        sums.append(-sum(float(row[token]) for row, token in zip(rows, predicted, strict=False)))
        counts.append(len(predicted))
        position += len(predicted)
    estimate = perplexity(*language_model, TEXT, max_length=length, max_tokens=max_tokens)
    assert estimate["tokens"] == sum(counts) == len(ids) - (not start)
    assert estimate["count"] == len(counts)
    assert estimate["value"] == pytest.approx(math.exp(sum(sums) / sum(counts)), rel=1e-4)
    mean = sum(sums) / sum(counts)
    squares = sum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    error = math.sqrt(squares * len(sums) / (len(sums) - 1)) / sum(counts)
    assert estimate["standard_error"] == pytest.approx(error * math.exp(mean), rel=1e-3)


def test_perplexity_of_too_short_a_text_is_refused(gpt2: LanguageModel) -> None:
    with pytest.raises(InputError, match="too short"):
        perplexity(*gpt2, "a")


@pytest.mark.parametrize("tokens_per_batch", [1, 8192])
def test_greedy_generation_equals_one_prompt_at_a_time(
    language_model: LanguageModel, tokens_per_batch: int
) -> None:
    texts = generate(
        *language_model, PROMPTS, max_new_tokens=9, top_k=1, tokens_per_batch=tokens_per_batch
    )
    assert texts == [greedy(language_model, prompt, 9) for prompt in PROMPTS]


def spy_on_tokens(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Record the token ids of every text that is decoded."""
    decoded: list[list[int]] = []
    decode = type(lm.tokenizer).decode

    def spy(self: Any, ids: list[int], **options: Any) -> str:
        decoded.append(ids)
        return decode(self, ids, **options)

    monkeypatch.setattr(type(lm.tokenizer), "decode", spy)
    return decoded


@pytest.mark.parametrize(("max_length", "expected"), [(40, 40), (1000, 64)])
def test_texts_end_at_their_length_or_at_the_context(
    language_model: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    max_length: int,
    expected: int,
) -> None:
    decoded = spy_on_tokens(language_model, monkeypatch)
    generate(*language_model, PROMPTS[:2], max_length=max_length)
    assert [len(ids) for ids in decoded[1::2]] == [expected] * 2


def test_a_prompt_as_long_as_the_text_is_not_continued(gpt2: LanguageModel) -> None:
    assert generate(*gpt2, PROMPTS[:1], max_length=3) == [""]


def test_end_of_text_cuts_only_where_wanted(gpt2: LanguageModel) -> None:
    (said,) = generate(*gpt2, PROMPTS[:1], max_new_tokens=8, top_k=1)
    ids = gpt2.tokenizer(PROMPTS[0])["input_ids"]
    third = gpt2.tokenizer(PROMPTS[0] + said)["input_ids"][len(ids) + 2]
    first = gpt2.tokenizer(PROMPTS[0] + said)["input_ids"][len(ids) :].index(third)
    tokenizer = copy.deepcopy(gpt2.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(third)
    (cut,) = generate(
        gpt2.model, tokenizer, PROMPTS[:1], max_new_tokens=8, top_k=1, stop_at_end=True
    )
    assert cut == greedy(gpt2, PROMPTS[0], first)
    assert len(cut) < len(said)


def test_sampling_depends_on_prompt_and_seed_alone(language_model: LanguageModel) -> None:
    state = torch.get_rng_state()
    together = generate(*language_model, PROMPTS, max_length=40, seed=1)
    alone = [generate(*language_model, [p], max_length=40, seed=1)[0] for p in PROMPTS[::-1]]
    assert together == alone[::-1]
    assert generate(*language_model, PROMPTS, max_length=40, seed=2) != together
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_differs_between_prompts_and_seeds() -> None:
    noise = torch.stack([prompt_noise(p, seed, 1000) for p in ("a", "b") for seed in (0, 1)])
    assert noise.corrcoef().sub(torch.eye(4)).abs().max() < 0.15
    assert torch.equal(prompt_noise("a", 0, 1000)[:10], prompt_noise("a", 0, 10))


def test_sampling_follows_the_top_k_distribution() -> None:
    logits = torch.tensor([1.0, 3.0, -2.0, 2.0, 0.5])
    n = 20_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0))
    tokens = next_token(logits.expand(n, -1), uniform, top_k=3)[:, 0]
    frequency = torch.bincount(tokens, minlength=5) / n
    kept = torch.tensor([1.0, 3.0, -math.inf, 2.0, -math.inf]).softmax(0)
    torch.testing.assert_close(frequency, kept, atol=0.015, rtol=0)


def test_batches_respect_the_budget_and_lose_nothing() -> None:
    lengths = [3, 50, 7, 7, 12, 3, 9]
    groups = list(batches(lengths, 24))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert groups[0] == [1]  # longer than the budget: alone
    for group in groups[1:]:
        assert len(group) * max(lengths[index] for index in group) <= 24
    assert len(groups) == 4


def test_each_distinct_prefix_is_computed_once(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    forward = gpt2.model.transformer.forward

    def count(*args: Any, **options: Any) -> Any:
        computed.append(options["attention_mask"].diagonal(dim1=-2, dim2=-1).numel())
        return forward(*args, **options)

    prompts = [*PROMPTS[:1], PROMPTS[0] + " and", *PROMPTS[:1]]
    targets = ["French", "Rome", "Rome"]
    ids = [
        gpt2.tokenizer(p)["input_ids"] + gpt2.tokenizer(f" {t}")["input_ids"][:-1]
        for p, t in zip(prompts, targets, strict=True)
    ]
    assert shared_prefixes.reads_forests(
        gpt2.model
    )  # tried out once, by a pass that does not count
    monkeypatch.setattr(gpt2.model.transformer, "forward", count)
    score_targets(*gpt2, prompts, targets)
    (tokens,) = computed
    assert tokens == len({tuple(row[:n]) for row in ids for n in range(1, len(row) + 1)})


def test_the_logits_of_a_batch_are_bounded(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = score_targets(*gpt2, PROMPTS * 4, TARGETS * 4)
    read: list[int] = []
    hook = gpt2.model.lm_head.register_forward_hook(lambda _m, _a, out: read.append(out.shape[1]))
    monkeypatch.setattr(shared_prefixes, "ROW_WIDTH", 8)
    monkeypatch.setattr(batching, "_LOGITS", 10 * len(gpt2.tokenizer))
    try:
        bounded = score_targets(*gpt2, PROMPTS * 4, TARGETS * 4)
    finally:
        hook.remove()
    assert 1 < max(read) <= 10
    assert [score.nll for score in bounded] == pytest.approx([score.nll for score in expected])


def in_float64(lm: LanguageModel) -> LanguageModel:
    return LanguageModel(copy.deepcopy(lm.model).double(), lm.tokenizer)


def test_padding_and_duplicates_leave_sampled_texts_as_they_are(
    language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = in_float64(language_model)
    sizes: list[tuple[int, ...]] = []
    sample = generation._sample

    def spy(model: Any, prompts: Any, *rest: Any) -> torch.Tensor:
        sizes.append(tuple(map(len, prompts)))
        return sample(model, prompts, *rest)

    alone = [generate(*exact, [prompt], max_length=60)[0] for prompt in PROMPTS]
    monkeypatch.setattr(generation, "_sample", spy)
    assert generate(*exact, PROMPTS, max_length=60) == alone
    (together,) = sizes
    assert len(together) == len(set(PROMPTS)) == len(PROMPTS) - 1
    assert len(set(together)) > 1


def test_where_padding_would_matter_prompts_of_one_length_go_together(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=len(gpt2.tokenizer), hidden_size=32, n_layer=2, n_head=2, initializer_range=0.2
    )
    bloom = in_float64(LanguageModel(BloomForCausalLM(config).eval(), gpt2.tokenizer))
    texts = generate(*bloom, PROMPTS, max_new_tokens=9, top_k=1)
    assert texts == [greedy(bloom, prompt, 9) for prompt in PROMPTS]


def test_the_cache_holds_what_a_growing_one_would(language_model: LanguageModel) -> None:
    model = language_model.model
    ids = torch.arange(20).reshape(2, 10)
    ours, usual = growing_cache(model, 10), DynamicCache(config=model.config)
    for piece in ids.split([4, 1, 5], dim=1):
        with torch.no_grad():
            logits = [model(piece, past_key_values=c).logits for c in (ours, usual)]
        torch.testing.assert_close(*logits)
    assert ours.get_seq_length() == usual.get_seq_length() == 10
    assert ours.layers[0].keys.untyped_storage().nbytes() == usual.layers[0].keys.nbytes
