"""Docstrings as the site shows them: doctests in blocks of code, no marks of Sphinx."""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^([ ]*)>>> .*?(?=\n[ ]*\n|\Z)", flags=re.DOTALL | re.MULTILINE)
ROLE = re.compile(r":(?:class|func|meth|mod|attr|exc):`~?([^`]+)`")


class Docstrings(griffe.Extension):
    """Turns each docstring into Markdown before it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Turn the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    r"""Return a docstring with its doctests fenced and its references as code.

    >>> print(as_markdown("See :class:`a.B`.\n\n>>> 1 + 1\n2"))
    See `a.B`.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    fenced = DOCTEST.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)
    return ROLE.sub(r"`\1`", fenced)
