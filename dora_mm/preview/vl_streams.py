"""How much of a vision-language model waits in main memory in a training."""

from __future__ import annotations

import logging

from accelerate import Accelerator

from dora_mm.adapting.networks import TrainedNetworks
from dora_mm.adapting.parts import MODEL
from dora_mm.config.streaming import Amount, amount_of
from dora_mm.config.vl import TrainVLConfig
from dora_mm.models.streaming import NOTHING, needed_on
from dora_mm.models.vl.vl_model import VLModel
from dora_mm.preview.memory import memory_rows
from dora_mm.preview.streamed import stream_plan
from dora_mm.preview.training import StepCost
from dora_mm.preview.vl_data import batch_of, preview_data
from dora_mm.preview.vl_memory import estimated_activations

log = logging.getLogger(__name__)


def stream_amount(
    config: TrainVLConfig, model: VLModel, trained: TrainedNetworks, accelerator: Accelerator
) -> Amount | None:
    """How much of the main network waits; None: nothing, as on a CPU.

    Args:
        config: The config.
        model: The model, adapted.
        trained: What is trained of it.
        accelerator: Knows the device.

    Raises:
        ValueError: `memory.stream` is auto, and there is no estimate for this model.
    """
    streamed = config.memory.stream
    if streamed is None:
        return None
    if accelerator.device.type == "cpu":
        log.info("memory.stream %s", NOTHING)
        return None
    if streamed != "auto":
        return amount_of(streamed)
    data = preview_data(config, model)
    if data.largest is None:
        raise ValueError("memory.stream: auto needs the lengths of rows, which this model does not tell: give a number")
    batch = batch_of(model, data.sets, data.largest)
    cost = StepCost(None, estimated_activations(config, batch, is_gpu=True), "estimated")
    ema = config.ema is not None
    rows = memory_rows(model.networks, trained.parameters, config.optimizer, cost, ema=ema)
    plan = stream_plan(model.networks[MODEL], model.target_maps[MODEL], None)
    amount = needed_on(accelerator.device, sum(size for _, _, size in rows), plan.sizes)
    log.info("memory.stream: %s", amount or "nothing waits in main memory")
    return amount
