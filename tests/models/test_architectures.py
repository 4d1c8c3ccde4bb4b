"""The networks of a model from its configs alone, and one sentence for what is no model."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen2ForCausalLM

from dora_mm.models.architectures import networks_of


def write(folder, name="config.json", **content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", ["llava", "blip_vqa", "fast_vlm", "git"])
def test_a_model_of_transformers_is_what_its_weights_would_be(tiny_vlm, tmp_path, name):
    shutil.copy(tiny_vlm(name) / "config.json", tmp_path)
    (network,) = networks_of(str(tmp_path)).values()
    model = network.build()
    assert type(model).__name__ == network.kind
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    loaded = type(model).from_pretrained(tiny_vlm(name))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in loaded.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in loaded.parameters())


def test_tied_weights_count_once(tmp_path):
    config = Qwen2ForCausalLM.config_class(num_hidden_layers=1, tie_word_embeddings=True)
    write(tmp_path, **{**config.to_dict(), "architectures": ["Qwen2ForCausalLM"]})
    model = networks_of(str(tmp_path))[""].build()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_components_of_a_pipeline(tiny_folder):
    networks = networks_of(str(tiny_folder))
    kinds = {name: network.kind for name, network in networks.items()}
    assert kinds == {
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    }
    assert {name: type(network.build()).__name__ for name, network in networks.items()} == kinds


def test_components_stay_in_their_folder(tmp_path):
    write(tmp_path / "outside", _class_name="UNet2DConditionModel")
    index = {"../outside": ["diffusers", "UNet2DConditionModel"], "unet": [None, None]}
    assert networks_of(str(write(tmp_path / "model", "model_index.json", **index))) == {}


def test_vl_bart():
    (network,) = networks_of("samples/tiny-vl").values()
    assert type(network.build()).__name__ == network.kind == "VLBart"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "has no model_type"),
        ({"_class_name": "FluxPipeline"}, "a FluxPipeline, no network of diffusers"),
        ({"_class_name": "Nothing"}, "a Nothing, no network of diffusers"),
        ({"_class_name": "FluxTransformer2DModel", "num_layers": "x"}, "cannot be built from its config.json"),
        ({"model_type": "vl_bart", "feature_dim": "x"}, "cannot be built from its config.json"),
        ({"model_type": "nothing"}, "is not a model of transformers"),
        ({"model_type": "llama"}, "has no architectures"),
        ({"model_type": "llama", "architectures": ["LlamaForNothing"]}, "a class that transformers .* does not have"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": -1}, "cannot be built"),
    ],
)
def test_configs_of_no_model(tmp_path, content, words):
    write(tmp_path, **content)
    with pytest.raises(ValueError, match=words) as error:
        networks_of(str(tmp_path))[""].build()
    assert str(tmp_path) in str(error.value)


CODE = r"code in its own folder, which is not run \(trust_remote_code is never used\); "
OWN = {"auto_map": {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}}


@pytest.mark.parametrize(
    ("content", "words"),
    [  # as published: DeepSeek-VL2 names neither a class nor code
        (
            {"model_type": "deepseek_vl_v2", "language_config": {"model_type": "deepseek_v2"}},
            "no model of type deepseek_",
        ),
        (
            {"model_type": "multi_modality"},
            "no model of type multi_modality; use its version for transformers, deepseek-c",
        ),
        (
            {"model_type": "kimi_vl", "architectures": ["KimiVLForConditionalGeneration"], **OWN},
            f"no KimiVLForConditionalGeneration: it is {CODE}use a version that was converted .* none is known here$",
        ),
        (
            {"model_type": "molmo", "architectures": ["MolmoForCausalLM"], **OWN},
            f"no MolmoForCausalLM: it is {CODE}no version .* of its successor, allenai/Molmo2-8B$",
        ),
        (
            {"model_type": "internvl_chat", "architectures": ["InternVLChatModel"], **OWN},
            f"no InternVLChatModel: it is {CODE}use its version for transformers, the same name with -hf",
        ),
        (
            {"model_type": "phi4mm", "architectures": ["Phi4MMForCausalLM"], **OWN},
            "microsoft/Phi-4-multimodal-instruct with the revision refs/pr/70$",
        ),
        (  # a type that transformers has, with a config that it cannot read
            {"model_type": "florence2", "architectures": ["Florence2ForConditionalGeneration"], **OWN}
            | {"text_config": {"model_type": "florence2_language"}},
            f"this Florence2ForConditionalGeneration is for {CODE}use .* florence-community/Florence-2-base",
        ),
        (
            {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]},
            "a LlavaLlamaForCausalLM, a class that transformers .* does not have; use its version .* llava-hf/llava-",
        ),
    ],
)
def test_models_whose_code_is_elsewhere_are_told_what_to_use_instead(tmp_path, content, words):
    write(tmp_path, **content)
    with pytest.raises(ValueError, match=words):
        networks_of(str(tmp_path))[""].build()


def test_folders_of_no_model(tmp_path):
    with pytest.raises(
        ValueError, match="^.* is no model, and holds no adapter: it has neither config.json nor model_"
    ):
        networks_of(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"has weights \(model.safetensors\) and no config.json"):
        networks_of(str(tmp_path))
    (tmp_path / "config.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        networks_of(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json is not a JSON object"):
        networks_of(str(tmp_path))


VALUES = st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda v: st.lists(v, max_size=3), max_leaves=5)
KEYS = st.sampled_from(["model_type", "_class_name", "architectures", "hidden_size", "text_config", "unet"])


@settings(max_examples=30)
@given(st.dictionaries(KEYS, VALUES), st.dictionaries(KEYS, VALUES) | st.none())
def test_any_config_is_read_or_refused(config, index):
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), **config)
        if index is not None:
            write(Path(folder), "model_index.json", **index)
        message = folder
        try:
            for network in networks_of(folder).values():
                network.build()
        except ValueError as error:
            message = str(error)
        assert folder in message


def test_a_hub_name_without_a_connection():
    with pytest.raises(ValueError, match="^owner/nothing is not on this machine, and the hub .* cannot be reached"):
        networks_of("owner/nothing")


def test_a_hub_name_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--tiny"
    config = LlamaConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=9)
    write(repository / "snapshots" / "abc", **{**config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    model = networks_of("owner/tiny")[""].build()
    assert isinstance(model, torch.nn.Module)
    assert type(model).__name__ == "LlamaForCausalLM"
