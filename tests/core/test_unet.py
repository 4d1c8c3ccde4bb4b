"""The layer inside a complete SDXL UNet."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dora_mm
from dora_mm import DoRASpec, adapter_parameters, fixed_parameters
from dora_mm.core import adapted_layers
from dora_mm.models.images.sdxl.random_weights import build_unet
from tests.shared import reference

ALL_PARTS = ("attn", "cross", "ff", "conv")


def build(dtype=torch.float32):
    return (
        build_unet(8, latent_channels=4, channels=(16, 32, 64), heads=(1, 2, 4), text_widths=(16, 32))
        .to(dtype)
        .requires_grad_(False)
    )


def predict(unet, dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    conditions = {"text_embeds": random(batch, 32), "time_ids": random(batch, 6)}
    return unet(random(batch, 4, 8, 8), 500, random(batch, 77, 48), added_cond_kwargs=conditions).sample


@pytest.mark.parametrize(
    ("method", "dtype", "autocast"),
    [
        ("dora", torch.float32, True),
        ("dora", torch.bfloat16, False),
        ("magnitude", torch.float32, False),
    ],
)
def test_a_fresh_adapter_changes_no_bit(method, dtype, autocast):
    unet = build(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = predict(unet, dtype)
        report = dora_mm.inject(unet, "sdxl-unet", DoRASpec(rank=4, method=method), parts=ALL_PARTS)
        assert report.num_modules == 219
        assert torch.equal(predict(unet, dtype), expected)
        with fixed_parameters(unet):
            assert torch.equal(predict(unet, dtype), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_training_follows_single_precision(autocast):
    """Gradients under a bf16 base or autocast point where those in float64 do (measured: 0.9995)."""
    gradients = []
    for dtype in (torch.float64, torch.float32 if autocast else torch.bfloat16):
        torch.manual_seed(0)
        unet = build(torch.bfloat16).to(dtype)
        dora_mm.inject(unet, "sdxl-unet", DoRASpec(rank=4), parts=ALL_PARTS)
        for seed, layer in enumerate(adapted_layers(unet).values()):
            reference.randomize(layer, seed=seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.float32):
            y = predict(unet, dtype)
        y.float().square().sum().backward()
        found = adapter_parameters(unet).values()
        assert all(p.grad.dtype == p.dtype for p in found)
        gradients.append(torch.cat([p.grad.double().flatten() for p in found]))
    exact, half = gradients
    assert torch.nn.functional.cosine_similarity(exact, half, dim=0) > 0.998


def test_a_copied_state_gives_the_same_predictions():
    unet = build()
    dora_mm.inject(unet, "sdxl-unet", DoRASpec(rank=4), parts=ALL_PARTS)
    for layer in adapted_layers(unet).values():
        reference.randomize(layer)
    twin = build()
    dora_mm.inject(twin, "sdxl-unet", DoRASpec(rank=4), parts=ALL_PARTS, seed=1)
    twin.load_state_dict(unet.state_dict())
    with torch.no_grad():
        expected = predict(unet)
        assert torch.equal(predict(twin), expected)
        assert torch.equal(predict(copy.deepcopy(unet)), expected)


def test_inference_builds_each_weight_once():
    """Inside `fixed_parameters`, a pass costs what the base model's does: nothing is built after the first one."""
    unet, counts = build(), []

    def count_operations():
        with FlopCounterMode(display=False) as counter:
            predict(unet)
        counts.append(counter.get_total_flops())

    with torch.no_grad():
        count_operations()
        dora_mm.inject(unet, "sdxl-unet", DoRASpec(rank=4))
        with fixed_parameters(unet):
            for _ in range(3):
                count_operations()
    base, first, *later = counts
    building = sum(2 * 4 * layer.weight.numel() for layer in adapted_layers(unet).values())  # V = W0 + B A, of rank 4
    assert (first, *later) == (base + building, base, base)
