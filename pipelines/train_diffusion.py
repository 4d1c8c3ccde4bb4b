"""Trains a style adapter for SDXL on a folder of captioned images, and draws images without and with it."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

import dora_mm
from dora_mm import formats, targets
from dora_mm.adapting import networks
from dora_mm.adapting.initial import load_initial_file
from dora_mm.adapting.networks import Trained
from dora_mm.config.adapter import EACH_TEXT_ENCODER
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.loader import dump_config
from dora_mm.core import TargetMap
from dora_mm.data.images.folder import CaptionedImage, digest_of, read_training_images
from dora_mm.models.sdxl.family import SDXL, commit_of, load_configured
from dora_mm.preview.images import describe_data, load_if_local, remark_on_length
from dora_mm.preview.parts import parts_table
from dora_mm.preview.training import describe_training, is_measured, slow_hardware
from dora_mm.sampling.before_after import before_after_sheet
from dora_mm.tasks.diffusion import DiffusionTask
from dora_mm.tasks.image_batches import CaptionedBatches, PromptEncoder
from dora_mm.train.loop import fit
from dora_mm.train.optim import build_optimizer
from dora_mm.train.processes import join_processes
from dora_mm.train.run import RunDirectory, training_run, training_summary, write_summary
from dora_mm.train.schedule import build_schedule

log = logging.getLogger(__name__)
Networks = dict[str, nn.Module]  # by component
TARGETS = {"unet": "sdxl-unet", "text_encoder": "clip-text", "text_encoder_2": "clip-text"}  # by component
MOST_SHOWN = 6  # pictures in a model card: of full SDXL, each has 1.5 MB


def main(config: TrainDiffusionConfig, *, resume: Path | None = None, dry_run: bool = False) -> None:
    """Trains the adapter.

    Writes to the run directory: checkpoints/, metrics.jsonl, the final adapter in adapter/, summary.json, sheet.png
    with the sample prompts without and with the adapter, and, with `sample.every`, earlier such sheets in samples/.

    Args:
        config: The config.
        resume: The run directory to resume from its last checkpoint; None starts a new run.
        dry_run: Only print what would be trained and what it would cost; nothing is written.

    Raises:
        ValueError: The images, the model, the initial adapter or the output folder cannot be used. A new run directory
            is created only after these checks.
    """
    images = read_training_images(config.data)
    # SDXL does not use the last layer of its first text encoder: that layer's adapters get no gradients.
    unused = config.adapter.trains_text_encoders
    accelerator = join_processes(config.train.mixed_precision, find_unused_parameters=unused)
    if dry_run:
        print(describe(config, images, accelerator))
        return
    model = load_configured(config.model).to(accelerator.device)
    remarks = slow_hardware(accelerator, model.networks.values())
    for remark in remarks + remark_on_length(len(images), config.train, accelerator.num_processes):
        log.warning("%s", remark)
    trained = adapt(model, config)
    log.info("%s", trained)
    training, adapted = build(config, model, images, trained, accelerator), trained.adapted
    with torch.no_grad():
        training["batch_at"].encode_all()
    move_idle_networks_to_cpu(model, config)
    draw = partial(draw_sheet, config, model, adapted) if accelerator.is_main_process else None

    inputs = {"the pictures and captions": digest_of(images)}
    with training_run(accelerator, config, inputs, resume, config.train.steps) as run:

        def observe(step: int) -> None:
            if draw and config.sample.every and step % config.sample.every == 0 and step < config.train.steps:
                draw(run.samples / f"step-{step:06d}.png")

        fit(run=run, **training, observe=observe, metadata=about_adapter(config))
        if draw:
            save(config, adapted, run)
            add_pictures(config, run, draw(run.sheet))
            write_results(config, run, training["parameters"])


def build(
    config: TrainDiffusionConfig, model: SDXL, images: list[CaptionedImage], trained: Trained, accelerator: Accelerator
) -> dict[str, Any]:
    """What a training consists of: the arguments of `fit`, and of `measure_step`, by name."""
    optimizer = build_optimizer(trained.parameters, config.optimizer, trained.rates)
    prompts = PromptEncoder(model, trained=config.adapter.trains_text_encoders)
    process = (accelerator.process_index, accelerator.num_processes)
    settings: dict[str, Any] = {"batch_size": config.train.batch_size, "seed": config.seed, "process": process}
    batches = CaptionedBatches(model, images, prompts, config.data, **settings)
    if config.train.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    set_training(trained.networks, True)
    return {
        "accelerator": accelerator,
        "config": config.train,
        "seed": config.seed,
        "networks": trained.networks,
        "parameters": trained.parameters,
        "optimizer": accelerator.prepare(optimizer),
        "schedule": build_schedule(optimizer, config.schedule, config.train.steps),
        "batch_at": batches,
        "loss": DiffusionTask(model.unet, dict(model.scheduler.config), config.loss).loss,
    }


def describe(config: TrainDiffusionConfig, images: list[CaptionedImage], accelerator: Accelerator) -> str:
    """The data, the modules, the memory and the time; of a hub model that is not on this machine, only the data."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"latent_cache": None})})  # writes nothing
    model = load_if_local(config.model)
    data = describe_data(images, config, model, accelerator.num_processes)
    if model is None:
        return "\n\n".join([data, *slow_hardware(accelerator, None)])
    trained = adapt(model.to(accelerator.device), config)
    table = parts_table(trained, model.adaptable, target_maps(model), config.adapter, config.optimizer)
    training = build(config, model, images, trained, accelerator)
    if is_measured(accelerator, model.networks.values()):
        with torch.no_grad():
            training["batch_at"](0)  # the only batch that is measured
        move_idle_networks_to_cpu(model, config)
    cost = describe_training(model.networks, config.optimizer, training)
    return f"{data}\n\n{trained.share}\n{table}\n\n{cost}"


def target_maps(model: SDXL) -> dict[str, TargetMap]:
    """The target maps of the networks that can be adapted."""
    return {component: targets.find(TARGETS[component]) for component in model.adaptable}


def adapt(model: SDXL, config: TrainDiffusionConfig) -> Trained:
    """Injects the adapters of the config, and loads `init_from`."""
    settings: dict[str, Any] = {"seed": config.seed, "backend": config.backend}
    trained = networks.adapt(model.adaptable, target_maps(model), config.adapter, **settings)
    if config.adapter.init_from:
        load_initial_file(trained, config.adapter, config.backend)
    return trained


def move_idle_networks_to_cpu(model: SDXL, config: TrainDiffusionConfig) -> None:
    """Frees device memory of networks whose results are cached: in half precision 1.6 GB, and 0.2 GB for the VAE."""
    idle = {"vae"} if config.data.crop == "center" else set()
    if not config.adapter.trains_text_encoders:
        idle |= {name for name in model.networks if name.startswith(EACH_TEXT_ENCODER)}
    for name in idle:
        model.networks[name].to("cpu")


def set_training(adapted: Networks, training: bool) -> None:
    """Switches training mode, without which adapter dropout and gradient checkpointing have no effect."""
    for network in adapted.values():
        network.train(training)


def draw_sheet(config: TrainDiffusionConfig, model: SDXL, adapted: Networks, path: Path) -> list[Image.Image]:
    """Draws the prompts of the config without and with the adapter, with the same seeds, and saves the sheet.

    Returns:
        The adapter's picture of each prompt.
    """
    if not config.sample.prompts:
        return []
    set_training(adapted, False)
    model.to(model.device)  # where the UNet is
    settings: dict[str, Any] = {"strength": config.adapter.strength, "full": "full" in config.adapter.methods}
    sheet, pictures = before_after_sheet(model.pipeline(), adapted, config.sample, **settings)
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)
    move_idle_networks_to_cpu(model, config)
    set_training(adapted, True)
    return pictures


def about_adapter(config: TrainDiffusionConfig) -> dict[str, str]:
    """What the headers of adapter files say: the base model, and how the adapter was trained."""
    base = {
        "base_model": config.model.path,
        "base_revision": commit_of(config.model.path, config.model.revision),
        "base_vae": config.model.vae,
        "base_dtype": config.model.dtype,
    }
    return {
        **{key: value for key, value in base.items() if value},
        "placeholder": config.data.placeholder or "",
        "instance_prompt": config.data.instance_prompt or config.data.placeholder or "",
        "unconditional": config.data.unconditional,  # the empty prompt in training: the zero embedding, or ""
        "config": dump_config(config),
    }


def save(config: TrainDiffusionConfig, adapted: Networks, run: RunDirectory) -> None:
    settings = {"metadata": about_adapter(config), "strength": config.adapter.strength}
    dora_mm.save_adapter(adapted, run.adapter, format=formats.format_for(adapted, preferred="diffusers"), **settings)


def add_pictures(config: TrainDiffusionConfig, run: RunDirectory, pictures: list[Image.Image]) -> None:
    """Saves the first pictures beside the adapter, and shows them in its model card."""
    shown = []
    for number, (prompt, picture) in enumerate(zip(config.sample.prompts[:MOST_SHOWN], pictures, strict=False), 1):
        shown.append((prompt, f"pictures/{number}.png"))
        path = run.adapter / shown[-1][1]
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
    formats.write_card(run.adapter, pictures=shown)


def write_results(config: TrainDiffusionConfig, run: RunDirectory, parameters: dict[str, nn.Parameter]) -> None:
    """Writes summary.json, and prints it with the paths of the adapter and the sheet."""
    num_parameters = sum(parameter.numel() for parameter in parameters.values())
    size = formats.find_file(run.adapter).stat().st_size
    details = {"adapter_mb": round(size / 1e6, 2)}
    write_summary(run, training_summary(run, config.adapter, num_parameters, config.train.steps, **details))
    print(f"\nadapter  {run.adapter}")
    if run.sheet.exists():
        print(f"sheet    {run.sheet}")
