"""Commands that read files and models without loading them, on adapters of stacked experts."""

from pathlib import Path

import pytest
import torch

import dora_mm
from dora_mm.core import adapted_layers, merge, remove
from dora_mm.formats.algebra import exact
from dora_mm.formats.commands.combine import combine
from dora_mm.formats.commands.convert import convert
from dora_mm.formats.commands.extract import extract
from dora_mm.formats.commands.verify import verify
from dora_mm.formats.files.base_weights import BaseWeights
from dora_mm.formats.naming.names import Name
from dora_mm.formats.reader import read
from tests.shared.vl.equalities import adapted, opened, randomize_all

NAMES = ("qwen3_vl_moe", pytest.param("llama4", marks=pytest.mark.slow), pytest.param("aria", marks=pytest.mark.slow))


def trained(base: Path, method: str):
    vlm = opened(base)
    adapted(vlm, ["text.attn", "text.experts"], method=method)
    randomize_all(vlm)
    return vlm


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_of_experts_are_those_of_the_model(name, tiny_vlm):
    """Also where the file stores each expert by itself, or the class stores them transposed."""
    vlm, weights = trained(tiny_vlm(name), "lora"), BaseWeights.open(tiny_vlm(name))
    layers = {path: layer for path, layer in adapted_layers(vlm.model).items() if "experts." in path}
    assert layers
    for path, layer in layers.items():
        found = weights.find(Name("model", path))
        assert found in weights.experts
        assert weights.shape(found) == tuple(layer.matrix.shape)
        assert torch.equal(weights[found], layer.matrix)


@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
def test_formulas_of_stacks_are_those_of_each_expert(method, tiny_vlm, tmp_path):
    vlm = trained(tiny_vlm("qwen3_vl_moe"), method)
    dora_mm.save_adapter(vlm.networks, tmp_path / "a", format="native")
    state, _ = read(tmp_path / "a", vlm.networks)
    layers = adapted_layers(vlm.model)
    matrices = {path: layer.matrix.detach().clone() for path, layer in layers.items()}
    merge(vlm.model)
    for path, layer in state.layers["model"].items():
        W0, W = matrices[path], layers[path].matrix.detach()
        torch.testing.assert_close(exact.new_weight(exact.fitted(layer, W0), W0), W)
        torch.testing.assert_close(exact.difference(layer, W0), W - W0, rtol=1e-3, atol=1e-6)
        half = exact.with_strength(layer, W0, 0.5)
        torch.testing.assert_close(exact.new_weight(half, W0), (W0 + W) / 2)
        both = exact.summed([(layer, 0.5), (layer, 0.25)], W0)
        torch.testing.assert_close(exact.new_weight(both, W0), W0 + 0.75 * (W - W0))


def test_a_folder_of_peft_is_verified(tiny_vlm, tmp_path):
    base = tiny_vlm("qwen3_vl_moe")
    vlm = trained(base, "lora")
    dora_mm.save_adapter(vlm.networks, tmp_path / "a", format="peft")
    (verdict,) = verify(tmp_path / "a", "peft", base)
    assert dict(verdict.findings) == {"right": 12}


def test_what_cannot_be_written_says_why(tiny_vlm, tmp_path):
    base = tiny_vlm("qwen3_vl_moe")
    for method in ("dora", "lora"):
        dora_mm.save_adapter(trained(base, method).networks, tmp_path / method, format="native")
    with pytest.raises(ValueError, match=r"stacked experts, and PEFT has no DoRA of those .*: use dora-mm merge"):
        convert(tmp_path / "dora", tmp_path / "out", to="peft", base=base)
    with pytest.raises(ValueError, match=r"stacked experts: load it into the model and save_adapter\(model"):
        combine([tmp_path / "lora"] * 2, tmp_path / "out", to="peft", base=base)
    with pytest.raises(ValueError, match="kohya files have no name for"):
        convert(tmp_path / "lora", tmp_path / "out.safetensors", to="kohya", base=base)
    assert not (tmp_path / "out").exists()


def test_extraction_names_the_experts_that_it_leaves_out(tiny_vlm, tmp_path):
    base = tiny_vlm("qwen3_vl_moe")
    vlm = trained(base, "dora")
    merge(vlm.model, keep_base=False)
    remove(vlm.model)
    vlm.model.save_pretrained(tmp_path / "tuned")
    found = extract(tmp_path / "tuned", base, tmp_path / "out", rank=2)
    assert len(found.errors) == 8
    assert {name.path.rpartition(".")[2] for name in found.left_out} == {"gate_up", "down"}
    assert len(found.left_out) == 4
