"""The one exception that a user's input may cause."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used: what is wrong, where, and how to fix it.

    The command line prints it without a traceback and exits with code 2. Library code raises it
    before any weight is touched.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if hint:
            lines.append(f"  hint:  {hint}")
        super().__init__("\n".join(lines))
