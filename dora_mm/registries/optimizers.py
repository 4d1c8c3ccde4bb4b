"""The optimizers: where the class of each is, and its settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dora_mm.registries.registry import Registry


@dataclass(frozen=True)
class Optimizer:
    """An optimizer.

    Attributes:
        import_path: Its class, as `module:class`.
        settings: Arguments of the class, where a config does not give them.
        install: What installs the module, for messages; empty for torch's own.
        needs_gpu: Whether it needs a GPU.
        lr: A usual learning rate, for messages.
        least_lr: Below it a training learns nothing: the rate is that of another optimizer.
        most_lr: From it on a training is destroyed, likewise.
    """

    import_path: str
    settings: Mapping[str, Any]
    install: str = ""
    needs_gpu: bool = False
    lr: float = 1e-4
    least_lr: float = 0.0
    most_lr: float = math.inf


ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
STEP: dict[str, Any] = {"most_lr": 1.0}  # each number moves by the rate in a step: prodigy's rate destroys the weights
QUANT, OPTIM = "'dora_mm[quant]'", "'dora_mm[optim]'"
OPTIMIZERS: Registry[Optimizer] = Registry(
    "optimizers",
    "optimizer",
    {
        "adamw": Optimizer(
            "torch.optim:AdamW", {**ADAM, "fused": True}, **STEP
        ),  # one kernel for hundreds of small tensors
        "adamw_8bit": Optimizer("bitsandbytes.optim:AdamW8bit", ADAM, QUANT, needs_gpu=True, **STEP),
        "paged_adamw_8bit": Optimizer("bitsandbytes.optim:PagedAdamW8bit", ADAM, QUANT, needs_gpu=True, **STEP),
        "adafactor": Optimizer("torch.optim:Adafactor", {}),
        # Without a schedule the first decay rate is also how far the trained point is from the average (arXiv
        # 2507.09846).
        "schedule_free": Optimizer(
            "schedulefree:AdamWScheduleFree", {"betas": (0.95, 0.99), "eps": 1e-8}, OPTIM, **STEP
        ),
        # Its authors recommend bias correction and the warm-up safeguard for diffusion models. It multiplies the rate
        # that it finds by the config's: at 0.001 the held-out loss of the embedded model moved by 1e-7 of itself in 60
        # steps, at 1 two thousand times as much.
        "prodigy": Optimizer(
            "prodigyopt:Prodigy",
            {**ADAM, "use_bias_correction": True, "safeguard_warmup": True},
            OPTIM,
            lr=1.0,
            least_lr=0.1,
        ),
    },
)
