"""Vectors of images by an image model of timm, such as DINOv2, with weights of the user's: dora_mm contains none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dora_mm.models.opening import opening


class TimmEncoder:
    """Image encoder that returns the pooled features of a timm model.

    Args:
        path: A local folder as timm saves it (config.json and model.safetensors), or a hub name (`owner/name`).
        device: The device of the model.

    Raises:
        ValueError: The folder contains no model of timm, or the hub cannot be reached.
    """

    def __init__(self, path: str, device: str | torch.device = "cpu"):
        import timm
        from timm.data import create_transform, resolve_model_data_config

        is_folder = Path(path).is_dir()
        if is_folder and not any(Path(path).glob("*.safetensors")):
            raise ValueError(
                f"timm_model: {path} contains no weights (model.safetensors): name a folder that timm has saved"
            )
        self.device = torch.device(device)
        with opening(path, f"{path} cannot be loaded", key="timm_model"):
            name = f"local-dir:{path}" if is_folder else f"hf-hub:{path}"
            self.model: Any = timm.create_model(name, pretrained=True, num_classes=0).to(self.device).eval()
        self.preprocess: Any = create_transform(**resolve_model_data_config(self.model), is_training=False)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image], batch_size: int = 32) -> np.ndarray:
        """Returns unit vectors (N, D)."""
        parts = []
        for start in range(0, len(images), batch_size):
            batch = [self.preprocess(image.convert("RGB")) for image in images[start : start + batch_size]]
            parts.append(torch.nn.functional.normalize(self.model(torch.stack(batch).to(self.device)), dim=1))
        return torch.cat(parts).float().cpu().numpy()
