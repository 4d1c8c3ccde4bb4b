"""Fits the judge of style adapters on real icons, at the size and through the VAE and UNet of one model.

A few minutes, once per model. What comes out (judge.safetensors, judge.json) is all that `eval_sdxl` needs.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from dora_mm.config.loader import resolve_path
from dora_mm.config.sdxl import LossConfig
from dora_mm.eval.images.encoder import Encoder
from dora_mm.eval.images.style import STYLES
from dora_mm.models.sdxl.encoding import denormalize_latents, encode_images, encode_prompts, normalize_latents, time_ids
from dora_mm.models.sdxl.loading import SDXL, load_configured
from dora_mm.tasks.sdxl import ConditionedLatents, DiffusionTask
from dora_mm.train.run import open_run
from dora_mm.utils.devices import default_device
from dora_mm.utils.digest import module_digest
from dora_mm.utils.randomness import generator
from samples.build.judge.fitting import fit_judge
from samples.build.judge.icons import decode, icon_paths, read_icon_concepts, signed
from samples.build.schema import FitJudgeConfig

log = logging.getLogger(__name__)


def main(config: FitJudgeConfig, *, resume: Path | None = None) -> None:
    folder = resolve_path(config.icons, "icons")
    concepts = read_icon_concepts(folder)
    paths = {style: icon_paths(folder, style, concepts) for style in STYLES}
    device = default_device()
    encoder = Encoder(device)
    model = load_configured(config.model).to(device)
    run = open_run(config)

    seen = [concept.split == "judge" for concept in concepts]
    times = torch.randint(1, config.max_time + 1, (sum(seen),), generator=generator(0, 0, "times"))
    features, denoised = {}, {}
    for style in STYLES:
        features[style] = encoder(
            through_model(model, paths[style], progress=f"{style}, VAE"), progress=f"{style}, features"
        )
        again = [path for path, fitted in zip(paths[style], seen, strict=True) if fitted]
        denoised[style] = encoder(
            through_model(model, again, times, progress=f"{style}, UNet"), progress=f"{style}, features"
        )
    log.info("fitting")
    origin = {"model": config.model.path, "resolution": model.resolution, "vae": module_digest(model.vae)}
    judge = fit_judge(concepts, features, origin, denoised)
    judge.save(run.path)
    print(judge.describe())
    print(f"judge    {run.path}")


@torch.no_grad()
def through_model(
    model: SDXL, paths: Sequence[Path], times: torch.Tensor | None = None, *, batch_size: int = 16, progress: str
) -> list[Image.Image]:
    """The pictures at the model's size as the model leaves them: through the VAE, and through the UNet where `times` is
    given.

    A judge fitted on clean pictures would find the blur of the VAE remarkable, and one that knows the VAE alone takes
    the UNet's uneven colours for shading.

    Args:
        times: (N,) the scheduler's time that each is noised to, before it is predicted back in one step and without a
            prompt.
    """
    size = (model.resolution, model.resolution)
    task = DiffusionTask(model.unet, dict(model.scheduler.config), LossConfig())
    prompt, pooled = (torch.zeros_like(each) for each in encode_prompts(model, [""]))
    sizes = time_ids(size, (0, 0), size)[None].to(model.device)
    pictures = []
    with tqdm(total=len(paths), desc=progress, unit="image", disable=None) as bar:
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            resized = [Image.open(path).convert("RGB").resize(size, Image.Resampling.LANCZOS) for path in batch]
            latents = normalize_latents(model.vae, encode_images(model, signed(resized))[0])
            if times is not None:
                told = (each.expand(len(batch), *each.shape[1:]) for each in (prompt, pooled, sizes))
                until = times[start : start + batch_size].to(model.device)
                latents = task.denoised(
                    ConditionedLatents(latents.to(model.unet.dtype), *told), until, generator(0, start, "noise")
                ).to(latents.dtype)
            pictures += decode(model, denormalize_latents(model.vae, latents))
            bar.update(len(batch))
    return pictures
