"""What stands between a prompt and its object, and why.

The rule, in order; the prompt alone decides, so that two objects after it are joined alike:

1. A ``target_prefix`` that the request or the run gives.
2. Nothing, or the white space that the model's chat template writes there, behind such a template.
3. Nothing behind a control token, behind white space, and behind an opening bracket, an opening
   quotation mark, or a sign that belongs to what follows it (``$``, ``#``, or a hyphen, dash or
   slash at the end of a word).
4. Nothing in scripts that write no spaces between words (Han, kana, Thai, Khmer and so on). Where
   the prompt ends with a character of no script, a digit or a colon, the words of the whole prompt
   are counted.
5. A space.
"""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

import regex

from lightning_blue.language_model.chat import NO_MARKERS, Markers

SPACE = " "
_CLASS = (  # of letters
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Tangut}\p{Nushu}\p{Thai}\p{Lao}\p{Khmer}"
    r"\p{Myanmar}\p{Tibetan}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}\p{Balinese}\p{Javanese}"
)
# What kana have in common, and are in Unicode of no script: marks of voiced sounds (combining in
# the decomposed form), the double hyphen, the dot and the mark of long vowels, each in both widths.
_KANA = r"\u3099-\u309c\u30a0\u30fb\u30fc\uff70\uff9e\uff9f"
# Their own punctuation: ideographic (U+3000 to U+303F) and full-width forms.
_CHARACTER = regex.compile(rf"[{_CLASS}{_KANA}\u3000-\u303f\uff01-\uff65]")
_LETTER = regex.compile(rf"[{_CLASS}]")
_WORD = regex.compile(rf"(?:(?![{_CLASS}{_KANA}])\p{{L}}\p{{M}}*)+")
_MARKS = regex.compile(r"\p{M}+\Z")
_VARIANT = regex.compile(r"\p{Variation_Selector}+\Z")  # of a sign, which it does not change
_ATTACHED = regex.compile(
    r"(?:(?<!\p{N}\s?)\p{Sc}|(?<!\S)[#@]|(?<=[\p{L}\p{N}])[\-\u2010\u2011\u2013\u2014/])\Z"
)


class Joint(NamedTuple):
    """What stands between a prompt and its object, and which part of the rule says so."""

    prefix: str
    reason: str


def joint(prompt: str, given: str | None = None, markers: Markers = NO_MARKERS) -> Joint:
    """Decide what stands between a prompt and its object.

    Args:
        prompt: the whole text before the object.
        given: the ``target_prefix`` of the request or of the run, which wins; None: none is given.
        markers: of the model's chat template and control tokens.

    >>> joint("The capital of France is")
    Joint(prefix=' ', reason='words')
    >>> joint("法国的首都是")
    Joint(prefix='', reason='script without spaces')
    >>> joint('She said: "')
    Joint(prefix='', reason='opening quotation mark')
    """
    if given is not None:
        return Joint(given, "target_prefix")
    if markers.tail and markers.carried_by(prompt) and prompt.endswith(markers.tail):
        return Joint(markers.gap, "chat template")
    if any(prompt.endswith(control) for control in markers.controls):
        return Joint("", "control token")
    if not prompt or prompt[-1].isspace():
        return Joint("", "white space") if prompt else Joint(SPACE, "words")
    prompt = _VARIANT.sub("", prompt) or prompt
    kind = unicodedata.category(prompt[-1])
    if _opens_quotation(prompt):
        return Joint("", "opening quotation mark")
    if kind == "Ps":
        return Joint("", "opening bracket")
    if _ATTACHED.search(prompt):
        return Joint("", "sign that belongs to the object")
    if _without_spaces(prompt):
        return Joint("", "script without spaces")
    return Joint(SPACE, "words")


def writes_no_spaces(character: str) -> bool:
    """Whether a character belongs to a script that writes no spaces between words.

    >>> writes_no_spaces("黎"), writes_no_spaces("s")
    (True, False)
    """
    return bool(_CHARACTER.match(character))


def _opens_quotation(prompt: str) -> bool:
    """Whether a prompt ends with a quotation mark that opens.

    A straight one opens if it is the odd one and does not end a word or a measure (``5"``).
    """
    last, before = prompt[-1], prompt[-2:-1]
    if last in "„‚«‹「『〈《“‘" or unicodedata.category(last) == "Pi":
        return last not in "“‘" or not _closes_german(prompt)
    apart = not before or before.isspace() or unicodedata.category(before) in ("Ps", "Pi", "Po")
    if last == '"':
        return prompt.count('"') % 2 == 1 and (apart or bool(_CHARACTER.match(before)))
    return last == "'" and apart and prompt.count("'") % 2 == 1


def _closes_german(prompt: str) -> bool:
    """Whether the last mark closes what a low one has opened: „so“."""
    low = {"“": "„", "‘": "‚"}[prompt[-1]]
    return prompt[:-1].rfind(low) > prompt[:-1].rfind(prompt[-1])


def _without_spaces(prompt: str) -> bool:
    """Whether a prompt ends in a script that writes no spaces between words."""
    last = _MARKS.sub("", prompt)[-1:]
    if not last or _CHARACTER.match(last):
        return bool(last)
    if unicodedata.category(last)[0] == "L":
        return False
    return len(_LETTER.findall(prompt)) > len(_WORD.findall(prompt))
