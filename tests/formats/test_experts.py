"""Adapters of stacked experts in files: our own form, PEFT's, and the commands on both."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

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


# --- PEFT's folders -------------------------------------------------------------------------------------------------

ADAPTED = {"all": TARGETS, "experts alone": TARGETS[:2], "down alone": TARGETS[1:2], "gate_up": TARGETS[:1]}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", ADAPTED)
def test_peft_computes_the_same_from_our_folder(tmp_path, name, targets):
    model = trained(name, "lora", ADAPTED[targets])
    save_adapter(model, tmp_path, format="peft")
    expected = outputs(model)
    assert reference.relative_error(outputs(base(name)), expected) > 1e-3
    theirs = PeftModel.from_pretrained(base(name), str(tmp_path)).eval()
    for implementation in ("eager", "grouped_mm") if name != "llama4" else [None]:
        if implementation:
            theirs.get_base_model().set_experts_implementation(implementation)
        assert reference.relative_error(outputs(theirs), expected) < 1e-5
    ours = base(name)
    load_adapter(ours, tmp_path)
    assert torch.equal(outputs(ours), expected)


PARAMETERS = ["experts.down_proj", "experts.gate_up_proj"]
CONFIGS = {
    "both and attention": {"target_parameters": PARAMETERS, "target_modules": ["q_proj"]},
    "last names alone": {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": []},
    "ranks and alphas of their own": {
        "target_parameters": PARAMETERS,
        "target_modules": ["q_proj"],
        "rank_pattern": {"experts.gate_up_proj": 3, "q_proj": 2},
        "alpha_pattern": {r".*\.down_proj": 7},
    },
    "rslora": {"target_parameters": PARAMETERS, "target_modules": [], "use_rslora": True},
}


def saved_by_peft(name, folder, **config):
    theirs = get_peft_model(base(name), LoraConfig(r=4, lora_alpha=6, **config)).eval()
    generator = torch.Generator().manual_seed(1)
    for path, parameter in theirs.named_parameters():
        if "lora_" in path:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", CONFIGS)
def test_folders_of_peft_are_read(tmp_path, name, config):
    theirs = saved_by_peft(name, tmp_path, **CONFIGS[config])
    ours = base(name)
    report = load_adapter(ours, tmp_path)
    assert {"DoRAExperts"} <= {module.kind for module in report.modules}
    assert reference.relative_error(outputs(base(name)), outputs(theirs)) > 1e-3
    assert reference.relative_error(outputs(ours), outputs(theirs)) < 1e-5


def test_target_parameters_that_are_no_experts_are_refused(tmp_path):
    saved_by_peft("aria", tmp_path, target_parameters=["q_proj.weight"], target_modules=[])
    with pytest.raises(ValueError, match="the setting target_parameters of PEFT with 'weight', which is no"):
        formats.AdapterFile(tmp_path)


@pytest.mark.parametrize("method", ["dora", "magnitude"])
def test_peft_holds_no_magnitudes_of_experts(tmp_path, method):
    model = trained("aria", method)
    message = "a layer of stacked experts, of which PEFT's files hold plain LoRA alone: merge the adapter instead"
    assert message in (formats.about_format({"model": model}, "peft") or "")
    with pytest.raises(ValueError, match=message):
        save_adapter(model, tmp_path, format="peft")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="stacked experts"):
        save_adapter({"transformer": model}, tmp_path, format="diffusers")
    with pytest.raises(ValueError, match="stacked experts, which files of diffusers do not have"):
        save_adapter({"transformer": trained("aria", "lora")}, tmp_path, format="diffusers")


def test_damaged_folders_are_refused(tmp_path):
    saved_by_peft("aria", tmp_path, **CONFIGS["both and attention"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, message in (
        ({"r": 3}, "do not fit each other, as those of stacked experts of rank 3"),
        ({"r": 0}, "its rank 0 is not a positive whole number"),
        (
            {"target_parameters": ["experts.gate_up_proj"]},
            "it has 2 adapters of .*experts, and its target_parameters 1",
        ),
        ({"target_parameters": [3]}, "target_parameters of PEFT with '3'"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_adapter(base("aria"), tmp_path)
