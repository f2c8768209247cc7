"""Where two texts differ, word by word."""

from __future__ import annotations

from difflib import SequenceMatcher

import regex

# A word; where a script writes no spaces between words, a character; any other sign by itself
_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_PIECE = regex.compile(rf"\s+|(?:(?![{_SPACELESS}])[\p{{L}}\p{{M}}\p{{N}}_])+|\X")


def differences(before: str, after: str) -> tuple[list[str], list[str]]:
    """Return both texts in pieces: what they share and what is their own, by turns.

    Each list begins with a shared piece, which may be empty, and joined is its text.

    >>> differences(" Paris, the city", " Rome, the city")
    ([' ', 'Paris', ', the city'], [' ', 'Rome', ', the city'])
    """
    pieces = [_PIECE.findall(text) for text in (before, after)]
    matcher = SequenceMatcher(None, pieces[0], pieces[1], autojunk=False)
    marked: tuple[list[str], list[str]] = ([], [])
    for kind, *ends in matcher.get_opcodes():
        shared = kind == "equal"
        for words, out, (start, end) in zip(pieces, marked, (ends[:2], ends[2:]), strict=True):
            if start == end:
                continue
            text = "".join(words[start:end])
            if (len(out) % 2 == 0) == shared:  # this piece's turn
                out.append(text)
            elif out:
                out[-1] += text
            else:
                out += ["", text]
    return marked
