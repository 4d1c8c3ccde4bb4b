"""The files in samples/ fit together: the model, its judge, the images and the configs that use them."""

from pathlib import Path

import pytest
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    Flux2KleinPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)
from PIL import Image

from dora_mm.config import load_config
from dora_mm.config.models import ModelConfig
from dora_mm.data.images.folder import read_captioned_images
from dora_mm.data.images.held_out import hold_out
from dora_mm.eval.images.classifier import Classifier
from dora_mm.eval.images.prompts import fill
from dora_mm.models.images.families import load_image_model
from dora_mm.models.images.z_image import GROUP
from dora_mm.utils.digest import module_digest

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "samples" / "tiny-sdxl"
FLOW_MODEL = ROOT / "samples" / "tiny-z-image"
EDITING_MODEL = ROOT / "samples" / "tiny-klein"


def test_the_embedded_model_is_small_and_works_in_plain_diffusers():
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= 25e6
    assert not [file for file in MODEL.rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]
    pipe = StableDiffusionXLPipeline.from_pretrained(MODEL)
    image = pipe("a flat icon of a bus", num_inference_steps=1, height=128, width=128).images[0]
    assert image.size == (128, 128)


def test_the_classifier_was_fitted_for_the_embedded_model_and_has_no_shortcomings():
    classifier = Classifier.load(ROOT / "samples" / "judge")
    model = load_image_model(ModelConfig(path=str(MODEL)))
    classifier.check_model(model.resolution, module_digest(model.vae))
    assert classifier.shortcomings() == []


def test_the_embedded_flow_model_is_small_and_works_in_plain_diffusers_with_the_vae_of_the_other():
    assert sum(file.stat().st_size for file in FLOW_MODEL.rglob("*") if file.is_file()) <= 3.3e6
    assert not [file for file in FLOW_MODEL.rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]
    pipe = ZImagePipeline.from_pretrained(FLOW_MODEL, vae=AutoencoderKL.from_pretrained(MODEL / "vae"))
    image = pipe("a flat icon of a bus", num_inference_steps=1, height=128, width=128).images[0]
    assert image.size == (128, 128)


def test_the_classifier_fits_the_embedded_flow_model_and_its_prompts_are_of_one_length():
    config = load_config(ROOT / "configs" / "z_image" / "eval_demo.yaml")
    classifier = Classifier.load(ROOT / config.classifier)
    model = load_image_model(config.model)
    classifier.check_model(model.resolution, module_digest(model.vae))
    drawn = [*classifier.choose("lego"), *classifier.choose(config.concepts.role, config.concepts.count)]
    for prompt in (config.prompt, config.flat_prompt):  # it was pretrained with one group of tokens alone
        assert all(model.num_tokens(fill(prompt, concept)) <= GROUP for concept in drawn)


def test_the_embedded_flow_model_says_where_its_vae_is_missing():
    model = load_image_model(ModelConfig(path=str(FLOW_MODEL)))
    with pytest.raises(ValueError, match=r"tiny-z-image has no weights of its VAE: set model\.vae to a folder"):
        model.components["vae"]


def test_the_embedded_editing_model_is_small_and_edits_in_plain_diffusers_with_the_vae_of_the_other():
    assert sum(file.stat().st_size for file in EDITING_MODEL.rglob("*") if file.is_file()) <= 1.2e6
    assert not [file for file in EDITING_MODEL.rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]
    vae = AutoencoderKLFlux2.from_pretrained(MODEL / "vae")
    pipe = Flux2KleinPipeline.from_pretrained(EDITING_MODEL, vae=vae)
    reference = Image.open(ROOT / "samples" / "lego_flat" / "anchor.webp")
    shared = {"prompt": "make it grey", "num_inference_steps": 1, "max_sequence_length": 40}
    assert pipe(image=[reference], **shared).images[0].size == reference.size == (128, 128)


def test_the_demo_of_editing_shows_pairs_that_it_is_not_trained_on():
    config = load_config(ROOT / "configs" / "flux2_klein" / "demo_edit.yaml")
    folder = ROOT / config.data.folder
    references = [ROOT / path for path in config.data.references]
    trained, held_out = hold_out(read_captioned_images(folder, references=references), config.data)
    assert (len(trained), len(held_out)) == (49, 12)
    assert {path.name for path in references[0].glob("*.webp")} == {path.name for path in folder.glob("*.webp")}
    shown = {Path(path).stem for images in config.sample.images for path in images}
    assert shown <= {image.path.stem for image in held_out}


@pytest.mark.parametrize(("name", "role", "count"), [("tiny_3d_icon", "icon3d", 23), ("tiny_lego", "lego", 61)])
def test_training_concepts_are_never_reported(name, role, count):
    data = load_config(ROOT / "configs" / "sdxl" / f"{name}.yaml").data
    images = read_captioned_images(
        ROOT / data.folder, instance_prompt=data.instance_prompt, placeholder=data.placeholder
    )
    classifier = Classifier.load(ROOT / "samples" / "judge")
    trained = {concept.name.replace(" ", "_").lower() for concept in classifier.choose(role)}
    assert len(images) == count
    assert {image.path.stem for image in images} <= trained
    assert not trained & {concept.name.replace(" ", "_").lower() for concept in classifier.choose("report")}
