"""Jobs encode prompts before the denoiser is loaded, and free the text encoders; images are the same by bits."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dora_mm import DoRASpec, inject, save_adapter
from dora_mm.config.generation import ImageGenerationConfig
from dora_mm.config.models import ModelConfig
from dora_mm.core import adapter_parameters
from dora_mm.models.images import families
from dora_mm.models.images.families import load_image_model
from dora_mm.sampling import model as sampling_model
from dora_mm.sampling.batch.requests import ImageRequest
from dora_mm.sampling.model import load_model

SETTINGS = {"seed": 3, "steps": 2, "guidance": 4.0, "width": 64, "height": 64, "scheduler": None, "strength": 1.0}
IMAGE = ImageRequest(row=1, prompt="a bus", negative_prompt="red", adapters=(), **SETTINGS)


@pytest.fixture(scope="module")
def adapters(tiny_folder, tmp_path_factory):
    """The folders of two adapters by the network that they change."""
    model, found = load_image_model(ModelConfig(path=str(tiny_folder))), {}
    for name in ("unet", "text_encoder"):
        network = getattr(model, name)
        inject(network, model.maps[name], DoRASpec(rank=2))
        stream = torch.Generator().manual_seed(0)
        for key, parameter in adapter_parameters(network).items():
            if key.endswith("lora_B"):
                parameter.data.normal_(std=0.3, generator=stream)
        found[name] = str(tmp_path_factory.mktemp(name))
        save_adapter({name: network}, found[name])
    return found


@pytest.fixture
def loading(monkeypatch):
    """The groups of components that were loaded, each with whether text encoders were in memory then."""
    found, encoders, own = [], [], families.load_components

    def load(pipeline, path, names, *args):
        gc.collect()
        found.append((*names, any(encoder() is not None for encoder in encoders)))
        loaded = own(pipeline, path, names, *args)
        encoders.extend(weakref.ref(loaded[name]) for name in names if name.startswith("text_encoder"))
        return loaded

    monkeypatch.setattr(families, "load_components", load)
    return found


def drawn(folder, adapters, tmp_path, name):
    config = ImageGenerationConfig(pipeline="sample", name="job", model=ModelConfig(path=str(folder)))
    weights = tuple((path, 1.0) for path in adapters)
    images = [IMAGE, replace(IMAGE, row=2, prompt="a cat", negative_prompt=None, adapters=weights)]
    loaded = load_model(config, adapters)
    loaded.check(images)
    (tmp_path / name).mkdir()
    job = loaded.generate(tmp_path / name, images, 2)
    job.raise_failures()
    return [np.asarray(Image.open(job.file(index))) for index in range(2)]


def test_text_encoders_are_freed_before_the_denoiser_is_loaded(tiny_folder, adapters, loading, tmp_path, monkeypatch):
    freed = drawn(tiny_folder, [adapters["unet"]], tmp_path, "freed")
    denoiser = next(group for group in loading if "unet" in group)
    assert denoiser == ("unet", False)
    loading.clear()
    monkeypatch.setattr(
        sampling_model, "MOST_ENCODED", 1
    )  # of two prompts: they are encoded while images are generated
    kept = drawn(tiny_folder, [adapters["unet"]], tmp_path, "kept")
    assert ("unet", True) in loading
    assert all(np.array_equal(one, other) for one, other in zip(freed, kept, strict=True))
    assert not np.array_equal(freed[0], freed[1])


def test_an_adapter_of_a_text_encoder_keeps_it(tiny_folder, adapters, loading, tmp_path):
    images = drawn(tiny_folder, [adapters["text_encoder"]], tmp_path, "adapted")
    assert ("unet", True) in loading
    assert not np.array_equal(*images)
