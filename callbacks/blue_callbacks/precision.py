"""Where float64 work is done: on a tensor's own device, or on the CPU where that has no float64."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def has_float64(device_type: str) -> bool:
    """Say whether devices of a type (``cpu``, ``cuda``, ``mps``) compute in float64; tried once."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device_type).add_(1)
    except (TypeError, RuntimeError, NotImplementedError):  # Apple's MPS raises the first
        return False
    return True


def float64_device(device: torch.device) -> torch.device:
    """Return where float64 work on tensors of a device is done.

    >>> float64_device(torch.device("cpu"))
    device(type='cpu')
    """
    return device if has_float64(device.type) else torch.device("cpu")


def in_float64(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """Return a tensor in float64, on a device or on the nearest one to its own that has float64.

    It is moved first and converted then: a device without float64 cannot convert it.

    Args:
        tensor: of any shape and dtype.
        device: where to, one that has float64; None: see `float64_device`.
    """
    return tensor.to(device or float64_device(tensor.device)).double()
