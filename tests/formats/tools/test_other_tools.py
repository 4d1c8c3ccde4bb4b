"""Files of other tools in our models: what loads computes what the tool computes, and what cannot is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_mm import load_adapter, merge, set_strength
from dora_mm.formats.commands.convert import convert
from dora_mm.formats.naming.names import Name
from tests.formats.tools.test_tools import path_of
from tests.shared import toy


@pytest.fixture
def unet():
    return toy.model()


@pytest.mark.parametrize("name", ["lycoris_out", "lycoris_tucker", "lycoris_rs"])
def test_what_loads_computes_what_lycoris_computes(name, unet):
    expected = load_file(path_of("expected"))
    load_adapter({"unet": unet}, path_of(name))
    merge(unet, keep_base=False)
    for module in toy.UNET:
        found = toy.probe(unet.get_submodule(module.path).weight.detach()).float()
        torch.testing.assert_close(found, expected[f"{name}/{module}@1"], rtol=1e-5, atol=1e-5)


def test_strength_0_is_the_base_bit_for_bit(unet):
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    layer = unet.get_submodule(toy.UNET[0].path)
    before = layer(x)
    load_adapter({"unet": unet}, path_of("lycoris_out"))
    assert not torch.equal(layer(x), before)
    set_strength(unet, 0.0)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("to", ["in", "diff"])
def test_what_has_no_low_rank_loads_exactly(to, strength, unet, tmp_path):
    """Magnitudes of input columns, and differences of weights."""
    base = {name: W0 for name, W0 in toy.base().items() if name.component == "unet"}
    path, expected = path_of("lycoris_in"), load_file(path_of("expected"))
    if to == "diff":
        (path,) = convert(path, tmp_path / "a.safetensors", to="diff", base=base, dtype="float32").files
    load_adapter({"unet": unet}, path, strength=strength)
    merge(unet, keep_base=False)
    for module in toy.UNET:
        found = toy.probe(unet.get_submodule(module.path).weight.detach())
        W0, W = toy.probe(base[module]), expected[f"lycoris_in/{module}@1"].double()
        torch.testing.assert_close(found, W0 + strength * (W - W0), rtol=1e-5, atol=1e-5)


def unscaled(path):
    """The files of ai-toolkit with an alpha that a person added: the norm is that of W0 + B A."""
    tensors, expected = {}, {}
    for name in toy.UNET:
        state, W0 = toy.layer(name), toy.base()[name]
        if W0.dim() == 2:
            A, B, m = state.tensors["lora_A"], state.tensors["lora_B"], state.tensors["magnitude"]
            module = "lora_unet_" + name.path.replace(".", "_")
            tensors |= {f"{module}.lora_down.weight": A, f"{module}.lora_up.weight": B, f"{module}.magnitude": m}
            tensors[f"{module}.alpha"] = torch.tensor(state.spec.alpha)
            V = (W0 + B @ A).double()
            change = state.spec.scaling * (B @ A).double()
            expected[name] = W0 + change + (m[:, None] / V.norm(dim=1, keepdim=True) - 1) * V
    save_file(tensors, path)
    return path, expected


def over_the_base(path):
    """A file for ComfyUI of 2025, which divides by the norm of W0."""
    base = {name: W0 for name, W0 in toy.base().items() if name.component == "unet"}
    (file,) = convert(path_of("lycoris_out"), path, to="comfy", base=base).files
    probes = load_file(path_of("expected"))
    return file, {name: probes[f"lycoris_out/{name}@1"] for name in toy.UNET}


@pytest.mark.parametrize("make", [unscaled, over_the_base])
def test_magnitudes_over_another_norm_are_converted(make, unet, tmp_path):
    """Exactly, with the weights of the model: also those of a second adapter, and over a weight that is adapted."""
    path, expected = make(tmp_path / "a.safetensors")
    load_adapter({"unet": unet}, path)
    set_strength(unet, 0.25)
    load_adapter({"unet": unet}, path, strength=0.75, name="second")
    merge(unet, keep_base=False)
    assert len(expected) > 3
    for name, W in expected.items():
        found = unet.get_submodule(name.path).weight.detach()
        found, W = (found, W.float()) if W.dim() == found.dim() else (toy.probe(found).float(), W)
        torch.testing.assert_close(found, W, rtol=1e-5, atol=1e-5)


def test_another_norm_in_a_network_that_is_not_given_is_refused(unet, tmp_path):
    names = [toy.UNET[0], Name("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj")]
    tensors = {}
    for name, module in zip(names, ("lora_unet_" + names[0].path, "lora_te1_" + names[1].path), strict=True):
        parts = {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B", "dora_scale": "magnitude"}
        state = toy.layer(name).tensors
        tensors |= {f"{module.replace('.', '_')}.{end}": state[key].clone() for end, key in parts.items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"dora_mm_target": "comfy"})
    with pytest.raises(ValueError, match=r"a\.safetensors.*text_encoder|a\.safetensors.*te1"):
        load_adapter({"unet": unet}, tmp_path / "a.safetensors")


def test_a_norm_over_weights_of_another_shape_is_refused(tmp_path):
    path, _ = over_the_base(tmp_path / "a.safetensors")
    unet = toy.model()
    unet.get_submodule(toy.UNET[0].path).weight = torch.nn.Parameter(torch.ones(8, 16))
    with pytest.raises(ValueError, match=r"a\.safetensors: unet\..*to_q: its lora_B has shape .* another model"):
        load_adapter({"unet": unet}, path)


def test_a_file_for_another_model_is_refused(unet, tmp_path):
    tensors = load_file(path_of("lycoris_out"))
    save_file({k.replace("attn1_to_q", "attn1_to_z"): t for k, t in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: .*attn1_to_z"):
        load_adapter({"unet": unet}, tmp_path / "a.safetensors")
