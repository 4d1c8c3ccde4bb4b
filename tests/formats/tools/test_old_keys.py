"""Keys that people's files have beside those that today's tools write: what loads means what the file says."""

import re

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import nn

from dora_mm import load_adapter, merge
from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.commands.inspection import inspect_file
from dora_mm.formats.commands.verify import verify
from dora_mm.formats.naming.names import Name
from tests.shared import toy

PATH = f"{toy.BLOCK}.attn1.to_q"
OUT = f"{toy.BLOCK}.attn1.to_out.0"
A, B = toy.wave((2, 16), 1).float(), toy.wave((16, 2), 2).float()


def lora(key_A, key_B):
    return {key_A: A.clone(), key_B: B.clone()}


SDXL = {
    "no prefix": lora(f"{PATH}.lora_A.weight", f"{PATH}.lora_B.weight"),
    "default": lora(f"unet.{PATH}.lora_A.default.weight", f"unet.{PATH}.lora_B.default.weight"),
    "no prefix, default": lora(f"{PATH}.lora_A.default.weight", f"{PATH}.lora_B.default.weight"),
    "lora.down": lora(f"unet.{PATH}.lora.down.weight", f"unet.{PATH}.lora.up.weight"),
    "no prefix, lora.down": lora(f"{PATH}.lora.down.weight", f"{PATH}.lora.up.weight"),
    "processor": lora(
        f"unet.{toy.BLOCK}.attn1.processor.to_q_lora.down.weight",
        f"unet.{toy.BLOCK}.attn1.processor.to_q_lora.up.weight",
    ),
    "no config": lora(f"base_model.model.{PATH}.lora_A.weight", f"base_model.model.{PATH}.lora_B.weight"),
    "lora_linear_layer": lora(f"unet.{PATH}.lora_linear_layer.down.weight", f"unet.{PATH}.lora_linear_layer.up.weight"),
}


@pytest.mark.parametrize("form", SDXL)
def test_it_loads_and_is_inspected(form, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(SDXL[form], path)
    found = inspect_file(path)
    assert found.architecture == "sdxl"
    assert [module.path for module in found.modules] == [PATH]
    model = toy.model()
    W0 = model.get_submodule(PATH).weight.detach().clone()
    load_adapter({"unet": model}, path)
    merge(model, keep_base=False)
    torch.testing.assert_close(model.get_submodule(PATH).weight, W0 + B @ A)


@pytest.mark.parametrize("form", ["default", "lora.down", "processor"])  # of the first it leaves B at 0
def test_diffusers_loads_what_we_say(form, tmp_path):
    """Over a layer of the embedded SDXL, which has another width."""
    pipe = StableDiffusionXLPipeline.from_pretrained("samples/tiny-sdxl")
    W0 = pipe.unet.get_submodule(PATH).weight.detach().float().clone()
    size = W0.shape[0]
    tensors = {
        key: toy.wave((2, size) if re.search("A|down", key.partition("attn1")[2]) else (size, 2), 1).float()
        for key in SDXL[form]
    }
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    (verdict,) = verify(path, "diffusers", {Name("unet", PATH): W0})
    assert dict(verdict.findings) == {"not known to this tool" if form == "default" else "right": 1}
    pipe.load_lora_weights(str(path))
    pipe.fuse_lora()
    first, second = tensors.values()
    down, up = (first, second) if first.shape[0] == 2 else (second, first)
    found = pipe.unet.get_submodule(PATH)
    torch.testing.assert_close(
        found.base_layer.weight.float(), W0 + (0 if form == "default" else up @ down), rtol=1e-3, atol=1e-3
    )


def test_peft_needs_its_config(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(SDXL["no config"], path)
    (verdict,) = verify(path, "peft", {Name("unet", PATH): torch.ones(16, 16)})
    assert dict(verdict.findings) == {"refused": 1}


def test_a_folder_without_a_config_is_read_for_image_networks_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(SDXL["no config"], path)
    assert any("alpha is not in the file" in point for point in inspect_file(path).ambiguous)
    save_file(lora("base_model.model.layers.0.q.lora_A.weight", "base_model.model.layers.0.q.lora_B.weight"), path)
    with pytest.raises(ValueError, match="adapter_config.json is missing beside the file"):
        load_adapter(nn.Linear(2, 2), path)


XLABS = {
    "double_blocks.0.processor.qkv_lora1": [f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv"],
    "double_blocks.0.processor.qkv_lora2": [f"transformer_blocks.0.attn.add_{letter}_proj" for letter in "qkv"],
    "double_blocks.0.processor.proj_lora1": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.processor.proj_lora2": ["transformer_blocks.0.attn.to_add_out"],
    "single_blocks.0.processor.qkv_lora": [f"single_transformer_blocks.0.attn.to_{letter}" for letter in "qkv"],
    "single_blocks.0.processor.proj_lora": ["single_transformer_blocks.0.proj_out"],
}


def test_xlabs(tmp_path):
    """The rows of a stacked projection are those of its parts, with the same A."""
    size, tensors = 4, {}
    for seed, (module, paths) in enumerate(XLABS.items()):
        tensors[f"{module}.down.weight"] = toy.wave((2, size), seed).float()
        tensors[f"{module}.up.weight"] = toy.wave((size * len(paths), 2), seed + 20).float()
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    assert inspect_file(path).architecture == "flux"
    model = nn.Module()
    for module in (p for paths in XLABS.values() for p in paths):
        toy._insert(model, module, torch.zeros(size, size))
    load_adapter({"transformer": model}, path)
    merge(model, keep_base=False)
    for module, paths in XLABS.items():
        W = tensors[f"{module}.up.weight"] @ tensors[f"{module}.down.weight"]
        for part, wanted in zip(paths, W.split(size), strict=True):
            torch.testing.assert_close(model.get_submodule(part).weight, wanted)


@pytest.mark.parametrize(
    ("module", "architecture"),
    [
        ("diffusion_model.blocks.3.self_attn.q", "wan"),
        ("lora_unet_blocks_3_cross_attn_k", "wan"),
        ("transformer.double_blocks.0.img_mlp.fc1", "hunyuan-video"),
        ("diffusion_model.distilled_guidance_layer.in_proj", "chroma"),
        ("layers.0.attention.to_qkv", "z-image"),
        ("diffusion_model.somewhere.else", None),
        ("blocks.0.somewhere.else", None),
    ],
)
def test_the_architecture_is_named_or_unknown(module, architecture, tmp_path):
    save_file(lora(f"{module}.lora_A.weight", f"{module}.lora_B.weight"), tmp_path / "a.safetensors")
    file = "lora_A" if "." in module else "lora_down"
    if file == "lora_down":
        save_file(lora(f"{module}.lora_down.weight", f"{module}.lora_up.weight"), tmp_path / "a.safetensors")
    assert inspect_file(tmp_path / "a.safetensors").architecture == architecture


def test_the_weights_of_a_network_are_no_adapter(tmp_path):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is a model, or a part of one, and no adapter"):
        AdapterFile(tmp_path / "a.safetensors")
