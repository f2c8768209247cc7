"""A plain parser whose errors are one message, for commands that read no run file."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import NoReturn


class UsageError(Exception):
    """Arguments that the parser refuses."""


class Parser(ArgumentParser):
    """A parser whose errors are one message, like all others of the command line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise UsageError(f"{message}\n  hint:  {self.prog} --help")
