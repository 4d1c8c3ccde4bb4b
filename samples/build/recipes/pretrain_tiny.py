"""Pretrains the embedded SDXL model from scratch, in three stages.

The VAE is trained on every style, text encoders and UNet on flat styles only, and then the VAE's decoder again, on
latents of every style that the UNet has denoised. The UNet never sees a 3D icon or a brick: adapters learn those.
"""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from dora_mm.config.loader import dump_config
from dora_mm.config.models import ModelConfig
from dora_mm.config.paths import resolve_path
from dora_mm.data.images.buckets import Framing
from dora_mm.data.images.latents import Latents
from dora_mm.models.images.components import Components, load_vae
from dora_mm.models.images.families import load_image_model
from dora_mm.models.images.image_model import Prompt
from dora_mm.models.images.sdxl.encoding import encode_images, encode_tokens, tokenize
from dora_mm.models.images.sdxl.family import SDXL
from dora_mm.models.images.sdxl.random_weights import build_tiny_sdxl
from dora_mm.sampling.grids import image_grid
from dora_mm.sampling.image_sampler import sample
from dora_mm.tasks.diffusion import ConditionedLatents, DiffusionTask
from dora_mm.utils.randomness import generator
from dora_mm.utils.run_directory import RunDirectory
from samples.build.pretraining.batches import batch_indices
from samples.build.pretraining.icons import ALL_STYLES, STYLE_WORDS, Icon, caption, load_pixels, read_icons, to_signed
from samples.build.pretraining.stages import train_stage
from samples.build.pretraining.vae import DecodingTask, ReconstructionTask, psnr, shift_latents
from samples.build.schema import DecoderStage, PretrainStage, PretrainTinyConfig

log = logging.getLogger(__name__)
# Vector icons have no original size, so the model gets a random one as its condition and learns that it has no effect.
ORIGINAL_SIDES = (128, 1024)
TEXT_TO_IMAGE = ("unet", "text_encoder", "text_encoder_2")  # what the second stage trains


def main(config: PretrainTinyConfig, *, resume: Path | None = None) -> None:
    """Runs the stages of the config.

    Writes to the run directory: checkpoints and metrics of each stage in vae/, unet/ and decoder/, sample images in
    samples/, the model in tiny-sdxl/, and sheet.png.

    Args:
        config: The config.
        resume: The run directory to resume; None: a new run.

    Raises:
        ValueError: The icons are missing, or a starting model does not have the config's sizes.
    """
    folder = resolve_path(config.icons, "icons")
    all_icons = read_icons(folder, ALL_STYLES)
    # Three quarters are Fluent's flat icons: the 3D icons that adapters learn from are the same drawings, and uneven
    # areas drawn by an undertrained model look like their shading.
    flat_icons = read_icons(folder, (*STYLE_WORDS, *["flat"] * 8), split="pretrain")
    model = build_tiny_sdxl(
        seed=config.seed,
        resolution=config.model.resolution,
        num_merges=config.model.num_merges,
        vae_channels=config.model.vae_channels,
        latent_channels=config.model.latent_channels,
        unet_channels=config.model.unet_channels,
    )
    if config.vae_from:
        model.vae = trained_vae(config)
    if config.unet_from:
        copy_weights(config, model)
    run = (
        RunDirectory.resume(resume) if resume else RunDirectory.create(config.name, dump_config(config), config.output)
    )
    model.to(Accelerator(mixed_precision=config.vae.train.mixed_precision).device)  # the same in all stages
    model.freeze()
    if not config.vae_from:
        train_vae(config, model.vae, all_icons, run.stage("vae"))
    if config.unet:
        train_unet(config, config.unet, model, flat_icons, run)
    if config.decoder:
        train_decoder(config, config.decoder, model, all_icons, run.stage("decoder"))
    show(config, model, run)
    log.info("The model is in %s, sample images are in %s.", run.path / "tiny-sdxl", run.contact_sheet)


def trained_vae(config: PretrainTinyConfig) -> Any:
    """The VAE in the folder `vae_from`.

    Raises:
        ValueError: Its sizes differ from those of the config's model.
    """
    folder = resolve_path(config.vae_from or "", "vae_from")
    vae = load_vae(AutoencoderKL, folder / "vae")
    found = (vae.config.latent_channels, tuple(vae.config.block_out_channels))
    if found != (expected := (config.model.latent_channels, tuple(config.model.vae_channels))):
        raise ValueError(
            f"vae_from: {folder} has {found[0]} latent channels and block channels {found[1]}, but the config's model "
            f"has {expected[0]} and {expected[1]}"
        )
    return vae


def copy_weights(config: PretrainTinyConfig, model: SDXL) -> None:
    """Copies the weights of UNet and text encoders from the model in the folder `unet_from`.

    Raises:
        ValueError: Their sizes differ from those of the config's model.
    """
    folder = resolve_path(config.unet_from or "", "unet_from")
    found = load_image_model(ModelConfig(path=str(folder)))
    for name in TEXT_TO_IMAGE:
        try:
            getattr(model, name).load_state_dict(getattr(found, name).state_dict())
        except RuntimeError as error:
            raise ValueError(f"unet_from: the {name} in {folder} has other sizes than in the config's model") from error


def train_vae(config: PretrainTinyConfig, vae: AutoencoderKL, icons: list[Icon], run: RunDirectory) -> None:
    stage = config.vae
    pixels = load_pixels(icons, config.model.resolution)

    def batch_at(number: int) -> torch.Tensor:
        return to_signed(pixels[batch_indices(len(pixels), stage.train.batch_size, number, config.seed)])

    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a fifth faster on a CPU
    train_stage(config.seed, stage, {"vae": vae}, ReconstructionTask(vae).loss, batch_at, run)
    vae.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    vae.requires_grad_(False).eval()
    normalise(vae, pixels)


@torch.no_grad()
def normalise(vae: Any, pixels: torch.Tensor, num: int = 512) -> None:
    """Makes the latents' mean 0 and their standard deviation 1, per channel, over `num` of the images."""
    chosen = to_signed(pixels[torch.linspace(0, len(pixels) - 1, min(num, len(pixels))).long()]).to(vae.device)
    means = torch.cat([vae.encode(part).latent_dist.mean for part in chosen.split(32)])
    decoded = torch.cat([vae.decode(part).sample for part in means.split(32)])
    log.info("The PSNR of the VAE's reconstructions is %.1f dB.", psnr(decoded, chosen))
    shift_latents(vae, means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3)))


def train_unet(
    config: PretrainTinyConfig, stage: PretrainStage, model: SDXL, icons: list[Icon], run: RunDirectory
) -> None:
    mean, logvar = encode_icons(model, icons)
    side = config.model.resolution

    def batch_at(number: int) -> dict[str, Any]:
        size = stage.train.batch_size
        rows = batch_indices(len(icons), size, number, config.seed)
        stream = generator(config.seed, number, "captions")
        ids, ids_2 = tokenize(model, [caption(icons[row], stream, config.unnamed_style) for row in rows])
        kept = torch.rand(size, generator=stream) >= config.caption_dropout
        sides = torch.randint(ORIGINAL_SIDES[0], ORIGINAL_SIDES[1] + 1, (size,), generator=stream).tolist()
        latents = Latents(mean[rows], logvar[rows]).sample(generator(config.seed, number, "latents"))
        return {
            "latents": model.normalized(latents),
            "ids": ids,
            "ids_2": ids_2,
            "kept": kept.float().view(-1, 1, 1),  # a dropped caption is all zeros, as SDXL encodes "no prompt"
            "framings": [whole((original, original), (side, side)) for original in sides],
        }

    task = DiffusionTask(model, config.loss)

    def loss(batch: dict[str, Any], stream: torch.Generator) -> torch.Tensor:
        # At most 40 tokens: unfused attention makes a complete step a sixth faster on a CPU than the fused kernel.
        with sdpa_kernel(SDPBackend.MATH):
            prompt, pooled = encode_tokens(model, batch["ids"], batch["ids_2"])
            prompts = as_prompts(prompt * batch["kept"], pooled * batch["kept"][:, 0])
            return task.loss(ConditionedLatents(batch["latents"], prompts, batch["framings"]), stream).mean

    trained = {name: getattr(model, name) for name in TEXT_TO_IMAGE}
    device = model.device
    average = EMAModel([p for network in trained.values() for p in network.parameters()], decay=config.ema_decay)

    def after_step(step: int) -> None:
        average.to(device)  # restored from a checkpoint, it is on the CPU
        parameters = [p for network in trained.values() for p in network.parameters()]
        average.step(parameters)

    def on_step_end(step: int) -> None:
        parameters = [p for network in trained.values() for p in network.parameters()]
        if config.sample.every and step % config.sample.every == 0 and step < stage.train.steps:
            average.to(device)
            average.store(parameters)
            try:
                average.copy_to(parameters)
                show(config, model, run, step)
            finally:  # an interruption writes a checkpoint, which must contain the weights that are trained
                average.restore(parameters)

    hooks = {"after_step": after_step, "on_step_end": on_step_end}
    train_stage(config.seed, stage, trained, loss, batch_at, run.stage("unet"), {"ema": average}, **hooks)
    average.copy_to([p for network in trained.values() for p in network.parameters()])
    model.freeze()


def train_decoder(
    config: PretrainTinyConfig, stage: DecoderStage, model: SDXL, icons: list[Icon], run: RunDirectory
) -> None:
    """Trains the VAE's decoder; the encoder does not change, so the UNet's latents remain valid."""
    mean, logvar = encode_icons(model, icons)
    pixels = load_pixels(icons, config.model.resolution)
    size, side = stage.train.batch_size, config.model.resolution
    # No captions: at these timesteps the latents show the content, and half of the styles have no captions.
    ids = tokenize(model, [""])
    prompt, pooled = (torch.zeros_like(each).expand(size, *each.shape[1:]) for each in encode_tokens(model, *ids))
    framings = [whole((side, side), (side, side))] * size

    def batch_at(number: int) -> tuple[torch.Tensor, ConditionedLatents]:
        rows = torch.tensor(batch_indices(len(icons), size, number, config.seed))
        latents = model.normalized(Latents(mean[rows], logvar[rows]).sample(generator(config.seed, number, "latents")))
        return to_signed(pixels[rows]), ConditionedLatents(latents, as_prompts(prompt, pooled), framings)

    task = DecodingTask(model.vae, DiffusionTask(model, config.loss), stage.max_time)
    model.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained = {"decoder": model.vae.decoder, "post_quant_conv": model.vae.post_quant_conv}
    train_stage(config.seed, stage, trained, task.loss, batch_at, run)
    model.vae.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.freeze()


def as_prompts(prompt: torch.Tensor, pooled: torch.Tensor) -> list[Prompt]:
    """Embeddings (B, L, D) and (B, P) as B prompts."""
    return [{"text": text, "pooled": each} for text, each in zip(prompt, pooled, strict=True)]


def whole(original: tuple[int, int], size: tuple[int, int]) -> Framing:
    """The framing of a picture that is resized to `size` and not cropped."""
    return Framing(original, size, 0, 0, size, False)


@torch.no_grad()
def encode_icons(model: SDXL, icons: list[Icon]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of the latents of all icons."""
    pixels = load_pixels(icons, model.resolution)
    parts = [encode_images(model, to_signed(part)) for part in tqdm(pixels.split(32), desc="latents", leave=False)]
    mean, logvar = (torch.cat(each) for each in zip(*parts, strict=True))
    return mean, logvar


def show(config: PretrainTinyConfig, model: SDXL, run: RunDirectory, step: int | None = None) -> None:
    """Saves the current model and images sampled from it; `step` is None at the end."""
    save_model(model, run.path / "tiny-sdxl")
    if config.sample.prompts:
        run.samples.mkdir(exist_ok=True)
        save_contact_sheet(config, model, run.contact_sheet if step is None else run.samples / f"step-{step:06d}.png")


def save_model(model: SDXL, folder: Path) -> None:
    """Saves a diffusers folder with fp16 weights, which is loaded in float32 by default."""
    halved = {name: copy.deepcopy(network).half() for name, network in model.networks.items()}
    components = {name: model.components[name] for name in model.components.names}
    SDXL(Components.of(**{**components, **halved})).pipeline().save_pretrained(folder)
    # diffusers loads in float32 by default, transformers in the dtype of the config: both must be the same.
    for name in ("text_encoder", "text_encoder_2"):
        file = folder / name / "config.json"
        file.write_text(
            json.dumps({**json.loads(file.read_text(encoding="utf-8")), "dtype": "float32"}, indent=2) + "\n",
            encoding="utf-8",
        )


def save_contact_sheet(config: PretrainTinyConfig, model: SDXL, path: Path) -> None:
    """Samples an image for each prompt and seed, and saves them as one contact sheet."""
    prompts, seeds = list(config.sample.prompts), config.sample.seeds
    images = sample(
        model,
        prompts * len(seeds),
        [seed for seed in seeds for _ in prompts],
        steps=config.sample.steps,
        guidance=config.sample.guidance,
        negative_prompt=config.sample.negative_prompt,
        batch_size=config.sample.batch_size,
    )
    rows = [images[start : start + len(prompts)] for start in range(0, len(images), len(prompts))]
    image_grid(rows, [f"seed {seed}" for seed in seeds], prompts).save(path)
