"""Trains an adapter of an image model on a folder of captioned images, and draws images without and with it."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from dora_mm import formats
from dora_mm.adapting import networks, new_tokens
from dora_mm.adapting.compiled import check_compiler, compile_blocks, compiled_line
from dora_mm.adapting.files import about_image_adapter, save_image_adapter
from dora_mm.adapting.initial import initial_identity, load_initial_file
from dora_mm.adapting.networks import TrainedNetworks
from dora_mm.adapting.parts import check_names
from dora_mm.adapting.sharding import division
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.core import base_model
from dora_mm.data.images.folder import CaptionedImage, digest_of, read_images
from dora_mm.data.images.held_out import hold_out, part_of
from dora_mm.eval.gradients import measuring
from dora_mm.models.images.families import about_prediction, files_identity, load_image_model, load_image_model_if_local
from dora_mm.models.images.image_model import ImageModel
from dora_mm.preview.images import (
    describe_data,
    describe_encoded,
    describe_latents,
    remark_on_captions,
    remark_on_length,
    repeats_of,
)
from dora_mm.preview.parts import parts_table
from dora_mm.preview.training import describe_training, is_measured, optimizer_line, slow_hardware
from dora_mm.sampling.before_after import add_pictures, before_after_sheet, drawing_command
from dora_mm.sampling.pictures import PictureSampler
from dora_mm.sampling.sheets import save_atomically
from dora_mm.tasks.diffusion import ConditionedLatents, DiffusionTask
from dora_mm.tasks.held_out import PictureLosses
from dora_mm.tasks.image_batches import CaptionedBatches, PromptEncoder
from dora_mm.tasks.preservation import PreservingBatches, preserving
from dora_mm.train.checkpoint import last_step
from dora_mm.train.loop import fit
from dora_mm.train.optim import build_optimizer, check_device
from dora_mm.train.processes import answering, check_can_shard, join_processes, takes_part
from dora_mm.train.run import finished_run, training_run, training_summary, write_summary
from dora_mm.train.schedule import Schedule
from dora_mm.train.validation import Validation, held_out_loss
from dora_mm.train.weights import EMA, WeightAverage, result_of
from dora_mm.utils.run_directory import SAMPLE_NOW, RunDirectory

log = logging.getLogger(__name__)
Networks = dict[str, nn.Module]  # by component
TOKENS = "new_tokens"  # where networks are by component


def main(config: TrainDiffusionConfig, *, resume: Path | None = None, dry_run: bool = False) -> None:
    """Trains the adapter.

    Writes to the run directory: checkpoints/, metrics.jsonl, the final adapter in adapter/, summary.json, sheet.png
    with the sample prompts without and with the adapter, and, with `sample.every`, earlier such sheets in samples/, the
    first one before the first step. `touch RUN/sample-now` asks for one after the next step.

    Args:
        config: The config.
        resume: The run directory to resume from its last checkpoint; None starts a new run.
        dry_run: Only print what would be trained and what it would cost; nothing is written.

    Raises:
        ValueError: The images, the model, the initial adapter or the output folder cannot be used. A new run directory
            is created only after these checks.
    """
    # The last layer of a text encoder may be unused: its adapters get no gradients. So may new tokens be in a batch.
    accelerator = join_processes(config.train.mixed_precision, find_unused_parameters=config.trains_text)
    if run := finished_run(resume, config, *(["sheet.png"] if config.sample.prompts else [])):
        print_results(config, run)
        return
    images, held = hold_out(read_images(config.data, "train"), config.data)
    class_images = read_images(config.data, "preserve")
    if dry_run:
        print(describe(config, images, held, class_images, accelerator))
        return
    check_device(config.optimizer, accelerator.device)
    check_can_shard(accelerator, config.train)
    if config.train.compile:
        check_compiler(accelerator.device)
    model = load_image_model(config.model).to(accelerator.device, denoiser=not config.train.shard)
    check_names(config.adapter, model.target_maps)  # mistakes now, and not when everything is encoded
    task = DiffusionTask(model, config.loss)
    new_tokens.start_tokens(config.tokens, model, images, config.data.captions, config.seed)
    remarks = slow_hardware(accelerator, [*model.encoders.values(), model.empty_denoiser()])
    remarks += remark_on_captions(model, images, config.data)
    for remark in remarks + remark_on_length(repeats_of(images), config.train, accelerator.num_processes):
        log.warning("%s", remark)
    batches = batches_of(config, model, images, accelerator)
    source = preserving(batches, config, class_images)
    losses = fixed_losses(config, task, batches, held, accelerator) if held else None
    sampler = encode(config, model, batches, source, losses)
    trained = adapt(model, config)
    if config.train.shard:
        division(trained, model.target_maps).apply(accelerator.device)
    log.info("%s", trained)
    training = build(config, model, trained, task, accelerator)
    if config.train.compile:
        compile_blocks(trained.networks, model.target_maps)
    if remark := formats.about_format(trained.adapted, "diffusers"):
        log.warning("%s", remark)
    move_vae(model, config)
    inputs = {"the pictures and captions": digest_of(images), **files_identity(config.model)}
    inputs |= initial_identity(config.adapter, formats.adapter_digest)
    others = {"the held-out pictures": held, "the pictures to preserve": class_images}
    inputs |= {name: digest_of(found) for name, found in others.items() if found}
    with training_run(accelerator, config, inputs, resume, config.train) as run:
        train(config, run, trained.adapted, training, source, sampler, losses)


def train(
    config: TrainDiffusionConfig,
    run: RunDirectory,
    adapted: Networks,
    training: dict[str, Any],
    batches: Callable[[int], ConditionedLatents],
    sampler: PictureSampler,
    losses: PictureLosses | None,
) -> None:
    """Trains, validates, draws and saves, in a run directory that is open."""
    accelerator, result = training["accelerator"], result_of(training["optimizer"])
    joins, writes = takes_part(accelerator, config.train), accelerator.is_main_process
    average = WeightAverage(training["parameters"], config.ema.decay) if config.ema else None
    draw = result(partial(draw_sheet, config, sampler, adapted, average, writes=writes))
    about = about_image_adapter(config, sampler.model)
    write = result(partial(save_image_adapter, config, adapted, sampler.model.new_tokens, about))
    measure = result(partial(losses, list(adapted.values()))) if losses else None
    saves = write if joins else None
    as_base = partial(bare, adapted, sampler.model)
    validate = held_out_loss(run, config.evaluate, measure, as_base, saves, average, writes=writes) if measure else None

    def observe(step: int) -> None:
        if validate and validate.is_due(step, config.train.steps):
            log_losses(step, validate(step))
        if not joins:
            return
        due = config.sample.every and step % config.sample.every == 0 and step < config.train.steps
        with answering(accelerator, config.train, run, SAMPLE_NOW) as asked:
            if due or asked:
                draw(run.samples / f"step-{step:06d}.png")

    if config.sample.every and not last_step(run.checkpoints):
        observe(0)  # so that what goes wrong in drawing does so before the training
    is_over = validate.is_over if validate else lambda: False
    hooks = {"observe": observe, "after_step": average.update if average else None, "is_over": is_over}
    hooks["around_passes"] = measuring(training["networks"], config.train.gradients_at if writes else (), run.path)
    hooks["before_step"] = new_tokens.stopping(config.train, training["parameters"])
    state = {EMA: average} if average else {}
    done = fit(run=run, **training, batch_at=batches, **hooks, state=state, metadata=about)
    if validate:
        log_losses(done, validate(done))
        validate.close()
    if joins:
        finish(config, run, write, draw, average, writes=writes)
    if writes:
        write_results(config, run, training["parameters"], done, validate)


def finish(
    config: TrainDiffusionConfig,
    run: RunDirectory,
    write: Callable[[Path], None],
    draw: Callable[[Path], Mapping[str, list[Image.Image]]],
    average: WeightAverage | None,
    *,
    writes: bool,
) -> None:
    """Saves the adapter and that of the average, and a sheet of both."""
    write(run.adapter)
    if average:
        average.applied()(write)(run.adapter_ema)
    pictures = draw(run.sheet)
    if writes:
        add_pictures(config, run.adapter, pictures.get("after", []))
        if average:
            add_pictures(config, run.adapter_ema, pictures.get("average", []))


def batches_of(
    config: TrainDiffusionConfig, model: ImageModel, images: list[CaptionedImage], accelerator: Accelerator
) -> CaptionedBatches:
    """The batches of this process, by number."""
    prompts = PromptEncoder(model, trained=config.adapter.trains_text_encoders, folder=config.data.text_cache)
    process = (accelerator.process_index, accelerator.num_processes)
    settings: dict[str, Any] = {"batch_size": config.train.batch_size, "seed": config.seed, "process": process}
    return CaptionedBatches(model, images, prompts, config.data, **settings)


def fixed_losses(
    config: TrainDiffusionConfig,
    task: DiffusionTask,
    batches: CaptionedBatches,
    held: list[CaptionedImage],
    accelerator: Accelerator,
) -> PictureLosses:
    """The loss of the held-out pictures, and of as many that are trained on, which shows what is only remembered."""
    data = config.data.model_copy(update={"crop": "center", "flip": False})
    size = config.train.batch_size
    parts = {"held_out_loss": held, "trained_loss": part_of(batches.images, len(held))}
    return PictureLosses(
        task,
        {
            name: CaptionedBatches(task.model, images, batches.prompts, data, batch_size=size, seed=config.seed)
            for name, images in parts.items()
        },
        batch_size=size,
        precision=accelerator.autocast,
        process=(accelerator.process_index, accelerator.num_processes),
    )


def log_losses(step: int, values: Mapping[str, float]) -> None:
    log.info("step %d: %s", step, ", ".join(f"{name} {value:.4f}" for name, value in values.items()))


@torch.no_grad()
def encode(
    config: TrainDiffusionConfig,
    model: ImageModel,
    batches: CaptionedBatches,
    source: CaptionedBatches | PreservingBatches,
    losses: PictureLosses | None,
) -> PictureSampler:
    """Encodes ahead of training what stays the same, and frees the text encoders where they are frozen.

    So they never lie in memory together with the denoiser, which is loaded when it is first asked for.

    Returns:
        What draws the sheets, with their prompts encoded.
    """
    for each in dict.fromkeys([batches, source]):
        each.encode_all(config.train.steps * config.train.gradient_accumulation_steps)
    for part in losses.parts.values() if losses else ():
        part.encode_all()
    sampler = PictureSampler(model)
    if not batches.prompts.needs_encoders:
        sampler.keep_prompts([(prompt, config.sample.negative_prompt) for prompt in config.sample.prompts])
        model.components.release(model.text_encoders)
    return sampler


def build(
    config: TrainDiffusionConfig,
    model: ImageModel,
    trained: TrainedNetworks,
    task: DiffusionTask,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What a training consists of but for its batches: the arguments of `fit`, and of `measure_step`, by name."""
    optimizer = build_optimizer(trained.parameters, config.optimizer, trained.rates)
    if config.train.gradient_checkpointing:
        denoiser: Any = model.networks[model.denoiser]
        denoiser.enable_gradient_checkpointing()
    set_training(trained.networks, True)
    return {
        "accelerator": accelerator,
        "config": config.train,
        "seed": config.seed,
        "networks": {**trained.networks, **({TOKENS: model.new_tokens} if config.tokens else {})},
        "parameters": trained.parameters,
        "optimizer": accelerator.prepare(optimizer),
        "schedule": Schedule(optimizer, config.schedule, config.train.steps),
        "loss": task.loss,
    }


def describe(
    config: TrainDiffusionConfig,
    images: list[CaptionedImage],
    held: list[CaptionedImage],
    class_images: list[CaptionedImage],
    accelerator: Accelerator,
) -> str:
    """The data, the modules, the memory and the time; of a hub model that is not on this machine, only the data."""
    given, writes_nothing = config.data, {"latent_cache": None, "text_cache": None}
    config = config.model_copy(update={"data": given.model_copy(update=writes_nothing)})
    model = load_image_model_if_local(config.model)
    data = describe_data(images, config, model, accelerator.num_processes, held, class_images)
    if model is None:
        return "\n\n".join([data, *slow_hardware(accelerator, None)])
    shard = config.train.shard
    model = model if shard else model.to(accelerator.device)
    new_tokens.start_tokens(config.tokens, model, images, config.data.captions, config.seed)
    batches = batches_of(config, model, images, accelerator)
    source = preserving(batches, config, class_images)
    if not shard and is_measured(accelerator, [*model.encoders.values(), model.empty_denoiser()]):
        with torch.no_grad():
            source(0)  # the only batch that is measured
    num_batches = config.train.steps * config.train.gradient_accumulation_steps
    data = "\n".join([data, *describe_latents(batches, given), *describe_encoded(source, num_batches, given)])
    if not batches.prompts.needs_encoders:
        model.components.release(model.text_encoders)
    trained = adapt(model, config)
    table = parts_table(trained, model.adaptable, model.target_maps, config.adapter, config.optimizer)
    task = DiffusionTask(model, config.loss)
    training = build(config, model, trained, task, accelerator) | {"batch_at": source}
    move_vae(model, config)
    divided = division(trained, model.target_maps) if shard else None
    ema = config.ema is not None
    cost = describe_training(model.networks, config.optimizer, training, ema=ema, division=divided)
    how = optimizer_line(config.optimizer, config.schedule, config.train.steps, config.ema)
    if config.train.compile:
        how += f"\n{compiled_line(trained.networks, model.target_maps)}"
    remarks = new_tokens.tokens_lines(config.tokens, model, config.train, config.optimizer.lr)
    remarks += [remark] if (remark := formats.about_format(trained.adapted, "diffusers")) else []
    table = "\n".join([table, *remarks])
    return f"{data}\n\n{about_prediction(config.model)}\n{trained.share}\n{table}\n\n{how}\n\n{cost}"


@contextmanager
def bare(adapted: Networks, model: ImageModel) -> Iterator[None]:
    """A context in which a model is that without adapters and new tokens."""
    with base_model(adapted.values()), model.new_tokens.off():
        yield


def adapt(model: ImageModel, config: TrainDiffusionConfig) -> TrainedNetworks:
    """Injects the adapters of the config, trains its new tokens, and loads `init_from`."""
    settings: dict[str, Any] = {"seed": config.seed, "backend": config.backend}
    trained = networks.adapt(model.adaptable, model.target_maps, config.adapter, **settings)
    new_tokens.train_tokens(config.tokens, model, trained)
    if config.adapter.init_from:
        load_initial_file(trained, config.adapter, config.backend)
        new_tokens.load_initial_tokens(config.tokens, model, config.adapter)
    return trained


def move_vae(model: ImageModel, config: TrainDiffusionConfig) -> None:
    """Frees the device memory of the VAE, 0.2 GB in half precision, where all latents are cached."""
    if config.data.crop == "center":
        model.vae.to("cpu")


def set_training(adapted: Networks, training: bool) -> None:
    """Switches training mode, without which adapter dropout and gradient checkpointing have no effect."""
    for network in adapted.values():
        network.train(training)


def draw_sheet(
    config: TrainDiffusionConfig,
    sampler: PictureSampler,
    adapted: Networks,
    average: WeightAverage | None,
    path: Path,
    *,
    writes: bool,
) -> Mapping[str, list[Image.Image]]:
    """Draws the prompts of the config by the bare model, the adapter and its average; saves the sheet if it writes.

    Returns:
        As `before_after_sheet`; nothing without prompts.
    """
    if not config.sample.prompts:
        return {}
    set_training(adapted, False)
    model = sampler.model.to(sampler.model.device)
    settings: dict[str, Any] = {"strength": config.adapter.strength, "full": "full" in config.adapter.methods}
    settings["average"] = average and average.applied
    # where text changes, prompts are encoded anew for each sheet
    sheet, pictures = before_after_sheet(model if config.trains_text else sampler, adapted, config.sample, **settings)
    if writes:
        save_atomically(path, sheet)
    move_vae(model, config)
    set_training(adapted, True)
    return pictures


def write_results(
    config: TrainDiffusionConfig,
    run: RunDirectory,
    parameters: dict[str, nn.Parameter],
    steps: int,
    validate: Validation | None,
) -> None:
    """Writes summary.json, and prints it with the paths of the adapter and the sheet."""
    num_parameters = sum(parameter.numel() for parameter in parameters.values())
    size = formats.find_file(run.adapter).stat().st_size
    details: dict[str, Any] = {"adapter_mb": round(size / 1e6, 2)}
    if validate:
        details |= {name: round(value, 5) for name, value in validate.rows[-1].items() if name != "step"}
        details["best_step"] = validate.best_step
    write_summary(run, training_summary(run, config.adapter, num_parameters, steps, **details))
    print()
    print_results(config, run)


def print_results(config: TrainDiffusionConfig, run: RunDirectory) -> None:
    """Prints where the adapter and the sheet are, and how to draw with them."""
    print(f"adapter  {run.adapter}")
    if run.sheet.exists():
        print(f"sheet    {run.sheet}")
    print(f"to draw  {drawing_command(config, run)}")
