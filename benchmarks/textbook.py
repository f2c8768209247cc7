"""The whole job as the papers write it: one edit at a time, full forward passes, dense solves.

The reference that the fast paths are measured against, and checked against in float64. It uses
nothing of the package but the type of a request. Where published
code is slower still (it runs the head twice in every step), the faster reading is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from benchmarks.timing import now
from lightning_blue.data.requests import EditRequest


class StopForward(Exception):
    """Ends a forward pass early."""


class Settings(NamedTuple):
    """Hyper-parameters of an edit; the names are those of the package."""

    steps: int = 20
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 0.75
    kl_weight: float = 0.0625
    stop_loss: float = 0.05
    covariance_weight: float = 15000.0
    contexts: tuple[str, ...] = ()


class Prompt(NamedTuple):
    """Token ids, index of the subject's last token, and index of the first label's prediction."""

    ids: list[int]
    lookup: int
    first: int


# Where things are in the model


def block(model: PreTrainedModel, layer: int) -> nn.Module:
    """Return a decoder block."""
    container = "transformer.h" if hasattr(model, "transformer") else "model.layers"
    return model.get_submodule(f"{container}.{layer}")


def down_projection(model: PreTrainedModel, layer: int) -> nn.Module:
    """Return the last linear map of a block's FFN."""
    mlp = block(model, layer).get_submodule("mlp")
    return mlp.get_submodule("c_proj" if hasattr(mlp, "c_proj") else "down_proj")


def weight_of(model: PreTrainedModel, layer: int) -> Tensor:
    """Return the edited weight as a ``(d_model, d_in)`` view."""
    projection = down_projection(model, layer)
    weight: Tensor = projection.weight.data  # type: ignore[assignment]
    return weight.T if isinstance(projection, Conv1D) else weight


# Tokens


def tokenise(
    tokenizer: PreTrainedTokenizerBase, request: EditRequest, context: str, target: list[int]
) -> Prompt:
    """Encode context, prompt and subject, followed by the target but its last token."""
    before, after = request.prompt.split("{}")
    start = f"{context} {before}" if context else before
    up_to_subject = tokenizer(start + request.subject)["input_ids"]
    ids = tokenizer(start + request.subject + after)["input_ids"]
    return Prompt(ids + target[:-1], len(up_to_subject) - 1, len(ids) - 1)


def target_tokens(tokenizer: PreTrainedTokenizerBase, target: str) -> list[int]:
    """Encode an object as it continues a prompt."""
    ids: list[int] = tokenizer(f" {target}", add_special_tokens=False)["input_ids"]
    return ids


def pad(rows: Sequence[list[int]], device: torch.device) -> dict[str, Tensor]:
    """Pad token ids on the right; return them with their mask, ``(n_rows, n_tokens)``."""
    width = max(map(len, rows))
    ids = [row + [0] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


# One edit


def optimise_target(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: EditRequest,
    layer: int,
    settings: Settings,
) -> tuple[Tensor, list[float]]:
    """Find the hidden state at the subject that makes the model say the new object.

    Returns:
        The target h + delta, ``(d_model,)``, and the loss of every step.
    """
    target = target_tokens(tokenizer, request.target_new)
    contexts = ("", *settings.contexts)
    prompts = [tokenise(tokenizer, request, context, target) for context in contexts]
    about = EditRequest("", "{} is a", request.subject, "")
    prompts.append(tokenise(tokenizer, about, "", []))
    inputs = pad([prompt.ids for prompt in prompts], model.device)
    rows = torch.arange(len(prompts), device=model.device)
    lookups = torch.tensor([prompt.lookup for prompt in prompts], device=model.device)
    labels = torch.tensor(target, device=model.device)

    delta: Tensor | None = None
    initial = before = torch.empty(0)

    def add_delta(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor]) -> object:
        nonlocal delta, initial
        hidden = output[0] if isinstance(output, tuple) else output
        if delta is None:
            initial = at_least_float32(hidden[0, lookups[0]].detach())
            delta = torch.zeros_like(initial, requires_grad=True)
        changed = hidden.clone()
        changed[rows, lookups] = (at_least_float32(hidden[rows, lookups]) + delta).to(hidden.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    losses: list[float] = []
    optimizer: torch.optim.Adam | None = None
    with hooked(block(model, layer), add_delta), torch.enable_grad():
        for step in range(settings.steps):
            logits = at_least_float32(model(**inputs, use_cache=False).logits)
            log_probs = F.log_softmax(logits, dim=-1)
            assert delta is not None
            about_subject = log_probs[-1, lookups[-1]]
            before = about_subject.detach() if step == 0 else before
            nll = torch.stack(
                [
                    -log_probs[row, prompt.first : prompt.first + len(target)]
                    .gather(1, labels[:, None])
                    .mean()
                    for row, prompt in enumerate(prompts[:-1])
                ]
            ).mean()
            kl = F.kl_div(before, about_subject, log_target=True, reduction="sum")
            decay = delta.norm() / initial.norm() ** 2
            loss = nll + settings.kl_weight * kl + settings.weight_decay * decay
            losses.append(loss.item())
            if loss < settings.stop_loss or step == settings.steps - 1:
                break
            optimizer = optimizer or torch.optim.Adam([delta], lr=settings.learning_rate)
            (delta.grad,) = torch.autograd.grad(loss, [delta])
            optimizer.step()
            with torch.no_grad():
                limit = settings.clamp * initial.norm()
                if delta.norm() > limit:
                    delta *= limit / delta.norm()
    assert delta is not None
    return initial + delta.detach(), losses


@torch.no_grad()
def read_key(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: EditRequest,
    layer: int,
    settings: Settings,
) -> Tensor:
    """Average the down projection's input at the subject, ``(d_in,)``.

    The bare prompt weighs one half, the prompts with a context together the other half.
    """
    contexts = ("", *settings.contexts)
    prompts = [tokenise(tokenizer, request, context, []) for context in contexts]
    keys: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor], _output: object) -> None:
        keys.extend(inputs[0][row, p.lookup] for row, p in enumerate(prompts))

    with hooked(down_projection(model, layer), keep):
        model(**pad([prompt.ids for prompt in prompts], model.device), use_cache=False)
    bare, prefixed = at_least_float32(keys[0]), [at_least_float32(key) for key in keys[1:]]
    return (bare + torch.stack(prefixed).mean(0)) / 2 if prefixed else bare


@torch.no_grad()
def read_output(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: EditRequest, layer: int
) -> Tensor:
    """Return the block's output at the subject of the bare prompt, ``(d_model,)``."""
    prompt = tokenise(tokenizer, request, "", [])
    states: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor]) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        states.append(at_least_float32(hidden[0, prompt.lookup]))

    with hooked(block(model, layer), keep):
        model(**pad([prompt.ids], model.device), use_cache=False)
    return states[0]


# One batch


def solve(
    covariance: Tensor, weight: float, past: Tensor, keys: Tensor, residual: Tensor
) -> Tensor:
    """Eq. 8, dense in float64: ``R K1^T (lambda C + Kp Kp^T + K1 K1^T)^-1``, ``(d_out, d_in)``.

    Args:
        covariance: C = K0 K0^T per token, ``(d_in, d_in)``.
        weight: lambda.
        past: Kp Kp^T, ``(d_in, d_in)`` float64.
        keys: K1, ``(d_in, n)``.
        residual: R, ``(d_out, n)``.
    """
    keys = keys.double()
    system = torch.addmm(past, keys, keys.T).add_(covariance, alpha=weight)
    return residual.double() @ torch.linalg.solve(system, keys).T


def edit_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[EditRequest],
    layers: Sequence[int],
    covariances: Mapping[int, Tensor],
    past: dict[int, Tensor],
    settings: Settings,
    solving: list[float] | None = None,
) -> dict[int, Tensor]:
    """Apply one batch to the boundary layers (BLUE); add its keys to ``past``, in place.

    Args:
        model: the model; its weights change.
        tokenizer: its tokenizer.
        batch: n requests.
        layers: the boundary layers.
        covariances: layer -> K0 K0^T per token, ``(d_in, d_in)``.
        past: layer -> Kp Kp^T of earlier batches, ``(d_in, d_in)`` float64.
        settings: hyper-parameters.
        solving: its first number grows by the seconds that went into the dense algebra.

    Returns:
        layer -> the targets, ``(d_model, n)``.
    """
    targets: dict[int, Tensor] = {}
    for layer in layers:
        found = [optimise_target(model, tokenizer, r, layer, settings)[0] for r in batch]
        targets[layer] = torch.stack(found, dim=1)
        keys = batch_keys(model, tokenizer, batch, layer, settings)
        now = torch.stack([read_output(model, tokenizer, r, layer) for r in batch], dim=1)
        residual = targets[layer] - now
        weight = weight_of(model, layer)
        with added_seconds(solving):
            weight_c = settings.covariance_weight
            delta = solve(covariances[layer], weight_c, past[layer], keys, residual)
            weight.copy_(weight.double() + delta)
    for layer in layers:
        keys = batch_keys(model, tokenizer, batch, layer, settings).double()
        with added_seconds(solving):
            past[layer].addmm_(keys, keys.T)
    return targets


def batch_keys(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[EditRequest],
    layer: int,
    settings: Settings,
) -> Tensor:
    """Return the keys of a batch, one edit after the other, ``(d_in, n)``."""
    found = [read_key(model, tokenizer, request, layer, settings) for request in batch]
    return torch.stack(found, dim=1)


# Covariance


@torch.no_grad()
def collect_covariance(
    model: PreTrainedModel,
    layer: int,
    sequences: Sequence[Sequence[int]],
    stop: bool = False,
) -> Tensor:
    """Average k k^T over the tokens of texts, one text and one pass at a time, ``(d_in, d_in)``.

    Products and sums are float32 (float64 for a float64 model). With ``stop`` a pass ends at the
    layer.
    """
    moment = torch.empty(0)

    def add(_module: nn.Module, inputs: tuple[Tensor], _output: object) -> None:
        nonlocal moment
        keys = at_least_float32(inputs[0].flatten(0, -2))
        moment = keys.T @ keys if not moment.numel() else moment.addmm_(keys.T, keys)
        if stop:
            raise StopForward

    with hooked(down_projection(model, layer), add):
        for sequence in sequences:
            with suppress(StopForward):
                model(torch.tensor([sequence], device=model.device), use_cache=False)
    return moment / sum(map(len, sequences))


def at_least_float32(values: Tensor) -> Tensor:
    """Widen half precisions, leave float32 and float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@contextmanager
def added_seconds(total: list[float] | None) -> Iterator[None]:
    """Add the seconds of what runs inside to ``total[0]``; CUDA work is waited for."""
    began = now()
    yield
    if total is not None:
        total[0] += now() - began


@contextmanager
def hooked(module: nn.Module, hook: object) -> Iterator[None]:
    """Hold a forward hook while the block runs."""
    handle = module.register_forward_hook(hook)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
