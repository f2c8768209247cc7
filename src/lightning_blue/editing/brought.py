"""Statistics that were collected elsewhere, and that the user vouches for.

Two forms are read, neither with pickle: safetensors with the second moment of layer N per token as
``layerN``, ``(d_in, d_in)``; and the ``.npz`` of ROME, MEMIT and AlphaEdit, one file a layer,
which holds the sum over tokens (``mom2.mom2``) and their number (``mom2.count``). Nothing in them
says which model and which text they are from: their form is checked, and the rest is trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from lightning_blue.editing.covariance_file import Collected, CovarianceFile, unpacked
from lightning_blue.language_model.states import is_finite
from lightning_blue.support.digests import file_digest
from lightning_blue.support.errors import InputError

MARK = "brought"  # in an identity: the covariances are such statistics
_EXPECTED = (
    "give a .safetensors file with the second moment of each layer N per token as layerN, "
    "(d_in, d_in), or a .npz of ROME or MEMIT for each layer, with {} for the layer's number"
)


class BroughtStatistics(CovarianceFile):
    """Covariances from a file that does not say what they were computed from.

    Args:
        path: the file; with ``{}`` in place of the layer's number, one for each layer.
        layers: those that are wanted.

    Raises:
        InputError: if there is no such file.
    """

    def __init__(self, path: str, layers: Sequence[int]) -> None:
        self.files = {layer: Path(path.replace("{}", str(layer))) for layer in layers}
        if path.endswith(".npz") and "{}" not in path and len(self.files) > 1:
            raise InputError(
                f"a .npz holds one layer, and {len(self.files)} are written",
                where=path,
                hint="put {} where the layer's number stands in the names of the files",
            )
        missing = [str(file) for file in self.files.values() if not file.is_file()]
        if missing:
            raise InputError("there is no such statistics file", where=missing[0], hint=_EXPECTED)
        digests = [file_digest(file) for file in sorted(set(self.files.values()))]
        super().__init__(Path(path), {MARK: ",".join(digests)})

    def read(self, d_in: Mapping[int, int]) -> dict[int, Tensor]:
        """Return the covariances of layers, ``(d_in, d_in)`` each, float64.

        Args:
            d_in: layer -> key dimensions that its covariance must have.

        Raises:
            InputError: if a layer is missing, or its matrix is no second moment of such keys.
        """
        found = {}
        for layer, size in d_in.items():
            file = self.files[layer]
            try:
                matrix = _npz(file) if file.suffix == ".npz" else _safetensors(file, layer)
                _check(matrix, size)
            except Exception as error:
                raise InputError(
                    f"the statistics of layer {layer} cannot be used: {error}",
                    where=str(file),
                    hint=_EXPECTED,
                ) from error
            found[layer] = (matrix + matrix.T) / 2
        return found

    def holds(self, layers: Sequence[int]) -> bool:
        """Return whether there is a file for each of the layers; `read` looks into them."""
        return set(layers) <= set(self.files)

    def collected(self, layers: Sequence[int]) -> dict[int, Collected]:
        """Return that nothing is known of how the covariances were collected."""
        return {layer: Collected() for layer in layers}


def _safetensors(path: Path, layer: int) -> Tensor:
    with safe_open(path, framework="pt") as file:
        if f"layer{layer}" not in file.keys():  # noqa: SIM118  (no mapping)
            raise ValueError(f"it has no layer{layer}, but {', '.join(sorted(file.keys())[:5])}")
        return unpacked(file.get_tensor(f"layer{layer}"))


def _npz(path: Path) -> Tensor:
    with np.load(path, allow_pickle=False) as file:
        missing = {"mom2.mom2", "mom2.count"} - set(file.files)
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        count = float(file["mom2.count"])
        if not 0 < count < float("inf"):
            raise ValueError(f"it counts {count:g} tokens")
        return torch.from_numpy(file["mom2.mom2"]).double() / count


def _check(matrix: Tensor, size: int) -> None:
    """Refuse what cannot be the second moment of keys of so many dimensions."""
    if tuple(matrix.shape) != (size, size):
        raise ValueError(f"its shape is {tuple(matrix.shape)}; the model needs ({size}, {size})")
    if not is_finite(matrix):
        raise ValueError("it holds NaN or infinity")
    diagonal = matrix.diagonal()
    if bool((diagonal < 0).any()) or not bool(diagonal.any()):
        raise ValueError("its diagonal is negative or zero, which no mean of squares is")
    # rounding of long float32 sums is far below this, and what is no second moment far above
    allowed = 1e-3 * float(diagonal.max())
    if float((matrix - matrix.T).abs().max()) > allowed:
        raise ValueError("it is not symmetric, as a second moment is")
