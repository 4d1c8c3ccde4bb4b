"""How much of an image model waits in main memory in a training, where the config leaves that to the estimate."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from accelerate import Accelerator

from dora_mm.adapting.images import adapt_image_model
from dora_mm.adapting.new_tokens import start_tokens
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.streaming import Amount, Streamed, amount_of
from dora_mm.data.images.folder import CaptionedImage
from dora_mm.models.images.families import load_image_model
from dora_mm.models.images.image_model import ImageModel
from dora_mm.models.quantization import planned_bytes
from dora_mm.models.streaming import NOTHING, needed_on
from dora_mm.preview.image_memory import encode_without_numbers, machine_of, phases, simulated_cost, without_numbers
from dora_mm.preview.memory import memory_rows
from dora_mm.preview.streamed import stream_plan
from dora_mm.tasks.image_batches import CaptionedBatches, captioned_batches
from dora_mm.tasks.preservation import PreservingBatches, preserving

log = logging.getLogger(__name__)
Amounts = tuple[Amount | None, Amount | None]  # of the denoiser, and of each text encoder


def stream_amounts(
    config: TrainDiffusionConfig,
    accelerator: Accelerator,
    images: Sequence[CaptionedImage],
    class_images: Sequence[CaptionedImage],
) -> Amounts:
    """How much of the denoiser and of each text encoder waits in main memory; nothing on a CPU.

    Args:
        config: The config.
        accelerator: Knows the device and the processes.
        images: Those that are trained on.
        class_images: Those of folders of role preserve.
    """
    given = config.memory.stream, config.memory.stream_text
    if given == (None, None):
        return None, None
    if accelerator.device.type == "cpu":
        log.info("memory.stream %s", NOTHING)
        return None, None
    found = _automatic(config, accelerator, images, class_images) if "auto" in given else (None, None)
    stream, text = (_amount(value, own) for value, own in zip(given, found, strict=True))
    for key, amount in (("stream", stream), ("stream_text", text)):
        log.info("memory.%s: %s", key, amount or "nothing waits in main memory")
    return stream, text


def _amount(streamed: Streamed | None, automatic: Amount | None) -> Amount | None:
    if streamed is None:
        return None
    return automatic if streamed == "auto" else amount_of(streamed)


def _automatic(
    config: TrainDiffusionConfig,
    accelerator: Accelerator,
    images: Sequence[CaptionedImage],
    class_images: Sequence[CaptionedImage],
) -> Amounts:
    """The least that has to wait for a step, and for encoding captions, to fit on the device as it is now."""
    device, model = accelerator.device, load_image_model(config.model, empty=True)
    with without_numbers(model):
        start_tokens(config.tokens, model, images, config.data.captions, config.seed)
    batches = captioned_batches(config, model, images, (accelerator.process_index, accelerator.num_processes))
    source = preserving(batches, config, class_images)
    captions = source.captions(config.train.num_steps * config.train.gradient_accumulation_steps)
    encode_without_numbers(model, batches, source, captions)
    encoding, *_ = phases(config, model, captions)
    sizes = [
        size
        for name in model.text_encoders
        for size in stream_plan(model.components[name], model.target_maps.get(name), None).sizes
    ]
    text = needed_on(device, encoding.weights + encoding.activations, sizes) and Amount(share=1.0)
    if not batches.prompts.needs_encoders:
        model.components.release(model.text_encoders)
    return _of_denoiser(config, accelerator, model, batches, source), text


def _of_denoiser(
    config: TrainDiffusionConfig,
    accelerator: Accelerator,
    model: ImageModel,
    batches: CaptionedBatches,
    source: CaptionedBatches | PreservingBatches,
) -> Amount | None:
    """The least of the denoiser that has to wait for a step."""
    trained = adapt_image_model(model, config)
    checkpointing = config.train.gradient_checkpointing
    cost = simulated_cost(config, model, trained, batches, source, machine_of(config), checkpointing=checkpointing)
    stored = planned_bytes(model.networks[model.denoiser])
    networks = {name: n for name, n in model.networks.items() if name != "vae" or config.data.crop == "random"}
    ema = config.ema is not None
    rows = memory_rows(networks, trained.parameters, config.optimizer, cost, stored=stored, ema=ema)
    plan = stream_plan(trained.networks[model.denoiser], model.target_maps[model.denoiser], None, stored=stored)
    return needed_on(accelerator.device, sum(size for _, _, size in rows), plan.sizes)
