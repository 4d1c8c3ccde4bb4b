"""Less memory, by one setting each."""

from typing import Any

import torch

from dora_mm.config.generation import MemoryConfig
from dora_mm.models.quantization import QUANTIZATIONS

TILE = 512  # pixels; diffusers takes the VAE's own size, with which an image of 1024 pixels is one tile


def save_memory(pipe: Any, config: MemoryConfig, device: torch.device) -> None:
    """Gets a pipeline ready to draw on a device; it may be adapted, and the adapters may be merged afterwards.

    Args:
        pipe: The pipeline. Without `offload` its networks are moved to the device; with it, each network or
            layer is moved there when it runs.
        config: The `memory` section.
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


def check_offload(config: MemoryConfig, device: torch.device, quantization: str | None = None) -> None:
    """Checks that networks can wait in main memory.

    Args:
        config: The `memory` section.
        device: The device that images are generated on.
        quantization: The key `model.quantization`.

    Raises:
        ValueError: `offload` is set, and the device is the CPU, where all weights are in main memory anyway; or layers
            would be moved without their scales.
    """
    package = QUANTIZATIONS[quantization].package if quantization else ""
    moves = ("none",) if quantization == "int8" else ("none", "model")
    if package == "bitsandbytes" and config.offload not in moves:  # its scales are beside the weight, not in a buffer
        raise ValueError(
            f"memory.offload: {config.offload} moves the weights of model.quantization {quantization} without their "
            f"scales: set it to {moves[-1]}."
        )
    if config.offload != "none" and device.type == "cpu":
        raise ValueError(
            f"memory.offload: {config.offload} needs a GPU, and there is none here: set it to none, which generates on "
            "the processor."
        )


def offload(pipe: Any, kind: str, device: torch.device) -> None:
    """Moves a pipeline to a device: at once ("none"), each network ("model") or each layer ("layers") when it runs.

    For layers it is diffusers' group offloading, which leaves the weights ordinary tensors, where accelerate's
    sequential offloading puts them on `meta`: so adapters can be merged and unmerged between images.
    """
    if kind == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif kind == "layers":
        pipe.enable_group_offload(device, offload_type="leaf_level")
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
