"""PEFT's folder: PEFT loads ours, we load PEFT's, and nothing that was trained is lost."""

import copy
import json
import re

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dora_mm import DoRASpec, adapter_parameters, inject, load_adapter, merge, save_adapter
from dora_mm.adapting.networks import parameters_by_name
from dora_mm.formats.tools.peft import CONFIG_NAME, FILE_NAME
from dora_mm.formats.tools.peft_config import OUR_METADATA
from tests.shared.toy import read_tensors
from tests.shared.vl.small_vl_bart import small_inputs, small_vl_bart

EXTRA_TRAINABLE = ("visual_embedding", "biases", "norms")


def trained(method: str = "dora", alpha: float = 3.0):
    """(bare model, the same with a trained adapter, names of the extra trainable parameters)."""
    torch.manual_seed(1)
    bare = small_vl_bart().requires_grad_(False)
    model = copy.deepcopy(bare)
    inject(model, "bart", DoRASpec(rank=2, alpha=alpha, method=method))
    extra = parameters_by_name(model, EXTRA_TRAINABLE)
    with torch.no_grad():
        for parameter in [*extra.values(), *adapter_parameters(model).values()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return bare, model, list(extra)


@pytest.fixture
def inputs():
    return small_inputs(["is there a red cat?", "what color is the bus?"])


def answer(model, inputs):
    with torch.no_grad():
        return model(*inputs, decoder_input_ids=torch.tensor([[2, 0, 5], [2, 0, 6]]), use_cache=False).logits


@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
def test_it_loads_again(tmp_path, inputs, method):
    bare, model, extra = trained(method)
    save_adapter({"model": model}, tmp_path, format="peft", extra_parameters=extra)
    report = load_adapter({"model": bare}, tmp_path)
    assert report.num_modules == 12
    assert torch.equal(answer(bare, inputs), answer(model, inputs))
    expected = answer(model, inputs)
    merge(bare)
    torch.testing.assert_close(answer(bare, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_peft_loads_it_with_all_that_trained(tmp_path, inputs, method):
    bare, model, extra = trained(method)
    save_adapter({"model": model}, tmp_path, format="peft", extra_parameters=extra, metadata={"base_model": "a/base"})
    theirs = peft.PeftModel.from_pretrained(bare, str(tmp_path)).eval()
    torch.testing.assert_close(answer(theirs, inputs), answer(model, inputs), rtol=1e-4, atol=1e-4)
    assert theirs.peft_config["default"].base_model_name_or_path == "a/base"


def test_peft_loads_whole_weights_of_some_layers_beside_adapters_of_others(tmp_path, inputs):
    torch.manual_seed(1)
    bare = small_vl_bart().requires_grad_(False)

    def adapted():
        model = copy.deepcopy(bare)
        inject(model, ["q_proj", "v_proj"], DoRASpec(rank=2))
        inject(model, ["fc1"], DoRASpec(method="full"))
        return model

    model = adapted()
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter({"model": model}, tmp_path, format="peft")
    expected = answer(model, inputs)
    assert not torch.allclose(answer(bare, inputs), expected, atol=1e-2)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(bare), str(tmp_path)).eval()
    torch.testing.assert_close(answer(theirs, inputs), expected, rtol=1e-4, atol=1e-4)
    for ours in (bare, adapted()):
        load_adapter({"model": ours}, tmp_path)
        torch.testing.assert_close(answer(ours.eval(), inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_dora", [True, False])
def test_we_load_what_peft_saves(tmp_path, inputs, use_dora):
    bare, _, _ = trained()
    config = peft.LoraConfig(r=3, lora_alpha=5, use_dora=use_dora, target_modules=["q_proj", "fc1"], bias="all")
    theirs = peft.get_peft_model(copy.deepcopy(bare), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.eval().save_pretrained(tmp_path)
    load_adapter({"model": bare}, tmp_path)
    torch.testing.assert_close(answer(bare, inputs), answer(theirs, inputs), rtol=1e-4, atol=1e-4)


def test_we_load_the_buffers_that_older_releases_of_peft_save(tmp_path, inputs):
    """Before 0.21, `bias="all"` saves every tensor whose name contains "bias": BART's final_logits_bias too."""
    bare, _, _ = trained()
    theirs = peft.get_peft_model(copy.deepcopy(bare), peft.LoraConfig(r=3, target_modules=["fc1"], bias="all"))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / FILE_NAME
    logits_bias = torch.randn_like(bare.final_logits_bias)
    save_file({**load_file(file), "base_model.model.final_logits_bias": logits_bias}, file, {"format": "pt"})
    load_adapter({"model": bare}, tmp_path)
    assert torch.equal(bare.final_logits_bias, logits_bias)


def test_extra_parameters_are_saved_with_full_weights(tmp_path, inputs):
    bare, model, extra = trained("full")
    save_adapter({"model": model}, tmp_path, format="native", extra_parameters=extra)
    load_adapter({"model": bare}, tmp_path)
    assert torch.equal(answer(bare, inputs), answer(model, inputs))


def test_a_missing_config_is_named(tmp_path):
    bare, model, extra = trained()
    save_adapter({"model": model}, tmp_path, format="peft", extra_parameters=extra)
    (tmp_path / CONFIG_NAME).unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        load_adapter({"model": bare}, tmp_path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "model.decoder.layers.1.encoder_attn.q_proj.lora_magnitude_vector",
            r"encoder_attn\.q_proj: its magnitude is missing",
        ),
        ("model.encoder.layers.0.final_layer_norm.weight", r"final_layer_norm\.weight, .* is missing"),
    ],
)
def test_an_incomplete_file_is_refused_and_changes_nothing(tmp_path, inputs, key, message):
    bare, model, extra = trained()
    save_adapter({"model": model}, tmp_path, format="peft", extra_parameters=extra)
    file = tmp_path / FILE_NAME
    tensors = load_file(file)
    del tensors[f"base_model.model.{key}"]

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata)
    before = answer(bare, inputs)
    with pytest.raises(ValueError, match=message):
        load_adapter({"model": bare}, tmp_path)
    assert torch.equal(answer(bare, inputs), before)


def test_a_parameter_that_the_model_does_not_have_is_refused_and_changes_nothing(tmp_path, inputs):
    _, model, extra = trained()
    save_adapter({"model": model}, tmp_path, format="peft", extra_parameters=extra)
    other = small_vl_bart("video").requires_grad_(False)
    del other.model.encoder.visual_embedding.image_embedding
    with pytest.raises(ValueError, match="it holds model.encoder.visual_embedding.image_embedding.weight"):
        load_adapter({"model": other}, tmp_path)
    assert not any("lora" in name for name, _ in other.named_parameters())


def test_diffusers_format_holds_adapters_only(tmp_path):
    _, model, extra = trained()
    with pytest.raises(ValueError, match="save it as peft"):
        save_adapter({"unet": model}, tmp_path, extra_parameters=extra)


def test_other_kinds_of_adapters_are_refused(tmp_path):
    bare, model, _ = trained()
    save_adapter({"model": model}, tmp_path, format="peft")
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(ValueError, match="holds IA3, not LoRA or DoRA: it changes more"):
        load_adapter({"model": bare}, tmp_path)


def values(model) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def unchanged(model, before) -> bool:
    after = values(model)
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_extra_parameters_have_no_strength(tmp_path, strength):
    bare, model, extra = trained()
    save_adapter({"model": model}, tmp_path / "with", format="peft", extra_parameters=extra)
    before = values(bare)
    with pytest.raises(ValueError, match=f"{FILE_NAME} holds the parameter .*, which has no strength"):
        load_adapter({"model": bare}, tmp_path / "with", strength=strength)
    assert unchanged(bare, before)
    save_adapter({"model": model}, tmp_path / "without", format="peft")
    load_adapter({"model": bare}, tmp_path / "without", strength=strength)


def test_extra_parameters_are_not_stacked(tmp_path, inputs):
    bare, model, extra = trained()
    save_adapter({"model": model}, tmp_path / "with", format="peft", extra_parameters=extra)
    save_adapter({"model": model}, tmp_path / "without", format="peft")
    load_adapter({"model": bare}, tmp_path / "with", name="first")
    before = values(bare)
    with pytest.raises(ValueError, match=f"{FILE_NAME} holds the parameter .* cannot be stacked .*'first'"):
        load_adapter({"model": bare}, tmp_path / "with", name="second")
    assert unchanged(bare, before)
    load_adapter({"model": bare}, tmp_path / "with", name="first")  # its own values, once more
    assert torch.equal(answer(bare, inputs), answer(model, inputs))
    load_adapter({"model": bare}, tmp_path / "without", name="second")
    assert not torch.equal(answer(bare, inputs), answer(model, inputs))


def test_nothing_is_changed_where_a_module_cannot_be_adapted(tmp_path):
    bare, model, extra = trained()
    save_adapter({"model": model}, tmp_path, format="peft", extra_parameters=extra)
    hooked = bare.model.decoder.layers[1].self_attn.v_proj
    hooked.forward = hooked.forward
    before = values(bare)
    with pytest.raises(ValueError, match=r"forward function of .*layers\.1\.self_attn\.v_proj"):
        load_adapter({"model": bare}, tmp_path)
    assert unchanged(bare, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern: the pattern '(' is not supported"),
        ({"alpha_pattern": [3]}, "alpha_pattern is not a JSON object"),
        ({"lora_alpha": "three"}, "alpha must be a finite number, not 'three'"),
        ({"target_modules": "all-linear"}, "all-linear, which its header lists, is missing"),
        ({"target_modules": [["q_proj"]]}, "['q_proj'], which its header lists, is missing"),
        ({"use_dora": False}, "but its header says that it is plain LoRA"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path, changes, message):
    bare, model, _ = trained()
    save_adapter({"model": model}, tmp_path, format="peft")
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_adapter({"model": bare}, tmp_path)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("dora", {"method": "lora"}, "its header says method lora, and its tensors are those of method dora"),
        ("lora", {"method": "magnitude"}, "its header says method magnitude, and its tensors are those of method lora"),
        ("dora", {"method": "full"}, "its header says method full, and"),
        ("dora", {"parameters": 5}, "5, which its header lists, is missing"),
    ],
)
def test_a_header_that_contradicts_the_config_is_refused(tmp_path, method, changes, message):
    bare, model, _ = trained(method)
    file = save_adapter({"model": model}, tmp_path, format="peft")
    tensors, metadata = read_tensors(file)
    save_file(tensors, file, {**metadata, OUR_METADATA: json.dumps({**json.loads(metadata[OUR_METADATA]), **changes})})
    with pytest.raises(ValueError, match=message):
        load_adapter({"model": bare}, tmp_path)
