"""The memory of trainings on images without a step, beside the measured peak of a step on a CPU."""

import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, ZImageTransformer2DModel
from torch import nn

from dora_mm import DoRASpec, adapter_parameters, inject, targets
from dora_mm.cli import main
from dora_mm.config import load_config
from dora_mm.core import fixed_parameters
from dora_mm.models.quantization import QUANTIZATIONS, quantize_layers
from dora_mm.preview.simulation import Machine, simulated_peak
from dora_mm.utils.losses import LossSum
from tests.shared import full_size_folders as full_size
from tests.shared.full_size import FULL_SIZE
from tests.shared.peaks import peak_bytes

CUDA = 1.0  # GB that a process takes of a GPU beside its tensors, an estimate

SDXL = FULL_SIZE | {
    "block_out_channels": (64, 128, 256),
    "norm_num_groups": 16,
    "attention_head_dim": (1, 2, 4),
    "transformer_layers_per_block": (1, 2, 4),
    "cross_attention_dim": 256,
    "projection_class_embeddings_input_dim": 6 * FULL_SIZE["addition_time_embed_dim"] + 128,
}
Z_IMAGE = {"dim": 256, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4, "cap_feat_dim": 128}
Z_IMAGE |= {"axes_dims": (16, 24, 24), "axes_lens": (512, 128, 128), "in_channels": 4}
CASES = [  # family, latents along a side, images, bf16, checkpointing
    ("z_image", 32, 1, False, True),
    ("z_image", 32, 1, True, False),
    pytest.param("sdxl", 32, 1, True, True, marks=pytest.mark.slow),
    *(
        pytest.param(family, side, batch, half, checkpointing, marks=pytest.mark.slow)
        for family in ("sdxl", "z_image")
        for side, batch in ((32, 3), (64, 1), (64, 3))
        for half in (False, True)
        for checkpointing in (False, True)
    ),
]


@pytest.mark.parametrize(("family", "side", "batch", "half", "checkpointing"), CASES)
def test_the_estimate_is_near_to_the_measured_peak_of_a_step(family, side, batch, half, checkpointing):
    measured, estimated = (peak_of(family, side, batch, half, checkpointing, device) for device in ("cpu", "meta"))
    assert measured * 0.85 < estimated < measured * 1.15


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_so_it_is_over_quantized_layers(name, checkpointing):
    if package := QUANTIZATIONS[name].package:
        pytest.importorskip(package)
    measured, estimated = (peak_of("z_image", 32, 1, True, checkpointing, device, name) for device in ("cpu", "meta"))
    assert measured * 0.85 < estimated < measured * 1.15


def peak_of(
    family: str, side: int, batch: int, half: bool, checkpointing: bool, device: str, quantized: str | None = None
) -> int:
    """The bytes of a step: measured on the processor, estimated on the meta device."""
    torch.manual_seed(0)
    dtype, is_sdxl = torch.bfloat16 if half else torch.float32, family == "sdxl"
    with torch.device(device):
        network: Any = UNet2DConditionModel(**SDXL) if is_sdxl else ZImageTransformer2DModel(**Z_IMAGE)
        nn.Module.to(network.requires_grad_(False), dtype)
        inputs = inputs_of(network, side, batch)
    chosen = targets.find("sdxl-unet" if is_sdxl else "z-image")
    if quantized:
        quantize_layers(network, chosen, quantized)
    inject(network, targets=chosen, spec=DoRASpec(8), backend="torch")
    network.train()
    if checkpointing:
        network.enable_gradient_checkpointing()

    def loss(_: Any = None) -> LossSum:
        found = network(**inputs)[0]
        found = found if is_sdxl else torch.stack(found)
        return LossSum(found.float().square().mean(), torch.ones(()))

    if device == "meta":
        return simulated_peak({"network": network}, loss, None, 1, Machine(dtype=dtype if half else None))
    for name, parameter in adapter_parameters(network).items():
        parameter.data += 0.01 * name.endswith("lora_B")  # fresh adapters take less
    autocast = torch.autocast("cpu", dtype) if half else nullcontext()

    def step() -> None:
        with autocast:
            total = loss().total
        total.backward()

    with fixed_parameters(network, num_passes=1):
        return peak_bytes(step)


def inputs_of(network: Any, side: int, batch: int) -> dict[str, Any]:
    if isinstance(network, ZImageTransformer2DModel):
        rows, text = torch.randn(batch, 4, 1, side, side, dtype=network.dtype), torch.randn(batch, 40, 128)
        return {
            "x": list(rows),
            "t": torch.full((batch,), 0.5),
            "cap_feats": list(text.to(network.dtype)),
            "return_dict": False,
        }
    added = {"text_embeds": torch.randn(batch, 128), "time_ids": torch.zeros(batch, 6)}
    states = torch.randn(batch, 77, 256, dtype=network.dtype)
    more = {"encoder_hidden_states": states, "added_cond_kwargs": added, "return_dict": False}
    return {"sample": torch.randn(batch, 4, side, side), "timestep": torch.full((batch,), 500), **more}


ENCODED = (("longest", "tokens"), ("encoded", "MB"))
SIZES = ("_24gb", "_16gb", "_12gb", "_8gb")
OF_FLOWS = {
    "z_image": ("", "_12gb", "_8gb"),
    "flux2_klein": ("", "_12gb", "_8gb"),
    "qwen_image": ("", "_32gb", "_24gb", "_8gb"),
    "qwen_image_21": ("", "_12gb"),
    "krea2": ("", "_24gb", "_16gb", "_12gb"),
    "sd3": ("", "_8gb"),
}
RECIPES = ["sdxl/3d_icon", *(f"sdxl/3d_icon{size}" for size in SIZES), "sdxl/lego"]
RECIPES += [f"{family}/style{size}" for family, sizes in OF_FLOWS.items() for size in sizes]
RECIPES += [f"qwen_image_edit/edit{size}" for size in ("", "_48gb", "_24gb", "_12gb")]


@pytest.fixture(scope="module")
def full_models(tmp_path_factory):
    return {name: full_size.MAKERS[name](tmp_path_factory.mktemp(name) / "model") for name in full_size.MAKERS}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU a step is measured")
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_heads_of_the_recipes_have_what_the_dry_run_says(recipe, full_models, tmp_path, capsys):
    family = recipe.partition("/")[0]
    quantization = load_config(f"configs/{recipe}.yaml").model.quantization
    if quantization and QUANTIZATIONS[quantization].package:
        pytest.importorskip(QUANTIZATIONS[quantization].package)
    given = [f"model.path={full_models[family]}", "model.vae=null"]
    given += ["data.folder=samples/3d_icon"] if family != "sdxl" else []
    if family == "qwen_image_edit":
        shutil.copytree("samples/3d_icon", tmp_path / "before", ignore=shutil.ignore_patterns("*.jsonl", "*.md"))
        given.append(f"data.references=[{tmp_path / 'before'}]")
    assert main(["train", f"configs/{recipe}.yaml", "--dry-run", "--set", *given]) == 0
    page = capsys.readouterr().out
    together = float(re.findall(r"^together .* ([\d,.]+)$", page, re.M)[0].replace(",", ""))
    head = re.sub(r"\n# ?", " ", (Path("configs") / f"{recipe}.yaml").read_text().partition("\npipeline")[0])
    assert f"steps take {together / 1e3:.1f} GB" in head
    size = re.search(r"GPU of (\d+) GB", head)
    assert size is None or together / 1e3 + CUDA < int(size[1])
    if recipe == "z_image/style_12gb":  # 6.157 billion numbers
        before = r"^transformer in bfloat16 in main memory, before it is stored in float8 .* ([\d,]+)\."
        assert 12_310 < int(re.findall(before, page, re.M)[0].replace(",", "")) < 12_330
    else:
        assert ("before it is stored in" in page) == (
            "quantization:" in (Path("configs") / f"{recipe}.yaml").read_text()
        )
    if family == "krea2":  # of each token it keeps twelve states of 2,560 numbers in bfloat16
        (longest,), (kept,) = (re.findall(rf"^{word} .*? ([\d.]+) {unit}", page, re.M) for word, unit in ENCODED)
        assert 0.8 < float(kept) * 1e6 / (23 * int(longest) * 12 * 2560 * 2) <= 1  # of 23 captions


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "sdxl/lego"])
def test_the_first_hour_has_the_numbers_of_the_heads(recipe):
    head = re.sub(r"\n# ?", " ", (Path("configs") / f"{recipe}.yaml").read_text().partition("\npipeline")[0])
    steps = re.findall(r"steps take ([\d.]+) GB", head)[0]
    row = re.findall(rf"^\| `{recipe}` \| ([\d.]+)", Path("docs/first_hour.md").read_text(), re.M)
    assert row == [steps]
