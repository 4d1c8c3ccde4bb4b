"""Trains an adapter of an image model on a folder of captioned images, and generates images without and with it."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from dora_mm import formats
from dora_mm.adapting import new_tokens
from dora_mm.adapting.assistant import assistant_identity
from dora_mm.adapting.compiled import compile_blocks
from dora_mm.adapting.files import about_image_adapter, save_image_adapter
from dora_mm.adapting.images import adapt_image_model, bare, check_fit
from dora_mm.adapting.initial import initial_identity
from dora_mm.adapting.networks import train_mode
from dora_mm.adapting.sharding import division
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.core import set_assistant_strength
from dora_mm.data.images.folder import CaptionedImage, digest_of, read_images
from dora_mm.data.images.held_out import hold_out, part_of
from dora_mm.eval.gradients import measuring
from dora_mm.models.images.families import has_unread_layers, identity_of, load_image_model
from dora_mm.models.images.image_model import ImageModel
from dora_mm.preview.image_page import image_page
from dora_mm.preview.image_sizes import remark_on_resolutions
from dora_mm.preview.image_streams import stream_amounts
from dora_mm.preview.images import remark_on_captions, remark_on_distilled, remark_on_length, repeats_of
from dora_mm.preview.training import print_page, slow_hardware
from dora_mm.sampling.before_after import (
    add_images,
    before_after_contact_sheet,
    keep_images,
    sample_references,
)
from dora_mm.sampling.contact_sheets import save_atomically
from dora_mm.sampling.gallery import GALLERY, INDEX, update_page
from dora_mm.sampling.image_sampler import ImageSampler
from dora_mm.sampling.next_steps import sampling_command
from dora_mm.tasks.diffusion import ConditionedLatents, DiffusionTask
from dora_mm.tasks.held_out import ImageLosses
from dora_mm.tasks.image_batches import CaptionedBatches, captioned_batches, free_vae
from dora_mm.tasks.preservation import PreservingBatches, preserving
from dora_mm.tasks.references import check_references
from dora_mm.train.checkpoint import last_step
from dora_mm.train.epochs import in_steps
from dora_mm.train.loop import fit
from dora_mm.train.preflight import preflight, stop_at
from dora_mm.train.processes import answering, join_processes, takes_part
from dora_mm.train.run import check_resumed, finished_run, training_run, training_summary, write_summary
from dora_mm.train.setup import training_setup
from dora_mm.train.sharing import shared_among
from dora_mm.train.validation import Validation, held_out_loss
from dora_mm.train.weights import EMA, WeightAverage, result_of
from dora_mm.utils.example_losses import ExampleLosses
from dora_mm.utils.run_directory import SAMPLE_NOW, RunDirectory
from dora_mm.utils.shell import command_line

log = logging.getLogger(__name__)
Networks = dict[str, nn.Module]  # by component


def main(config: TrainDiffusionConfig, *, resume: Path | None = None, dry_run: bool = False) -> None:
    """Trains the adapter.

    Writes to the run directory: checkpoints/, metrics.jsonl, the final adapter in adapter/, summary.json, sheet.png
    with the sample prompts without and with the adapter, and, with `sample.every`, earlier such contact sheets in
    samples/, the first one before the first step. `touch RUN/sample-now` asks for one after the next step. With each
    contact sheet, gallery/ is written anew, the page of the training.

    Args:
        config: The config.
        resume: The run directory to resume from its last checkpoint; None starts a new run.
        dry_run: Only print what would be trained and what it would cost, and report why it would be refused; nothing is
            written.

    Raises:
        ValueError: The images, the model, the initial adapter or the output folder cannot be used. A new run directory
            is created only after these checks.
    """
    # The last layer of a text encoder may be unused: its adapters get no gradients. So may new tokens be in a batch.
    unused = config.trains_text or has_unread_layers(config.model)
    accelerator = join_processes(config.train, find_unused_parameters=unused)
    config = in_steps(config, accelerator.num_processes, resume)
    shared = shared_among(config, accelerator.num_processes, resume)
    if dry_run:
        problems = preflight(accelerator, config, resume)
        page = image_page(shared, accelerator, problems, resume)
        print_page(page, problems, shown=accelerator.is_main_process)
        return
    if run := finished_run(accelerator, resume, config, *(["sheet.png"] if config.sample.prompts else [])):
        print_results(config, run)
        return
    stop_at(preflight(accelerator, config, resume))
    # What is rounded is divided on its device. Each network is loaded when it is asked for.
    on_one_device = bool(config.model.quantization) or not config.train.shard
    model = load_image_model(config.model)
    check_fit(config, model)
    images, held_out = hold_out(read_images(config.data, "train"), config.data)
    class_images = read_images(config.data, "preserve")
    model.stream(*stream_amounts(shared, accelerator, images, class_images))
    model.to(accelerator.device, denoiser=on_one_device)
    check_references(model, [*images, *held_out], config.data)
    sample_references(config, model)
    if resume is not None:
        check_resumed(accelerator, resume, inputs_of(config, images, held_out, class_images))
    task = DiffusionTask(model, config.loss)
    new_tokens.start_tokens(config.tokens, model, images, config.data.captions, config.seed)
    remarks = slow_hardware(accelerator, [model.empty_denoiser()])
    remarks += remark_on_distilled(config)
    remarks += remark_on_captions(model, images, config.data)
    remarks += remark_on_resolutions(images, config.data)
    for remark in remarks + remark_on_length(repeats_of(images, config.data), shared.train, accelerator.num_processes):
        log.warning("%s", remark)
    process = (accelerator.process_index, accelerator.num_processes)
    batches = captioned_batches(config, model, images, process)
    source = preserving(batches, shared, class_images)
    losses = fixed_losses(config, task, batches, held_out, accelerator) if held_out else None
    each = losses_of_each(config, task, batches, images, accelerator)
    sampler = encode(shared, model, batches, source, losses, each)
    trained = adapt_image_model(model, config)
    if config.train.shard:
        division(trained, model.target_maps).apply(accelerator.device)
    log.info("%s", trained)
    others = new_tokens.token_networks(config.tokens, model)
    training = training_setup(accelerator, config, shared.train, trained, task.loss, others)
    if config.train.compile:
        compile_blocks(trained.networks, model.target_maps)
    if remark := formats.about_format(trained.adapted, "diffusers"):
        log.warning("%s", remark)
    free_vae(model, config.data)
    inputs = inputs_of(config, images, held_out, class_images)
    with training_run(accelerator, config, inputs, resume, shared.train) as run:
        train(config, run, trained.adapted, training, source, sampler, losses, each)


def inputs_of(
    config: TrainDiffusionConfig,
    images: list[CaptionedImage],
    held_out: list[CaptionedImage],
    class_images: list[CaptionedImage],
) -> dict[str, str]:
    """Digests of all that the config refers to, by a description of each; of a hub model, once it was downloaded."""
    inputs = {"the pictures and captions": digest_of(images), **identity_of(config.model).inputs}
    inputs |= initial_identity(config.adapter, formats.adapter_digest)
    inputs |= assistant_identity(config.adapter, formats.adapter_digest)
    others = {"the held-out pictures": held_out, "the pictures to preserve": class_images}
    return inputs | {name: digest_of(found) for name, found in others.items() if found}


def train(
    config: TrainDiffusionConfig,
    run: RunDirectory,
    adapted: Networks,
    training: dict[str, Any],
    batches: Callable[[int], ConditionedLatents],
    sampler: ImageSampler,
    losses: ImageLosses | None,
    each: ImageLosses | None,
) -> None:
    """Trains, validates, generates and saves, in a run directory that is open."""
    accelerator, result = training["accelerator"], result_of(training["optimizer"])
    joins, writes = takes_part(accelerator, config.train), accelerator.is_main_process
    average = WeightAverage(training["parameters"], config.ema.decay) if config.ema else None
    save_samples = result(partial(save_contact_sheet, config, run, sampler, adapted, average, writes=writes))
    about = about_image_adapter(config, sampler.model)
    write = result(partial(save_image_adapter, config, adapted, sampler.model.new_tokens, about))
    measure = result(partial(losses, list(adapted.values()))) if losses else None
    saves = write if joins else None
    as_base = partial(bare, adapted.values(), sampler.model)
    validate = held_out_loss(run, config.evaluate, measure, as_base, saves, average, writes=writes) if measure else None

    every = config.evaluate.per_example_every or 0
    measure_each = each and ExampleLosses(
        run.path, every, result(partial(each.by_image, list(adapted.values()))), writes=writes
    )

    def on_step_end(step: int) -> None:
        if measure_each and measure_each.is_due(step, config.train.num_steps):
            measure_each(step)
        if validate and validate.is_due(step, config.train.num_steps):
            log_losses(step, validate(step))
        if not joins:
            return
        due = config.sample.every and step % config.sample.every == 0 and step < config.train.num_steps
        with answering(accelerator, config.train, run, SAMPLE_NOW) as requested:
            if due or requested:
                save_samples(step, run.samples / f"step-{step:06d}.png")
                if writes and config.sample.prompts:
                    update_page(run.path)

    if measure_each and not last_step(run.checkpoints):
        measure_each(0)
    if config.sample.every and not last_step(run.checkpoints):
        on_step_end(0)  # so that what goes wrong in generating does so before the training
    should_stop = validate.should_stop if validate else lambda: False
    hooks = {"on_step_end": on_step_end, "after_step": average.update if average else None, "should_stop": should_stop}
    hooks["wrap_gradients"] = measuring(training["networks"], config.train.gradients_at if writes else (), run.path)
    hooks["before_step"] = new_tokens.stopping(config.train, training["parameters"])
    state = {EMA: average} if average else {}
    done = fit(run=run, **training, batch_at=batches, **hooks, state=state, metadata=about)
    if measure_each:
        measure_each(done)
    if validate:
        log_losses(done, validate(done))
        validate.close()
    if joins:
        finish(config, run, write, partial(save_samples, done), average, writes=writes)
    if writes:
        write_results(config, run, training["parameters"], done, validate)
        verify = command_line("dora-mm", "verify", run.path)
        log.info("Which programs read the adapter, and how to convert it for the others: %s", verify)


def finish(
    config: TrainDiffusionConfig,
    run: RunDirectory,
    write: Callable[[Path], None],
    save_samples: Callable[[Path], Mapping[str, list[Image.Image]]],
    average: WeightAverage | None,
    *,
    writes: bool,
) -> None:
    """Saves the adapter and that of the average, and a contact sheet of both."""
    write(run.adapter)
    if average:
        average.applied()(write)(run.adapter_ema)
    images = save_samples(run.contact_sheet)
    if writes:
        add_images(config, run.adapter, images.get("after", []))
        if average:
            add_images(config, run.adapter_ema, images.get("average", []))


def fixed_losses(
    config: TrainDiffusionConfig,
    task: DiffusionTask,
    batches: CaptionedBatches,
    held_out: list[CaptionedImage],
    accelerator: Accelerator,
) -> ImageLosses:
    """The loss of the held-out images, and of as many that are trained on, which shows what is only remembered."""
    parts = {"held_out_loss": held_out, "trained_loss": part_of(batches.images, len(held_out))}
    return losses_of(config, task, batches, parts, accelerator)


def losses_of_each(
    config: TrainDiffusionConfig,
    task: DiffusionTask,
    batches: CaptionedBatches,
    images: list[CaptionedImage],
    accelerator: Accelerator,
) -> ImageLosses | None:
    """The loss of each image that is trained on, where the config asks for it."""
    if config.evaluate.per_example_every is None:
        return None
    return losses_of(config, task, batches, {"loss of each image": images}, accelerator)


def losses_of(
    config: TrainDiffusionConfig,
    task: DiffusionTask,
    batches: CaptionedBatches,
    parts: Mapping[str, list[CaptionedImage]],
    accelerator: Accelerator,
) -> ImageLosses:
    """The losses of images at fixed times and noise, by the name of what they are part of."""
    data = config.data.model_copy(update={"crop": "center", "flip": False})
    size = config.train.batch_size
    shared: Any = {"batch_size": size, "seed": config.seed, "cache": batches.cache, "unguided": batches.unguided}
    return ImageLosses(
        task,
        {name: CaptionedBatches(task.model, images, batches.prompts, data, **shared) for name, images in parts.items()},
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
    *losses: ImageLosses | None,
) -> ImageSampler:
    """Encodes ahead of training what stays the same, and frees the text encoders where they are frozen.

    So they never lie in memory together with the denoiser, which is loaded on first use.

    Returns:
        What generates the contact sheets, with their prompts encoded.
    """
    for each in dict.fromkeys([batches, source]):
        each.encode_all(config.train.num_steps * config.train.gradient_accumulation_steps)
    for each in filter(None, losses):
        for part in each.parts.values():
            part.encode_all()
    sampler = ImageSampler(model)
    if not batches.prompts.needs_encoders:
        prompts = ((prompt, config.sample.negative_prompt) for prompt in config.sample.prompts)
        sampler.keep_prompts(zip(prompts, sample_references(config, model), strict=True))
    return sampler


def save_contact_sheet(
    config: TrainDiffusionConfig,
    run: RunDirectory,
    sampler: ImageSampler,
    adapted: Networks,
    average: WeightAverage | None,
    step: int,
    path: Path,
    *,
    writes: bool,
) -> Mapping[str, list[Image.Image]]:
    """Generates the prompts of the config by the bare model, the adapter and its average.

    If it writes, it saves the contact sheet to `path`, and each of the images in samples/.

    Returns:
        As `before_after_contact_sheet`; nothing without prompts.
    """
    if not config.sample.prompts:
        return {}
    for network in adapted.values():
        network.eval()
    model = sampler.model.to(sampler.model.device)
    settings: dict[str, Any] = {"strength": config.adapter.strength, "full": "full" in config.adapter.methods}
    settings |= {"average": average and average.applied, "references": sample_references(config, model)}
    assistant = config.adapter.assistant
    shown = assistant.strength if assistant and assistant.in_samples and path != run.contact_sheet else 0.0
    # where text changes, prompts are encoded anew for each contact sheet
    contact_sheet, images = before_after_contact_sheet(
        model if config.trains_text else sampler, adapted, config.sample, assistant=shown, **settings
    )
    if assistant:
        set_assistant_strength(model.networks[model.denoiser], assistant.strength)
    if writes:
        save_atomically(path, contact_sheet)
        keep_images(run, config, step, images, shown)
    free_vae(model, config.data)
    train_mode(adapted.values())
    return images


def write_results(
    config: TrainDiffusionConfig,
    run: RunDirectory,
    parameters: dict[str, nn.Parameter],
    steps: int,
    validate: Validation | None,
) -> None:
    """Writes the page and summary.json, and prints the summary with the paths of adapter, contact sheet and page."""
    num_parameters = sum(parameter.numel() for parameter in parameters.values())
    size = formats.find_file(run.adapter).stat().st_size
    details: dict[str, Any] = {"adapter_mb": round(size / 1e6, 2)}
    if validate:
        details |= {name: round(value, 5) for name, value in validate.rows[-1].items() if name != "step"}
        details["best_step"] = validate.best_step
    summary = training_summary(run, config.adapter, num_parameters, steps, **details)
    if config.sample.prompts or config.evaluate.per_example_every is not None:
        update_page(run.path, summary)
    write_summary(run, summary)
    print()
    print_results(config, run)


def print_results(config: TrainDiffusionConfig, run: RunDirectory) -> None:
    """Prints where the adapter, the contact sheet and the page are, and how to generate with the adapter."""
    print(f"adapter  {run.adapter}")
    if run.contact_sheet.exists():
        print(f"sheet    {run.contact_sheet}")
    if (page := run.path / GALLERY / INDEX).exists():
        print(f"page     {page}")
    print(f"to sample  {sampling_command(config, run)}")
