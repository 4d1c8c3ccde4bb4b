"""What is particular to Z-Image, on a tiny one; test_flow_families.py has what families share."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from dora_mm.cli import main
from dora_mm.config.images import DataConfig
from dora_mm.config.models import ModelConfig
from dora_mm.data.images.folder import read_training_images
from dora_mm.models.images import families
from dora_mm.models.images.components import Components
from dora_mm.models.images.families import load_image_model
from dora_mm.models.images.sdxl.family import SDXL
from dora_mm.tasks.image_batches import CaptionedBatches
from dora_mm.tasks.prompt_encoder import PromptEncoder
from tests.shared.images.tiny_z_image import build

PROMPT = "a TOK icon of a red ball"
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("z-image") / "model")


@pytest.fixture
def model(folder):
    return load_image_model(ModelConfig(path=str(folder)))


@pytest.fixture
def config(tmp_path, folder, image_folder):
    def write(name="train", **sections):
        values = {
            "pipeline": "train_diffusion",
            "output": str(tmp_path / "run"),
            "model": {"path": str(folder)},
            "adapter": {"rank": 4, "parts": ["transformer.attn", "transformer.ff"]},
            "data": {"folder": str(image_folder), "resolution": 64, "caption_dropout": 0.2},
            "optimizer": {"lr": 0.02},
            "train": {"steps": STEPS, "batch_size": 2, "checkpoint_every": 2},
            "sample": {"prompts": [PROMPT], "steps": 2, "guidance": 3.0},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**values, **sections}, sort_keys=False))
        return str(path)

    return write


def difference(one, other):
    return np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max()


def test_an_adapter_brings_the_settings_of_its_base(config, tmp_path, folder, caplog):
    """The run's own image is generated again by a job that names the run alone."""
    model = {"path": str(folder), "z_image": {"max_tokens": 12}}
    assert main(["train", config(model=model)]) == 0
    assert "captions have more than 12 tokens and lose their end, the first: a TOK icon of thing" in caplog.text
    job = tmp_path / "job.csv"
    job.write_text(f"prompt,seed,steps,guidance\n{PROMPT},0,2,3\n")
    assert main(["sample", str(job), "--set", f"adapter.path={tmp_path / 'run'}", f"output={tmp_path / 'job'}"]) == 0
    assert "1 prompts have more than 12 tokens and lose their end" in caplog.text
    drawn = Image.open(tmp_path / "job" / "samples" / "0001-seed0.png")
    assert difference(drawn, Image.open(tmp_path / "run" / "adapter" / "pictures" / "1.png")) <= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["loss.min_snr_gamma=5.0"], "loss.min_snr_gamma is for models that predict noise or v, and Z-Image does not"),
        (["loss.noise_offset=0.1"], "loss.noise_offset is for models that predict noise or v"),
        (["model.sdxl.unconditional=empty"], "is Z-Image, not SDXL: leave it out"),
        (
            ["adapter.parts=[unet.attn]"],
            "is Z-Image (ZImagePipeline), whose denoiser has transformer.attn, transformer.ff",
        ),
        (["adapter.parts=[text_encoder.attn]"], "this model has no part text_encoder.attn"),
        (["model.dtype=float16", "train.mixed_precision=fp16"], "model.dtype: Z-Image needs float32 or bfloat16"),
        (["model.z_image.max_tokens=800"], "model.z_image.max_tokens must be at most 576 for "),
        (
            ["model.vae=samples/tiny-sdxl/vae"],
            "does not fit the model: latent_channels: 8, not 4",
        ),
        (["model.vae=samples/tiny-sdxl/unet"], "model.vae: "),
        (["sample.guidance_rescale=0.7"], "sample.guidance_rescale is not for Z-Image"),
    ],
)
def test_what_has_no_meaning_for_the_family_is_refused(config, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.setattr(families, "load_components", None)  # found before anything is loaded, but the scheduler
    if changes[0].startswith(("loss", "sample")):
        monkeypatch.undo()
    assert main(["train", config(), "--set", *changes]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["scheduler=ddim"],
            "row 1: scheduler: ddim is not for models that predict a velocity; euler is",
        ),
        (["prompt_syntax=a1111"], "prompt_syntax a1111 is not for Z-Image, whose encoder takes no weights: use plain"),
        (["guidance_rescale=0.7"], "row 1: guidance_rescale is not for Z-Image, whose pipeline does not take it"),
        (["width=72"], "row 1: width 72 must be a multiple of 16 for Z-Image"),
    ],
)
def test_jobs_that_do_not_fit_the_family_are_refused(folder, tmp_path, capsys, settings, message):
    job = {"pipeline": "sample", "model": {"path": str(folder)}, "prompts": [PROMPT], "steps": 2}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    output = f"output={tmp_path / 'job'}"
    assert main(["sample", str(tmp_path / "job.yaml"), "--set", output, *settings]) == 2
    assert message in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "job.yaml"), "--set", output, "scheduler=euler"]) == 0


def test_the_length_of_prompts_is_a_setting_that_images_remember(folder, tmp_path):
    job = {
        "pipeline": "sample",
        "prompts": [PROMPT],
        "steps": 1,
        "output": str(tmp_path / "job"),
        "contact_sheet": False,
    }
    job["model"] = {"path": str(folder), "z_image": {"max_tokens": 12}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    assert main(["sample", str(tmp_path / "job.yaml")]) == 0
    image = tmp_path / "job" / "samples" / "0001-seed0.png"
    assert json.loads(Image.open(image).text["dora_mm"])["model"]["settings"] == {"z_image": {"max_tokens": 12}}
    assert main(["sample", "--replay", str(image), "--set", f"output={tmp_path / 'again'}"]) == 0
    again = tmp_path / "again" / "samples" / image.name
    assert difference(Image.open(image), Image.open(again)) == 0


def test_families_with_the_same_vae_do_not_share_cached_latents(model, image_folder, tmp_path):
    """One trains on the mode, which is all that it keeps; another needs the variance."""
    data = DataConfig(folder=str(image_folder), resolution=64, latent_cache=str(tmp_path / "cache"))
    images = read_training_images(data)

    def fill(family):
        CaptionedBatches(family, images, PromptEncoder(family, trained=True), data, batch_size=1, seed=0).encode_all()
        return len(list((tmp_path / "cache").rglob("*.safetensors")))

    assert fill(model) == fill(model) == 5
    assert fill(SDXL(Components.of(vae=model.vae))) == 10
