"""Less memory, by one setting each."""

from typing import Any

import torch
from torch import nn

from dora_mm.config.pictures import MemoryConfig
from dora_mm.core import TargetMap
from dora_mm.core.targets import match_modules
from dora_mm.core.wrappers.float8 import Float8Linear

TILE = 512  # pixels; diffusers takes the VAE's own size, with which a picture of 1024 pixels is one tile


def store_in_float8(network: nn.Module, targets: TargetMap) -> None:
    """Stores the weights of all Linear layers that a target map knows in float8; other layers stay as they are.

    Args:
        network: The network, frozen and not adapted.
        targets: Its target map.
    """
    for path in match_modules(network, targets.select(list(targets.parts))):
        layer = network.get_submodule(path)
        if type(layer) is nn.Linear:
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, Float8Linear.of(layer))


def save_memory(pipe: Any, config: MemoryConfig, device: torch.device) -> None:
    """Gets a pipeline ready to draw on a device; it may be adapted, and the adapters may be merged afterwards.

    Args:
        pipe: The pipeline. Without `offload` its networks are moved to the device; with it, each network or
            layer is moved there when it runs.
        config: The `memory` section.
        device: The device that pictures are drawn on.

    Raises:
        ValueError: `offload` is set, and the device is the CPU, where all weights are in main memory anyway.
    """
    check_offload(config, device)
    if config.vae_tiling:
        decode_in_tiles(pipe.vae)
    if config.attention_slicing:
        pipe.enable_attention_slicing()
    offload(pipe, config.offload, device)


def check_offload(config: MemoryConfig, device: torch.device) -> None:
    """Checks that networks can wait in main memory.

    Raises:
        ValueError: `offload` is set, and the device is the CPU, where all weights are in main memory anyway.
    """
    if config.offload != "none" and device.type == "cpu":
        raise ValueError(
            f"memory.offload: {config.offload} needs a GPU, and there is none here: set it to none, which draws on the "
            "processor."
        )


def offload(pipe: Any, kind: str, device: torch.device) -> None:
    """Moves a pipeline to a device: at once ("none"), each network ("model") or each layer ("layers") when it runs.

    For layers it is diffusers' group offloading, which leaves the weights ordinary tensors, where accelerate's
    sequential offloading puts them on `meta`: so adapters can be merged and unmerged between pictures.
    """
    if kind == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif kind == "layers":
        pipe.enable_group_offload(device, offload_type="leaf_level")
    else:
        pipe.to(device)


def decode_in_tiles(vae: Any) -> None:
    """Makes a VAE decode one picture at a time, in overlapping tiles of at most 512 pixels."""
    vae.enable_slicing()
    vae.enable_tiling()
    if not hasattr(vae, "tile_sample_min_size"):  # of videos: its own tiles have 256 pixels
        return
    vae.tile_sample_min_size = min(vae.tile_sample_min_size, TILE)
    vae.tile_latent_min_size = vae.tile_sample_min_size // 2 ** (len(vae.config.block_out_channels) - 1)
