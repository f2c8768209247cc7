"""The command ``ask``: what a model, or a run's model before and after its edits, says."""

from __future__ import annotations

import json
import sys
import textwrap
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lightning_blue.cli.run_files import require_text
from lightning_blue.language_model.chat import wrap
from lightning_blue.language_model.loading import load_language_model
from lightning_blue.language_model.next_tokens import Answer, ask, spelled
from lightning_blue.reporting.tables import WIDTH, markdown_table
from lightning_blue.runs.edited import Loaded, chat_of, is_run, models_of
from lightning_blue.support.errors import InputError

UNEDITED, EDITED, MODEL = "unedited", "edited", "model"
DTYPE = "float32"  # of a model, unless another is given
Answers = Mapping[str, list[Answer]]  # by model, in the order of the prompts


def ask_model(args: Namespace) -> int:
    """Print the continuations of prompts and the most probable next tokens.

    Args:
        args: see `lightning_blue.cli.model_commands`.

    Raises:
        InputError: if there is no such run or model, or it cannot read a prompt.
    """
    require_text(args.prompts, "PROMPT")
    require_text(args.system, "--system")
    names, models, (chat, system) = _of_run(args) if is_run(args.source) else _of_model(args)
    if args.system is not None and not chat:
        raise InputError(
            "a system text is given, but no chat template is used",
            where="--system",
            hint="add --chat, or leave out --system",
        )
    answers, prompts, tokenizer = _asked(models, names, args, chat, system)
    laid_out = _as_json if args.json else _as_text
    sys.stdout.write(laid_out(args.prompts, answers, prompts, tokenizer, args.top))
    return 0


def _of_run(args: Namespace) -> tuple[list[str], Iterator[Loaded], tuple[bool, str | None]]:
    """Return which models of a run are asked, and by which chat template: as the run did."""
    if args.dtype is not None:
        raise InputError(
            "a run is asked in the dtype that it was edited in",
            where=f"--dtype {args.dtype}",
            hint="leave it out; `lightning-blue export RUN --as model` makes a model of the run",
        )
    run = Path(args.source)
    known = chat_of(run)
    chat = known[0] if args.chat is None else args.chat
    system = known[1] if args.system is None else args.system
    names = [UNEDITED, EDITED] if args.before else [EDITED]
    return names, models_of(run, args.before, args.model), (chat, system)


def _of_model(args: Namespace) -> tuple[list[str], Iterator[Loaded], tuple[bool, str | None]]:
    """Return a model that is no run's, and whether it is asked by its chat template."""
    for flag, given in (("--before", args.before), ("--model", args.model is not None)):
        if given:
            raise InputError(
                f"{flag} is for a run, which knows what it edited",
                where=args.source,
                hint="give the folder of a run, e.g. runs/quickstart, or leave it out",
            )
    models = iter([load_language_model(args.source, args.dtype or DTYPE)])
    return [MODEL], models, (bool(args.chat), args.system)


def _asked(
    models: Iterator[Loaded],
    names: Sequence[str],
    args: Namespace,
    chat: bool,
    system: str | None,
) -> tuple[Answers, list[str], PreTrainedTokenizerBase]:
    """Ask one model after the other; return what they said, and the prompts as they were read."""
    answers: dict[str, list[Answer]] = {}
    for name, (model, tokenizer) in zip(names, models, strict=True):
        prompts = [wrap(tokenizer, prompt, system) if chat else prompt for prompt in args.prompts]
        answers[name] = ask(model, tokenizer, prompts, args.tokens)
    return answers, prompts, tokenizer


class NextToken(NamedTuple):
    """A token that may come next: its id, its text, and how probable each model finds it."""

    id: int
    text: str
    probabilities: list[float]


def _next_tokens(
    answers: Answers, number: int, prompt: str, tokenizer: PreTrainedTokenizerBase, top: int
) -> list[NextToken]:
    """Return the tokens that are among the most probable of a model.

    The one that any model finds most probable comes first.
    """
    said = [of[number] for of in answers.values()]
    ids = dict.fromkeys(token for answer in said for token in answer.top(top))
    found = [(id, [float(answer.probabilities[id]) for answer in said]) for id in ids]
    found.sort(key=lambda each: -max(each[1]))
    texts = spelled(tokenizer, prompt, [id for id, _ in found])
    return [NextToken(id, text, of) for (id, of), text in zip(found, texts, strict=True)]


def _as_text(
    shown: Sequence[str],
    answers: Answers,
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    top: int,
) -> str:
    parts = []
    for number, prompt in enumerate(prompts):
        lines = textwrap.wrap(shown[number], WIDTH) or [""]
        if shown[number][-1:].isspace():
            lines.append("(ends with white space, which is kept)")
        for name, of in answers.items():
            said = of[number].continuation.strip() or "(nothing)"
            start = f"  {name:<9} "
            lines += textwrap.wrap(
                said, WIDTH, initial_indent=start, subsequent_indent=" " * len(start)
            )
        table = [
            [repr(token.text), *(f"{value:.2%}" for value in token.probabilities)]
            for token in _next_tokens(answers, number, prompt, tokenizer, top)
        ]
        heads = [UNEDITED, EDITED] if UNEDITED in answers else ["probability"]
        parts.append("\n".join([*lines, "", markdown_table(table, ["next token", *heads])]))
    return "\n\n".join(parts) + "\n"


def _as_json(
    shown: Sequence[str],
    answers: Answers,
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    top: int,
) -> str:
    content: list[dict[str, Any]] = []
    for number, prompt in enumerate(prompts):
        tokens = _next_tokens(answers, number, prompt, tokenizer, top)
        content.append(
            {
                "prompt": shown[number],
                "read_as": prompt,
                "continuation": {name: of[number].continuation for name, of in answers.items()},
                "next_tokens": [
                    {"id": each.id, "token": each.text}
                    | dict(zip(answers, each.probabilities, strict=True))
                    for each in tokens
                ],
            }
        )
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
