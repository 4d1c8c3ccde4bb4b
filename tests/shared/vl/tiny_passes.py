"""A pass of a tiny model as its own processor prepares it."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin

from tests.shared.vl import tiny_vlm as tiny

QUESTION = "What colour is the ball?"


def load(folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, architecture).from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def turn(role: str, *content: str | Image.Image) -> dict:
    parts = [{"type": "text", "text": x} if isinstance(x, str) else {"type": "image", "image": x} for x in content]
    return {"role": role, "content": parts}


def inputs(name: str, processor: ProcessorMixin, image: Image.Image) -> dict[str, torch.Tensor]:
    if name in tiny.CHAT:
        return processor.apply_chat_template(
            [turn("user", image, QUESTION)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    text = "<image>" + QUESTION if name == "paligemma" else QUESTION
    return processor(images=image, text=text, return_tensors="pt")


def scores(name: str, model: PreTrainedModel, processor: ProcessorMixin, image: Image.Image) -> torch.Tensor:
    batch = inputs(name, processor, image)
    if name == "blip_vqa":
        return model(**batch, labels=batch["input_ids"]).loss  # it returns no logits
    if name == "florence2":
        batch["decoder_input_ids"] = torch.tensor([[2, 0]])
    return model(**batch).logits
