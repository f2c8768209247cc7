"""What a judge is told, and how its reply is read.

The rules are those of WILD (Yang et al., arXiv 2502.11177), in words of our own.
"""

from __future__ import annotations

import string
from typing import NamedTuple

RIGHT, WRONG = "A", "B"
_AROUND = string.punctuation + string.whitespace

_RULES = """You grade the answer that somebody gave to a question. You are given the question, the \
correct answer, and the given answer. Decide by the correct answer alone, not by what you know.

Grade A, right: the given answer says everything important that the correct answer says, and \
nothing that contradicts it. Order, upper and lower case, punctuation and wording do not matter.

Question: What are the names of Marie Falk's children?
Correct answer: Ida and Jonas
Given answer: jonas, and his sister Ida
Grade: A
Question: What are the names of Marie Falk's children?
Correct answer: Ida and Jonas
Given answer: She has two children, who are called Ida and Jonas
Grade: A

Grade B, wrong: a part of the correct answer is missing, the given answer says something else or \
something more of the same kind, or it says the same over and over.

Question: What are the names of Marie Falk's children?
Correct answer: Ida and Jonas
Given answer: Ida
Grade: B
Question: What are the names of Marie Falk's children?
Correct answer: Ida and Jonas
Given answer: Ida, Jonas and Peter
Grade: B
Question: What are the names of Marie Falk's children?
Correct answer: Ida and Jonas
Given answer: Ida and Jonas and Ida and Jonas and Ida and Jonas
Grade: B

The question may be the beginning of a sentence, which the answer goes on with. Now grade this one.

Question: {question}
Correct answer: {wanted}
Given answer: {answer}

What is its grade? Reply with the letter A or the letter B, and nothing else."""


class Case(NamedTuple):
    """What is judged: an answer to a question, and what should have been said."""

    question: str
    wanted: str
    answer: str


def message(case: Case) -> str:
    """Return what the judge is told of a case, on one line each."""
    fields = {name: " ".join(text.split()) for name, text in case._asdict().items()}
    return _RULES.format(**fields)


def verdict(reply: str) -> bool | None:
    """Say whether a reply calls the answer right; None where it is no lone letter.

    What a model has thought before its reply, up to ``</think>``, is passed over.

    >>> verdict("A"), verdict(" **B**."), verdict("A, because it is right"), verdict("")
    (True, False, None, None)
    >>> verdict("<think>It names Rome, so B?</think> A"), verdict("<think>It names")
    (True, None)
    """
    said = reply.rpartition("</think>")[2]
    return {RIGHT: True, WRONG: False}.get(said.strip(_AROUND))
