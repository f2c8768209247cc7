"""Whether answers are right, as a language model behind an endpoint judges it."""

from lightning_blue.judge.endpoint import Judge
from lightning_blue.judge.rules import Case
from lightning_blue.judge.settings import JudgeSettings

__all__ = ["Case", "Judge", "JudgeSettings"]
