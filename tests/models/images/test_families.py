"""Which family of image models a path is of, and how its components are loaded."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from dora_mm.config.models import ModelConfig, ZImageConfig
from dora_mm.models.images.components import Components
from dora_mm.models.images.families import family_of, load_image_model
from dora_mm.registries.image_families import IMAGE_FAMILIES
from dora_mm.registries.target_maps import TARGET_MAPS
from dora_mm.tasks.prompt_encoder import PromptEncoder


def folder_of(tmp_path, name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return str(tmp_path)


@pytest.mark.parametrize("name", IMAGE_FAMILIES.built_in)
def test_the_index_of_a_folder_says_the_family(tmp_path, name):
    record = IMAGE_FAMILIES[name]
    family = family_of(folder_of(tmp_path, record.pipeline))
    assert (family.name, family.record()) == (name, record)
    assert set(family.maps.values()) <= set(TARGET_MAPS)
    assert family.maps[family.denoiser] == record.target_map
    assert next(iter(family.maps)) == family.denoiser == family.phases[-1][0]
    assert hasattr(ModelConfig(path="a"), name)
    assert family.pipeline_class().__name__ == record.pipeline
    assert bool(record.tensors) == (family.single_file is not None)


def test_a_model_of_no_family_is_named_with_the_families_there_are(tmp_path):
    expected = r"is a FluxPipeline, which is no family of image models here; there are SDXL \(.*\), Z-Image \(.*\)\."
    with pytest.raises(ValueError, match=expected):
        load_image_model(ModelConfig(path=folder_of(tmp_path, "FluxPipeline")))


@pytest.mark.parametrize("index", ["{", "[]", "null", '{"_class_name": 3}'])
def test_damaged_indices(tmp_path, index):
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ValueError, match=str(tmp_path)):
        family_of(str(tmp_path))


def test_a_folder_without_an_index_says_what_it_has(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder / "vae", tmp_path / "vae")
    with pytest.raises(ValueError, match=r"is not an image model of diffusers: it has vae, but no model_index\.json"):
        family_of(str(tmp_path))


def test_single_files_are_told_by_the_names_of_their_tensors(tmp_path):
    names = ["model.diffusion_model.label_emb.0.0.weight", "conditioner.embedders.1.model.ln_final.weight"]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "xl.safetensors")
    assert family_of(str(tmp_path / "xl.safetensors")).name == "sdxl"
    save_file({names[0]: torch.zeros(1)}, tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="it is no checkpoint of SDXL, of which single files are read"):
        family_of(str(tmp_path / "unet.safetensors"))


def test_a_section_of_another_family_is_refused(tiny_folder):
    with pytest.raises(ValueError, match=r"model\.z_image: .* is SDXL, not Z-Image: leave it out"):
        load_image_model(ModelConfig(path=str(tiny_folder), z_image=ZImageConfig()))


def test_parts_are_loaded_in_phases_and_released_for_good():
    asked = []

    def load(names):
        asked.append(tuple(names))
        return {name: torch.nn.Linear(1, 1) for name in names}

    components = Components(load, [("text_encoder", "vae"), ("unet",)])
    assert asked == []
    assert not components["vae"].weight.requires_grad
    assert not components["vae"].training
    assert asked == [("text_encoder", "vae")]
    components.release(["text_encoder"])
    components.to("meta")
    assert components["unet"].weight.device.type == components["vae"].weight.device.type == "meta"
    assert components["text_encoder"] is None
    assert asked == [("text_encoder", "vae"), ("unet",)]


def test_a_part_that_was_replaced_is_not_loaded():
    asked = []
    components = Components(lambda names: asked.extend(names) or dict.fromkeys(names, "loaded"), [("vae", "scheduler")])
    components["vae"] = "mine"
    assert (components["scheduler"], components["vae"], asked) == ("loaded", "mine", ["scheduler"])


def test_weights_are_identified_by_their_files_without_loading_them(tmp_path):
    file, asked = tmp_path / "model.safetensors", []

    def opened(dtype="float32"):
        return Components(asked.append, [("vae",)], None, lambda name: [file], lambda name: dtype)

    save_file({"weight": torch.ones(1, 1)}, file)
    before = opened().digest("vae")
    save_file({"weight": torch.zeros(1, 1)}, file)
    assert len({before, opened().digest("vae"), opened("bfloat16").digest("vae")}) == 3
    assert not asked
    components = opened()
    components["vae"] = torch.nn.Linear(1, 1)  # a VAE of its own
    assert components.digest("vae") not in (before, opened().digest("vae"))


def test_a_training_with_cached_captions_loads_no_text_encoder(tiny_folder, tmp_path):
    captions = ["a TOK", "another TOK"]
    whole = load_image_model(ModelConfig(path=str(tiny_folder)))
    PromptEncoder(whole, trained=False, folder=str(tmp_path)).keep(captions)
    model = load_image_model(ModelConfig(path=str(tiny_folder)))
    model.components.release(["text_encoder", "text_encoder_2"])  # asking for one would fail
    prompts = PromptEncoder(model, trained=False, folder=str(tmp_path))
    prompts.keep(captions)
    assert [set(prompt) for prompt in prompts(captions)] == [{"text", "pooled"}] * 2
