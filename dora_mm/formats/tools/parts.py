"""Helpers that the tools share: the tensors of one module by role, and conversion to and from the neutral form.

The roles of the tensors of a module, whatever a tool calls them:

    A       (R, I), of a convolution (R, I, *K)
    B       (O, R), of a convolution (O, R, 1, ...)
    mid     (R, R, *K): the middle factor of a Tucker decomposition; A is then (R, I, 1, ...)
    alpha   one number; B A is scaled by alpha / R, by 1 where there is none
    scaling one number, by which the change of a method without A and B is scaled, where the header says it
    m       the magnitude; its shape is part of the format
    diff    W' - W0

A and B of stacked experts are (E, R, I) and (E, O, R), in our own files and in PEFT's (see `peft_experts.py`). There
`experts` is their number E, which tells them from a one-dimensional convolution.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dora_mm.core.spec import DoRASpec
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools import products

Parts = Mapping[str, Tensor]
_ON_ROWS = ("B", "m", "lost", "diff", "weight")  # the roles that have a row for each of the weight's

KOHYA_PARTS = {
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    "dora_scale": "m",
    "diff": "diff",
    "w_norm": "diff",
}
LYCORIS_PARTS = {**KOHYA_PARTS, **products.LOHA, **products.LOKR}
NO_LOW_RANK = {"diff", "weight", *products.LOHA, *products.LOKR, *products.GLORA}  # ends of keys
OLD_PARTS = {  # of diffusers of 2023 and what follows it; `down` and `up` are those of `adapter_file.OLD_LAYER`
    "lora.down.weight": "A",
    "lora.up.weight": "B",
    "lora_linear_layer.down.weight": "A",
    "lora_linear_layer.up.weight": "B",
    "lora_A.default.weight": "A",
    "lora_B.default.weight": "B",
    "down": "A",
    "up": "B",
}
BARE_NAMES = (
    r"((down|up|input|output|(single_)?transformer|joint|double|single)_blocks|mid(dle)?_block|blocks|layers|"
    r"(noise|context)_refiner|time_embedding|add_embedding|conv_in|conv_out)\."
)
KOHYA_NAMES = re.compile(r"(lora_(unet|te[123]?|transformer|prior_unet|prior_te)|lycoris)_")


def down(parts: Parts) -> Tensor:
    """A (R, I, *K), into which the middle factor of a Tucker decomposition is multiplied."""
    if "mid" not in parts:
        return parts["A"]
    if parts["mid"].dim() < 3 or parts["mid"].shape[1] != parts["A"].shape[0]:
        raise ValueError(f"its middle factor has shape {shape(parts['mid'])}, which does not fit A")
    return torch.einsum("mn...,ni->mi...", parts["mid"], parts["A"].flatten(1).to(parts["mid"].dtype))


def rows_of_parts(parts: Parts, rows: slice) -> Parts:
    """The tensors of some rows of the weight."""
    return {role: tensor[rows] if role in _ON_ROWS else tensor for role, tensor in parts.items()}


def without_magnitude(parts: Parts) -> Parts:
    """The tensors that are no magnitude."""
    return {role: tensor for role, tensor in parts.items() if role not in ("m", "lost")}


def have_rows(parts: Parts, num_rows: int) -> bool:
    """Whether each tensor that has the rows of the weight has so many; no where there are roles of another method."""
    known = parts.keys() <= {*_ON_ROWS, "A", "mid", "alpha"}
    return known and all(tensor.shape[:1] == (num_rows,) for role, tensor in parts.items() if role in _ON_ROWS)


def with_rows(parts: Parts) -> Parts:
    """Flat magnitudes where they are always of output rows: `.magnitude`, `.lora_magnitude_vector`."""
    return {**parts, "m": of_rows(parts["m"], parts["A"].dim())} if {"A", "m"} <= parts.keys() else parts


def of_rows(m: Tensor, dim: int) -> Tensor:
    """A magnitude, which is that of output rows of a weight where it is flat."""
    return m if m.dim() > 1 else m.reshape(-1, *(1,) * (dim - 1))


# --- to and from the neutral form ------------------------------------------------------------------------------------


def neutral(parts: Parts, axis: str | None = None) -> LayerState:
    """The adapter of one module.

    Args:
        parts: Its tensors by role.
        axis: The axis, where the shape of the magnitude does not say it.

    Raises:
        ValueError: Tensors are missing or have shapes that do not fit, alpha is not a positive number, or the shape of
            the magnitude fits both axes and `axis` is None.
    """
    if "diff" in parts and parts.keys() & {"A", "B", "m"}:
        raise ValueError("it has a difference of weights and a low-rank adapter, and only one of them is supported")
    if "diff" in parts:
        return LayerState(DoRASpec(method="full"), {"diff": parts["diff"]})
    if products.method_of(parts):
        return _without_rank(parts, axis)
    if "experts" in parts:
        return of_experts(parts)
    if missing := {"A", "B"} - parts.keys():
        raise ValueError(f"its low-rank tensor {' and '.join(sorted(missing))} is missing")
    if any(parts[name].dim() < 2 for name in "AB") or parts["B"].flatten(1).shape[1] != parts["A"].shape[0]:
        raise ValueError(f"the shapes {shape(parts['A'])} of A and {shape(parts['B'])} of B do not fit each other")
    A, B = down(parts), parts["B"].flatten(1)
    rank = A.shape[0]
    spec = DoRASpec(rank, alpha_of(parts, rank), method="dora" if "m" in parts else "lora")
    tensors = {"lora_A": A, "lora_B": B}
    if "m" not in parts:
        return LayerState(spec, tensors)
    found = axis_of(parts["m"], B.shape[0], A.shape[1], axis)
    return LayerState(spec, {**tensors, "magnitude": parts["m"].flatten()}, found)


def of_experts(parts: Parts) -> LayerState:
    """The adapter of stacked experts, from A (E, R, I), B (E, O, R), the magnitude (E, O) and alpha.

    Raises:
        ValueError: Their shapes do not fit each other, or alpha is not a positive number.
    """
    A, B, m = parts["A"], parts["B"], parts.get("m")
    fits = A.dim() == 3 and A.shape[:2] == (B.shape[0], B.shape[2])
    if not fits or (m is not None and m.shape != B.shape[:2]):
        shapes = ", ".join(f"{shape(parts[role])} of {role}" for role in ("A", "B", "m") if role in parts)
        raise ValueError(f"the shapes {shapes} do not fit each other, as those of stacked experts")
    spec = DoRASpec(A.shape[1], alpha_of(parts, A.shape[1]), method="lora" if m is None else "dora")
    return LayerState(spec, {"lora_A": A, "lora_B": B} | ({} if m is None else {"magnitude": m}))


def rank_of(parts: Parts) -> int:
    """R, the rank of A and B."""
    return parts["A"].shape[1 if "experts" in parts else 0]


def _without_rank(parts: Parts, axis: str | None) -> LayerState:
    """The adapter of a module whose change has no low rank, as `exact.fitted` takes it."""
    added, right = products.change({name: tensor.float() for name, tensor in parts.items()})
    if "alpha" in parts:
        alpha_of(parts, 1)  # it is a positive number
    s = products.scaling(parts)
    tensors = {"diff": s * added} | ({} if right is None else {"right": s * right})
    if "m" not in parts:
        return LayerState(DoRASpec(method="full"), tensors)
    m = parts["m"]
    rows = m.shape[:1] == added.shape[:1] and m.numel() == m.shape[0]
    return LayerState(DoRASpec(method="full"), {**tensors, "magnitude": m.flatten()}, axis or ("out" if rows else "in"))


def alpha_of(parts: Parts, rank: int) -> float:
    """Alpha; the rank where there is none. Raises ValueError where it is not one positive number."""
    if "alpha" not in parts:
        return float(rank)
    alpha = parts["alpha"]
    if alpha.numel() != 1:
        raise ValueError(f"its alpha is not one number, but has the shape {shape(alpha)}")
    if alpha.is_complex() or not math.isfinite(alpha.item()) or alpha.item() <= 0:
        raise ValueError(f"its alpha is not a positive number, but {alpha.item()}")
    return float(alpha.item())


def axis_of(m: Tensor, out: int, inner: int, given: str | None) -> str:
    """The axis of a magnitude: (out, 1, ...) or (1, in, ...), and of one dimension what fits.

    Raises:
        ValueError: It fits neither axis, or both and none is given.
    """
    fits = axes_that_fit(tuple(m.shape), out, inner)
    if given in fits:
        return str(given)
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise ValueError(
            f"its magnitude {shape(m)} fits the output rows and the input columns of the weight ({out}, {inner}): "
            "say which with --axis out or --axis in (of dora-mm convert and verify)"
        )
    raise ValueError(f"its magnitude {shape(m)} fits neither axis of a weight with {out} rows and {inner} columns")


def axes_that_fit(shape: tuple[int, ...], out: int, inner: int) -> list[str]:
    """The axes, `out` and `in`, that a magnitude of a shape can have on a weight."""
    size = math.prod(shape)
    fits = [axis for axis, length in (("out", out), ("in", inner)) if size == length]
    return [axis for axis in fits if len(shape) < 2 or shape[0 if axis == "out" else 1] == size]


def shape(t: Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple, for messages."""
    return tuple(t.shape)


def kohya_tensors(layer: LayerState, W0: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of a module as kohya's scripts name them, in fp32; the magnitude is (O, 1, ...) or (1, I, ...).

    A difference stays in its dtype, and that of a norm has a key of its own. W0 is not needed: it is there so that this
    is an `Export.write`.
    """
    tensors = {name: tensor.detach() for name, tensor in layer.tensors.items()}
    if "diff" in tensors:
        return {"w_norm" if tensors["diff"].dim() == 1 else "diff": tensors["diff"]}
    A, B = tensors["lora_A"].float(), tensors["lora_B"].float()
    ones = (1,) * (A.dim() - 2)
    found = {"lora_down.weight": A, "lora_up.weight": B.view(*B.shape, *ones)}
    found["alpha"] = torch.tensor(float(layer.spec.alpha or layer.spec.rank))
    if "magnitude" in tensors:
        shape = (-1, 1, *ones) if layer.axis == "out" else (1, -1, *ones)
        found["dora_scale"] = tensors["magnitude"].float().reshape(shape)
    return found
