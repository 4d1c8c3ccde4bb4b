"""Small targets of noise with their references, and the batches of a training on them."""

import json
from contextlib import contextmanager

import numpy as np
from PIL import Image

from dora_mm.config.images import DataConfig
from dora_mm.config.models import validated
from dora_mm.data.images.folder import read_training_images
from dora_mm.tasks.image_batches import CaptionedBatches
from dora_mm.tasks.prompt_encoder import PromptEncoder
from dora_mm.tasks.references import check_references


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


def batches_of(model, root, batch_size=1, **settings):
    given = {"folder": str(root), "references": [str(root / "references")], "resolution": 64, **settings}
    data = validated(DataConfig, given)
    images = read_training_images(data)
    check_references(model, images, data)
    encoder = PromptEncoder(model, trained=False)
    return CaptionedBatches(model, images, encoder, data, batch_size=batch_size, seed=1)


@contextmanager
def recorded(network):
    """The inputs and outputs of a denoiser."""
    calls = []
    hook = network.register_forward_hook(lambda _, args, kwargs, out: calls.append((kwargs, out[0])), with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()
