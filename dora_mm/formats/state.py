"""The neutral form of adapters, which every file is read into and written from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_mm.core.spec import DoRASpec
from dora_mm.formats.files.checks import first_not_finite
from dora_mm.formats.tokens import TokenRows, bundled

UNNAMED = "model"  # the component of a model whose class and file do not tell it


@dataclass(frozen=True)
class LayerState:
    """The adapter of one module.

    Attributes:
        spec: Rank, alpha and method.
        tensors: `lora_A` (R, I) or (R, I, *K) for a convolution, `lora_B` (O, R) and `magnitude` (O,), as far as the
            method has them; or `weight` in the shape of the base's, for method `full`. O comes first also where the
            layer stores its weight transposed: of an embedding A is (R, num), B (dim, R) and the magnitude (dim,).
            Files of other tools may hold `diff`, W' - W0 in the shape of the base's, for method `full`. Stacked experts
            have one adapter each: A (E, R, I), B (E, O, R) and the magnitude (E, O); see `num_experts`.
        axis: `out`: the magnitude scales output rows, as in the paper. `in`: it scales input columns, and is (I,).
        norm: What the magnitude is divided by: the norm of `updated`, W0 + s B A, as in the paper; of `base`, W0; or of
            `unscaled`, W0 + B A, where the gain g multiplies this sum and s stays outside: g W0 + (s + g - 1) B A.
            `algebra/exact.py` changes one into another.
    """

    spec: DoRASpec
    tensors: Mapping[str, Tensor]
    axis: str = "out"
    norm: str = "updated"

    @property
    def num_experts(self) -> int | None:
        """E of stacked experts; None for a single weight, whose B has two dimensions and whose magnitude has one."""
        B, m = self.tensors.get("lora_B"), self.tensors.get("magnitude")
        if B is not None and B.dim() == 3:
            return B.shape[0]
        return m.shape[0] if B is None and m is not None and m.dim() == 2 else None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight that A and B belong to: (O, I), (O, I, *K), or (E, O, I) of stacked experts."""
        A, B = self.tensors["lora_A"], self.tensors["lora_B"]
        return (*B.shape[:2], A.shape[2]) if B.dim() == 3 else (B.shape[0], *A.shape[1:])

    def of_experts(self) -> list[LayerState]:
        """The adapters of stacked experts, each that of a single weight."""
        assert self.num_experts is not None
        each = range(self.num_experts)
        return [replace(self, tensors={name: tensor[i] for name, tensor in self.tensors.items()}) for i in each]

    @staticmethod
    def stacked(experts: Sequence[LayerState]) -> LayerState:
        """The adapter of stacked experts, from those of the single ones, which have equal specs."""
        tensors = {name: torch.stack([expert.tensors[name] for expert in experts]) for name in experts[0].tensors}
        return replace(experts[0], tensors=tensors)


@dataclass(frozen=True)
class AdapterState:
    """The adapters of one or several models.

    Attributes:
        layers: By component, such as "unet", and then by module path: the adapter of the module.
        parameters: By component and then by name: the values of extra trainable parameters, such as biases and norms.
        untied: By component: the names of those that no longer share the weight which the base ties to them.
        tokens: By word and then by table: the rows (N, D) of new tokens, which belong to no component.
    """

    layers: dict[str, dict[str, LayerState]]
    parameters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    untied: dict[str, set[str]] = field(default_factory=dict)
    tokens: TokenRows = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, by component, path and name, and those of new tokens."""
        for component, layers in self.layers.items():
            for path, layer in layers.items():
                yield from ((joined(component, path, name), tensor) for name, tensor in layer.tensors.items())
        for component, parameters in self.parameters.items():
            yield from ((joined(component, name), tensor) for name, tensor in parameters.items())
        yield from bundled(self.tokens).items()


def with_settings(layer: LayerState, header_settings: Mapping[str, Any]) -> LayerState:
    """Applies the settings in the header of a file to an adapter.

    A `magnitude` keeps A and B, zeros, where the file has them.

    Args:
        layer: The adapter, as its tensors are.
        header_settings: `method`, `rank`, `alpha`, `dropout`, `norm_grad` and PEFT's `use_dora`, those of the header.

    Raises:
        ValueError: A setting is invalid, or contradicts the tensors or another one.
    """
    found, magnitude = layer.spec.method, "magnitude" in layer.tensors
    if header_settings.get("use_dora", magnitude) != magnitude:
        raise ValueError(
            "it has a magnitude, but its header says that it is plain LoRA" if magnitude else "its magnitude is missing"
        )
    method = header_settings.get("method", found)
    if method != found and (method, found) != ("magnitude", "dora"):
        raise ValueError(f"its header says method {method!s:.50}, and its tensors are those of method {found}")
    settings = {
        key: header_settings[key] for key in ("rank", "alpha", "dropout", "norm_grad") if key in header_settings
    }
    try:
        spec = replace(layer.spec, method=method, **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its header is invalid: {error}") from error
    if "lora_A" in layer.tensors and spec.rank != layer.spec.rank:
        raise ValueError(f"its tensors have rank {layer.spec.rank}, and its header says {spec.rank}")
    return replace(layer, spec=spec)


def check_finite(state: AdapterState, source: Path) -> None:
    """Reads all values of an adapter, and raises ValueError where one is NaN or infinite; names the first tensor."""
    if name := first_not_finite(state.tensors()):
        raise ValueError(f"{source} cannot be used: its {name} has values that are NaN or infinite")


def joined(*names: str) -> str:
    """The names with dots between them; the path of a layer that is the model itself is empty."""
    return ".".join(name for name in names if name)
