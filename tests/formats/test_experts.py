"""Adapters of stacked experts in files: our own form, PEFT's, and the commands on both."""

import copy

import pytest
import torch

from dora_mm import DoRASpec, formats, inject, load_adapter, remove, save_adapter, set_strength
from dora_mm.core import adapted_layers
from tests.shared import reference
from tests.shared.vl import tiny_vlm

MODELS = ("qwen3_vl_moe", "aria", "llama4")  # experts as (E, O, I); as (E, I, O); as (E, I, O), which PEFT is not told
TARGETS = ["experts.gate_up", "experts.down", "self_attn.q_proj"]
TOKENS = torch.tensor([[5, 9, 12, 7, 6, 11, 8, 10], [11, 6, 5, 12, 9, 8, 7, 10]])
BASES = {}


def base(name):
    """A tiny model with large experts, so that what their adapters change is seen in its outputs."""
    if name not in BASES:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, _ = tiny_vlm.BUILDERS[name]()
            for path, parameter in model.named_parameters():
                if "experts." in path and parameter.dim() == 3:
                    torch.nn.init.normal_(parameter, std=0.3)
        BASES[name] = model.eval()
    return copy.deepcopy(BASES[name])


def trained(name, method="dora", targets=TARGETS, **settings):
    model = base(name)
    inject(model, targets, DoRASpec(**{"rank": 2, "alpha": 5, "method": method, **settings}))
    for seed, layer in enumerate(adapted_layers(model).values()):
        reference.randomize(layer, size=0.3, seed=seed)
    return model


@torch.no_grad()
def outputs(model):
    text = model.get_submodule(next(p for p, m in model.named_modules() if p.endswith("language_model")))
    found = text(input_ids=TOKENS, use_cache=False)  # Llama 4 as a whole takes no text without images
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
def test_native_files_keep_every_bit(tmp_path, name, method):
    model = trained(name, method)
    save_adapter(model, tmp_path, format="native")
    assert reference.relative_error(outputs(base(name)), outputs(model)) > 1e-3
    ours = base(name)
    load_adapter(ours, tmp_path)
    for path, layer in adapted_layers(model).items():
        for key, tensor in layer.adapter_tensors().items():
            assert torch.equal(adapted_layers(ours)[path].adapter_tensors()[key], tensor)
    assert torch.equal(outputs(ours), outputs(model))
    load_adapter(ours, tmp_path)  # into the same layers
    load_adapter(ours, tmp_path, name="second", strength=0.5)
    remove(ours)
    assert torch.equal(outputs(ours), outputs(base(name)))


@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
def test_a_strength_is_saved_per_expert(tmp_path, method):
    model = trained("aria", method)
    save_adapter(model, tmp_path, format="native", strength=0.6)
    set_strength(model, 0.6)
    ours = base("aria")
    load_adapter(ours, tmp_path)
    assert reference.relative_error(outputs(ours), outputs(model)) < 1e-5


def test_a_file_for_other_experts_is_refused_with_the_shapes(tmp_path):
    save_adapter(trained("aria", targets=["experts.gate_up"]), tmp_path, format="native")
    state, _ = formats.read(tmp_path)
    layer = next(iter(state.layers["model"].values()))
    assert layer.num_experts == layer.weight_shape[0] == 4
    model = base("aria")
    for experts in (m for m in model.modules() if type(m).__name__ == "AriaExperts"):
        experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj[:3].clone())
    with pytest.raises(ValueError, match=r"its lora_A has shape \(4, 2, 32\) instead of \(3, 2, 32\)"):
        load_adapter(model, tmp_path)
