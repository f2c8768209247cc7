"""What a model can do besides the facts that are edited, by lm-evaluation-harness."""

from lightning_blue.ability.harness import GeneralAbility
from lightning_blue.ability.settings import AbilitySettings

__all__ = ["AbilitySettings", "GeneralAbility"]
