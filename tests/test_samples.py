"""The files in samples/ fit together: the model, its judge, the images and the configs that use them."""

from pathlib import Path

import pytest
from diffusers import StableDiffusionXLPipeline

from dora_mm.config import load_config
from dora_mm.config.models import ModelConfig
from dora_mm.data.images.folder import read_captioned_images
from dora_mm.eval.images.judge import Judge
from dora_mm.models.images.families import load_image_model
from dora_mm.utils.digest import module_digest

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "samples" / "tiny-sdxl"


def test_the_embedded_model_is_small_and_works_in_plain_diffusers():
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= 25e6
    assert not [file for file in MODEL.rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]
    pipe = StableDiffusionXLPipeline.from_pretrained(MODEL)
    image = pipe("a flat icon of a bus", num_inference_steps=1, height=128, width=128).images[0]
    assert image.size == (128, 128)


def test_the_judge_was_fitted_for_the_embedded_model_and_has_no_shortcomings():
    judge = Judge.load(ROOT / "samples" / "judge")
    model = load_image_model(ModelConfig(path=str(MODEL)))
    judge.check_model(model.resolution, module_digest(model.vae))
    assert judge.shortcomings() == []


@pytest.mark.parametrize(("name", "role", "count"), [("tiny_3d_icon", "icon3d", 23), ("tiny_lego", "lego", 61)])
def test_training_concepts_are_never_reported(name, role, count):
    data = load_config(ROOT / "configs" / "sdxl" / f"{name}.yaml").data
    images = read_captioned_images(
        ROOT / data.folder, instance_prompt=data.instance_prompt, placeholder=data.placeholder
    )
    judge = Judge.load(ROOT / "samples" / "judge")
    trained = {concept.name.replace(" ", "_").lower() for concept in judge.choose(role)}
    assert len(images) == count
    assert {image.path.stem for image in images} <= trained
    assert not trained & {concept.name.replace(" ", "_").lower() for concept in judge.choose("report")}
