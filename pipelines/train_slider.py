"""Trains a slider: an adapter whose strength moves an attribute of images, to more above 0 and to less below.

It needs no images but two captions, or two folders of pairs.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dora_mm import formats
from dora_mm.adapting import networks
from dora_mm.adapting.files import about_slider, save_image_adapter
from dora_mm.adapting.networks import train_mode
from dora_mm.adapting.parts import check_names
from dora_mm.config.slider import TrainSliderConfig
from dora_mm.data.images.folder import digest_of
from dora_mm.models.images.families import has_unread_layers, identity_of, load_image_model
from dora_mm.preview.slider_page import slider_page
from dora_mm.preview.training import print_page, slow_hardware
from dora_mm.sampling.contact_sheets import save_atomically
from dora_mm.sampling.image_sampler import ImageSampler
from dora_mm.sampling.next_steps import sliding_command
from dora_mm.sampling.slider_grid import prompts_of_grid, slider_grid
from dora_mm.tasks.slider import Pairs, SliderBatches, SliderTask, read_pairs, slider_batches
from dora_mm.train.checkpoint import last_step
from dora_mm.train.loop import fit
from dora_mm.train.preflight import preflight, stop_at
from dora_mm.train.processes import answering, join_processes
from dora_mm.train.run import check_resumed, finished_run, training_run, training_summary, write_summary
from dora_mm.train.setup import training_setup
from dora_mm.train.sharing import shared_among
from dora_mm.train.weights import result_of
from dora_mm.utils.run_directory import SAMPLE_NOW, RunDirectory

log = logging.getLogger(__name__)


def main(config: TrainSliderConfig, *, resume: Path | None = None, dry_run: bool = False) -> None:
    """Trains the adapter.

    Writes to the run directory: checkpoints/, metrics.jsonl, the final adapter in adapter/, summary.json, and sheet.png
    with the sample prompts at strengths from -2 to 2; with `sample.every`, earlier such grids in samples/. `touch
    RUN/sample-now` asks for one after the next step.

    Args:
        config: The config.
        resume: The run directory to resume from its last checkpoint; None starts a new run.
        dry_run: Only print what would be trained and what it would cost, and report why it would be refused; nothing is
            written.

    Raises:
        ValueError: The captions, the images, the model or the output folder cannot be used. A new run directory is
            created only after these checks.
    """
    accelerator = join_processes(config.train, find_unused_parameters=has_unread_layers(config.model))
    shared = shared_among(config, accelerator.num_processes, resume)
    if dry_run:
        problems = preflight(accelerator, config, resume)
        page = slider_page(shared, accelerator, problems, resume)
        print_page(page, problems, shown=accelerator.is_main_process)
        return
    if run := finished_run(accelerator, resume, config, "sheet.png"):
        print_results(config, run)
        return
    stop_at(preflight(accelerator, config, resume))
    pairs = read_pairs(config.slider)
    model = load_image_model(config.model)
    model.check_rescale(config.sample.guidance_rescale, "sample.guidance_rescale")
    check_names(config.adapter, model.target_maps)
    model.to(accelerator.device, denoiser=bool(config.model.quantization))
    inputs = inputs_of(config, pairs)
    if resume is not None:
        check_resumed(accelerator, resume, inputs)
    for remark in slow_hardware(accelerator, [model.empty_denoiser()]):
        log.warning("%s", remark)
    batches = slider_batches(shared, model, pairs, (accelerator.process_index, accelerator.num_processes))
    sampler = encode(config, batches)
    model.to(accelerator.device)
    settings: dict[str, Any] = {"seed": config.seed, "backend": config.backend}
    trained = networks.adapt(model.adaptable, model.target_maps, config.adapter, **settings)
    log.info("%s", trained)
    if remark := formats.about_format(trained.adapted, "diffusers"):
        log.warning("%s", remark)
    task, by_strength = SliderTask(model), shared.train_by_strength
    training = training_setup(accelerator, config, by_strength, trained, task.loss)
    with training_run(accelerator, config, inputs, resume, shared.train) as run:
        train(config, run, training, batches, sampler)


def inputs_of(config: TrainSliderConfig, pairs: Pairs | None) -> dict[str, str]:
    """Digests of all that the config refers to, by a description of each; of a hub model, once it was downloaded."""
    sides = zip(("the plus pictures", "the minus pictures"), pairs or (), strict=False)
    return {**{name: digest_of(images) for name, images in sides}, **identity_of(config.model).inputs}


@torch.no_grad()
def encode(config: TrainSliderConfig, batches: SliderBatches) -> ImageSampler:
    """Encodes captions, pairs and the prompts of grids, and frees the text encoders.

    Returns:
        What generates the grids.
    """
    batches.encode_all()
    sampler = ImageSampler(batches.model)
    sampler.keep_prompts(((prompt, config.sample.negative_prompt), ()) for prompt in prompts_of_grid(config))
    return sampler


def train(
    config: TrainSliderConfig,
    run: RunDirectory,
    training: dict[str, Any],
    batches: SliderBatches,
    sampler: ImageSampler,
) -> None:
    """Trains, generates and saves, in a run directory that is open."""
    accelerator, result = training["accelerator"], result_of(training["optimizer"])
    adapted, writes, about = training["networks"], accelerator.is_main_process, about_slider(config)
    save_grid = result(partial(save_slider_grid, config, sampler, adapted))

    def on_step_end(step: int) -> None:
        due = config.sample.every and step % config.sample.every == 0 and step < config.train.steps
        with answering(accelerator, config.train, run, SAMPLE_NOW) as requested:
            if writes and (due or requested):
                save_grid(run.samples / f"step-{step:06d}.png")

    if config.sample.every and not last_step(run.checkpoints):
        on_step_end(0)  # so that what goes wrong in generating does so before the training
    done = fit(run=run, **training, batch_at=batches, on_step_end=on_step_end, metadata=about)
    if writes:
        result(partial(save_image_adapter, config, adapted, sampler.model.new_tokens, about))(run.adapter)
        save_grid(run.contact_sheet)
        write_results(config, run, sum(each.numel() for each in training["parameters"].values()), done)


def save_slider_grid(config: TrainSliderConfig, sampler: ImageSampler, adapted: dict[str, Any], path: Path) -> None:
    """Generates the grid of the slider and saves it, between two steps."""
    for network in adapted.values():
        network.eval()
    sampler.model.to(sampler.model.device)  # the VAE may be elsewhere
    save_atomically(path, slider_grid(sampler, adapted, config))
    train_mode(adapted.values())


def write_results(config: TrainSliderConfig, run: RunDirectory, num_parameters: int, steps: int) -> None:
    """Writes summary.json, and prints the summary with the paths of the adapter and the grid."""
    size = formats.find_file(run.adapter).stat().st_size
    adapter_mb = round(size / 1e6, 2)
    write_summary(run, training_summary(run, config.adapter, num_parameters, steps, adapter_mb=adapter_mb))
    print()
    print_results(config, run)


def print_results(config: TrainSliderConfig, run: RunDirectory) -> None:
    """Prints where the adapter and the grid are, and how to generate and score with the adapter."""
    print(f"adapter   {run.adapter}\ngrid      {run.contact_sheet}")
    print(f"to sample {sliding_command(config, run, prompts_of_grid(config)[0])}")
