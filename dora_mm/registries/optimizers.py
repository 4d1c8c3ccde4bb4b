"""The optimizers: where the class of each is, and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dora_mm.registries.registry import Registry


@dataclass(frozen=True)
class Optimizer:
    """An optimizer.

    Attributes:
        place: Its class, as `module:class`.
        settings: Arguments of the class, where a config does not give them.
        install: What installs the module, for messages; empty for torch's own.
        needs_gpu: Whether it steps on a GPU only.
    """

    place: str
    settings: Mapping[str, Any]
    install: str = ""
    needs_gpu: bool = False


ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
QUANT, OPTIM = "'dora_mm[quant]'", "'dora_mm[optim]'"
OPTIMIZERS: Registry[Optimizer] = Registry(
    "optimizers",
    "optimizer",
    {
        "adamw": Optimizer("torch.optim:AdamW", {**ADAM, "fused": True}),  # one kernel for hundreds of small tensors
        "adamw_8bit": Optimizer("bitsandbytes.optim:AdamW8bit", ADAM, QUANT, needs_gpu=True),
        "paged_adamw_8bit": Optimizer("bitsandbytes.optim:PagedAdamW8bit", ADAM, QUANT, needs_gpu=True),
        "adafactor": Optimizer("torch.optim:Adafactor", {}),
        # Without a schedule the first decay rate is also how far the trained point is from the average (arXiv
        # 2507.09846).
        "schedule_free": Optimizer("schedulefree:AdamWScheduleFree", {"betas": (0.95, 0.99), "eps": 1e-8}, OPTIM),
        # Its authors recommend bias correction and the warm-up safeguard for diffusion models.
        "prodigy": Optimizer(
            "prodigyopt:Prodigy", {**ADAM, "use_bias_correction": True, "safeguard_warmup": True}, OPTIM
        ),
    },
)
