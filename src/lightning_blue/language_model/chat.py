"""Chat templates: put around plain questions, and recognised where a prompt carries one already."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from lightning_blue.support.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER = "QUESTION", "ANSWER"
SLOT = "{}"
TODAY = datetime(2024, 7, 26)  # of every prompt; what Llama 3.1's template says without a clock
_DIRECTIVE = re.compile(r"(?<!\{)%-?[A-Za-z]")  # of strftime


class Markers(NamedTuple):
    """By what a prompt of a chat model is known.

    Attributes:
        controls: the tokenizer's special tokens, as they are written in a text.
        head: what the chat template writes before a lone question; empty without a template.
        tail: what it writes behind the question, up to where the answer begins.
        gap: white space that it writes between that and the answer.
    """

    controls: tuple[str, ...] = ()
    head: str = ""
    tail: str = ""
    gap: str = ""

    def carried_by(self, text: str) -> bool:
        """Whether a text brings its special tokens along: a control token, or the template.

        The tokenizer must then not put a BOS before it.
        """
        return text.startswith(self.controls) or bool(
            self.head.strip() and text.startswith(self.head)
        )

    def opening(self, text: str) -> int:
        """Return where in a text the user's own words begin; 0 in a text without a template.

        The beginning of a user's turn is looked for, the longest part of ``head`` that is there;
        without a template, the end of the last control token before the first ``{}``.
        """
        if not self.carried_by(text):
            return 0
        before = text.partition(SLOT)[0]
        turns = [i for i in range(len(self.head)) if self.head.startswith(self.controls, i)]
        for start in [0, *turns] if self.head.strip() else []:
            place = before.rfind(self.head[start:])
            if place >= 0:
                return place + len(self.head) - start
        ends = (before.rfind(control) + len(control) for control in self.controls if control)
        return max((end for end in ends if end > 0), default=0)

    def parts(self, text: str) -> tuple[str, str, str]:
        """Cut a text into what stands before the user's own words, these, and what follows them."""
        start = self.opening(text)
        tail = self.tail if start and self.tail and text[start:].endswith(self.tail) else ""
        return text[:start], text[start : len(text) - len(tail)], tail


NO_MARKERS = Markers()


def markers(tokenizer: PreTrainedTokenizerBase) -> Markers:
    """Find out by what the prompts of a tokenizer's model are known."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts = [token.content for token in added if token.special]
    controls = tuple(dict.fromkeys(filter(None, [*texts, *tokenizer.all_special_tokens])))
    if not getattr(tokenizer, "chat_template", None):
        return Markers(controls)
    try:
        asked = _render(tokenizer, _QUESTION, None)
        answered = _render(tokenizer, _QUESTION, None, _ANSWER)
    except Exception:  # a template may raise anything; wrapping a question says what
        return Markers(controls)
    head, found, tail = asked.partition(_QUESTION)
    if not found:
        return Markers(controls)
    gap = answered[len(asked) :].partition(_ANSWER)[0] if answered.startswith(asked) else ""
    return Markers(controls, head, tail, gap if gap.isspace() else "")


def wrap(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    system: str | None = None,
    known: Markers | None = None,
) -> str:
    """Put the tokenizer's chat template around a question; leave a prompt that has one as it is.

    Args:
        tokenizer: with a chat template.
        question: what the user asks; may hold a ``{}`` for a subject.
        system: the system text; None leaves it to the template.
        known: the tokenizer's :func:`markers`, if they are at hand.

    Raises:
        InputError: if there is no template, or it refuses the messages, loses the question, or
            writes nothing by which its prompts can be told from plain ones; for a ``{}`` in the
            system text of a question that has one.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the tokenizer has no chat template",
            where="data.chat",
            hint="leave out --data.chat, or take a chat model (chat_template.jinja in its folder)",
        )
    known = known or markers(tokenizer)
    if known.carried_by(question):
        return question
    if SLOT in question:
        require_no_slot(system)
    try:
        text = _render(tokenizer, question, system)
    except Exception as error:
        raise InputError(
            f"the chat template refuses the prompt: {first_line(error)}",
            where=f"data.chat, prompt {question!r}",
            hint="leave out --data.system if the template knows none, or write the prompts with "
            "their template and leave out --data.chat",
        ) from error
    slots = question.count(SLOT)
    if question.strip() not in text or (slots and text.count(SLOT) != slots):
        raise InputError(
            f"the chat template does not keep the question as it is: {text!r}",
            where=f"data.chat, prompt {question!r}",
            hint="write the prompts with their template and leave out --data.chat",
        )
    if not known.carried_by(text):
        raise InputError(
            "the chat template begins with nothing that tells its prompts from plain ones",
            where=f"data.chat, prompt {question!r}",
            hint="leave out --data.system, or write into the prompts what the template adds and "
            "leave out --data.chat",
        )
    return text


def require_no_slot(system: str | None) -> None:
    """Refuse a system text with the mark of a subject's place, which a prompt has once.

    Raises:
        InputError: if it holds ``{}``.
    """
    if system is not None and SLOT in system:
        raise InputError(
            "the system text holds {}, which in a prompt is the subject's place",
            where="--data.system",
            hint="put something between the braces, if only a space: { }",
        )


def _render(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    system: str | None,
    answer: str | None = None,
) -> str:
    """Write a conversation with the template; without an answer, up to where it begins."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": question})
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    text = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=answer is None,
        chat_template=_on_one_day(tokenizer.get_chat_template()),
    )
    return str(text)


def _on_one_day(template: str) -> str:
    """Return a template that writes the same date every day, where it writes one.

    A run that is resumed, or compared with another, has to have the same prompts. The clock is a
    function of the template's environment, and functions cannot be handed to a template.
    """
    if "strftime_now" not in template:
        return template
    directives = dict.fromkeys(_DIRECTIVE.findall(template))
    written = "".join(
        f" | replace({json.dumps(each)}, {json.dumps(TODAY.strftime(each))})" for each in directives
    )
    clock = f"{{% macro strftime_now(form) %}}{{{{ form{written} }}}}{{% endmacro %}}\n"
    return clock + template  # behind a block, one end of line is no part of the text
