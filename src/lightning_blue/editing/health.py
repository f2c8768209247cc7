"""Whether an edited model is still well: its loss on ordinary text, and what it still knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_blue.data.corpus import corpus_texts, require_own_text
from lightning_blue.data.requests import Probe
from lightning_blue.language_model.scoring import perplexity, score_targets
from lightning_blue.language_model.tokens import plain_ids
from lightning_blue.support.errors import InputError

ORDINARY_TOKENS = 1024
CONTROL_FACTS = 100


def first_texts(
    tokenizer: PreTrainedTokenizerBase, corpus: str, split: str, n_tokens: int = ORDINARY_TOKENS
) -> str | None:
    """Return the beginning of a corpus, of a hub dataset no more rows than are needed.

    Args:
        tokenizer: counts the tokens.
        corpus: see :func:`lightning_blue.data.corpus.corpus_texts`.
        split: of a hub dataset.
        n_tokens: the least number of tokens, if the corpus has as many.

    Returns:
        None, with a warning, where the corpus cannot be read: a run whose covariances are in a
        file needs no corpus otherwise.
    """
    read = ""
    try:
        require_own_text(corpus, tokenizer)
        lines = (line for text in corpus_texts(corpus, split) for line in text.splitlines(True))
        for line in lines:
            read += line
            if len(plain_ids(tokenizer, [read])[0]) >= n_tokens:
                break
    except InputError as error:
        rank_zero_warn(f"the loss on ordinary text is not watched: {error}")
        return None
    return read


def text_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    n_tokens: int = ORDINARY_TOKENS,
) -> float:
    """Return the mean loss over the first tokens of a text, in nats per token; maybe infinite."""
    measured = perplexity(model, tokenizer, text, max_tokens=n_tokens)
    return math.log(measured.get("value", math.inf))


def percent_known(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Probe],
    at_most: int = CONTROL_FACTS,
    sent: Callable[[str], str] = str,
) -> float | None:
    """Return how many of the first facts are known, in percent; None without facts.

    A fact is known if each token of its answer is the most probable one, behind what ``sent``
    makes of its prompt.
    """
    asked = facts[:at_most]
    if not asked:
        return None
    return 100 * sum(known(model, tokenizer, asked, sent)) / len(asked)


def known(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Probe],
    sent: Callable[[str], str] = str,
) -> list[bool]:
    """Say of each fact whether a model knows it: each token of its answer is the most probable."""
    scores = score_targets(
        model,
        tokenizer,
        [sent(fact.prompt) for fact in facts],
        [fact.answer for fact in facts],
        prefixes=[fact.target_prefix for fact in facts],
    )
    return [all(score.correct) for score in scores]
