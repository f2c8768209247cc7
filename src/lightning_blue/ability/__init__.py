"""What a model can do besides the facts that are edited, by lm-evaluation-harness."""

from .harness import GeneralAbility
from .settings import AbilitySettings

__all__ = ["AbilitySettings", "GeneralAbility"]
