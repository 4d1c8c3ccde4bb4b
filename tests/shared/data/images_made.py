"""Small images of noise in two shapes, with captions."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(64, 64), (80, 80), (64, 64), (160, 44), (160, 44)]  # (h, w)


def write_images(folder: Path, count: int = 5, *, captions: bool = True) -> None:
    """Writes images named 0.png, 1.png and so on, and metadata.jsonl with their captions."""
    rows = []
    for index, (height, width) in enumerate(SIZES[:count]):
        noise = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": f"a TOK icon of thing {index}"}))
    if captions:
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def write_mask(file, values):
    Image.fromarray((np.asarray(values) * 255).astype(np.uint8)).save(file)


def half(height, width):
    """White on the left."""
    return np.repeat((np.arange(width) < width // 2)[None], height, axis=0)
