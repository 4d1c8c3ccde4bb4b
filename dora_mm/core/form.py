"""Which form of the layer's product costs less: merged, with W(t) built, or split, with W0 and a separate branch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dora_mm.core.corrected import CORRECTED
from dora_mm.core.few_tokens import MOST_TOKENS_BACK, TRANSPOSING_PAYS
from dora_mm.core.functional import Adapter
from dora_mm.core.products import LinearProduct, Product

# What the passes of either form over an element of memory cost, in multiplications of a large product, on two cores of
# an AMD EPYC in fp32. Where the memory of one W(t) is reused for the next, building takes 16, and with rank 16 the two
# forms take the same time at some 100 tokens for 640 x 640, 250 for 1280 x 1280 and 350 for 1280 x 2048; with four
# times as many they still differ by less than a twentieth. But in a model the W(t) of all layers exist at once, and the
# system allocates their pages again in every step: the full-size SDXL UNet at 512 px with checkpointing takes 1.08
# times PEFT LoRA's time and 2.7 GB with 16 here, 1.01 times and 0.4 GB with 100.
BUILD_COST = 100  # per element of W(t): W0 copied, added to, scaled, and new memory for that
SPLIT_COST = 48  # per element of y: y scaled and added to, dY scaled
# A tenth of the multiplications of either product, where both are transposed (see few_tokens.py).
TRANSPOSED_SAVING = 0.2

# In bf16, in picoseconds, on two cores of an Intel Xeon with AMX. Forward and backward in ms, split and merged,
# for out x in, rank, tokens: 1280 x 1280, 16, 4096: 26.0 and 23.8; 1280 x 1280, 16, 1024: 8.3 and 8.6; 1280 x 2048, 16,
# 308: 6.0 and 7.7; 768 x 768, 128, 1000: 6.7 and 6.1; 4096 x 4096, 16, 512: 39 and 114.
HALF_BUILD_COST = 900  # per element of W(t): W0 upcast, added to, scaled, divided into a rounded part and the residual
HALF_SPLIT_COST = 670  # per element of y: x W0^T scaled and added to, dY scaled, dX added to
HALF_RANK_COST = 2  # per multiplication of a thin product


def stays_split(
    x: Tensor,
    weight: Tensor,
    adapters: Sequence[Adapter],
    product: Product,
    num_passes: float,
    dtype: torch.dtype,
) -> bool:
    """Whether the product uses W0, since building W(t) would cost more than it saves. That holds for few tokens.

    In half precision only some products can: otherwise W0 x and the update would be rounded separately. The answer does
    not depend on anything that another pass leaves behind: a checkpointed pass runs twice and has to save the same
    tensors.

    Args:
        x: Input of the layer.
        weight: W0.
        adapters: The adapters.
        product: The operation of the layer.
        num_passes: How many forward passes one W(t) would serve.
        dtype: The dtype of the product.
    """
    if product.always_splits:
        return True
    half = dtype.itemsize < 4 or dtype != weight.dtype
    if half and not product.splits_half:
        return False
    norm = any(a.magnitude is not None for a in adapters)
    rank = sum(0 if a.A is None else a.A.shape[0] for a in adapters)
    sizes = product.num_tokens(x, weight), weight.shape[0], weight[0].numel(), rank
    if half:
        return product is not CORRECTED or not norm or half_split_pays(*sizes, num_passes)
    return split_pays(*sizes, num_passes, norm, transposed=is_transposed(x, product))


def is_transposed(x: Tensor, product: Product) -> bool:
    return type(product) is LinearProduct and x.device.type == "cpu" and TRANSPOSING_PAYS


def half_split_pays(num_tokens: int, num_out: int, num_in: int, rank: int, num_passes: float = 1.0) -> bool:
    """Compares passes over (O, I) in fp32 with passes over (T, O) and (T, I) in bf16, on a CPU.

    With a magnitude, either form has three large products. Without one the split form has two, and always pays.
    """
    split = num_tokens * (HALF_SPLIT_COST * num_out + HALF_RANK_COST * rank * (num_out + num_in))
    return num_passes * split < HALF_BUILD_COST * num_out * num_in


def split_pays(
    num_tokens: int,
    num_out: int,
    num_in: int,
    rank: int,
    num_passes: float = 1.0,
    norm: bool = True,
    transposed: bool = True,
) -> bool:
    """Compares what either form costs in addition to the product, forward and backward, for `num_passes` passes.

    The norm takes one pass over W(t), where that is built, and otherwise the product W0 A^T.
    """
    build = num_out * num_in * (rank + BUILD_COST)
    split = num_tokens * (rank * (num_out + num_in) + SPLIT_COST * num_out)
    training = math.isfinite(num_passes)  # inference has only the forward product
    if transposed and num_tokens <= MOST_TOKENS_BACK and training:
        split -= TRANSPOSED_SAVING * num_tokens * num_out * num_in
    return num_passes * split + (num_out * num_in * rank if norm else 0) < build
