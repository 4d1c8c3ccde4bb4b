"""Small targets of noise with their references."""

import json

import numpy as np
from PIL import Image


def noise(size, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def write_pairs(root, rows):
    """A folder of targets, and references/ with those of each row: (target's size, sizes of references)."""
    (root / "references").mkdir(parents=True)
    lines = []
    for index, (target, references) in enumerate(rows):
        noise(target, index).save(root / f"{index}.png")
        for number, size in enumerate(references, 1):
            noise(size, 100 * number + index).save(root / "references" / f"{index}_{number}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"make thing {index} red" + " again" * index}))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root
