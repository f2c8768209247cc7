"""What a string may hold that is no text, and values as messages show them."""

from __future__ import annotations

import reprlib

BYTES = range(0xDC80, 0xDD00)  # what Python reads in the place of bytes that are not UTF-8


class _Short(reprlib.Repr):
    """Representations of at most about 120 characters, and of a few levels."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 120

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to spell a number of some thousand digits."""
        try:
            return super().repr_int(x, level)
        except ValueError:
            return "a number of thousands of digits"


shown = _Short().repr
"""``repr``, short: the middle of a long value is left out, and nesting has an end."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, which is in the plural unless there is one.

    >>> counted(1, "fact"), counted(1_000, "fact"), counted(2, "batch", "batches")
    ('1 fact', '1,000 facts', '2 batches')
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def no_text(value: str) -> str | None:
    r"""Say what a string holds that can be neither written nor tokenised; None if it is text.

    >>> no_text("caf\u00e9"), no_text("a\0b")
    (None, 'holds a NUL character')
    >>> no_text("\ud83d")
    'holds U+D83D, half of a character (a surrogate without the other)'
    >>> no_text(b"caf\xe9".decode(errors="surrogateescape"))
    'holds the byte 0xe9, which is not UTF-8'
    """
    if "\0" in value:
        return "holds a NUL character"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        if code in BYTES:
            return f"holds the byte 0x{code - 0xDC00:02x}, which is not UTF-8"
        return f"holds U+{code:04X}, half of a character (a surrogate without the other)"
    return None
