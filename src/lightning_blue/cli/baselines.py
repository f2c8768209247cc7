"""Commands that are about the closed form refuse the baselines, which solve nothing."""

from __future__ import annotations

from blue_callbacks import ClosedFormUpdate
from lightning_blue.support.errors import InputError


def require_closed_form(update: ClosedFormUpdate, command: str) -> None:
    """Refuse an update that computes nothing in closed form.

    Raises:
        InputError: naming the solver.
    """
    if not update.solver.closed_form:
        raise InputError(
            f"{command} is about methods that solve for keys and residuals, and "
            f"{update.solver.kind} does not",
            where=f"update.solver = {update.solver.kind}",
            hint="leave the baseline's run file out; fit and sweep take it",
        )
