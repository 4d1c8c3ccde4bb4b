"""What `verify` says of files: the table of measured errors, and what it finds in each layer."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_mm
from dora_mm.core.spec import DoRASpec
from dora_mm.formats.algebra import exact
from dora_mm.formats.naming.names import Name
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools.parts import kohya_tensors
from dora_mm.registries.tools import other_tools

MODULES = [f"down_blocks.{i}.attentions.{j}.transformer_blocks.0.attn2.to_k" for i in (1, 2) for j in (0, 1)]
OUT_96, SQUARE = (96, 64), (64, 64)


def random_base(shape):
    return {
        Name("unet", path): torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[1] ** 0.5
        for seed, path in enumerate(MODULES)
    }


def random_layer(W0, seed):
    """An adapter of rank 8 and alpha 4, as in facts/formats.md."""
    g = torch.Generator().manual_seed(100 + seed)
    out, inner = W0.shape
    tensors = {
        "lora_A": (torch.rand(8, inner, generator=g) * 2 - 1) / inner**0.5,
        "lora_B": 0.52 * torch.randn(out, 8, generator=g),
        "magnitude": W0.norm(dim=1) * (1 + 0.055 * torch.randn(out, generator=g)),
    }
    return LayerState(DoRASpec(8, 4.0), tensors)


def write_kohya(path, base, change=lambda layer, W0: layer, flat=False, drop=()):
    tensors = {}
    for seed, (name, W0) in enumerate(base.items()):
        found = kohya_tensors(change(random_layer(W0, seed), W0))
        if flat:
            found["dora_scale"] = found["dora_scale"].flatten()
        prefix = f"lora_unet_{name.path.replace('.', '_')}"
        tensors |= {f"{prefix}.{end}": t.contiguous() for end, t in found.items() if end not in drop}
    save_file(tensors, path)
    return path


def for_comfy(layer, W0):
    g = exact.gain(layer, W0).flatten()
    return LayerState(layer.spec, {**layer.tensors, "magnitude": g * W0.norm(dim=1)})


@pytest.mark.parametrize(
    ("tool", "finding", "measured"),
    [  # for 96 x 64 and 64 x 64, as measured with the tools' own loaders
        ("kohya", "right", (3e-7, 3e-7)),
        ("comfy", "differs", (0.277, 0.296)),
        ("a1111", "wrong axis", (0.522, 0.331)),
        ("invokeai", "wrong axis", (0.522, 0.331)),
        ("sdnext", "right", (3e-7, 3e-7)),
        ("diffusers", "loses the magnitude", (0.295, 0.328)),
        ("peft", "not known to this tool", (1.0, 1.0)),
    ],
)
@pytest.mark.parametrize("shape", [OUT_96, SQUARE], ids=str)
def test_the_measured_table(tool, finding, measured, shape, tmp_path):
    base = random_base(shape)
    (verdict,) = dora_mm.verify(write_kohya(tmp_path / "a.safetensors", base), tool, base)
    assert dict(verdict.findings) == {finding: 4}
    wanted = measured[0 if shape == OUT_96 else 1]
    if finding == "right":
        assert verdict.error < 2e-6
    else:
        assert verdict.error == pytest.approx(wanted, rel=0.15)


@pytest.mark.parametrize(("shape", "measured"), [(OUT_96, 0.237), (SQUARE, 0.250)], ids=["96x64", "64x64"])
def test_a_magnitude_for_comfyui_is_wrong_elsewhere(shape, measured, tmp_path):
    base = random_base(shape)
    header = {"dora_mm_target": "comfy"}
    file = write_kohya(tmp_path / "a.safetensors", base, for_comfy)
    save_file(load_file(file), file, metadata=header)
    verdicts = {verdict.tool: verdict for verdict in dora_mm.verify(file, "all", base)}
    assert tuple(verdicts) == other_tools()
    assert tuple(verdicts)[:4] == ("comfy", "diffusers", "forge", "kohya")  # those that most people use
    assert [verdict.tool for verdict in dora_mm.verify(file, "ComfyUI", base)] == ["comfy"]
    assert verdicts["comfy"].error < 1e-6
    assert verdicts["sdnext"].error == pytest.approx(measured, rel=0.15)
    reasons = {layer.reason for layer in verdicts["sdnext"].layers}
    assert reasons == {"divides by another norm; the magnitudes of this file need the norm of W0"}
    assert {layer.reason for layer in verdicts["comfy"].layers} == {""}


def test_a_flat_magnitude(tmp_path):
    base = random_base(OUT_96)
    (verdict,) = dora_mm.verify(write_kohya(tmp_path / "a.safetensors", base, flat=True), "comfy", base)
    assert dict(verdict.findings) == {"fails": 4}
    assert math.isinf(verdict.error)
    assert json.loads(json.dumps(verdict.as_dict(), allow_nan=False))["error"] is None
    base = random_base(SQUARE)
    file = write_kohya(tmp_path / "b.safetensors", base, flat=True)
    with pytest.raises(ValueError, match="fits the output rows and the input columns .* --axis out or --axis in"):
        dora_mm.verify(file, "comfy", base)
    (verdict,) = dora_mm.verify(file, "comfy", base, axis="out")
    assert dict(verdict.findings) == {"wrong axis": 4}
    assert verdict.error == pytest.approx(0.479, rel=0.15)


def test_modules_that_a_tool_does_not_know_are_counted(tmp_path):
    base = random_base(OUT_96)
    file = write_kohya(tmp_path / "a.safetensors", base)
    tensors = load_file(file)
    old = f"lora_unet_{MODULES[0].replace('.', '_')}"
    own = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k"
    save_file({key.replace(old, own): tensor for key, tensor in tensors.items()}, file)
    found = {verdict.tool: dict(verdict.findings) for verdict in dora_mm.verify(file, "all", base)}
    assert found["comfy"] == {"differs": 4}
    assert found["kohya"] == {"right": 3, "not known to this tool": 1}
    assert found["peft"] == {"not known to this tool": 4}


def test_modules_that_the_base_lacks_are_counted(tmp_path):
    base = random_base(OUT_96)
    file = write_kohya(tmp_path / "a.safetensors", base)
    del base[Name("unet", MODULES[0])]
    (verdict,) = dora_mm.verify(file, "LyCORIS", base)  # another name of it
    assert dict(verdict.findings) == {"not in the base": 1, "right": 3}
    assert verdict.error < 2e-6
    assert [layer["error"] is None for layer in verdict.as_dict()["layers"]] == [True, False, False, False]


def test_a_result_that_is_not_finite(tmp_path):
    """A row of zeros has no norm; AUTOMATIC1111 divides by it without an epsilon."""
    base = random_base(SQUARE)
    file = write_kohya(tmp_path / "a.safetensors", base)
    tensors = load_file(file)
    for key in tensors:
        if key.endswith("lora_down.weight"):
            tensors[key][:, 0] = 0
    save_file(tensors, file)
    for W0 in base.values():
        W0[:, 0] = 0
    (verdict,) = dora_mm.verify(file, "a1111", base)
    assert dict(verdict.findings) == {"not finite": 4}
    assert math.isnan(verdict.error)


@pytest.mark.parametrize("drop", [(), ("dora_scale",)], ids=["dora", "lora"])
def test_norms_that_overflow_are_not_right(drop, tmp_path):
    """With alpha 1e38 the norm of V is infinite in fp32: W' was 0 in the file and in OneTrainer, which was right."""
    base = random_base(OUT_96)
    file = write_kohya(tmp_path / "a.safetensors", base, drop=drop)
    tensors = {key: torch.tensor(1e38) if key.endswith("alpha") else t for key, t in load_file(file).items()}
    save_file(tensors, file)
    for verdict in dora_mm.verify(file, "all", base):
        assert verdict.findings["right"] == 0
    (verdict,) = dora_mm.verify(file, "onetrainer", base)
    assert dict(verdict.findings) == {"not finite": 4}


def test_what_is_not_judged_is_named(tmp_path):
    base = random_base(OUT_96)
    file = write_kohya(tmp_path / "a.safetensors", base)
    tensors = load_file(file)
    module = f"lora_unet_{MODULES[0].replace('.', '_')}"
    own = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    again = {key.replace(module, own): tensor.clone() for key, tensor in tensors.items() if key.startswith(module)}
    save_file({**tensors, **again, "unet.bias": torch.zeros(3)}, file)
    (verdict,) = dora_mm.verify(file, "kohya", base)
    assert "1 tensors that belong to no adapter, such as unet.bias, are not judged" in verdict.note
    assert f"unet.{MODULES[0]} is adapted twice" in verdict.note


def test_mistakes(tmp_path):
    base = random_base(OUT_96)
    file = write_kohya(tmp_path / "a.safetensors", base)
    with pytest.raises(ValueError, match="there is no tool 'comfyuj': use all or one of"):
        dora_mm.verify(file, "comfyuj", base)
    with pytest.raises(ValueError, match="verify needs the base model"):
        dora_mm.verify(file, "kohya")
    with pytest.raises(ValueError, match="a.safetensors.*mid_block|a.safetensors.*no .*module|a.safetensors.*attn2"):
        dora_mm.verify(file, "kohya", {Name("unet", "mid_block.attentions.0.proj_in"): torch.zeros(4, 4)})
    write_kohya(file, random_base(SQUARE))
    with pytest.raises(ValueError, match="a.safetensors: lora_unet_down_blocks.*shape .* for another model"):
        dora_mm.verify(file, "kohya", base)
