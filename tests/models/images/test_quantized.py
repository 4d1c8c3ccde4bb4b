"""Denoisers of all families with quantised layers, where bitsandbytes and torchao are installed (make test-slow)."""

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

import dora_mm
from dora_mm import DoRASpec
from dora_mm.config.losses import LossConfig
from dora_mm.config.models import ModelConfig
from dora_mm.core.targets import match_modules
from dora_mm.core.wrappers.float8 import Float8Linear
from dora_mm.core.wrappers.quantized import dequantized, is_quantized
from dora_mm.data.images.buckets import Framing
from dora_mm.models.images.families import load_image_model
from dora_mm.models.quantization import QUANTIZATIONS, PlannedLinear, check_installed, planned_bytes, quantize_layers
from dora_mm.preview.training import num_bytes
from dora_mm.tasks.diffusion import ConditionedLatents, DiffusionTask
from tests.shared.images.tiny_flows import FLOWS, NAMES

PACKAGES = {name: kind.package for name, kind in QUANTIZATIONS.items() if kind.package}
FAMILIES = ["sdxl", *NAMES]
ERRORS = {"int8": 0.02, "torchao_int8": 0.02, "nf4": 0.2, "fp4": 0.25}  # of a weight, as a share of its length


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tiny_folder, tmp_path_factory):
    if request.param == "sdxl":
        return tiny_folder
    flow = next(flow for flow in FLOWS if flow.name == request.param)
    return flow.build(tmp_path_factory.mktemp(flow.name) / "model")


@pytest.fixture(params=PACKAGES)
def name(request):
    pytest.importorskip(PACKAGES[request.param])
    return request.param


def denoiser_of(folder, name=None, **settings):
    model = load_image_model(ModelConfig(path=str(folder), quantization=name), **settings)
    return model, model.networks[model.denoiser]


def test_the_file_of_a_quantised_denoiser_is_let_go(tiny_folder):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not show what a process maps")
    file = str(tiny_folder / "unet" / "diffusion_pytorch_model.safetensors")
    dense = denoiser_of(tiny_folder)
    assert file in maps.read_text()
    del dense
    gc.collect()
    kept = denoiser_of(tiny_folder, "float8")
    assert file not in maps.read_text()
    del kept


@pytest.mark.slow
def test_the_linear_layers_of_all_parts_are_quantised_and_planned_as_large_as_they_are(folder, name):
    model, network = denoiser_of(folder, name)
    _, dense = denoiser_of(folder)
    targets = model.target_maps[model.denoiser]
    taken = match_modules(dense, targets.select(list(targets.parts)))
    expected = {path for path in taken if type(dense.get_submodule(path)) is nn.Linear}
    assert {path for path, layer in network.named_modules() if is_quantized(layer)} == expected
    for path in expected:
        W, found = dense.get_submodule(path).weight, dequantized(network.get_submodule(path))
        assert (found - W).norm() < ERRORS[name] * W.norm(), path
    _, planned = denoiser_of(folder, name, empty=True)
    sizes = planned_bytes(planned)
    assert len(sizes) == len(expected)
    for path in expected:
        layer = planned.get_submodule(path)
        assert isinstance(layer, PlannedLinear)
        assert layer.dense().dtype == dequantized(network.get_submodule(path)).dtype
        found = num_bytes([network.get_submodule(path).weight])
        assert sizes[id(layer.weight)] == pytest.approx(found, rel=0.05, abs=8 * layer.out_features)


@pytest.mark.slow
def test_adapters_learn_and_a_fresh_one_changes_what_rounding_does(folder, name):
    model, network = denoiser_of(folder, name)
    prompts = model.encode_prompts(["a red ball", "a cat"])
    generator = torch.Generator().manual_seed(0)
    channels = 16 if getattr(model, "patch", 2) == 1 else 4
    x, t = torch.randn(2, channels, 8, 8, generator=generator), model.noise.times(torch.tensor([0.3, 0.7]), (8, 8))
    framings = [Framing((64, 64), (64, 64), 0, 0, (64, 64), False)] * 2
    with torch.no_grad():
        before = model.predict(x, t, prompts, framings)
        dora_mm.inject(network, model.target_maps[model.denoiser], DoRASpec(rank=2))
        error = (model.predict(x, t, prompts, framings) - before).norm() / before.norm()
    assert error < (0.05 if name == "int8" else 1e-4)  # bitsandbytes rounds its inputs to 8 bits, too
    trained = dora_mm.adapter_parameters(network)
    task, optimizer, losses = DiffusionTask(model, LossConfig()), torch.optim.AdamW(trained.values(), lr=0.02), []
    for _ in range(4):
        loss = task.loss(ConditionedLatents(x, prompts, framings), torch.Generator().manual_seed(1)).mean
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    dora_mm.set_strength(network, 0.0)
    with torch.no_grad():
        assert torch.equal(model.predict(x, t, prompts, framings), before)


def test_without_its_package_one_sentence_says_what_to_install(tiny_folder, monkeypatch):
    monkeypatch.setattr("dora_mm.models.quantization.find_spec", lambda name: None)
    for name, package in PACKAGES.items():
        said = rf"^model\.quantization {name} needs {package} 0\.\d+ or newer: pip install 'dora_mm\[quant\]'$"
        with pytest.raises(ValueError, match=said):
            load_image_model(ModelConfig(path=str(tiny_folder), quantization=name))
        load_image_model(ModelConfig(path=str(tiny_folder), quantization=name), empty=True)  # a dry run needs none


def test_a_package_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr("dora_mm.models.quantization.find_spec", lambda name: name)
    monkeypatch.setattr("dora_mm.models.quantization.version", lambda name: "0.46.1")
    with pytest.raises(ValueError, match=r"int8 needs bitsandbytes 0\.48 or newer"):
        check_installed("int8")
    check_installed("torchao_int8")


def test_what_stands_for_4_bits_is_counted_as_such():
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(64, 96)).to(torch.bfloat16)
    targets = dora_mm.TargetMap("one", {"all": ("0",)})
    quantize_layers(network, targets, "nf4")
    assert list(planned_bytes(network).values()) == [3172]  # 64 * 96 * 4.13 / 8, rounded up
    assert isinstance(network[0], Float8Linear)
    assert network[0].dense().dtype == torch.bfloat16
    dora_mm.inject(network, targets, DoRASpec(rank=2), backend="torch")
    assert network(torch.empty(3, 64, device="meta", dtype=torch.bfloat16)).shape == (3, 96)
