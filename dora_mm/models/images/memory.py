"""Less memory, by one setting each."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from dora_mm.config.generation import MemoryConfig
from dora_mm.config.models import ModelConfig
from dora_mm.config.streaming import Amount, amount_of
from dora_mm.models.images.families import load_image_model
from dora_mm.models.images.image_model import ImageModel
from dora_mm.models.quantization import planned_bytes
from dora_mm.models.streaming import NOTHING, block_bytes, freed, needed_on, streamable_blocks

log = logging.getLogger(__name__)
ROOM = 0.25  # of the GPU, for what images take beside weights

TILE = 512  # pixels; diffusers takes the VAE's own size, with which an image of 1024 pixels is one tile


def save_memory(pipe: Any, config: MemoryConfig, device: torch.device) -> None:
    """Gets a pipeline ready to draw on a device; it may be adapted, and the adapters may be merged afterwards.

    Args:
        pipe: The pipeline. Without `offload` its networks are moved to the device; with it, each network is moved there
            when it runs.
        config: The `memory` section; what it streams, the model has got ready.
        device: The device that images are generated on.

    Raises:
        ValueError: `offload` is set, and the device is the CPU, where all weights are in main memory anyway.
    """
    check_offload(config, device)
    if config.vae_tiling:
        decode_in_tiles(pipe.vae)
    if config.attention_slicing:
        pipe.enable_attention_slicing()
    offload(pipe, config.offload, device)


def check_offload(config: MemoryConfig, device: torch.device, *quantizations: str | None) -> None:
    """Checks that networks can wait in main memory.

    Args:
        config: The `memory` section.
        device: The device that images are generated on.
        quantizations: The keys `model.quantization` and `model.text_quantization`.

    Raises:
        ValueError: `offload` is set, and the device is the CPU, where all weights are in main memory anyway; or layers
            would be moved without their scales.
    """
    if config.offload == "none":
        return
    if "int8" in quantizations:  # its scales are beside the weight, not in a buffer
        raise ValueError(
            "memory.offload: model moves weights that are quantized to int8 without their scales: set memory.stream"
        )
    if device.type == "cpu":
        raise ValueError(
            "memory.offload: model needs a GPU, and there is none here: set it to none, which generates on the "
            "processor."
        )


def stream_networks(model: ImageModel, chosen: ModelConfig, config: MemoryConfig, device: torch.device) -> None:
    """Lets blocks of a model wait in main memory, before its networks are loaded.

    Args:
        model: The model.
        chosen: The `model` section.
        config: The `memory` section. For auto, a quarter of the GPU is left for what images take; text encoders wait
            before the denoiser does, since they run once for each prompt.
        device: The device that images are generated on.
    """
    streamed = {model.denoiser: config.stream, "text": config.stream_text}
    if device.type == "cpu":
        if any(streamed.values()):
            log.info("memory.stream %s", NOTHING)
        return
    amounts = {name: amount_of(value) for name, value in streamed.items() if value not in (None, "auto")}
    if "auto" in streamed.values():
        amounts |= _automatic(chosen, [name for name, value in streamed.items() if value == "auto"], device)
    model.stream(amounts.get(model.denoiser), amounts.get("text"))


def _automatic(chosen: ModelConfig, wanted: Sequence[str], device: torch.device) -> dict[str, Amount]:
    """The amounts of the denoiser and of "text", as far as they are wanted and something has to wait."""
    free, _ = torch.get_device_module(device).mem_get_info(device)
    model, found = load_image_model(chosen, empty=True), {}
    denoiser, stored = model.networks[model.denoiser], planned_bytes(model.networks[model.denoiser])
    tensors = (p for network in model.networks.values() for p in network.parameters())
    total = sum(stored.get(id(p), p.nbytes) for p in tensors) + free * ROOM
    if "text" in wanted and total > free:
        found["text"] = Amount(share=1.0)
        blocks = (
            streamable_blocks(model.components[name], model.target_maps.get(name)) for name in model.text_encoders
        )
        total -= sum(freed(sizes, range(len(sizes))) for sizes in map(block_bytes, blocks))
    if model.denoiser in wanted:
        sizes = block_bytes(streamable_blocks(denoiser, model.target_maps[model.denoiser]), stored)
        if (amount := needed_on(device, total, sizes)) is not None:
            found[model.denoiser] = amount
    return found


def offload(pipe: Any, kind: str, device: torch.device) -> None:
    """Moves a pipeline to a device: at once ("none"), or each network when it runs ("model")."""
    if kind == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)


def decode_in_tiles(vae: Any) -> None:
    """Makes a VAE decode one image at a time, in overlapping tiles of at most 512 pixels."""
    vae.enable_slicing()
    vae.enable_tiling()
    if not hasattr(vae, "tile_sample_min_size"):  # of videos: its own tiles have 256 pixels
        return
    vae.tile_sample_min_size = min(vae.tile_sample_min_size, TILE)
    vae.tile_latent_min_size = vae.tile_sample_min_size // 2 ** (len(vae.config.block_out_channels) - 1)
