"""Settings of PEFT: what computes the same here is loaded, and the rest is refused by name."""

import json
from dataclasses import fields
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dora_mm import DoRASpec, inject, load_adapter, save_adapter
from dora_mm.formats.tools.diffusers import FILE_NAME, PEFT_METADATA
from dora_mm.formats.tools.peft import CONFIG_NAME
from tests.shared.toy import read_tensors


def base():
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in range(2)])
    return nn.ModuleDict({"layers": layers, "head": nn.Linear(8, 3)})


def output(model):
    x = torch.linspace(-1, 1, 16).view(2, 8)
    with torch.no_grad():
        for layer in model["layers"]:
            x = layer["fc"](x).tanh()
        return model["head"](x)


def peft_folder(tmp_path, **settings):
    """PEFT's folder of a trained adapter, and the model that it was trained on."""
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["fc"], **settings})
    theirs = peft.get_peft_model(base(), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.eval().save_pretrained(tmp_path)
    return theirs.base_model.model


def edited(tmp_path, format, **settings):
    """The adapter of a model in a file of ours whose PEFT configuration has other settings."""
    model = base()
    inject(model, ["fc"], DoRASpec(rank=2))
    file = save_adapter({"unet": model}, tmp_path, format=format)
    if format == "peft":
        config = json.loads((tmp_path / CONFIG_NAME).read_text())
        (tmp_path / CONFIG_NAME).write_text(json.dumps({**config, **settings}))
    else:
        tensors, header = read_tensors(file)
        config = json.loads(header[PEFT_METADATA]) | {f"unet.{key}": value for key, value in settings.items()}
        save_file(tensors, file, {**header, PEFT_METADATA: json.dumps(config)})
    return model


def refuses(tmp_path, format, message):
    model = base()
    name = CONFIG_NAME if format == "peft" else FILE_NAME
    with pytest.raises(ValueError, match=f"{name}.* has .*{message}"):
        load_adapter({"unet": model}, tmp_path)
    assert not any("lora" in key for key in model.state_dict())


FORMATS = ["peft", "diffusers"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "loftq", "lora_ga"])
def test_initializations_that_modify_the_base_are_refused(tmp_path, format, init):
    edited(tmp_path, format, init_lora_weights=init)
    refuses(tmp_path, format, f"init_lora_weights {init.lower()}, which modifies the base weights")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initializations_that_keep_the_base_are_loaded(tmp_path, format, init):
    edited(tmp_path, format, init_lora_weights=init)
    assert load_adapter({"unet": base()}, tmp_path).num_modules == 2


@pytest.mark.parametrize("format", FORMATS)
def test_an_unknown_initialization_is_refused(tmp_path, format):
    edited(tmp_path, format, init_lora_weights="tomorrow")
    refuses(tmp_path, format, "init_lora_weights tomorrow, which is unknown")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_peft_modifies_the_base_with_them(tmp_path, init):
    before = base()["layers"][0]["fc"].weight
    theirs = peft_folder(tmp_path, init_lora_weights=init)
    assert not torch.allclose(theirs["layers"][0]["fc"].base_layer.weight, before)
    refuses(tmp_path, "peft", f"init_lora_weights {init}")


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
@pytest.mark.parametrize("use_dora", [True, False])
def test_peft_keeps_the_base_with_these(tmp_path, init, use_dora):
    before = base()["layers"][0]["fc"].weight
    theirs = peft_folder(tmp_path, init_lora_weights=init, use_dora=use_dora)
    assert torch.equal(theirs["layers"][0]["fc"].base_layer.weight, before)
    ours = base()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(output(ours), output(theirs))


REFUSED = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 2},
    "ensure_weight_tying": True,
    "kasa_config": {"beta": 1.0},
    "layer_replication": [[0, 2], [1, 2]],
    "lora_bias": True,
    "monteclora_config": {"num_samples": 4},
    "target_parameters": ["layers.0.fc.weight"],
    "trainable_token_indices": [1],
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("key", REFUSED)
def test_settings_with_which_peft_computes_something_else_are_refused(tmp_path, format, key):
    edited(tmp_path, format, **{key: REFUSED[key]})
    refuses(tmp_path, format, f"the setting {key} of PEFT")


SAME: dict[str, Any] = {
    "use_rslora": True,
    "alpha_pattern": {"layers.1.fc": 7},
    "rank_pattern": {"layers.1.fc": 3},
    "layers_to_transform": [1],  # with layers_pattern
    "exclude_modules": ["layers.0.fc"],
    "fan_in_fan_out": True,  # PEFT sets it to what the class of the layer needs
    "modules_to_save": ["head"],
    "bias": "all",
    "lora_dropout": 0.5,
}


@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize("key", SAME)
def test_settings_that_change_nothing_are_loaded(tmp_path, key, use_dora):
    if key == "layers_to_transform" and peft.__version__.startswith("0.20"):
        pytest.skip("PEFT 0.20 does not find layers at the root of a model")
    settings = {key: SAME[key]} | ({"layers_pattern": "layers"} if key == "layers_to_transform" else {})
    theirs = peft_folder(tmp_path, **settings, use_dora=use_dora)
    ours = base()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(output(ours), output(theirs))
    assert not torch.allclose(output(ours), output(base()))


@pytest.mark.parametrize("use_dora", [True, False])
def test_rslora_divides_by_the_root_of_the_rank_of_each_layer(tmp_path, use_dora):
    theirs = peft_folder(tmp_path, use_rslora=True, rank_pattern={"layers.1.fc": 9}, use_dora=use_dora)
    ours = base()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(output(ours), output(theirs))


def test_every_setting_of_peft_was_looked_at():
    """A new release may add settings: see whether they change what is computed from the same tensors."""
    described = {"base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type"}
    described |= {"auto_mapping", "runtime_config", "r", "lora_alpha", "target_modules", "use_dora", "layers_pattern"}
    about_training = {"init_lora_weights", "corda_config", "eva_config", "loftq_config", "lora_ga_config"}
    about_training |= {"velora_config"}  # its own backward pass
    of_others = {"megatron_config", "megatron_core", "qalora_group_size"}  # layers that we cannot adapt, use_qalora
    known = described | about_training | of_others | REFUSED.keys() | SAME.keys()
    assert sorted({field.name for field in fields(peft.LoraConfig)} - known) == []
