"""Files of other tools in our models: what loads computes what the tool computes, and what cannot is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_mm import load_adapter, merge, set_strength
from dora_mm.formats.convert import convert
from tests.formats import toy
from tests.formats.test_tools import path_of


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


@pytest.mark.parametrize(("to", "reason"), [("in", "scales input columns"), ("diff", "a difference of weights")])
def test_what_the_layer_cannot_compute_is_refused(to, reason, unet, tmp_path):
    path = path_of("lycoris_in")
    if to == "diff":
        base = {name: W0 for name, W0 in toy.base().items() if name.component == "unet"}
        (path,) = convert(path, tmp_path / "a.safetensors", to="diff", base=base).files
    with pytest.raises(ValueError, match=rf"{path.name} cannot be loaded: at unet\..*{reason}.*dora-mm convert --to"):
        load_adapter({"unet": unet}, path)


def test_another_norm_is_refused(unet, tmp_path):
    base = {name: W0 for name, W0 in toy.base().items() if name.component == "unet"}
    (path,) = convert(path_of("lycoris_out"), tmp_path / "a.safetensors", to="comfy-2025", base=base).files
    with pytest.raises(ValueError, match="another norm than that of the updated weight: .*--to peft"):
        load_adapter({"unet": unet}, path)


def test_a_file_for_another_model_is_refused(unet, tmp_path):
    tensors = load_file(path_of("lycoris_out"))
    save_file({k.replace("attn1_to_q", "attn1_to_z"): t for k, t in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: .*attn1_to_z"):
        load_adapter({"unet": unet}, tmp_path / "a.safetensors")
