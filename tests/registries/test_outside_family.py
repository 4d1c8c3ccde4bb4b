"""A family of image models of another package, with a pipeline of its own, is trained and drawn with by command."""

import json

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from safetensors.torch import load_file

from tests.registries.test_outside_package import run
from tests.shared.images.tiny_flux2_klein import build
from tests.shared.packages import outside_package

PROMPT = "a TOK icon of a red ball"
RECORD = """
from dora_mm.config.models import Flux2KleinConfig
from dora_mm.registries.image_families import ImageFamily


class SmallKleinConfig(Flux2KleinConfig):
    pass


FAMILY = ImageFamily(
    title="small klein",
    import_path="small_klein_model:SmallKlein",
    section="small_klein:SmallKleinConfig",
    pipeline="SmallKleinPipeline",
)
"""
MODEL = """
from diffusers import Flux2KleinPipeline

from dora_mm.models.images.flux2_klein import Flux2Klein


class SmallKleinPipeline(Flux2KleinPipeline):
    pass


class SmallKlein(Flux2Klein):
    name = "small_klein"

    @classmethod
    def pipeline_class(cls):
        return SmallKleinPipeline
"""


def difference(one, other):
    return np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max()


@pytest.mark.slow
def test_a_family_of_a_package_is_trained_and_drawn_and_diffusers_draws_the_same(image_folder, tmp_path):
    files = {"small_klein.py": RECORD, "small_klein_model.py": MODEL}
    package = outside_package(tmp_path / "package", files, {"image_families.small_klein": "small_klein:FAMILY"})
    folder = build(tmp_path / "model")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("Flux2KleinPipeline", "SmallKleinPipeline"))
    config = {
        "pipeline": "train_diffusion",
        "output": "run",
        "model": {"path": str(folder), "small_klein": {"max_tokens": 64}},
        "adapter": {"rank": 4, "parts": ["transformer.attn", "transformer.ff"]},
        "data": {"folder": str(image_folder), "resolution": 64, "caption_dropout": 0.2},
        "optimizer": {"lr": 0.3},
        "train": {"steps": 2, "batch_size": 2},
        "sample": {"prompts": [PROMPT], "steps": 2, "guidance": 3.0},
    }
    (tmp_path / "train.yaml").write_text(json.dumps(config))
    (tmp_path / "job.csv").write_text(f"prompt,seed,strength\n{PROMPT},3,1\n{PROMPT},3,0\n")
    commands = ("train train.yaml --dry-run", "train train.yaml", "train --resume run")
    done = run(package, *commands)
    assert done.returncode == 0, done.stderr
    assert "run run is finished" in done.stderr.lower() + done.stdout.lower()
    done = run(package, "sample job.csv --set adapter.path=run output=job steps=2", "inspect run")
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    drawn = [Image.open(tmp_path / "job" / "samples" / f"000{n}-seed3.png") for n in (1, 2)]

    plain = Flux2KleinPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)

    def draw():
        settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 64, "width": 64}
        seed = torch.Generator().manual_seed(3)
        return plain(prompt=PROMPT, generator=seed, max_sequence_length=64, **settings).images[0]

    assert difference(draw(), drawn[1]) <= 2
    plain.load_lora_weights(str(tmp_path / "run" / "adapter"))
    assert difference(draw(), drawn[0]) <= 2
    assert difference(*drawn) > 3


def test_its_section_is_unknown_without_the_package(tmp_path):
    (tmp_path / "train.yaml").write_text("pipeline: train_diffusion\nmodel:\n  path: a/b\n  small_klein: {}\n")
    done = run(tmp_path / "package", "train train.yaml")
    assert "line 4: model.small_klein: unknown key" in done.stderr
