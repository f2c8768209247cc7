"""The plain version: whole prompts through the whole model, one pass a prompt, nothing skipped.

What the fast passes are compared with, and what runs where a model cannot be run in parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_blue.editing.optimization import Predictions
from lightning_blue.editing.prompts import EditPrompts
from lightning_blue.language_model.states import adding, bypassed, hidden_of, precise
from lightning_blue.language_model.tokens import Encoded


class PlainPredictor:
    """Predicts the targets in all rewriting prompts, and what follows the subjects.

    Args:
        model: a causal language model in eval mode.
        blocks: its decoder blocks.
        sites: modules whose outputs a delta is added to.
        prompts: of the n edits.
        loss_layer: the block whose output is read for the target; None: the last.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[nn.Module],
        sites: Sequence[nn.Module],
        prompts: Sequence[EditPrompts],
        loss_layer: int | None = None,
    ) -> None:
        self.model, self.blocks, self.sites = model, blocks, sites
        self.prompts, self.loss_layer = prompts, loss_layer
        outputs = [self._outputs(prompt.rewriting[0]) for prompt in prompts]
        self.initial = torch.stack(outputs, dim=1)  # (n_sites, n, d_model)

    def __call__(self, edits: Tensor, delta: Tensor) -> Predictions:
        """Predict with ``delta``, ``(n_sites, m, d_model)``, at the lookups of m edits."""
        nll, most_probable, subject = [], [], []
        for place, index in enumerate(edits.tolist()):
            prompt = self.prompts[index]
            logits = [self.target_logits(row, prompt, delta[:, place]) for row in prompt.rewriting]
            labels = torch.tensor(prompt.target, device=self.model.device)
            nll.append(torch.stack([F.cross_entropy(x, labels) for x in logits]).mean())
            most_probable.append(all(torch.equal(x.argmax(-1), labels) for x in logits))
            subject.append(self.subject_logits(prompt, delta[:, place]).log_softmax(-1))
        flags = torch.tensor(most_probable, device=self.model.device)
        return Predictions(torch.stack(nll), flags, torch.stack(subject))

    def target_logits(self, row: Encoded, prompt: EditPrompts, delta: Tensor) -> Tensor:
        """Return logits where the target's tokens are predicted, ``(n_target, vocabulary)``.

        Args:
            row: one of the edit's rewriting prompts.
            prompt: the edit's.
            delta: ``(n_sites, d_model)``.
        """
        return self._logits(row, delta, self.loss_layer)[-len(prompt.target) :]

    def subject_logits(self, prompt: EditPrompts, delta: Tensor) -> Tensor:
        """Return logits behind the subject, ``(vocabulary,)``; ``delta`` is ``(n_sites, d)``."""
        return self._logits(prompt.subject, delta, None)[-1]

    def _logits(self, row: Encoded, delta: Tensor, last: int | None) -> Tensor:
        """Return logits of all tokens, in float32 or better, with delta added at the lookup."""
        with ExitStack() as stack:
            for site, change in zip(self.sites, delta, strict=True):
                stack.enter_context(adding(site, change[None], row.lookup))
            stack.enter_context(bypassed([] if last is None else self.blocks[last + 1 :]))
            ids = torch.tensor([row.ids], device=self.model.device)
            return precise(self.model(input_ids=ids, use_cache=False).logits[0])

    @torch.no_grad()
    def _outputs(self, row: Encoded) -> Tensor:
        """Return the sites' outputs at the lookup, ``(n_sites, d_model)``."""
        outputs: list[Tensor] = []
        hooks = [
            site.register_forward_hook(
                lambda _m, _a, out: outputs.append(
                    hidden_of(out).reshape(len(row.ids), -1)[row.lookup]
                )
            )
            for site in self.sites
        ]
        try:
            self.model(input_ids=torch.tensor([row.ids], device=self.model.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return precise(torch.stack(outputs))
