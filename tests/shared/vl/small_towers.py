"""A convolutional vision tower that is loaded and computed in milliseconds, with random weights."""

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

DIM = 72  # channels of its layers together


def small_tower(folder: Path) -> dict:
    """Saves the weights; returns the `vision` section of configs."""
    torch.manual_seed(0)
    file = folder / "tower.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), file)
    return {"tower": "timm/test_efficientnet", "pretrained": str(file), "layers": ["blocks.1", "blocks.3"]}
