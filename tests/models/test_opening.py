"""One sentence for whatever a library raises while a model is opened, and what the hub's cache holds."""

import json
import shutil

import pytest
import torch

from dora_mm.config.models import ModelConfig, VLBartModelConfig, VLMModelConfig
from dora_mm.models.image_families import load_image_model
from dora_mm.models.opening import UnreachableError, local_copy, opening
from dora_mm.models.vl_bart.loading import load_vl_bart
from dora_mm.models.vlm.loading import load_processor, load_vlm

SENTENCE = r"owner/nothing is not on this machine, and the hub \(huggingface.co\) cannot be reached: .*local folder"


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


def test_weights_of_another_shape(tiny_vlm, tmp_path):
    """transformers' own message refers to a report of 60 lines."""
    folder = shutil.copytree(tiny_vlm("llava"), tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^model.path: {folder} has a .*mlp.* of shape .*, and its config.json needs"):
        load_vlm(VLMModelConfig(path=str(folder)), torch.device("cpu"))


def test_other_errors_have_other_messages(tmp_path):
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
