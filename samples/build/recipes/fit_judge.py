"""Fits the judge of style adapters on real icons, resized for one model and passed through its VAE and UNet.

It has to be fitted once per model. `eval_diffusion` needs only its output, judge.safetensors and judge.json.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from dora_mm.config.images import LossConfig
from dora_mm.config.paths import resolve_path
from dora_mm.data.images.buckets import Framing
from dora_mm.eval.images.encoder import Encoder
from dora_mm.eval.images.style import STYLES
from dora_mm.models.images.families import load_image_model
from dora_mm.models.images.image_model import ImageModel
from dora_mm.models.images.sdxl.encoding import denormalize_latents
from dora_mm.models.images.vae import decoded
from dora_mm.tasks.diffusion import ConditionedLatents, DiffusionTask
from dora_mm.train.run import open_run
from dora_mm.utils.devices import default_device
from dora_mm.utils.digest import module_digest
from dora_mm.utils.randomness import generator
from samples.build.judge.fitting import fit_classifier
from samples.build.pretraining.icons import Icon, load_pixels, read_icons, to_signed
from samples.build.schema import FitClassifierConfig

log = logging.getLogger(__name__)


def main(config: FitClassifierConfig, *, resume: Path | None = None) -> None:
    """Fits the judge and prints its report.

    Writes judge.safetensors and judge.json to the run directory.

    Raises:
        ValueError: The icons are missing, or the model cannot be loaded.
    """
    folder = resolve_path(config.icons, "icons")
    icons = {style: read_icons(folder, [style]) for style in STYLES}
    concepts = [icon.concept for icon in icons[STYLES[0]]]
    device = default_device()
    encoder = Encoder(device)
    model = load_image_model(config.model).to(device)
    run = open_run(config)

    num_classifier = sum(concept.split == "judge" for concept in concepts)
    times = torch.randint(1, config.max_time + 1, (num_classifier,), generator=generator(0, 0, "times"))
    features, denoised = {}, {}
    for style in STYLES:
        features[style] = encoder(
            through_model(model, icons[style], progress=f"{style}, VAE"), progress=f"{style}, features"
        )
        fitted = [icon for icon in icons[style] if icon.concept.split == "judge"]
        denoised[style] = encoder(
            through_model(model, fitted, times, progress=f"{style}, UNet"), progress=f"{style}, features"
        )
    log.info("fitting")
    origin = {"model": config.model.path, "resolution": model.resolution, "vae": module_digest(model.vae)}
    classifier = fit_classifier(concepts, features, origin, denoised)
    classifier.save(run.path)
    print(classifier.describe())
    print(f"judge    {run.path}")


@torch.no_grad()
def through_model(
    model: ImageModel, icons: Sequence[Icon], times: torch.Tensor | None = None, *, batch_size: int = 16, progress: str
) -> list[Image.Image]:
    """Encodes and decodes icons with the VAE, and denoises them with the UNet in between if `times` is given.

    A judge fitted on clean images would take the blur of the VAE for a style, and one fitted on images from the VAE
    alone would take the UNet's uneven colours for shading.

    Args:
        model: The model.
        icons: N icons; they are resized to the model's resolution.
        times: The timestep of the scheduler to which each icon is noised, (N,); the UNet denoises it in one step and
            without a prompt. None: the UNet is not used.
        batch_size: Icons per forward pass.
        progress: The label of the progress bar.

    Returns:
        N RGB images.
    """
    size = (model.resolution, model.resolution)
    task = DiffusionTask(model, LossConfig())
    prompt = {name: torch.zeros_like(each) for name, each in model.encode_prompts([""])[0].items()}
    framing = Framing(size, size, 0, 0, size, False)
    images = []
    with tqdm(total=len(icons), desc=progress, unit="image", disable=None) as bar:
        for start in range(0, len(icons), batch_size):
            batch = icons[start : start + batch_size]
            pixels = to_signed(load_pixels(batch, model.resolution))
            latents = model.normalized(model.encode_images(pixels).mean)
            if times is not None:
                count = len(batch)
                conditioned = ConditionedLatents(latents.to(model.unet.dtype), [prompt] * count, [framing] * count)
                batch_times = times[start : start + batch_size].to(model.device)
                latents = task.denoised(conditioned, batch_times, generator(0, start, "noise")).to(latents.dtype)
            images += decoded(model.vae, denormalize_latents(model.vae, latents))
            bar.update(len(batch))
    return images
