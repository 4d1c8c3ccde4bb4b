"""The page of a dry run of a training on pictures."""

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator

from dora_mm import formats
from dora_mm.adapting.compiled import compiled_line
from dora_mm.adapting.images import adapt_image_model
from dora_mm.adapting.networks import TrainedNetworks
from dora_mm.adapting.new_tokens import start_tokens, token_networks, tokens_lines
from dora_mm.adapting.sharding import division
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.data.images.folder import CaptionedImage
from dora_mm.models.images.families import about_prediction, load_image_model_if_local
from dora_mm.models.images.image_model import ImageModel
from dora_mm.preview.images import describe_data, describe_encoded, describe_latents
from dora_mm.preview.parts import parts_table
from dora_mm.preview.training import (
    measure_step,
    memory_table,
    optimizer_line,
    slow_hardware,
    time_line,
    why_not_measured,
)
from dora_mm.tasks.diffusion import DiffusionTask
from dora_mm.tasks.image_batches import captioned_batches, free_vae
from dora_mm.tasks.preservation import preserving
from dora_mm.train.optim import check_optimizer, lacks_gpu
from dora_mm.train.setup import training_setup


def image_page(
    config: TrainDiffusionConfig,
    images: Sequence[CaptionedImage],
    held: Sequence[CaptionedImage],
    class_images: Sequence[CaptionedImage],
    accelerator: Accelerator,
) -> Iterator[str]:
    """Sections of text: the data, the modules, the memory and the time.

    Of a hub model that is not on this machine, only the data. Nothing is written.

    Args:
        config: The config.
        images: Those that are trained on.
        held: Those that are held out.
        class_images: Those of folders of role preserve.
        accelerator: Knows the device, the mixed precision and the processes.
    """
    given, writes_nothing = config.data, {"latent_cache": None, "text_cache": None}
    config = config.model_copy(update={"data": given.model_copy(update=writes_nothing)})
    if without_gpu := lacks_gpu(config.optimizer, accelerator.device):
        yield without_gpu
    else:
        check_optimizer(config.optimizer, accelerator.device)
    model = load_image_model_if_local(config.model)
    data = describe_data(images, config, model, accelerator.num_processes, held, class_images)
    if model is None:
        yield from [data, *slow_hardware(accelerator, None)]
        return
    shard = config.train.shard
    model = model if shard else model.to(accelerator.device)
    start_tokens(config.tokens, model, images, config.data.captions, config.seed)
    batches = captioned_batches(config, model, images, (accelerator.process_index, accelerator.num_processes))
    source = preserving(batches, config, class_images)
    why_not = without_gpu or why_not_measured(
        accelerator, [*model.encoders.values(), model.empty_denoiser()], shard=shard
    )
    if not why_not:
        with torch.no_grad():
            source(0)  # the only batch that is measured
    num_batches = config.train.steps * config.train.gradient_accumulation_steps
    yield "\n".join([data, *describe_latents(batches, given), *describe_encoded(source, num_batches, given)])
    if not batches.prompts.needs_encoders:
        model.components.release(model.text_encoders)
    trained = adapt_image_model(model, config)
    yield trained_section(config, model, trained)
    how = optimizer_line(config.optimizer, config.schedule, config.train.steps, config.ema)
    yield f"{how}\n{compiled_line(trained.networks, model.target_maps)}" if config.train.compile else how
    free_vae(model, config.data)
    cost = None
    if not why_not:
        loss, others = DiffusionTask(model, config.loss).loss, token_networks(config.tokens, model)
        cost = measure_step(**training_setup(accelerator, config, config.train, trained, loss, others), batch_at=source)
    yield memory_table(
        model.networks,
        trained.parameters,
        config.optimizer,
        cost,
        place=accelerator.device.type if shard else None,
        ema=config.ema is not None,
        division=division(trained, model.target_maps) if shard else None,
    )
    yield time_line(cost, config.train.steps, "drawing pictures") if cost else f"time      not measured: {why_not}"
    yield from slow_hardware(accelerator, model.networks.values())


def trained_section(config: TrainDiffusionConfig, model: ImageModel, trained: TrainedNetworks) -> str:
    """What the model predicts, and what of it is trained, by part."""
    table = parts_table(trained, model.adaptable, model.target_maps, config.adapter, config.optimizer)
    remarks = tokens_lines(config.tokens, model, config.train, config.optimizer.lr)
    remarks += [remark] if (remark := formats.about_format(trained.adapted, "diffusers")) else []
    return "\n".join([about_prediction(config.model), trained.share, table, *remarks])
