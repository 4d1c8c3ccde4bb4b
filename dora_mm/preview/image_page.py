"""The page of a dry run of a training on images."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dora_mm import formats
from dora_mm.adapting.assistant import assistant_line
from dora_mm.adapting.compiled import compiled_line
from dora_mm.adapting.images import adapt_image_model, check_fit
from dora_mm.adapting.networks import TrainedNetworks
from dora_mm.adapting.new_tokens import start_tokens, token_networks, tokens_lines
from dora_mm.adapting.sharding import division
from dora_mm.config.images import DataConfig, TrainDiffusionConfig
from dora_mm.data.images.folder import CaptionedImage, read_images
from dora_mm.data.images.held_out import hold_out
from dora_mm.models.hub import UnreachableError
from dora_mm.models.images.families import about_prediction, load_image_model, load_image_model_if_local
from dora_mm.models.images.image_model import ImageModel
from dora_mm.models.quantization import planned_bytes
from dora_mm.models.streaming import NOTHING
from dora_mm.preview.image_memory import (
    checkpointing_line,
    encode_without_numbers,
    machine_of,
    phases,
    phases_table,
    simulated_cost,
    without_numbers,
)
from dora_mm.preview.image_sizes import measure_resolutions, measured_batches
from dora_mm.preview.image_streams import stream_amounts
from dora_mm.preview.images import describe_data, describe_encoded, describe_latents
from dora_mm.preview.memory import memory_table
from dora_mm.preview.parts import parts_table
from dora_mm.preview.rounding import MEASURED, dense_prompts, rounding_line
from dora_mm.preview.streamed import stream_plan
from dora_mm.preview.training import (
    left_lines,
    optimizer_line,
    slow_hardware,
    time_line,
    why_not_measured,
)
from dora_mm.tasks.diffusion import DiffusionTask
from dora_mm.tasks.image_batches import CaptionedBatches, captioned_batches, free_vae
from dora_mm.tasks.preservation import PreservingBatches, preserving
from dora_mm.tasks.references import check_references
from dora_mm.train.preflight import OPTIMIZER, QUANTIZATION, Problems, finished_steps, first_problem
from dora_mm.train.setup import training_setup


def image_page(
    config: TrainDiffusionConfig, accelerator: Accelerator, problems: Problems, resume: Path | None = None
) -> Iterator[str]:
    """Sections of text: the data, the modules, the memory and the time.

    Of a hub model that is not on this machine, only the data. Nothing is written.

    Args:
        config: The config.
        accelerator: Knows the device, the mixed precision and the processes.
        problems: Those found by `preflight`.
        resume: The run directory to resume; None: a new run would start.

    Raises:
        ValueError: The images cannot be read, or the config does not fit the model.
    """
    given, writes_nothing = config.data, {"latent_cache": None, "text_cache": None}
    config = config.model_copy(update={"data": given.model_copy(update=writes_nothing)})
    images, held_out = hold_out(read_images(config.data, "train", look=True), config.data)
    class_images = read_images(config.data, "preserve")
    try:
        model = load_image_model(config.model, empty=True)
    except UnreachableError:
        yield describe_data(images, config, None, accelerator.num_processes, held_out, class_images)
        yield from slow_hardware(accelerator, None)
        return
    check_fit(config, model)
    check_references(model, [*images, *held_out], config.data)
    networks = list(model.networks.values())
    why_not = first_problem(problems, (OPTIMIZER, QUANTIZATION))
    why_not = why_not or why_not_measured(accelerator, networks, shard=config.train.shard)
    if not why_not:
        if (found := load_image_model_if_local(config.model)) is None:
            why_not = f"the weights of {config.model.path} are not on this machine"
        else:
            amounts = stream_amounts(config, accelerator, images, class_images)
            model = found.stream(*amounts).to(accelerator.device)
    data = describe_data(images, config, model, accelerator.num_processes, held_out, class_images)
    data = "\n".join([data, *left_lines(resume, config.train.num_steps)])
    settings = (config, given, model, images, class_images, accelerator, data)
    left = config.train.num_steps - finished_steps(resume)
    yield from estimated_sections(*settings) if why_not else measured_sections(*settings, left)
    if why_not:
        yield f"time      not measured: {why_not}"
    yield from slow_hardware(accelerator, networks)


def measured_sections(
    config: TrainDiffusionConfig,
    given: DataConfig,
    model: ImageModel,
    images: Sequence[CaptionedImage],
    class_images: Sequence[CaptionedImage],
    accelerator: Accelerator,
    data: str,
    steps: int,
) -> Iterator[str]:
    """The data, the modules, and the memory and time of a step that is taken.

    Args:
        config: The config, without folders of caches.
        given: Its `data` section with these.
        model: The model.
        images: Those that are trained on.
        class_images: Those of folders of role preserve.
        accelerator: Knows the device, the mixed precision and the processes.
        data: The report on the data.
        steps: The number of steps that are left.
    """
    start_tokens(config.tokens, model, images, config.data.captions, config.seed)
    batches, source = batches_of(config, model, images, class_images, accelerator)
    every = config.preserve.every * config.train.gradient_accumulation_steps if config.preserve else 1
    numbers = measured_batches(batches, every)
    with torch.no_grad():
        for number, _ in numbers.values():  # the only batches that are measured
            source(number)
    yield encoded_section(data, config, given, batches, source)
    captions = source.captions(1)[:MEASURED] if config.model.text_quantization else []
    rounded = batches.prompts(captions)
    if not batches.prompts.needs_encoders:
        model.components.release(model.text_encoders)
    if captions:
        yield rounding_line(config.model, rounded, dense_prompts(config.model, captions, model.device))
    trained = adapt_image_model(model, config)
    yield trained_section(config, model, trained)
    yield how_section(config, model, trained)
    free_vae(model, config.data)
    loss, others = DiffusionTask(model, config.loss).loss, token_networks(config.tokens, model)
    training = training_setup(accelerator, config, config.train, trained, loss, others)
    cost, by_resolution = measure_resolutions(training, source, numbers)
    denoiser, waits = trained.networks[model.denoiser], model.components.streamed.get(model.denoiser)
    plan = stream_plan(denoiser, model.target_maps[model.denoiser], waits and waits.amount)._replace(is_measured=True)
    details: dict[str, Any] = {"ema": config.ema is not None, "plan": plan if plan.waiting else None}
    yield memory_table(model.networks, trained.parameters, config.optimizer, cost, **details)
    yield time_line(cost, steps, "generating images", by_resolution)


def estimated_sections(
    config: TrainDiffusionConfig,
    given: DataConfig,
    model: ImageModel,
    images: Sequence[CaptionedImage],
    class_images: Sequence[CaptionedImage],
    accelerator: Accelerator,
    data: str,
) -> Iterator[str]:
    """The data, the modules and the memory, of a model on the meta device: see `measured_sections`."""
    with without_numbers(model):
        start_tokens(config.tokens, model, images, config.data.captions, config.seed)
    batches, source = batches_of(config, model, images, class_images, accelerator)
    captions = source.captions(num_batches(config))
    encode_without_numbers(model, batches, source, captions)
    yield encoded_section(data, config, given, batches, source)
    if config.model.text_quantization:
        yield rounding_line(config.model)
    other_phases = phases(config, model, captions)
    if not batches.prompts.needs_encoders:
        model.components.release(model.text_encoders)
    trained = adapt_image_model(model, config)
    yield trained_section(config, model, trained)
    yield how_section(config, model, trained)
    details: dict[str, Any] = {"target_device": accelerator.device.type, "ema": config.ema is not None}
    details["stored"] = planned_bytes(model.networks[model.denoiser])
    details["division"] = division(trained, model.target_maps) if config.train.shard else None
    denoiser = trained.networks[model.denoiser]
    settings = {"stored": details["stored"], "passes": config.train.gradient_accumulation_steps}
    details["plan"] = stream_plan(denoiser, model.target_maps[model.denoiser], config.memory.stream, **settings)
    checkpointing, simulated = config.train.gradient_checkpointing, (config, model, trained, batches, source)
    costs = {each: simulated_cost(*simulated, machine_of(config), checkpointing=each) for each in (False, True)}
    in_steps = {name: n for name, n in model.networks.items() if name != "vae" or config.data.crop == "random"}
    memory = memory_table(in_steps, trained.parameters, config.optimizer, costs[checkpointing], **details)
    yield f"{memory}\n{checkpointing_line(costs, checkpointing)}"
    if accelerator.device.type == "cpu" and config.memory.stream:
        yield f"memory.stream {NOTHING}: the table is that of a GPU"
    yield phases_table(other_phases)


def batches_of(
    config: TrainDiffusionConfig,
    model: ImageModel,
    images: Sequence[CaptionedImage],
    class_images: Sequence[CaptionedImage],
    accelerator: Accelerator,
) -> tuple[CaptionedBatches, CaptionedBatches | PreservingBatches]:
    """The batches of a training, and the same with prior preservation added."""
    batches = captioned_batches(config, model, images, (accelerator.process_index, accelerator.num_processes))
    return batches, preserving(batches, config, class_images)


def num_batches(config: TrainDiffusionConfig) -> int:
    """The batches of a process."""
    return config.train.num_steps * config.train.gradient_accumulation_steps


def encoded_section(
    data: str,
    config: TrainDiffusionConfig,
    given: DataConfig,
    batches: CaptionedBatches,
    source: CaptionedBatches | PreservingBatches,
) -> str:
    """The report on the data, with the latents and captions that are encoded ahead of the steps."""
    return "\n".join([data, *describe_latents(batches, given), *describe_encoded(source, num_batches(config), given)])


def how_section(config: TrainDiffusionConfig, model: ImageModel, trained: TrainedNetworks) -> str:
    """The optimizer, the size of contact sheets where it is not the training's, and what is compiled."""
    how = optimizer_line(config.optimizer, config.schedule, config.train.num_steps, config.ema)
    how += size_of_sheets(config, model)
    return f"{how}\n{compiled_line(trained.networks, model.target_maps)}" if config.train.compile else how


def size_of_sheets(config: TrainDiffusionConfig, model: ImageModel) -> str:
    """A line where contact sheets have another size than the training; else nothing.

    With reference images the size follows from those.
    """
    own, sheets = model.resolution, config.sample
    if not sheets.prompts or sheets.images or config.data.resolutions or own == config.data.resolution:
        return ""
    return f"\nsheets    images of {own} px, the model's own size; the training is at {config.data.resolution} px"


def trained_section(config: TrainDiffusionConfig, model: ImageModel, trained: TrainedNetworks) -> str:
    """The model's prediction type, and its trained parameters by part."""
    table = parts_table(trained, model.adaptable, model.target_maps, config.adapter, config.optimizer)
    remarks = tokens_lines(config.tokens, model, config.train, config.optimizer.lr)
    assistant = config.adapter.assistant
    remarks += [assistant_line(assistant, {model.denoiser: model.networks[model.denoiser]})] if assistant else []
    remarks += [remark] if (remark := formats.about_format(trained.adapted, "diffusers")) else []
    return "\n".join([about_prediction(config.model), trained.share, table, *remarks])
