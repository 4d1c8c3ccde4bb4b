"""CLIP similarity of images to texts and to other images, with weights of the user's: dora_mm contains none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dora_mm.config.paths import resolve_path
from dora_mm.data.images.folder import load_rgb
from dora_mm.models.opening import opening
from dora_mm.utils.progress import tracked


class ClipSimilarity:
    """Cosine similarities by an open_clip model.

    Args:
        path: A local folder (open_clip_config.json and safetensors) or a hub name (`owner/name`).
        device: Where the model runs.
        key: The config key that names it, for messages.

    Raises:
        ValueError: The folder contains no open_clip model, or the hub cannot be reached.
    """

    def __init__(self, path: str, device: str | torch.device = "cpu", key: str = "clip.path"):
        import open_clip

        folder, is_folder = Path(path), Path(path).is_dir()
        if is_folder and not (folder / "open_clip_config.json").is_file():
            raise ValueError(f"{key}: {folder} contains no open_clip_config.json: it is not an open_clip model")
        if is_folder and not any(folder.glob("*.safetensors")):
            raise ValueError(f"{key}: {folder} contains no weights (open_clip_model.safetensors)")
        name = f"local-dir:{path}" if is_folder else f"hf-hub:{path}"
        self.device = torch.device(device)
        with opening(path, f"{path} cannot be loaded", key=key):
            created: Any = open_clip.create_model_from_pretrained(name, device=self.device)
        self.model, self.preprocess = created
        self.tokenize: Any = open_clip.get_tokenizer(name)
        self.model.eval()

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image], batch_size: int = 32) -> np.ndarray:
        """Returns unit vectors (N, D)."""
        parts = []
        for start in tracked(range(0, len(images), batch_size), "comparing", "batches"):
            batch = [self.preprocess(image.convert("RGB")) for image in images[start : start + batch_size]]
            parts.append(self.model.encode_image(torch.stack(batch).to(self.device), normalize=True))
        return torch.cat(parts).float().cpu().numpy()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns unit vectors (N, D)."""
        return self.model.encode_text(self.tokenize(list(texts)).to(self.device), normalize=True).float().cpu().numpy()

    def to_texts(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """Returns the cosine of each image with its own text, (N,)."""
        return (self.embed_images(images) * self.embed_texts(texts)).sum(axis=1)

    def to_images(self, images: Sequence[Image.Image], references: Sequence[Image.Image]) -> np.ndarray:
        """Returns the mean cosine of each image with all references, (N,), as CLIP-I in the DreamBooth paper."""
        return (self.embed_images(images) @ self.embed_images(references).T).mean(axis=1)

    def cosines(
        self, images: Sequence[Image.Image], texts: Sequence[str], references: Sequence[Image.Image] = ()
    ) -> dict[str, np.ndarray]:
        """Returns the similarities of each image by their names, (N,) each.

        Args:
            images: The N images.
            texts: The text of each.
            references: Images that they should resemble; empty: no similarity with images.
        """
        found = {"CLIP text similarity": self.to_texts(images, texts)}
        if references:
            found["CLIP image similarity"] = self.to_images(images, references)
        return found


def read_references(images: str) -> list[Image.Image]:
    """Reads the images of a folder, in the order of their names.

    Args:
        images: The folder, relative as paths in configs are.

    Raises:
        ValueError: The folder does not exist or contains no images.
    """
    folder = resolve_path(images, "clip.images")
    suffixes = {".webp", ".png", ".jpg", ".jpeg"}
    found = [load_rgb(path, "white") for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes]
    if not found:
        raise ValueError(f"clip.images: {folder} contains no images (.webp, .png, .jpg): name a folder that does")
    return found
