"""Memory of an image training, computed from configs on the meta device, without loading weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from dora_mm.adapting.networks import TrainedNetworks, train_mode
from dora_mm.adapting.new_tokens import token_networks
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.models.images.image_model import ImageModel
from dora_mm.models.images.vae import pixels_of
from dora_mm.models.quantization import planned_bytes
from dora_mm.preview.simulation import Machine, Simulation, fused_attention, simulated_peak
from dora_mm.preview.streamed import stream_plan
from dora_mm.preview.training import PRECISIONS, StepCost, num_bytes
from dora_mm.tasks.diffusion import DiffusionTask
from dora_mm.tasks.image_batches import CaptionedBatches
from dora_mm.tasks.preservation import PreservingBatches
from dora_mm.tasks.prompt_encoder import Caption, encode_captions, text_of
from dora_mm.train.setup import checkpoint_activations
from dora_mm.utils.randomness import generator
from dora_mm.utils.tables import aligned_columns

SAMPLE = 8  # captions whose size is taken for that of all
TOGETHER = 16  # captions that are encoded at once


class Phase(NamedTuple):
    """A phase outside the training steps: description, bytes of its networks, and bytes of its activations."""

    name: str
    weights: int
    activations: int


def machine_of(config: TrainDiffusionConfig) -> Machine:
    """The machine that a training is planned for: a GPU with the config's precision and backend."""
    return Machine(True, PRECISIONS.get(config.train.mixed_precision), triton=config.backend != "torch")


def largest_batch(batches: CaptionedBatches) -> int:
    """The number of the batch of the first epoch that has the most pixels, with those of references."""
    areas = [sum(h * w for h, w in layout) for layout in batches.layouts]
    sizes = [sum(areas[row] for row in rows) for rows in batches.order.batches_of(0)]
    return max(range(len(sizes)), key=sizes.__getitem__)


def encode_without_numbers(
    model: ImageModel,
    batches: CaptionedBatches,
    source: CaptionedBatches | PreservingBatches,
    captions: Sequence[Caption],
) -> None:
    """Encodes the largest batch, and captions of all lengths; only the sizes of what is kept of them are known.

    Args:
        model: The model, on the meta device.
        batches: The batches of the training.
        source: The same, with prior preservation added.
        captions: Those of the training.
    """
    by_length = sorted(captions, key=lambda caption: len(text_of(caption)))
    chosen = by_length[:: max(1, len(by_length) // SAMPLE)]
    with torch.no_grad(), without_numbers(model):
        batches.prompts.keep(chosen)
        source(largest_batch(batches))


@contextmanager
def without_numbers(model: ImageModel) -> Iterator[Simulation]:
    """A context in which what a model computes has no numbers, and its bytes are counted."""
    networks = [*model.networks.values(), model.new_tokens]
    counted = Simulation([t for network in networks for t in (*network.parameters(), *network.buffers())])
    with counted, fused_attention(Machine(is_gpu=True)):
        yield counted


def phases(config: TrainDiffusionConfig, model: ImageModel, captions: Sequence[Caption]) -> list[Phase]:
    """The cost of encoding captions and images, of decoding one image, and of quantising the denoiser.

    Args:
        config: The config.
        model: The model, on the meta device, nothing of which was released.
        captions: Those of the training.
    """
    encoders = sum(_text_encoder_bytes(config, model, name) for name in model.text_encoders)
    vae, side = num_bytes(_tensors(model.vae)), config.data.all_resolutions[-1]
    longest = sorted(captions, key=lambda caption: len(text_of(caption)))[-TOGETHER:]
    pixels = torch.zeros(1, 3, side, side)
    found = [Phase(f"VAE, an image of {side} px encoded", vae, _peak(model, lambda: model.encode_images(pixels)))]
    if longest:
        peak = _peak(model, lambda: encode_captions(model, longest))
        found.insert(0, Phase(f"captions, {len(longest)} at once", encoders, peak))
    if config.sample.prompts:
        size = (1, model.vae_channels, *2 * (model.resolution // model.vae_downscale,))
        latents = torch.zeros(size, dtype=model.vae.dtype, device="meta")
        peak = _peak(model, lambda: pixels_of(model.vae, latents))
        found.append(Phase(f"VAE, an image of {model.resolution} px decoded", vae, peak))
    if (name := config.model.quantization) and config.model.denoiser is None:
        numbers, dtype = sum(t.numel() for t in _tensors(model.networks[model.denoiser])), config.model.dtype
        size = numbers * getattr(torch, dtype).itemsize
        found.append(Phase(f"{model.denoiser} in {dtype} in main memory, before it is stored in {name}", size, 0))
    return found


def _text_encoder_bytes(config: TrainDiffusionConfig, model: ImageModel, name: str) -> int:
    """The bytes of a text encoder on the card."""
    network = model.components[name]
    stored = planned_bytes(network)
    plan = stream_plan(network, model.target_maps.get(name), config.memory.stream_text, stored=stored)
    return sum(stored.get(id(t), t.nbytes) for t in _tensors(network)) - plan.freed


def phases_table(found: Sequence[Phase]) -> str:
    """A text table of the phases outside the training steps."""
    rows = [(p.name, *(f"{size / 1e6:,.1f}" for size in (*p[1:], p.weights + p.activations))) for p in found]
    return aligned_columns([("beside the steps", "weights, MB", "activations", "together"), *rows], num_text=1)


def simulated_cost(
    config: TrainDiffusionConfig,
    model: ImageModel,
    trained: TrainedNetworks,
    batches: CaptionedBatches,
    source: CaptionedBatches | PreservingBatches,
    machine: Machine,
    *,
    checkpointing: bool,
) -> StepCost:
    """The activations of a step with the largest batch.

    Args:
        config: The config.
        model: The model, on the meta device, adapted.
        trained: What is trained of it.
        batches: The batches of the training, with latents and captions from `encode_without_numbers`.
        source: The same, with prior preservation added.
        machine: What the step is simulated for.
        checkpointing: Whether the backward pass computes activations again.
    """
    networks = {**model.networks, **token_networks(config.tokens, model)}
    denoiser: Any = trained.networks[model.denoiser]
    denoiser.disable_gradient_checkpointing()
    if checkpointing:
        checkpoint_activations(denoiser)
    train_mode(trained.networks.values())
    loss, stream = DiffusionTask(model, config.loss).loss, generator(config.seed, 0, "loss 0")
    passes = config.train.gradient_accumulation_steps
    peak = simulated_peak(
        networks, lambda number: loss(source(number), stream), largest_batch(batches), passes, machine
    )
    for parameter in trained.parameters.values():
        parameter.grad = None
    activations = max(0, peak - num_bytes(trained.parameters.values()))
    how = "gradient checkpointing" if checkpointing else "no gradient checkpointing"
    return StepCost(None, activations, f"{how}, an estimate")


def checkpointing_line(costs: Mapping[bool, StepCost], checkpointing: bool) -> str:
    """A line on the activations with the other setting of `train.gradient_checkpointing`."""
    size = costs[not checkpointing].activations
    key = f"train.gradient_checkpointing={str(not checkpointing).lower()}"
    return f"with {key} the activations take {size / 1e6:,.1f} MB"


def _peak(model: ImageModel, compute: Callable[[], Any]) -> int:
    with torch.no_grad(), without_numbers(model) as counted:
        compute()
    return counted.peak


def _tensors(network: nn.Module) -> Iterator[torch.Tensor]:
    yield from network.parameters()
    yield from network.buffers()
