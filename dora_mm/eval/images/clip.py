"""Similarity of pictures to texts and to other pictures by CLIP weights that the user has; none come with dora_mm."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


class ClipSimilarity:
    """An open_clip model from a local folder (open_clip_config.json and safetensors) or from the hub (`owner/name`)."""

    def __init__(self, path: str, device: str | torch.device = "cpu"):
        import open_clip

        if Path(path).is_dir():
            _check_folder(Path(path))
        name = f"local-dir:{path}" if Path(path).is_dir() else f"hf-hub:{path}"
        self.device = torch.device(device)
        created: Any = open_clip.create_model_from_pretrained(name, device=self.device)
        self.model, self.preprocess = created
        self.tokenize: Any = open_clip.get_tokenizer(name)
        self.model.eval()

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image], batch_size: int = 32) -> np.ndarray:
        """(N, D), unit length."""
        parts = []
        for start in range(0, len(images), batch_size):
            batch = [self.preprocess(image.convert("RGB")) for image in images[start : start + batch_size]]
            parts.append(self.model.encode_image(torch.stack(batch).to(self.device), normalize=True))
        return torch.cat(parts).float().cpu().numpy()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D), unit length."""
        return self.model.encode_text(self.tokenize(list(texts)).to(self.device), normalize=True).float().cpu().numpy()

    def to_texts(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """(N,): cosine of each image with its own text."""
        return (self.embed_images(images) * self.embed_texts(texts)).sum(axis=1)

    def to_images(self, images: Sequence[Image.Image], references: Sequence[Image.Image]) -> np.ndarray:
        """(N,): mean cosine of each image with all references, as in the DreamBooth paper's CLIP-I."""
        return (self.embed_images(images) @ self.embed_images(references).T).mean(axis=1)


def _check_folder(folder: Path) -> None:
    if not (folder / "open_clip_config.json").is_file():
        raise ValueError(f"clip.path: {folder} holds no open_clip_config.json, so it is no open_clip model folder")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"clip.path: {folder} holds no weights (open_clip_model.safetensors)")
