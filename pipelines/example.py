"""dora-mm example: a small model with random weights and a few images, to try the commands on without a download."""

import json
from importlib import import_module
from pathlib import Path

from PIL import Image, ImageDraw

from dora_mm.data.images.captions import METADATA
from dora_mm.models.opening import without_bars
from dora_mm.preview.drafts import print_commands
from dora_mm.registries.image_families import IMAGE_FAMILIES
from dora_mm.utils.folders import is_free, written_at_once
from dora_mm.utils.home import expanded

MODEL, IMAGES, NAME = "model", "images", "example_style"  # the folders in FOLDER, the config that comes next
SIDE = 128  # of the images in pixels, as the model's
COLORS = {"red": (214, 69, 65), "blue": (52, 101, 164)}
SHAPES = {
    "circle": lambda draw, color: draw.ellipse((32, 32, 96, 96), fill=color),
    "square": lambda draw, color: draw.rectangle((34, 34, 94, 94), fill=color),
    "triangle": lambda draw, color: draw.polygon(((64, 28), (100, 96), (28, 96)), fill=color),
    "ring": lambda draw, color: draw.ellipse((34, 34, 94, 94), outline=color, width=14),
}
BACKGROUND = (244, 236, 216)
NOTE = "The weights are random: generated images mean nothing, also after a training. It shows that the commands run."


def main(out: str) -> None:
    """Writes the model and the images, and prints the commands that follow.

    Args:
        out: A new or empty folder.

    Raises:
        ValueError: The folder has content, or cannot be made there.
    """
    folder = expanded(out)
    if not is_free(folder):
        raise ValueError(f"FOLDER {out} exists already, and is not an empty folder: name a new one")
    family, record = next((name, record) for name, record in IMAGE_FAMILIES.built_in.items() if record.example)
    module, _, build = record.example.partition(":")
    model = getattr(import_module(module), build)()
    with written_at_once(folder) as partial, without_bars():
        model.pipeline().save_pretrained(partial / MODEL)
        write_images(partial / IMAGES)
    num_images = len(COLORS) * len(SHAPES)
    print(f"written   {folder / MODEL} (a small {record.title}), {folder / IMAGES} ({num_images} images with captions)")
    print(f"note      {NOTE}")
    print_next(family, folder)


def write_images(folder: Path) -> None:
    """Draws each shape in each color, and writes the captions to metadata.jsonl."""
    folder.mkdir()
    lines = []
    for color, rgb in COLORS.items():
        for shape, draw in SHAPES.items():
            image = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
            draw(ImageDraw.Draw(image), rgb)
            image.save(folder / f"{color}_{shape}.png")
            caption = f"a {color} {shape}, in the style of TOK"
            lines.append(json.dumps({"file_name": f"{color}_{shape}.png", "text": caption}) + "\n")
    (folder / METADATA[0]).write_text("".join(lines), encoding="utf-8")


def print_next(family: str, folder: Path) -> None:
    """Prints the commands that train on the images."""
    new = ["new", family, NAME, "--images", folder / IMAGES, "--model", folder / MODEL]
    print_commands(
        {
            "a config of your own, with its prompts": new,
            "a training of a few steps": ["train", f"{NAME}.yaml", "--set", "train.steps=20"],
            "images without and with the adapter": [
                *("sample", f"{NAME}_prompts.txt", "--set", f"adapter.path=runs/{NAME}/latest", "strengths=[0, 1]")
            ],
        }
    )
