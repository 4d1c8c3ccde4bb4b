"""One sentence for whatever a library raises while a model is opened, and what the hub's cache holds."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from dora_mm.config.models import ModelConfig, VLBartModelConfig, VLMModelConfig
from dora_mm.models import hub
from dora_mm.models.folders import identity_of as identity_of_folder
from dora_mm.models.hub import UnreachableError, hub_answers, local_copy
from dora_mm.models.images.families import identity_of, load_image_model
from dora_mm.models.opening import base_of, loaded_files, opening
from dora_mm.models.vl.vl_bart.loading import load_vl_bart
from dora_mm.models.vl.vlm.loading import load_processor, load_vlm
from dora_mm.utils.run_directory import changed_names

SENTENCE = r"owner/nothing is not on this machine, and the hub \(huggingface.co\) cannot be reached: .*local folder"


def test_libraries_show_no_bars_of_loading_but_those_of_downloads():
    from diffusers.utils import logging as diffusers
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as transformers

    for library in (diffusers, transformers):
        library.enable_progress_bar()
    with opening("here", "it cannot be loaded"):
        assert not diffusers.is_progress_bar_enabled()
        assert not transformers.is_progress_bar_enabled()
        assert not are_progress_bars_disabled()
    assert diffusers.is_progress_bar_enabled()
    assert transformers.is_progress_bar_enabled()


def test_an_image_model(tiny_folder):
    with pytest.raises(UnreachableError, match=f"^model.path: {SENTENCE}"):
        load_image_model(ModelConfig(path="owner/nothing"))
    with pytest.raises(UnreachableError, match=f"^model.vae: {SENTENCE}"):
        load_image_model(ModelConfig(path=str(tiny_folder), vae="owner/nothing"))


def test_a_bart():
    with pytest.raises(UnreachableError, match=f"^model.path: {SENTENCE}"):
        load_vl_bart(VLBartModelConfig(family="vl_bart", path="owner/nothing"), 8, 0)


@pytest.mark.parametrize("file", ["unet/config.json", "tokenizer/tokenizer.json"])
def test_damaged_files_of_an_image_model(tiny_folder, tmp_path, file):
    """Libraries expect an object and raise what they stumble over, such as a TypeError."""
    folder = shutil.copytree(tiny_folder, tmp_path / "damaged")
    (folder / file).write_text("1234")
    with pytest.raises(ValueError, match=f"^model.path: {folder} cannot be loaded: "):
        _ = load_image_model(ModelConfig(path=str(folder))).networks


def test_a_damaged_processor(tiny_vlm, tmp_path):
    folder = shutil.copytree(tiny_vlm("llava"), tmp_path / "damaged")
    (folder / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match=f"^model.path: the processor of {folder} cannot be loaded: "):
        load_processor(VLMModelConfig(path=str(folder)))


def test_a_processor_with_code_of_its_own(tiny_vlm, tmp_path):
    """transformers' own message asks for an argument that nobody can give here."""
    folder = shutil.copytree(tiny_vlm("llava"), tmp_path / "own")
    config = json.loads((folder / "processor_config.json").read_text())
    config |= {"processor_class": "OwnProcessor", "auto_map": {"AutoProcessor": "processing_own.OwnProcessor"}}
    (folder / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"it needs code in its own folder, which is not run \(trust_remote_code is ne"
    ):
        load_processor(VLMModelConfig(path=str(folder)))


def test_weights_for_the_code_of_a_folder_are_told_what_to_use_instead(tiny_vlm, tmp_path):
    folder = shutil.copytree(tiny_vlm("florence2"), tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "configuration_own.Own"}}))
    save_file({"own.weight": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is incomplete: it lacks .*; use its version for transformers, florence-comm"):
        load_vlm(VLMModelConfig(path=str(folder)), torch.device("cpu"))


def test_weights_of_another_shape(tiny_vlm, tmp_path):
    """transformers' own message refers to a report of 60 lines."""
    folder = shutil.copytree(tiny_vlm("llava"), tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^model.path: {folder} has a .*mlp.* of shape .*, and its config.json needs"):
        load_vlm(VLMModelConfig(path=str(folder)), torch.device("cpu"))


def test_a_hub_that_does_not_answer_is_asked_once_and_for_no_file(monkeypatch, tmp_path):
    """What is in the cache is loaded then; the libraries would ask five times for each file of it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "local_copy", lambda path, revision=None: None if revision else tmp_path)
    hub_answers.cache_clear()
    try:
        unreachable = pytest.raises(UnreachableError, match=r"^model.path: owner/nothing \(revision x\) is not on this")
        with unreachable, opening("owner/nothing", "it cannot be loaded", key="model.path", revision="x"):
            raise AssertionError
        assert constants.HF_HUB_OFFLINE
        entered = False
        with opening("owner/nothing", "it cannot be loaded"):
            entered = True
        assert entered
    finally:
        hub_answers.cache_clear()


def test_other_errors_have_other_messages(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    problem, offline = "it cannot be loaded", OSError("no config")
    offline.__cause__ = ConnectionError("offline")
    with pytest.raises(ValueError, match="^it cannot be loaded: damaged$"), opening("owner/nothing", problem):
        raise ValueError("damaged")
    with pytest.raises(UnreachableError, match=f"^{SENTENCE}"), opening("owner/nothing", problem):
        raise offline
    # a local folder needs no hub
    with pytest.raises(ValueError, match=f"^KEY: {problem}: no config$"), opening(str(tmp_path), problem, key="KEY"):
        raise offline


def test_local_copies(tmp_path):
    assert local_copy(str(tmp_path)) == tmp_path
    assert local_copy("owner/nothing") is None


def test_the_identity_of_an_image_model_is_all_that_is_loaded_of_it(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    before = identity_of(ModelConfig(path=str(folder)))
    networks = {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert set(before.weights) == {f"the weights of {name}" for name in networks}
    assert {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json"} <= set(before.files)
    assert {name.partition("/")[0] for name in before.files} > {"tokenizer", "tokenizer_2"}
    unet = folder / "unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    for name in (
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.bin",
        "README.md",
        ".gitattributes",
    ):
        shutil.copy(weights, unet / name)
    assert sorted(file.name for file in loaded_files(unet)) == ["config.json", weights.name]
    assert identity_of(ModelConfig(path=str(folder))) == before
    (unet / "config.json").write_text((unet / "config.json").read_text() + "\n")
    after = identity_of(ModelConfig(path=str(folder)))
    assert changed_names(before.files, after.files) == ["unet/config.json"]
    assert after.weights == before.weights
    other = identity_of(ModelConfig(path=str(folder), vae=str(unet)))
    assert changed_names(after.weights, other.weights) == ["the weights of vae"]
    assert changed_names(after.files, other.files) == ["model.vae/config.json"]


def test_the_files_of_a_model_are_all_but_the_weights(tmp_path):
    for name in ("config.json", "chat_template.jinja", "tokenizer.json", "model.safetensors.index.json"):
        (tmp_path / name).write_text(name)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool.jinja").write_text("one of several templates")
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    before = identity_of_folder(str(tmp_path), None)
    templates = ["additional_chat_templates/tool.jinja", "chat_template.jinja"]
    assert sorted(before.files) == [*templates, "config.json", "tokenizer.json"]
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    after = identity_of_folder(str(tmp_path), None)
    assert after.files == before.files
    assert after.weights != before.weights
    for name in templates:
        (tmp_path / name).write_text("another one")
    assert changed_names(before.files, identity_of_folder(str(tmp_path), None).files) == templates


def test_the_base_model_of_an_adapter_is_that_of_its_header_where_it_is_here(tmp_path):
    file = tmp_path / "adapter.safetensors"
    for named, found in ((str(tmp_path), str(tmp_path)), ("no/such-model", None), ("nosuch", None), (None, None)):
        save_file({"a": torch.ones(1)}, file, metadata={"base_model": named} if named else {})
        assert base_of(file) == found
