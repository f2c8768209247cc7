"""A device without float64, as Apple's MPS is, played by the CPU: for machines that have none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")  # the only one, beside the CPU, that every build of torch knows
NO_FLOAT64 = "the device has no float64"
_MOVES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class OnDevice(Tensor):
    """A tensor that says it is on the device, and whose values are on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnDevice:
        self = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=DEVICE
        )
        self.values = values
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class FakeDevice(TorchDispatchMode):
    """Within it, what is made on the device stands on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU; refuse float64 on the device, and tensors on two devices, as torch does.

    A tensor is converted where it is and then moved, so that both at once may fail.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [isinstance(tensor, OnDevice) for tensor in tensors]
    moves = func in _MOVES
    if (
        any(here)
        and not moves
        and not all(h or t.ndim == 0 for h, t in zip(here, tensors, strict=True))
    ):
        raise RuntimeError(f"{func}: tensors on two devices")
    there = isinstance(args[0], OnDevice) if moves else any(here)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs.pop("device")).type == DEVICE.type
    dtypes = {kwargs.get("dtype"), *(tensor.dtype for tensor in tensors)}
    if moves and any((there, *here)) and torch.float64 in dtypes:
        raise TypeError(NO_FLOAT64)
    plain = tree_map(
        lambda leaf: leaf.values if isinstance(leaf, OnDevice) else leaf, (args, kwargs)
    )
    result = func(*plain[0], **plain[1])
    if func.__name__.split(".")[0].endswith("_"):  # in place
        return args[0]

    def placed(value: Any) -> Any:
        if not (isinstance(value, Tensor) and there):
            return value
        if value.dtype == torch.float64:
            raise TypeError(NO_FLOAT64)
        return OnDevice(value)

    return tree_map(placed, result)
