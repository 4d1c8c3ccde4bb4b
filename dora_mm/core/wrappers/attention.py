"""nn.MultiheadAttention, whose q, k and v projections are rows of one packed weight, and which never calls `out_proj`.

Row norms are independent of each other, so each projection is a separate layer over its rows of the weight:
`attn.q_proj`, `attn.k_proj` and `attn.v_proj`, next to `attn.out_proj`. The attention keeps its class until one of them
is adapted, and always keeps its parameters and their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dora_mm.core.adapted import AdaptedLayer
from dora_mm.core.ops import LINEAR
from dora_mm.core.wrappers.projections import AdaptedProjection, Projection, ProjectionHolder

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class PackedProjection(Projection):
    """One projection of an attention: a third of the rows of its packed weight and bias.

    Args:
        attention: An attention with `in_proj_weight` (3 E, E).
        index: 0 for q, 1 for k, 2 for v.
    """

    def __init__(self, attention: nn.MultiheadAttention, index: int):
        super().__init__(attention)
        self.index = index

    @property
    def weight(self) -> nn.Parameter:
        """The packed weight with all rows, (3 E, E)."""
        weight = self.holder[0].in_proj_weight
        assert weight is not None
        return weight

    @property
    def matrix(self) -> Tensor:
        """The rows of this projection, a view (E, E)."""
        return self.weight.chunk(3)[self.index]

    @property
    def bias(self) -> Tensor | None:
        """The entries of this projection, a view (E,), or None."""
        bias: Tensor | None = self.holder[0].in_proj_bias
        return None if bias is None else bias.chunk(3)[self.index]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.bias)


class DoRAPackedProjection(AdaptedProjection, PackedProjection):
    """An adapted projection: A (R, E), B (E, R), magnitude (E,)."""

    matrix = PackedProjection.matrix
    base_class = PackedProjection
    not_full = "is a part of in_proj_weight, all of which method full would train"

    def forward(self, x: Tensor) -> Tensor:
        return PackedProjection.forward(self, x) if self.is_base() else self.adapted_product(x, LINEAR)

    def merge(self, *, keep_base: bool) -> tuple[float, float]:
        attention, base, weight = self.holder[0], self.matrix.detach().clone(), self.weight
        sums = super().merge(keep_base=keep_base)
        self.adaptation.base_weight = base if keep_base else None  # its own rows: others may be merged as well
        if isinstance(attention, PackedAttention) and attention.unmerged_weight is None and keep_base:
            attention.unmerged_weight = (weight,)
        return sums

    def store(self, matrix: Tensor) -> None:
        packed = self.weight.detach().clone()
        packed.chunk(3)[self.index].copy_(matrix)
        self.holder[0].in_proj_weight = nn.Parameter(packed, requires_grad=self.weight.requires_grad)

    def put_back(self, base: Tensor) -> None:
        self.store(base)
        attention = self.holder[0]
        assert isinstance(attention, PackedAttention)
        others = (p for p in attention.adapted_projections().values() if p is not self)
        if attention.unmerged_weight is not None and not any(p.adaptation.merged for p in others):
            (weight,), attention.unmerged_weight = attention.unmerged_weight, None
            weight.data = attention.in_proj_weight.data  # the same bits, unless it was moved or cast
            attention.in_proj_weight = weight


class PackedAttention(ProjectionHolder, nn.MultiheadAttention):
    """An attention with adapted projections: it calls `q_proj`, `k_proj`, `v_proj` and `out_proj`."""

    q_proj: PackedProjection
    k_proj: PackedProjection
    v_proj: PackedProjection
    unmerged_weight: tuple[nn.Parameter] | None  # the Parameter from before the first merge; hidden from the parameters

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes what nn.MultiheadAttention does, with the operations that it uses in training.

        In inference nn.MultiheadAttention may call one fused kernel, which rounds differently. Arguments, shapes and
        results are those of nn.MultiheadAttention.

        Raises:
            ValueError: `is_causal` is given without `attn_mask`.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask: pass attn_mask too")
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            if projection.holder[0] is not self:  # in a copy of DataParallel, they still have the original's weight
                projection.holder = (self,)
        batched, sequence_first = query.dim() == 3, not self.batch_first
        if not batched:
            query, key, value, sequence_first = query[:, None], key[:, None], value[:, None], True
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        if not sequence_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (self._heads(p(t)) for p, t in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value)))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _combined_mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            inner, weights = _attention_with_weights(q, k, v, mask, dropout)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            inner, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
        length, batch, width = query.shape
        inner = inner.permute(2, 0, 1, 3).reshape(length * batch, width)  # 2-D, as in torch's attention: the same bits
        y = self.out_proj(inner).view(length, batch, width)
        if not sequence_first:
            y = y.transpose(0, 1)
        if not batched:
            y, weights = y.squeeze(1), None if weights is None else weights.squeeze(0)
        return y, weights

    def _heads(self, t: Tensor) -> Tensor:
        """(L, B, E) -> (B, H, L, E / H)."""
        return t.unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3)

    def parameters_of_projections(self) -> dict[str, str]:
        return dict.fromkeys(PROJECTIONS, "in_proj_weight")


def _combined_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask added to the scores, broadcastable to (B, H, L, S); True in a boolean mask leaves a position out."""
    masks = [None if m is None else _additive(m, q.dtype) for m in (attn_mask, key_padding_mask)]
    if (mask := masks[0]) is not None and mask.dim() == 3:
        masks[0] = mask.unflatten(0, q.shape[:2])
    if (padding := masks[1]) is not None:
        masks[1] = padding[:, None, None]
    given = [m for m in masks if m is not None]
    return sum(given[1:], start=given[0]) if given else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))


def _attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:3], k.shape[2])
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    q = q * (1.0 / q.shape[-1]) ** 0.5
    scores = q @ k.mT if mask is None else torch.baddbmm(mask.expand(shape).flatten(0, 1), q, k.mT)
    weights = F.dropout(scores.softmax(-1), dropout)
    return (weights @ v).unflatten(0, shape[:2]), weights.view(shape)


# --- separating the projections of an attention, and restoring it -----------------------------------------------------


def projections_of(attention: nn.Module) -> dict[str, PackedProjection]:
    """New projections of an attention by name; empty where it is none, or they are separated already."""
    if type(attention) is not nn.MultiheadAttention or attention.in_proj_weight is None:
        return {}
    return {name: PackedProjection(attention, index) for index, name in enumerate(PROJECTIONS)}


def why_not_separable(attention: nn.Module | None) -> str | None:
    """The reason why an attention cannot call its projections, for an error message; None where it can."""
    if not isinstance(attention, nn.MultiheadAttention):
        return None
    if type(attention) not in (nn.MultiheadAttention, PackedAttention):
        return f"it is a subclass of MultiheadAttention ({type(attention).__name__})"
    if "forward" in vars(attention):
        return "its forward function was replaced (a hook of accelerate?)"
    if attention.in_proj_weight is None:
        return "its keys or values have another size (kdim, vdim)"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "it adds keys (add_bias_kv, add_zero_attn)"
    return None


def separate_projections(attention: nn.MultiheadAttention, projections: Mapping[str, nn.Module]) -> None:
    """Makes an attention call its projections, in place.

    Args:
        attention: An attention for which `why_not_separable` returns None.
        projections: Its projections, by the names in PROJECTIONS.
    """
    object.__setattr__(attention, "__class__", PackedAttention)
    assert isinstance(attention, PackedAttention)
    attention.unmerged_weight = None
    for name in PROJECTIONS:
        attention.add_module(name, projections[name])


def restore_attention(attention: PackedAttention) -> None:
    """Makes it an nn.MultiheadAttention again, in place, where nothing in it is adapted any longer."""
    parts: Any = (attention.out_proj, *(getattr(attention, name) for name in PROJECTIONS))
    if not any(isinstance(part, AdaptedLayer) for part in parts):
        for name in (*PROJECTIONS, "unmerged_weight"):
            delattr(attention, name)
        object.__setattr__(attention, "__class__", nn.MultiheadAttention)


# --- torch's fused inference of nn.TransformerEncoder ----------------------------------------------------------------

# It reads the weights and never calls an adapted layer, so it is switched off where a module inside is adapted, by the
# attributes that torch checks before it takes that path.
SWITCHES = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
BEFORE = "fast_path_before"


def set_fast_paths(model: nn.Module) -> None:
    """Switches the fused inference off where a module inside is adapted, and restores it where none is.

    Args:
        model: The model, whose transformer encoders are changed in place.
    """
    for module in model.modules():
        for kind, (name, off) in SWITCHES.items():
            if not isinstance(module, kind):
                continue
            if any(isinstance(inner, AdaptedLayer) for inner in module.modules()):
                if not hasattr(module, BEFORE):
                    setattr(module, BEFORE, getattr(module, name))
                setattr(module, name, off)
            elif hasattr(module, BEFORE):
                setattr(module, name, getattr(module, BEFORE))
                delattr(module, BEFORE)
