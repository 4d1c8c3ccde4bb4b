"""Which form of the layer's product costs less: merged, with W(t) built, or split, with W0 and the branch beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dora_mm.core.few_tokens import MOST_TOKENS_BACK
from dora_mm.core.functional import Adapter
from dora_mm.core.products import LinearProduct, Product

# What the passes of either form over an element of memory cost, in multiplications of a large product. Fitted to where
# the two take the same time on two cores of an AMD EPYC (fp32, ranks 16 and 64): with rank 16 at some 100 tokens for
# 640 x 640, 250 for 1280 x 1280 and 350 for 1280 x 2048. They differ by less than a tenth up to twice that number.
BUILD_COST = 16  # per element of W(t): W0 copied, added to, scaled
SPLIT_COST = 48  # per element of y: y scaled and added to, dY scaled
TURNED_SAVING = 0.2  # of the multiplications of either product, where both are turned (see few_tokens.py): a tenth each


def stays_split(
    x: Tensor,
    weight: Tensor,
    adapters: Sequence[Adapter],
    product: Product,
    operand: Tensor | None,
    uses: float,
    dtype: torch.dtype,
) -> bool:
    """Whether the product stays with W0: few tokens, for which building W(t) costs more than it saves.

    In half precision never: W0 x and the update would be rounded apart.
    """
    if product.always_splits:
        return True
    if dtype.itemsize < 4 or dtype != weight.dtype:
        return product.splits_half
    if operand is not None:
        return False
    rank = sum(0 if a.A is None else a.A.shape[0] for a in adapters)
    norm = any(a.magnitude is not None for a in adapters)
    turned = type(product) is LinearProduct and x.device.type == "cpu"
    return split_pays(product.num_tokens(x, weight), weight.shape[0], weight[0].numel(), rank, uses, norm, turned)


def split_pays(
    num_tokens: int, num_out: int, num_in: int, rank: int, uses: float = 1.0, norm: bool = True, turned: bool = True
) -> bool:
    """Counts what either form costs beyond the product itself, forward and backward, for `uses` passes.

    The norm comes out of a pass over W(t), if that is built, and else costs the product W0 A^T.
    """
    build = num_out * num_in * (rank + BUILD_COST)
    split = num_tokens * (rank * (num_out + num_in) + SPLIT_COST * num_out)
    if turned and num_tokens <= MOST_TOKENS_BACK and math.isfinite(uses):  # training; inference has one product alone
        split -= TURNED_SAVING * num_tokens * num_out * num_in
    return uses * split + (num_out * num_in * rank if norm else 0) < build
