"""All parts of the maps on tiny vision-language models: a gradient reaches every layer, but for those named here."""

import re

import pytest
import torch

import dora_mm
from dora_mm import DoRASpec, adapter_parameters, targets
from dora_mm.core import adapted_layers
from dora_mm.core.targets import parts_in
from tests.shared import reference
from tests.shared.vl import tiny_vlm as tiny
from tests.shared.vl.tiny_passes import load, noise, scores

LAST_BLOCK = {"model.vision_tower.encoder.layers.1.mlp.fc1", "model.vision_tower.encoder.layers.1.mlp.fc2"}
LAST_BLOCK |= {f"model.vision_tower.encoder.layers.1.self_attn.{name}_proj" for name in ("q", "k", "v", "out")}
UNREACHED = {"llava": LAST_BLOCK}  # its features are those of the block before


@pytest.mark.parametrize("name", tiny.NAMES)
def test_gradients_reach_every_layer(tiny_vlm, name):
    model, processor = load(tiny_vlm(name))
    chosen = targets.map_of(model)
    report = dora_mm.inject(model, chosen, DoRASpec(rank=2), parts=parts_in(model, chosen))
    called = set()
    for seed, (path, layer) in enumerate(adapted_layers(model).items()):
        reference.randomize(layer, seed=seed)
        layer.register_forward_hook(lambda *_, path=path: called.add(path))
    total = scores(name, model, processor, noise(0)).square().sum()
    assert called == {module.path for module in report.modules}
    trained = adapter_parameters(model)
    gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    without = [n for n, g in zip(trained, gradients, strict=True) if g is None or not g.any()]
    assert {re.sub(r"\.(lora_A|lora_B|magnitude)$", "", n) for n in without} == UNREACHED.get(name, set())
