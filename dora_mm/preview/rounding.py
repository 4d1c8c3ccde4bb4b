"""The difference that rounded text encoders (`model.text_quantization`) make to the embeddings of captions."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import torch

from dora_mm.config.models import ModelConfig
from dora_mm.models.images.families import load_image_model
from dora_mm.models.images.image_model import Prompt
from dora_mm.tasks.prompt_encoder import Caption, encode_captions

MEASURED = 4  # captions
# How far hidden states of Qwen3 4B with random weights are off after 12 of its 36 layers, and what the embedded image
# model encodes, as shares of their length (tests/benchmarks/bench_text_rounding.py)
TEXT_ROUNDING = {"float8": (0.18, 0.02), "int8": (0.10, 0.008), "nf4": (0.57, 0.27)}


def relative_difference(found: Sequence[Prompt], exact: Sequence[Prompt]) -> float:
    """||found - exact|| / ||exact|| over all tensors of a prompt, the mean over prompts."""
    return mean(_relative(each, other) for each, other in zip(found, exact, strict=True))


def _relative(found: Prompt, exact: Prompt) -> float:
    names = [name for name, tensor in exact.items() if tensor.is_floating_point()]
    one, other = (torch.cat([prompt[name].cpu().double().flatten() for name in names]) for prompt in (found, exact))
    return float((one - other).norm() / other.norm())


def dense_prompts(config: ModelConfig, captions: Sequence[Caption], device: torch.device) -> list[Prompt] | None:
    """Captions as the text encoders encode them that are not rounded; None: they do not fit the device.

    Args:
        config: The `model` section, with `text_quantization`; the model is on this machine.
        captions: The captions.
        device: The device that encodes.
    """
    model = load_image_model(config.model_copy(update={"text_quantization": None})).to(device, denoiser=False)
    try:
        with torch.no_grad():
            return encode_captions(model, captions)
    except torch.OutOfMemoryError:
        return None


def rounding_line(config: ModelConfig, found: Sequence[Prompt] = (), exact: Sequence[Prompt] | None = None) -> str:
    """A line on what rounding does to the embeddings.

    Args:
        config: The `model` section, with `text_quantization`.
        found: Captions as the rounded text encoders encode them; empty: nothing was measured.
        exact: The same of those that are not rounded; None: nothing was measured.
    """
    name = config.text_quantization
    assert name is not None
    start = f"rounded   text encoders in {name}, so that prompts are encoded otherwise: off by"
    if exact:
        share = relative_difference(found, exact)
        return f"{start} {share:.1%} of their length ({len(exact)} captions of this training); images differ, too"
    random, trained = TEXT_ROUNDING[name]
    return (
        f"{start} {random:.0%} of their length in a Qwen3 of 4B with random weights after 12 layers, by {trained:.1%} "
        "in the embedded image model, which is small and trained; of your model nothing was measured"
    )
