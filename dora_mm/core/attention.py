"""nn.MultiheadAttention, whose q, k and v projections are rows of one packed weight, and which never calls `out_proj`.

Row norms make the slices independent, so each projection is a layer of its own over its rows: `attn.q_proj`,
`attn.k_proj`, `attn.v_proj`, beside `attn.out_proj`. The attention keeps its class until one of them is adapted, and
its parameters and their names in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dora_mm.core.adapted import AdaptedLayer
from dora_mm.core.products import LINEAR

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class PackedProjection(nn.Module):
    """One projection of an attention: a third of the rows of its packed weight and bias."""

    def __init__(self, attention: nn.MultiheadAttention, index: int):
        super().__init__()
        self.attention = (attention,)  # a tuple hides it from the module's children
        self.index = index

    @property
    def weight(self) -> nn.Parameter:
        """All rows: (3 E, E)."""
        weight = self.attention[0].in_proj_weight
        assert weight is not None
        return weight

    @property
    def matrix(self) -> Tensor:
        return self.weight.chunk(3)[self.index]

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.attention[0].in_proj_bias
        return None if bias is None else bias.chunk(3)[self.index]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.bias)


class DoRAPackedProjection(AdaptedLayer, PackedProjection):
    matrix = PackedProjection.matrix

    def forward(self, x: Tensor) -> Tensor:
        return PackedProjection.forward(self, x) if self.is_base() else self.adapted_product(x, LINEAR)

    def check_can_replace_weight(self, *, shared: bool) -> None:
        if shared:
            raise ValueError(f"{self.path} is a part of a weight that another module uses too, and cannot be merged")

    def replace_weight(self, merged: Tensor, *, keep_base: bool, shared: bool) -> None:
        self.base_weight = (nn.Parameter(self.matrix.detach().clone()) if keep_base else None,)
        self.matrix.data.copy_(merged)

    def put_back(self, base: nn.Parameter) -> None:
        self.matrix.data.copy_(base)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Without keys of its own there is nothing to load: the attention has loaded the rows."""
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)


class PackedAttention(nn.MultiheadAttention):
    """The attention once any of its projections is adapted: it calls `q_proj`, `k_proj`, `v_proj` and `out_proj`."""

    q_proj: PackedProjection
    k_proj: PackedProjection
    v_proj: PackedProjection
    trainable_before: bool | None  # of in_proj_weight, once any of its rows is adapted

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
        """As nn.MultiheadAttention's, in the operations that it makes while it trains.

        In inference that calls one fused kernel, which rounds apart from them.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which is missing")
        batched, sequence_first = query.dim() == 3, not self.batch_first
        if not batched:
            query, key, value, sequence_first = query[:, None], key[:, None], value[:, None], True
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        if not sequence_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (self._heads(p(t)) for p, t in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value)))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _joined_mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            inner, weights = _attention_with_weights(q, k, v, mask, dropout)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            inner, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
        length, batch, width = query.shape
        inner = inner.permute(2, 0, 1, 3).reshape(length * batch, width)  # a matrix, whose bias the product adds
        y = self.out_proj(inner).view(length, batch, width)
        if not sequence_first:
            y = y.transpose(0, 1)
        if not batched:
            y, weights = y.squeeze(1), None if weights is None else weights.squeeze(0)
        return y, weights

    def _heads(self, t: Tensor) -> Tensor:
        """(L, B, E) -> (B, H, L, E / H)."""
        return t.unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3)

    def remember_trainable(self) -> None:
        """Before any row is adapted, which freezes all of in_proj_weight."""
        if self.trainable_before is None:
            self.trainable_before = bool(self.in_proj_weight.requires_grad)

    def adapted_projections(self) -> list[DoRAPackedProjection]:
        return [rows for name in PROJECTIONS if isinstance(rows := getattr(self, name), DoRAPackedProjection)]

    def _apply(self, fn, recurse=True):
        before = {rows: rows.before_move() for rows in self.adapted_projections()}  # while they are as the weight is
        super()._apply(fn, recurse)
        for rows, state in before.items():
            rows.after_move(*state)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """As an adapted layer: with the bare model's weight, rows that are fresh take m from it and others refuse."""
        own = zip(PROJECTIONS, (self.q_proj, self.k_proj, self.v_proj), strict=True)
        without_keys = [r for name, r in own if not any(key.startswith(f"{prefix}{name}.") for key in state_dict)]
        bare = [r for r in without_keys if isinstance(r, DoRAPackedProjection)]
        loads = prefix + "in_proj_weight" in state_dict
        for rows in self.adapted_projections() if loads else []:
            if problem := rows.why_not_load(bare=rows in bare):
                errors.append(problem)
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        for rows in self.adapted_projections():
            rows.end_fixed(base=True)
        for rows in bare if loads else []:
            rows.reset_magnitude()


def _joined_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to the scores, of a shape that meets (B, H, L, S); in boolean masks True is "leave out"."""
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


# --- taking attentions apart, and together again ---------------------------------------------------------------------


def with_projections(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """`modules` by path, and in their order, with the projections of attentions that are still whole."""
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        found[path] = module
        if type(module) is nn.MultiheadAttention and module.in_proj_weight is not None:
            found |= {inside(path, name): PackedProjection(module, i) for i, name in enumerate(PROJECTIONS)}
    return found


def inside(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def why_not_apart(attention: nn.MultiheadAttention) -> str | None:
    if type(attention) not in (nn.MultiheadAttention, PackedAttention):
        return f"of a class of its own ({type(attention).__name__})"
    if "forward" in vars(attention):
        return "with a forward function of its own (a hook of accelerate?)"
    if attention.in_proj_weight is None:
        return "with another size of keys or values"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "with added keys"
    return None


def take_apart(attention: nn.MultiheadAttention, rows: Mapping[str, nn.Module]) -> None:
    """Makes the attention call its projections. rows: those of `with_projections`, by name."""
    object.__setattr__(attention, "__class__", PackedAttention)
    assert isinstance(attention, PackedAttention)
    attention.trainable_before = None
    for name in PROJECTIONS:
        attention.add_module(name, rows[name])


def put_together(attention: PackedAttention) -> None:
    """Gives the attention its own class back, where nothing in it is adapted any longer."""
    parts: Any = (attention.out_proj, *(getattr(attention, name) for name in PROJECTIONS))
    if not any(isinstance(part, AdaptedLayer) for part in parts):
        if attention.trainable_before is not None:
            attention.in_proj_weight.requires_grad_(attention.trainable_before)
        for name in (*PROJECTIONS, "trainable_before"):
            delattr(attention, name)
        object.__setattr__(attention, "__class__", nn.MultiheadAttention)
