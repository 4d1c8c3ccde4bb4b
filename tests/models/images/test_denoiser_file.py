"""Denoisers in files of their own, in their authors' names: in 16 bits, and in float8 as ComfyUI writes it."""

import json
import re
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_mm.cli import main
from dora_mm.config.models import ModelConfig
from dora_mm.core.wrappers.float8 import Float8Linear
from dora_mm.formats.adapter_file import find_file
from dora_mm.formats.files.tensor_file import read_metadata
from dora_mm.formats.naming.names import owners
from dora_mm.models.images.families import load_image_model
from dora_mm.registries.image_families import IMAGE_FAMILIES
from tests.shared.images.tiny_flows import FLOWS, PROMPT

NORMS = {  # of both streams of klein, of Z-Image and Krea 2: diffusers' name -> its authors'
    r"transformer_blocks\.(\d+)\.attn\.norm_(q|k)\.weight": r"double_blocks.\1.img_attn.norm.\2.scale",
    r"transformer_blocks\.(\d+)\.attn\.norm_added_(q|k)\.weight": r"double_blocks.\1.txt_attn.norm.\2.scale",
    r"single_transformer_blocks\.(\d+)\.attn\.norm_(q|k)\.weight": r"single_blocks.\1.norm.\2.scale",
    r"(.*\.attention)\.norm_(q|k)\.weight": r"\1.\2_norm.weight",
}
KREA2 = {
    r"transformer_blocks\.(.*)": r"blocks.\1",
    r"text_fusion\.(.*)": r"txtfusion.\1",
    r"txt_in\.norm\.weight": "txtmlp.0.scale",
    r"final_layer\.norm\.weight": "last.norm.scale",
    r"final_layer\.scale_shift_table": "last.modulation.lin",
    r"(.*)\.attn\.norm_(q|k)\.weight": r"\1.attn.qknorm.\2norm.scale",
    r"(.*)\.norm1\.weight": r"\1.prenorm.scale",
    r"(.*)\.norm2\.weight": r"\1.postnorm.scale",
    r"(.*)\.scale_shift_table": r"\1.mod.lin",
}
OF_BLOCKS = r"(double_blocks|single_blocks|blocks|(single_)?transformer_blocks|layers|\w+_refiner)\.\d+\."
FUSED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def norm(name):
    for pattern, own in NORMS.items():
        if found := re.fullmatch(pattern, name):
            own = found.expand(own)
            return own.replace(".q.scale", ".query_norm.scale").replace(".k.scale", ".key_norm.scale")
    return name


def of_krea2(name):
    """The name of a norm or of a table."""
    for pattern, own in KREA2.items():
        name = re.sub(f"^{pattern}$", own, name)
    return name


def authors(layout, state):
    """A transformer's weights by its authors' names, with their stacks of projections, and shift before scale."""
    tables, found, state = owners(layout), {}, dict(state)
    stacks = () if layout == "krea2" else FUSED
    names = {name.path: own for name, own in tables.items()}
    for name in list(state):
        if name not in state:
            continue
        path, _, end = name.rpartition(".")
        block, _, layer = path.rpartition(".")
        if stack := next((one for one in stacks if layer in one), None):
            rows = [state.pop(f"{block}.{each}.{end}") for each in stack]
            found[f"{names[path]}.{end}"] = torch.cat(rows)
        elif path == "norm_out.linear":
            scale, shift = state.pop(name).chunk(2)
            found[f"{names[path]}.{end}"] = torch.cat([shift, scale])
        elif layout == "krea2" and path not in names:  # of a block the table is a row
            found[of_krea2(name)] = state.pop(name).flatten(0 if "blocks" in name else -1)
        else:
            found[f"{names[path]}.{end}" if path in names else norm(name)] = state.pop(name)
    return found


def stacked(state):
    """The weights of Qwen-Image-2.1 as in ComfyUI, where the gate of a block is stacked on what it gates."""
    found = dict(state)
    for name in [name for name in state if ".gate_layer." in name]:
        rows = [found.pop(name), found.pop(name.replace("gate_layer", "proj"))]
        found[name.replace("gate_layer", "gate_up")] = torch.cat(rows)
    return found


def in_float8(state, spelling):
    """Weights of blocks in float8, each with one scale, as these files have them."""
    found, layers = {}, {}
    for key, tensor in state.items():
        if tensor.ndim != 2 or not re.match(OF_BLOCKS, key):
            found[key] = tensor
            continue
        layer = key.removesuffix(".weight")
        scale = tensor.abs().max() / 448
        found[key] = (tensor / scale).to(torch.float8_e4m3fn)
        form = {"format": "float8_e4m3fn"}
        layers[layer] = form
        if spelling == "scale_weight":
            found |= {f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.ones(())}
        else:
            found |= {f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.ones(())}
        if spelling == "comfy_quant":
            found[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(json.dumps(form).encode()), dtype=torch.uint8)
    if spelling == "scale_weight":
        found["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    return found, {"_quantization_metadata": json.dumps({"layers": layers})} if spelling == "header" else None


@dataclass
class Published:
    """A model whose folder lacks the weights of its denoiser, and these by their authors' names."""

    flow: object
    folder: object
    own: dict
    state: dict
    half: dict

    def load(self, file, *, empty=False, **settings):
        return load_image_model(ModelConfig(path=str(self.folder), denoiser=str(file), **settings), empty=empty)


def dtypes_of(state):
    return {name: tensor.dtype for name, tensor in state.items()}


READ = [flow for flow in FLOWS if IMAGE_FAMILIES[flow.name].denoiser]


@pytest.fixture(scope="module", params=READ, ids=[flow.name for flow in READ])
def published(request, tmp_path_factory):
    flow = request.param
    folder = flow.build(tmp_path_factory.mktemp(flow.name) / "model")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    half = flow.plain(folder, dtype=torch.bfloat16).transformer.state_dict()
    weights.unlink()
    # Qwen-Image's authors have diffusers' names, and so has ComfyUI of 2.1 but for one stack
    layout = {"z_image": "z-image", "flux2_klein": "flux2", "krea2": "krea2"}.get(flow.name)
    own = stacked(state) if flow.name == "qwen_image_21" else authors(layout, state) if layout else state
    return Published(flow, folder, own, state, half)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_in_the_authors_names_is_the_denoiser(published, tmp_path, prefix):
    assert (published.own.keys() == published.state.keys()) == (published.flow.name == "qwen_image")
    save_file({prefix + key: tensor.clone() for key, tensor in published.own.items()}, tmp_path / "a.safetensors")
    network = published.load(tmp_path / "a.safetensors").transformer
    found = network.state_dict()
    assert found.keys() == published.state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in published.state.items())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    half = published.load(tmp_path / "a.safetensors", dtype="bfloat16").transformer
    assert dtypes_of(half.state_dict()) == dtypes_of(published.half)
    assert all(torch.equal(tensor, published.half[name]) for name, tensor in half.state_dict().items())
    assert (torch.float32 in dtypes_of(published.half).values()) == (published.flow.name == "krea2")
    planned = published.load(tmp_path / "a.safetensors", dtype="bfloat16", empty=True).transformer
    assert dtypes_of(planned.state_dict()) == dtypes_of(published.half)
    with pytest.raises(ValueError, match=rf"is the denoiser of {published.flow.title} alone: set model\.denoiser="):
        load_image_model(ModelConfig(path=str(tmp_path / "a.safetensors")))


@pytest.mark.parametrize("spelling", ["header", "comfy_quant", "scale_weight"])
def test_float8_with_scales_is_what_the_file_means(published, tmp_path, spelling):
    stored, header = in_float8(published.own, spelling)
    save_file({key: tensor.clone() for key, tensor in stored.items()}, tmp_path / "a.safetensors", header)
    dense = published.load(tmp_path / "a.safetensors").transformer
    for name, tensor in dense.state_dict().items():
        wanted = published.state[name]
        if wanted.ndim == 2 and name.endswith(".weight") and re.match(OF_BLOCKS, name):
            assert not torch.equal(tensor, wanted)
            assert (tensor - wanted).abs().max() <= wanted.abs().max() / 16
        else:
            assert torch.equal(tensor, wanted), name
    kept = published.load(tmp_path / "a.safetensors", quantization="float8").transformer
    layers = {path: layer for path, layer in kept.named_modules() if isinstance(layer, Float8Linear)}
    assert layers
    bytes_of = {tensor.view(torch.uint8).numpy().tobytes() for tensor in stored.values() if tensor.element_size() == 1}
    assert any(layer.weight.view(torch.uint8).numpy().tobytes() in bytes_of for layer in layers.values())
    for path, layer in layers.items():  # others are stored so now
        if re.match(OF_BLOCKS, path):
            assert torch.equal(layer.dense(), dense.get_submodule(path).weight), path


def test_files_of_other_models_and_forms_are_refused(published, tmp_path):
    file = tmp_path / "a.safetensors"
    wrong = dict(published.own)
    lost = wrong.pop(max(wrong, key=lambda key: wrong[key].numel()))
    save_file({key: tensor.clone() for key, tensor in wrong.items()}, file)
    with pytest.raises(ValueError, match=r"model\.denoiser: .* cannot be loaded: it is of another model and lacks"):
        _ = published.load(file).transformer
    save_file({key: tensor.clone() for key, tensor in published.own.items()} | {"new.weight": lost.clone()}, file)
    with pytest.raises(ValueError, match=r"which has 1 other tensors, such as new\.weight"):
        _ = published.load(file).transformer
    stored, _ = in_float8(published.own, "plain")
    form = torch.frombuffer(bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    save_file({key: tensor.clone() for key, tensor in stored.items()} | {"a.comfy_quant": form}, file)
    with pytest.raises(ValueError, match=r"it has weights as nvfp4, which are not read: use one in 16 bits"):
        _ = published.load(file).transformer


@pytest.mark.slow
def test_a_training_over_a_file_says_so_and_is_drawn_with_it(published, tmp_path, image_folder, capsys):
    file = tmp_path / "model.safetensors"
    save_file({key: tensor.clone() for key, tensor in published.own.items()}, file)
    config = {
        "pipeline": "train_diffusion",
        "output": str(tmp_path / "run"),
        "model": {"path": str(published.folder), "denoiser": str(file)},
        "adapter": {"rank": 2, "parts": ["transformer.attn"]},
        "data": {"folder": str(image_folder), "resolution": 64},
        "optimizer": {"lr": 0.1},
        "train": {"steps": 1, "batch_size": 2},
    }
    (tmp_path / "train.yaml").write_text(json.dumps(config))
    assert main(["train", str(tmp_path / "train.yaml")]) == 0
    adapter = tmp_path / "run" / "adapter"
    assert json.loads(read_metadata(find_file(adapter))["base_settings"]) == {"denoiser": str(file)}
    job = [
        "sample",
        "--set",
        f"adapter.path={tmp_path / 'run'}",
        f"prompts=[{PROMPT}]",
        "steps=1",
        "contact_sheet=false",
    ]
    assert main([*job, f"output={tmp_path / 'job'}"]) == 0
    image = tmp_path / "job" / "samples" / "0001-seed0.png"
    assert main(["sample", "--replay", str(image), "--set", f"output={tmp_path / 'again'}"]) == 0
    capsys.readouterr()
    if published.flow.name != "qwen_image_21":  # of which formats/naming has no layout: verify reads folders alone
        assert main(["verify", str(adapter), "--tool", "diffusers", "--json"]) == 0
        (verdict,) = json.loads(capsys.readouterr().out)
        assert set(verdict["findings"]) == {"right"}
    save_file({key: 2 * tensor for key, tensor in published.own.items()}, file)
    assert main(["sample", "--replay", str(image), "--set", f"output={tmp_path / 'other'}"]) == 2
    assert "has changed since the image was generated" in capsys.readouterr().err
