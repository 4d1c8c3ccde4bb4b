"""LoHa, LoKr and GLoRA of LyCORIS, whose change of a weight has no low rank: its value from their factors.

    LoHa     (w1_a w1_b) * (w2_a w2_b), element by element
    LoKr     the Kronecker product of w1 and w2, each whole or w_a w_b
    GLoRA    b1 b2 + W0 a1 a2

times alpha / rank. Of convolutions `t1`, `t2` are the middle factors of Tucker decompositions. A LoKr of two whole
factors has no rank, and its alpha does nothing. Nothing here trains them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from dora_mm.formats.algebra.exact import times

LOHA = {name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")}
LOKR = {f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
GLORA = {f"{name}.weight": f"glora_{name}" for name in ("a1", "a2", "b1", "b2")}
_NEEDED = {  # by method: the roles of which one set is there
    "LoHa": [{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}],
    "LoKr": [{w1, w2} for w1 in ("lokr_w1", "lokr_w1_b") for w2 in ("lokr_w2", "lokr_w2_b")],
    "GLoRA": [{"glora_a1", "glora_a2", "glora_b1", "glora_b2"}],
}


def method_of(roles: Collection[str]) -> str | None:
    """The method of a module with these roles; None where it is none of the three, or incomplete."""
    return next((name for name, sets in _NEEDED.items() if any(found <= set(roles) for found in sets)), None)


def scaling(parts: Mapping[str, Tensor]) -> float:
    """Alpha / rank; 1 without alpha, or without a rank. Of PEFT's files what their settings say."""
    if "scaling" in parts:
        return float(parts["scaling"])
    ranks = [parts[name].shape[0] for name in ("hada_w1_b", "lokr_w1_b", "lokr_w2_b", "glora_a2") if name in parts]
    return float(parts["alpha"]) / ranks[0] if ranks and "alpha" in parts else 1.0


def change(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The change added to W0, without alpha: (O, I), (O, I, *K) or (O, I K); and R (I, I) where W0 R is added, too.

    Raises:
        ValueError: The shapes of the factors do not fit each other.
    """
    if any(t.is_meta for t in parts.values()):  # as a header describes them, but for a factor that is one number
        parts = {name: t.to("meta") for name, t in parts.items()}
    try:
        if "hada_w1_a" in parts:
            return _factor(parts, "hada_w1", "hada_t1") * _factor(parts, "hada_w2", "hada_t2"), None
        if "glora_b1" in parts:
            a1, a2, b1, b2 = (parts[f"glora_{name}"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
            return b1 @ b2, a1 @ a2
        w1, w2 = _factor(parts, "lokr_w1"), _factor(parts, "lokr_w2", "lokr_t2")
        return torch.kron(w1.view(*w1.shape, *(1,) * (w2.dim() - w1.dim())), w2.contiguous()), None
    except (RuntimeError, IndexError, KeyError) as error:
        raise ValueError("the shapes of its factors do not fit each other") from error


def product(parts: Mapping[str, Tensor], W0: Tensor) -> Tensor:
    """The change of a weight, without alpha, in the shape and dtype of W0."""
    added, right = change({name: tensor.to(W0.dtype) for name, tensor in parts.items()})
    added = added.view(W0.shape)
    return added if right is None else added + times(W0, right)


def _factor(parts: Mapping[str, Tensor], name: str, middle: str = "") -> Tensor:
    """A whole factor, or the product of its two; (r, r, *K) in the middle of a Tucker decomposition."""
    if name in parts:
        return parts[name]
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    return torch.einsum("ij...,ip,jr->pr...", parts[middle], a, b) if middle in parts else a @ b.flatten(1)
