"""A model that is frozen while it is edited, and is then left as it was found."""

from __future__ import annotations

from typing import Any

from lightning import Callback
from torch import nn


class FrozenModel(Callback):
    """Freeze a model and put it into eval mode; thaw it when a run ends or fails.

    Frozen from the start, so that nothing that is asked of it before a run sees dropout, and again
    for each further run.

    Args:
        model: to be frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._required: dict[str, bool] = {}
        self._training: dict[str, bool] = {}
        self._frozen = False
        self.freeze()

    def freeze(self) -> None:
        """Freeze the model, unless it is frozen by this already."""
        if self._frozen:
            return
        self._required = {name: p.requires_grad for name, p in self._model.named_parameters()}
        self._training = {name: module.training for name, module in self._model.named_modules()}
        self._model.requires_grad_(False).eval()
        self._frozen = True

    def thaw(self) -> None:
        """Give back to each parameter and module what it had before it was frozen."""
        if not self._frozen:
            return
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self._required[name])
        for name, module in self._model.named_modules():
            module.training = self._training[name]
        self._frozen = False

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Freeze the model for another run."""
        self.freeze()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Thaw the model at the end of a run."""
        self.thaw()

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Thaw the model of a run that failed."""
        self.thaw()
