"""A copy of a model with the weights of an adapter in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.linalg import vector_norm

from dora_mm.formats.algebra import exact
from dora_mm.formats.algebra.row_blocks import in_rows
from dora_mm.formats.commands.export_check import ToolErrors
from dora_mm.formats.files.base_weights import BaseWeights, write_merged
from dora_mm.formats.files.checks import is_finite
from dora_mm.formats.naming.names import Name
from dora_mm.formats.reader import LayerReader
from dora_mm.formats.state import LayerState


def write_with_adapter(layers: LayerReader, target: Path, strength: float) -> ToolErrors:
    """Writes the model at a strength of the adapter; returns what rounding to its dtype has changed.

    Raises:
        ValueError: The base is no model in files, a new weight is not finite, or the target exists.
    """
    if not isinstance(layers.weights, BaseWeights):
        raise ValueError("--to merged needs the base model as a folder, a file or a hub name: give it with --base")
    merged = _MergedWeights(layers, layers.weights, strength)
    write_merged(layers.weights, target, merged)
    return merged.errors()


class _MergedWeights(Mapping[Name, Tensor]):
    """The merged weights by name, computed on access, in the dtype of the base."""

    def __init__(self, layers: LayerReader, weights: BaseWeights, strength: float):
        self._layers, self._weights, self._strength = layers, weights, strength
        self._norms: dict[Name, tuple[float, float]] = {}  # of the rounding error and of the update

    def __getitem__(self, name: Name) -> Tensor:
        W0, transposed = self._weights[name], self._layers.transposed(name)  # read for this call: it is written over
        W0 = W0.T if transposed else W0
        layer = exact.fitted(self._layers.layer(name), W0)
        norms = [_merge_rows(part, W0[rows], self._strength) for rows, part in in_rows(layer, W0)]
        off, size = (math.hypot(*found) for found in zip(*norms, strict=True))
        if not math.isfinite(off) and not is_finite(W0):
            raise ValueError(f"the new weight of {name} is not finite in {W0.dtype}")
        self._norms[name] = off, size
        return W0.T if transposed else W0

    def errors(self) -> ToolErrors:
        """The errors from rounding the merged weights to the dtype of the base."""
        norms = {name: self._norms[name] for name in self}
        off, size = zip(*norms.values(), strict=True)
        layers = {str(name): e / n if n else e for name, (e, n) in norms.items()}
        dtypes = sorted({str(self._weights.dtype(name)).removeprefix("torch.") for name in self._norms})
        title = f"rounding to {' and '.join(dtypes)}"
        return ToolErrors(title, layers, math.hypot(*off) / (math.hypot(*size) or 1.0), {})

    def __iter__(self) -> Iterator[Name]:
        return iter(self._layers.names())

    def __len__(self) -> int:
        return len(self._layers.names())


def _merge_rows(layer: LayerState, W0: Tensor, strength: float) -> tuple[float, float]:
    """Writes W(t) over rows of W0; ||rounding error||, which is not finite where W(t) is not, and ||W(t) - W0||."""
    old = W0.to(torch.float32, copy=True)  # also of fp32, since W0 is written over
    W = exact.new_rows(layer, old, strength)
    W0.copy_(W)
    size = vector_norm(torch.sub(W, old, out=old))  # in the same memory: the fewer temporaries, the more a cache holds
    return float(vector_norm(old.copy_(W0).sub_(W))), float(size)
