"""The component of a model that is given without a name."""

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dora_mm import DoRASpec, inject, load_adapter, save_adapter
from dora_mm.core import adapted_layers
from dora_mm.formats.components import component_of
from dora_mm.formats.tools.diffusers import FILE_NAME
from tests.shared import reference

UNET = {
    "sample_size": 8,
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "attention_head_dim": 2,
}
FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
    "axes_dims_rope": [4, 4, 8],
}
CLIP = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
CLIP |= {"projection_dim": 8, "bos_token_id": 0, "eos_token_id": 1}


def build(component):
    torch.manual_seed(0)
    models = {
        "unet": lambda: diffusers.UNet2DConditionModel(**UNET),
        "transformer": lambda: diffusers.FluxTransformer2DModel(**FLUX),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**CLIP)),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)),
    }
    return models[component]().eval()


def adapted(component):
    model = build(component)
    inject(model, [r"re:.*\.(to_q|q_proj|to_out\.0|out_proj)"], DoRASpec(rank=2, alpha=3))
    for seed, layer in enumerate(adapted_layers(model).values()):
        reference.randomize(layer, seed=seed)
    return model


def same_adapter(a, b):
    a, b = adapted_layers(a), adapted_layers(b)
    tensors = [(a[path].adapter_tensors(), b[path].adapter_tensors()) for path in a]
    return a.keys() == b.keys() and all(torch.equal(x[name], y[name]) for x, y in tensors for name in x)


@pytest.mark.parametrize("component", ["unet", "transformer", "text_encoder", "text_encoder_2"])
def test_the_class_tells_the_component(component, tmp_path):
    model, other = adapted(component), build(component)
    file = save_adapter(model, tmp_path)
    assert {key.partition(".")[0] for key in load_file(file)} == {component}
    load_adapter(other, file)
    assert same_adapter(model, other)
    named = build(component)
    load_adapter({component: named}, file)
    assert same_adapter(model, named)


@pytest.mark.parametrize(
    "name", ["SD3Transformer2DModel", "CogVideoXTransformer3DModel", "Transformer2DModel", "FluxTransformer2DModel"]
)
def test_transformers_of_diffusers(name):
    kind = getattr(diffusers, name)
    assert component_of(kind.__new__(kind)) == "transformer"
    derived = type(f"FSDP{name}", (kind,), {})  # as FSDP2 does
    assert component_of(derived.__new__(derived)) == "transformer"
    own = type(name, (nn.Module,), {})
    assert component_of(own()) is None


def test_diffusers_needs_the_component_of_other_classes(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, ["0"], DoRASpec(rank=2))
    with pytest.raises(ValueError, match=r'a Sequential does not tell: pass \{"unet": model\}.*format="native"'):
        save_adapter(model, tmp_path, format="diffusers")
    assert not list(tmp_path.iterdir())
    for format in ("peft", "native", None):
        other = nn.Sequential(nn.Linear(4, 4))
        save_adapter(model, tmp_path / str(format), format=format)
        load_adapter(other, tmp_path / str(format))
        assert same_adapter(model, other)


def test_the_format_follows_from_the_model(tmp_path):
    own = nn.Sequential(nn.Linear(4, 4))
    inject(own, ["0"], DoRASpec(rank=2))
    assert save_adapter(own, tmp_path / "own").name == "adapter_model.safetensors"  # PEFT's
    full = nn.Sequential(nn.Linear(4, 4))
    inject(full, ["0"], DoRASpec(rank=2, method="full"))
    assert save_adapter(full, tmp_path / "full").name == "trained_weights.safetensors"  # PEFT has no such method
    assert save_adapter(adapted("unet"), tmp_path / "unet").name == "pytorch_lora_weights.safetensors"


def test_parameters_that_are_trained_and_not_saved_are_named(tmp_path, caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    report = inject(model, ["0"], DoRASpec(rank=2))
    assert report.num_trainable_others == 3
    assert "3 other parameters still require gradients" in str(report)
    save_adapter(model, tmp_path / "some")
    assert "3 trainable parameters outside of the adapter (0.bias, ...) are not saved" in caplog.text
    caplog.clear()
    save_adapter(model, tmp_path / "all", format="native", extra_parameters=["0.bias", "1.weight", "1.bias"])
    model[1].requires_grad_(False)
    model[0].bias.requires_grad_(False)
    save_adapter(model, tmp_path / "frozen")
    assert not caplog.text
    frozen = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    assert "require gradients" not in str(inject(frozen, ["0"], DoRASpec(rank=2)))


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_files_that_call_every_model_unet_still_load(component, tmp_path):
    model, other = adapted(component), build(component)
    tensors = load_file(save_adapter({"unet": model}, tmp_path))
    assert all(key.startswith("unet.") for key in tensors)
    load_adapter(other, tmp_path)
    assert same_adapter(model, other)


def test_a_file_of_several_components_is_not_for_a_single_model(tmp_path):
    model = adapted("unet")
    save_adapter({"unet": model, "text_encoder": adapted("text_encoder")}, tmp_path)
    with pytest.raises(ValueError, match="also adapts text_encoder, but it is being loaded into unet only"):
        load_adapter(build("unet"), tmp_path)
    with pytest.raises(ValueError, match="also adapts .*, but it is being loaded into transformer only"):
        load_adapter(build("transformer"), tmp_path)


def flux_output(transformer):
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 3, 8, generator=generator),
        "pooled_projections": torch.randn(1, 8, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    with torch.no_grad():
        return transformer(**inputs).sample


@pytest.mark.parametrize("through", ["model", "pipeline"])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_diffusers_loads_a_transformer(tmp_path, method, through):
    model, theirs = build("transformer"), build("transformer")
    inject(model, [r"re:.*\.to_q", r"re:.*\.to_out\.0", r"re:.*\.proj_mlp"], DoRASpec(rank=2, alpha=5, method=method))
    for seed, layer in enumerate(adapted_layers(model).values()):
        reference.randomize(layer, seed=seed)
    bare, expected = flux_output(theirs), flux_output(model)
    file = save_adapter({"transformer": model}, tmp_path)
    if through == "model":
        theirs.load_lora_adapter(str(tmp_path), prefix="transformer", weight_name=FILE_NAME)
    else:
        rest = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        diffusers.FluxPipeline(transformer=theirs, scheduler=scheduler, **rest).load_lora_weights(str(tmp_path))
    assert np.abs(flux_output(theirs) - expected).max() <= 1e-5 * expected.abs().max()
    assert (bare - expected).abs().max() > 1e-2
    ours = build("transformer")
    load_adapter(ours, file)
    assert torch.equal(flux_output(ours), expected)


@pytest.mark.parametrize("format", ["diffusers", "peft", "native"])
@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
def test_a_model_that_is_one_layer(tmp_path, format, method):
    torch.manual_seed(0)
    base = nn.Linear(6, 4)
    layer, other = nn.Linear(6, 4), nn.Linear(6, 4)
    for copy in (layer, other):
        copy.load_state_dict(base.state_dict())
    inject(layer, ["re:"], DoRASpec(rank=2, alpha=3, method=method))
    assert list(adapted_layers(layer)) == [""]
    reference.randomize(layer)
    save_adapter({"unet": layer}, tmp_path, format=format)
    x = torch.randn(3, 6)
    load_adapter({"unet": other}, tmp_path)
    assert torch.equal(other(x), layer(x))
    load_adapter(base, tmp_path)
    assert torch.equal(base(x), layer(x))


def test_an_incomplete_file_of_one_layer_names_the_key(tmp_path):
    layer = nn.Linear(6, 4)
    inject(layer, ["re:"], DoRASpec(rank=2))
    file = save_adapter({"unet": layer}, tmp_path)
    tensors = load_file(file)
    del tensors["unet.lora_B.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match="unet: its low-rank tensor B is missing"):
        load_adapter(nn.Linear(6, 4), file)
