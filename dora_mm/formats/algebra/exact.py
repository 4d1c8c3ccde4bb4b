"""The adapted weight of a layer, and exact conversions of its adapter from one form into another.

W' is g * (W0 + s B A), where g = m / n is constant along the rows (axis `out`) or columns (axis `in`) of the weight,
and n is the norm that `LayerState.norm` names. For `unscaled`, W' is g W0 + (s + g - 1) B A. All is computed in fp32,
or float64 for a float64 W0, on the weight as it is: (O, I), or (O, I, *K) for a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dora_mm.core.functional import Adapter, adapter_dtype, directions, row_norm
from dora_mm.core.spec import DoRASpec
from dora_mm.formats.algebra.row_blocks import in_rows
from dora_mm.formats.state import LayerState


def fitted(layer: LayerState, W0: Tensor) -> LayerState:
    """The adapter with A in the shape of its base weight (O, I) or (O, I, *K): some write (R, I, 1, 1).

    A difference with a magnitude, or with what W0 is multiplied by, becomes one that is only added.

    Raises:
        ValueError: The adapter has other shapes than the weight needs.
    """
    if "diff" in layer.tensors and len(layer.tensors) > 1:
        layer = _as_difference(layer, W0)
    tensors, shape = dict(layer.tensors), tuple(W0.shape)
    if "diff" in tensors and tensors["diff"].shape == (shape[0], math.prod(shape[1:])):  # of a convolution, flat
        tensors["diff"] = tensors["diff"].view(shape)
    needed = {"magnitude": shape[:1] if layer.axis == "out" else shape[1:2], "diff": shape, "weight": shape}
    if (number := layer.num_experts) is not None:
        rank, *sizes = layer.spec.rank, *(shape if len(shape) == 3 else (number, 0, 0))
        needed = {"lora_A": (sizes[0], rank, sizes[2]), "lora_B": (*sizes[:2], rank), "magnitude": tuple(sizes[:2])}
    elif "lora_A" in tensors:
        rank = tensors["lora_A"].shape[0]
        needed |= {"lora_A": (rank, *shape[1:]), "lora_B": (shape[0], rank)}
    for name, tensor in tensors.items():
        given = tuple(tensor.shape)
        if _without_ones(given) != _without_ones(needed[name]):
            raise ValueError(f"its {name} has shape {given} instead of {needed[name]}: it is for another model")
        tensors[name] = tensor.reshape(needed[name])
    return replace(layer, tensors=tensors)


def _as_difference(layer: LayerState, W0: Tensor) -> LayerState:
    """W' - W0 of W' = g (W0 + W0 R + diff), with g = m / ||W0 + W0 R + diff||; of a linear layer or a convolution."""
    tensors, W0 = layer.tensors, W0.to(adapter_dtype(W0.dtype))
    try:
        V = W0 + tensors["diff"].to(W0.dtype).view_as(W0)
        if "right" in tensors:
            V += times(W0, tensors["right"].to(W0.dtype))
        if "magnitude" in tensors:
            V = V * along(tensors["magnitude"], W0, layer.axis) / norms(V, layer.axis)
    except RuntimeError as error:
        raise ValueError(
            f"its factors do not fit a weight of shape {tuple(W0.shape)}: it is for another model"
        ) from error
    return LayerState(layer.spec, {"diff": V - W0})


def times(W0: Tensor, right: Tensor) -> Tensor:
    """W0 R (I, I) over the input columns, of a convolution at each position of the kernel."""
    return torch.einsum("oi...,ij->oj...", W0, right)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the last dimensions of size 1 after the second."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def norms(W: Tensor, axis: str) -> Tensor:
    """The norms of the rows (O, 1, ...) or columns (1, I, ...) of a weight (O, I, *K)."""
    if axis == "in":  # five times faster than vector_norm, which reads the columns one after the other
        return W.square().sum([d for d in range(W.dim()) if d != 1], keepdim=True).sqrt_()
    return row_norm(W).view(-1, *[1] * (W.dim() - 1))  # bit for bit the layer's, in every memory layout


def along(vector: Tensor, W: Tensor, axis: str) -> Tensor:
    """A vector (O,) or (I,) in the shape that multiplies rows or columns of a weight."""
    shape = [1] * W.dim()
    shape[0 if axis == "out" else 1] = -1
    return vector.to(W.dtype).reshape(shape)


def product(layer: LayerState, W0: Tensor) -> Tensor:
    """B A in the shape of W0, without s; zeros where the method has no A."""
    if "lora_A" not in layer.tensors:
        return torch.zeros_like(W0)
    A, B = (layer.tensors[name].to(W0.dtype) for name in ("lora_A", "lora_B"))
    return (B @ A.flatten(1)).view(W0.shape)


def gain(layer: LayerState, W0: Tensor) -> Tensor:
    """g, in a shape that broadcasts over W0; 1 where the norm is 0, and for plain LoRA."""
    if "magnitude" not in layer.tensors:
        return torch.ones(1, dtype=W0.dtype)
    return torch.cat([_gain(part, W0[rows], product(part, W0[rows])) for rows, part in in_rows(layer, W0)])


def _gain(layer: LayerState, W0: Tensor, BA: Tensor) -> Tensor:
    """The same, where B A is known."""
    if "magnitude" not in layer.tensors:
        return torch.ones(1, dtype=W0.dtype)
    factor = {"updated": layer.spec.scaling, "base": 0.0, "unscaled": 1.0}[layer.norm]
    return gain_of(layer, torch.add(W0, BA, alpha=factor) if factor else W0)


def gain_of(layer: LayerState, V: Tensor) -> Tensor:
    """g, m / ||V||; 1 where the norm is 0, and NaN where it is infinite and W' would be 0."""
    n = norms(V, layer.axis)
    g = along(layer.tensors["magnitude"], V, layer.axis) / n
    return g.masked_fill_(n == 0, 1).masked_fill_(n == math.inf, math.nan)


@torch.no_grad()
def new_weight(layer: LayerState, weight: Tensor, strength: float = 1.0) -> Tensor:
    """Computes W0 + t (W' - W0).

    Args:
        layer: The adapter.
        weight: W0, with O first.
        strength: t.

    Returns:
        A new tensor in the shape of `weight`, fp32, or float64 for a float64 weight.
    """
    if layer.num_experts is not None:
        each = zip(layer.of_experts(), weight, strict=True)
        return torch.stack([new_weight(expert, W0, strength) for expert, W0 in each])
    W = torch.empty(weight.shape, dtype=adapter_dtype(weight.dtype))
    for rows, part in in_rows(layer, weight):
        W[rows] = new_rows(part, weight[rows].to(W.dtype), strength)
    return W


@torch.no_grad()
def difference(layer: LayerState, weight: Tensor, strength: float = 1.0) -> Tensor:
    """W(t) - W0, as `new_weight`."""
    if layer.num_experts is not None:
        return torch.stack([difference(*each, strength) for each in zip(layer.of_experts(), weight, strict=True)])
    D = torch.empty(weight.shape, dtype=adapter_dtype(weight.dtype))
    for rows, part in in_rows(layer, weight):
        W0 = weight[rows].to(D.dtype)
        torch.sub(new_rows(part, W0, strength), W0, out=D[rows])
    return D


def new_rows(layer: LayerState, W0: Tensor, strength: float = 1.0) -> Tensor:
    """The same for W0 in the dtype of the result, all at once."""
    if strength == 0:
        return W0.clone()  # bit for bit: a sum with 0 turns -0 into 0
    if "weight" in layer.tensors:
        W = layer.tensors["weight"].to(W0.dtype)
    elif "diff" in layer.tensors:
        W = W0 + layer.tensors["diff"].to(W0.dtype).view_as(W0)
    elif layer.norm == "unscaled":
        BA = product(layer, W0)
        g = _gain(layer, W0, BA)
        W = g * W0 + BA * (layer.spec.scaling + g - 1)
    else:
        W = updated(layer, W0)
        if "magnitude" in layer.tensors:
            W.mul_(gain_of(layer, W if layer.norm == "updated" else W0))
    return W if strength == 1 else torch.lerp(W0, W, strength)


def updated(layer: LayerState, W0: Tensor) -> Tensor:
    """V of the layer, W0 + s B A: a new tensor in the shape and dtype of W0."""
    if "lora_A" not in layer.tensors:
        return W0.clone()
    A, B = (layer.tensors[name].to(W0.dtype) for name in ("lora_A", "lora_B"))
    return directions(W0.flatten(1), Adapter(A, B, None, layer.spec.scaling)).view(W0.shape)


def with_strength(layer: LayerState, weight: Tensor, strength: float) -> LayerState:
    """The adapter whose strength 1 is strength t of this one, of the same rank: see `summed`.

    With t = 1 it only changes the norm, and folds alpha into B: s is 1. Of stacked experts W0 is (E, O, I).
    """
    return summed([(layer, strength)], weight)


@torch.no_grad()
def summed(terms: Sequence[tuple[LayerState, float]], weight: Tensor | None) -> LayerState:
    """The adapter whose strength 1 is the sum of adapters, each with a strength t; alpha is the rank, norm `updated`.

        W0 + sum t (W' - W0) = e (W0 + B' A')    with e = 1 + sum t (g - 1)

    where A' stacks all A and B' all (t f / e) B for axis `out`, or A' all (t f / e) A for axis `in`, with the factor f
    of B A in W': s for plain LoRA, whose g is 1. So its rank is the sum of ranks. Where one has no low rank, or their
    axes differ, it is a difference.

    Args:
        terms: The adapters, in the shape of the weight (see `fitted`), and their strengths.
        weight: W0, with O first; None where no term depends on it (see `has_no_magnitude`).

    Raises:
        ValueError: e is 0 in some row, which no adapter can express.
    """
    if (number := terms[0][0].num_experts) is not None:
        weights = [None] * number if weight is None else list(weight)
        of_each = zip(*(layer.of_experts() for layer, _ in terms), weights, strict=True)
        strengths = [t for _, t in terms]
        return LayerState.stacked([summed(list(zip(own, strengths, strict=True)), W0) for *own, W0 in of_each])
    dtype = torch.float32 if weight is None else adapter_dtype(weight.dtype)
    axes = {layer.axis for layer, _ in terms if "magnitude" in layer.tensors}
    if len(axes) > 1 or any(layer.spec.method == "full" for layer, _ in terms):
        D = sum(t * _change(layer, weight, dtype) for layer, t in terms)
        assert isinstance(D, Tensor)
        return LayerState(DoRASpec(method="full"), {"diff": D})
    if not axes:
        return _side_by_side(terms, [t * layer.spec.scaling for layer, t in terms], "out", dtype)
    assert weight is not None
    (axis,), W0 = axes, weight.to(dtype)
    e, change, factors = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype), []
    for layer, t in terms:
        BA = product(layer, W0)
        g = _gain(layer, W0, BA)
        factors.append(t * _factor(layer, g))
        e, change = e + t * (g - 1), change + factors[-1] * BA
    if not e.all():
        strengths = f"strength{'s' if len(terms) > 1 else ''} {', '.join(f'{t:g}' for _, t in terms)}"
        raise ValueError(
            f"at {strengths} a row of the weight has no part of the base: use dora-mm convert --to merged or --to diff"
        )
    layer = _side_by_side(terms, [factor / e for factor in factors], axis, dtype)
    return replace(layer, tensors={**layer.tensors, "magnitude": (e * norms(W0 + change / e, axis)).flatten()})


def _factor(layer: LayerState, g: Tensor) -> Tensor:
    """The factor of B A in W'."""
    s = layer.spec.scaling
    if "magnitude" not in layer.tensors:
        return torch.full_like(g, s)
    return s + g - 1 if layer.norm == "unscaled" else s * g


def _change(layer: LayerState, W0: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W' - W0, without the rounding of W0 where it does not depend on that."""
    if layer.tensors.keys() == {"diff"}:
        return layer.tensors["diff"].to(dtype)
    if has_no_magnitude(layer):
        A, B = (layer.tensors[name].to(dtype) for name in ("lora_A", "lora_B"))
        return (layer.spec.scaling * B @ A.flatten(1)).view(-1, *A.shape[1:])
    assert W0 is not None
    return difference(layer, W0)


def _side_by_side(
    terms: Sequence[tuple[LayerState, float]], factors: Sequence[Tensor | float], axis: str, dtype: torch.dtype
) -> LayerState:
    """The stacked A and B, where factors of B A are numbers, or those of rows (O, 1, ...) or columns (1, I, ...)."""
    As, Bs = [], []
    for (layer, _), factor in zip(terms, factors, strict=True):
        if "lora_A" in layer.tensors:
            A, B = (layer.tensors[name].to(dtype) for name in ("lora_A", "lora_B"))
            As.append(A * factor if axis == "in" else A)
            Bs.append(B if axis == "in" else B * (factor.view(-1, 1) if isinstance(factor, Tensor) else factor))
    first = terms[0][0]
    rank = sum(map(len, As)) or first.spec.rank
    any_magnitude = any("magnitude" in layer.tensors for layer, _ in terms)
    method = ("dora" if any_magnitude else "lora") if As else first.spec.method
    spec = replace(first.spec, rank=rank, alpha=float(rank), method=method)
    return LayerState(spec, {"lora_A": torch.cat(As), "lora_B": torch.cat(Bs, 1)} if As else {}, axis)


def has_no_magnitude(layer: LayerState) -> bool:
    """Whether it is plain LoRA, whose change depends on no base weight."""
    return layer.tensors.keys() == {"lora_A", "lora_B"}


def folded(layer: LayerState) -> LayerState:
    """The same adapter with alpha in B, so that alpha is the rank; needs no W0, and keeps the norm."""
    if layer.norm == "unscaled" or "lora_B" not in layer.tensors or layer.spec.scaling == 1:
        return layer
    tensors = {**layer.tensors, "lora_B": layer.tensors["lora_B"].float() * layer.spec.scaling}
    return replace(layer, spec=replace(layer.spec, alpha=float(layer.spec.rank)), tensors=tensors)


def unfolded(layer: LayerState, spec: DoRASpec) -> LayerState:
    """An adapter whose alpha is the rank, with the alpha of `spec`."""
    tensors = dict(layer.tensors)
    if "lora_B" in tensors:
        tensors["lora_B"] = tensors["lora_B"] / spec.scaling
    return replace(layer, spec=spec, tensors=tensors)


@torch.no_grad()
def full_rank(layer: LayerState, weight: Tensor) -> LayerState:
    """The plain LoRA of full rank that computes the same as any adapter: D = W' - W0 is I D, or D I.

    It is exact at every strength, and has the size of D and of the smaller of the two identity matrices.
    """
    W0 = weight.to(adapter_dtype(weight.dtype))
    D = difference(layer, W0)
    rows, columns = D.flatten(1).shape
    rank = min(rows, columns)
    one = torch.eye(rank, dtype=D.dtype)
    A, B = (D, one) if rows <= columns else (one.view(rank, *D.shape[1:]), D.flatten(1))
    return LayerState(DoRASpec(rank, float(rank), method="lora"), {"lora_A": A, "lora_B": B})


def depends_on_base(layer: LayerState, strength: float = 1.0, *, magnitude: bool = False) -> bool:
    """Whether `paper_form` computes other tensors over another base weight."""
    if "magnitude" in layer.tensors:
        return strength != 1 or layer.norm != "updated"
    return magnitude or "weight" in layer.tensors


@torch.no_grad()
def paper_form(layer: LayerState, weight: Tensor, strength: float = 1.0, *, magnitude: bool = False) -> LayerState:
    """The adapter that computes W(t), as A and B with alpha, and a magnitude over the norm of W0 + s B A if it has one.

    Args:
        layer: The adapter; one without A and B gets zeros of rank 1. Whole weights become a difference.
        weight: W0, with O first.
        strength: The strength that becomes strength 1.
        magnitude: Whether plain LoRA gets the magnitude with which DoRA computes the same.
    """
    if "weight" in layer.tensors or strength != 1 or layer.norm != "updated":
        layer = with_strength(layer, weight, strength)
    tensors, spec = dict(layer.tensors), layer.spec
    if spec.method == "magnitude":
        tensors["lora_A"], tensors["lora_B"] = torch.zeros(1, *weight.shape[1:]), torch.zeros(weight.shape[0], 1)
        spec = DoRASpec(rank=1)
    if magnitude and spec.method == "lora":
        W0 = weight.to(adapter_dtype(weight.dtype))
        tensors["magnitude"] = norms(torch.add(W0, product(layer, W0), alpha=spec.scaling), "out").flatten()
        spec = replace(spec, method="dora")
    return replace(layer, spec=spec, tensors=tensors)
