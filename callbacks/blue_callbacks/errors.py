"""What can go wrong for a user: input that cannot be used, and numbers that are not finite."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's message, or its kind where it has none.

    >>> first_line(ValueError("one\ntwo")), first_line(AssertionError())
    ('one', 'AssertionError')
    """
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class InputError(ValueError):
    """Input that cannot be used: what is wrong, where, and how to fix it.

    Raised before any weight is touched. The command line prints it without a traceback.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if hint:
            lines.append(f"  hint:  {hint}")
        text = "\n".join(lines)
        super().__init__(text.encode("utf-8", "backslashreplace").decode())  # any file takes it


class NonFiniteError(RuntimeError):
    """An update would have put NaN or infinity into the weights; they were left as before."""


class UnsolvableError(RuntimeError):
    """The system of an update has no solution in float64; the weights were left as before."""


class EditRejected(RuntimeError):
    """Raised in ``on_edit_written`` by a callback that refuses a batch; the weights go back.

    Args:
        reason: which number crossed which line.
        stop: whether the run ends with the batches before it, or goes on with the next one.
    """

    def __init__(self, reason: str, *, stop: bool) -> None:
        super().__init__(reason)
        self.stop = stop
