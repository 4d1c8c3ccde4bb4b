"""Jobs draw rows with several adapters at their own strengths."""

import numpy as np
import pytest
import torch
from PIL import Image

from dora_mm import DoRASpec, inject, load_adapter, save_adapter
from dora_mm.config.generation import ImageGenerationConfig
from dora_mm.config.models import ModelConfig
from dora_mm.core import adapter_parameters
from dora_mm.models.images.families import load_image_model
from dora_mm.sampling.batch.requests import ImageRequest
from dora_mm.sampling.image_sampler import sample
from dora_mm.sampling.model import load_model

SETTINGS = {"seed": 3, "steps": 2, "guidance": 4.0, "width": 64, "height": 64, "scheduler": None}


@pytest.fixture(scope="module")
def styles(tiny_folder, tmp_path_factory):
    """The folders of two adapters of the denoiser."""
    found = []
    for seed in (0, 1):
        model = load_image_model(ModelConfig(path=str(tiny_folder)))
        inject(model.unet, "sdxl-unet", DoRASpec(rank=2))
        stream = torch.Generator().manual_seed(seed)
        for name, parameter in adapter_parameters(model.unet).items():
            if name.endswith("lora_B"):
                parameter.data.normal_(std=0.3, generator=stream)
        found.append(str(tmp_path_factory.mktemp("style")))
        save_adapter({"unet": model.unet}, found[-1])
    return found


@pytest.mark.parametrize("strengths", [(0.25, 1.5), (1.5, 0.25)])
def test_each_adapter_of_a_row_has_its_own_strength(tiny_folder, styles, strengths, tmp_path):
    weights = tuple(zip(styles, strengths, strict=True))
    image = ImageRequest(row=1, prompt="a bus", negative_prompt=None, adapters=weights, strength=1.0, **SETTINGS)
    config = ImageGenerationConfig(pipeline="sample", name="job", model=ModelConfig(path=str(tiny_folder)))
    job = load_model(config, styles).generate(tmp_path, [image], 1)
    job.raise_failures()
    model = load_image_model(ModelConfig(path=str(tiny_folder)))
    for path, strength in weights:
        load_adapter(model.adaptable, path, name=path[-1], strength=strength)
    expected = sample(model, ["a bus"], [3], steps=2, guidance=4.0)[0]
    found = np.asarray(Image.open(job.file(0)), np.int64)
    assert np.abs(found - np.asarray(expected, np.int64)).max() <= 1
