"""Settings that save memory change no image beyond rounding."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import SlicedAttnProcessor
from torch import nn

from dora_mm import DoRASpec, inject, targets
from dora_mm.config.generation import MemoryConfig
from dora_mm.core.wrappers.float8 import Float8Linear
from dora_mm.models.images.memory import check_offload, decode_in_tiles, offload, save_memory
from dora_mm.models.quantization import quantize_layers
from dora_mm.registries.renamed import migrated_memory
from dora_mm.sampling.before_after import at_strength
from dora_mm.sampling.image_sampler import ImageSampler, sample

CPU = torch.device("cpu")


def pixels(images):
    return np.stack([np.asarray(image, dtype=np.int64) for image in images])


def draw(model, **settings):
    return pixels(sample(model, ["a bus", "a cat"], [1, 2], steps=2, batch_size=2, **settings))


def test_the_vae_decodes_in_tiles(tiny, monkeypatch):
    whole = draw(tiny, height=160, width=160)
    sampler, sizes = ImageSampler(tiny), []
    decoder = tiny.vae.decoder.forward
    monkeypatch.setattr(tiny.vae.decoder, "forward", lambda z: sizes.append(tuple(z.shape)) or decoder(z))
    save_memory(sampler.pipe, MemoryConfig(vae_tiling=True), CPU)
    tiled = draw(sampler, height=160, width=160)
    assert {size[0] for size in sizes} == {1}  # one image at a time
    assert max(size[-1] for size in sizes) == 8  # the model's own 64 pixels
    assert len(sizes) > 2
    assert tiled.shape == whole.shape
    # each tile is normalized on its own, so colours shift a little
    assert np.corrcoef(tiled.ravel(), whole.ravel())[0, 1] > 0.7 > np.corrcoef(whole[0].ravel(), whole[1].ravel())[0, 1]


def test_tiles_are_smaller_than_a_image_of_full_sdxl():
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            sample_size=1024,
        )
    decode_in_tiles(vae)
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (512, 64)


def test_attention_in_slices_draws_the_same(tiny):
    whole, sampler = draw(tiny), ImageSampler(tiny)
    save_memory(sampler.pipe, MemoryConfig(attention_slicing=True), CPU)
    assert any(isinstance(each, SlicedAttnProcessor) for each in tiny.unet.attn_processors.values())
    assert np.abs(draw(sampler) - whole).max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offloaded_networks_draw_the_same_and_merge(tiny, dtype):
    """On a processor the hooks move nothing, but they run: adapters are merged and unmerged under them."""
    inject(tiny.unet, "sdxl-unet", DoRASpec(rank=2))
    for name, parameter in tiny.unet.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    for network in tiny.networks.values():
        network.to(dtype)
    settings = {"steps": 2, "batch_size": 2}

    def draw_at(model):
        return [
            pixels(at_strength(model, {"unet": tiny.unet}, strength, ["a bus", "a cat"], [1, 2], **settings))
            for strength in (0.0, 1.0, 0.0)
        ]

    before, sampler = draw_at(tiny), ImageSampler(tiny)
    embeddings = tiny.encode_for_sampling("a bus", "red")
    offload(sampler.pipe, "model", CPU)
    assert all(torch.equal(t, embeddings[name]) for name, t in tiny.encode_for_sampling("a bus", "red").items())
    after = draw_at(sampler)
    for one, two in zip(before, after, strict=True):
        assert np.abs(one - two).max() <= 1
    assert np.abs(after[0] - after[1]).max() > 5


def test_offloading_needs_a_gpu(tiny):
    with pytest.raises(ValueError, match="memory.offload: model needs a GPU"):
        save_memory(tiny.pipeline(), MemoryConfig(offload="model"), CPU)


def test_int8_is_not_offloaded():
    """diffusers moves `weight.data` alone: the scales in `weight.SCB` stay where they are."""
    with pytest.raises(ValueError, match="^memory.offload: model moves weights that are quantized to int8 without"):
        check_offload(MemoryConfig(offload="model"), torch.device("cuda"), "int8")
    for name in ("nf4", "float8", None, "torchao_int8"):
        check_offload(MemoryConfig(offload="model"), torch.device("cuda"), name)


def test_offloading_and_streaming_are_one_or_the_other():
    with pytest.raises(ValueError, match="offload model moves whole networks, and stream their blocks"):
        MemoryConfig(offload="model", stream="all")


def test_images_whose_layers_waited_are_streamed_when_they_are_replayed():
    saved = {"offload": "layers", "vae_tiling": True, "attention_slicing": False}
    assert MemoryConfig(**migrated_memory(saved)) == MemoryConfig(stream="all", stream_text="all", vae_tiling=True)
    assert MemoryConfig(**migrated_memory({"offload": "model"})) == MemoryConfig(offload="model")


def test_float8_takes_the_linear_layers_of_all_parts_and_nothing_else(tiny):
    before, whole = draw(tiny), sum(parameter.nbytes for parameter in tiny.unet.parameters())
    quantize_layers(tiny.unet, targets.find("sdxl-unet"), "float8")
    stored = {path for path, module in tiny.unet.named_modules() if isinstance(module, Float8Linear)}
    dense = {path for path, module in tiny.unet.named_modules() if type(module) is nn.Linear}
    assert {path.rpartition(".")[2] for path in stored} >= {"to_q", "to_k", "to_v", "0", "proj", "2"}
    assert {"time_embedding.linear_1", "add_embedding.linear_1"} <= dense
    assert not any("attentions" in path and "transformer_blocks" in path for path in dense)
    saved = 3 * sum(tiny.unet.get_submodule(path).weight.numel() for path in stored)
    assert sum(parameter.nbytes for parameter in tiny.unet.parameters()) == whole - saved
    assert not any(parameter.requires_grad for parameter in tiny.unet.parameters())
    difference = np.abs(draw(tiny) - before)
    assert 0 < difference.mean() < 20
