"""Icons of invented concepts in six styles, and a classifier fitted on them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from dora_mm.eval.images.classifier import Classifier
from dora_mm.eval.images.concepts import Concept
from dora_mm.eval.images.encoder import Encoder, Features
from dora_mm.eval.images.style import STYLES
from samples.build.judge.fitting import fit_classifier

SIDE = 64
NUM_CLASSIFIER, NUM_PRETRAIN = 15, 12
ROLES = ("report", "tune")


def make_concepts() -> list[Concept]:
    judged = [Concept(f"a{index:02d}", f"judged thing {index}", "Objects", "judge") for index in range(NUM_CLASSIFIER)]
    learned = [
        Concept(f"b{index:02d}", f"thing {index}", "Objects", "pretrain", ROLES[index % 2])
        for index in range(NUM_PRETRAIN)
    ]
    return judged + learned


def draw_icon(seed: int, style: str) -> Image.Image:
    """Two coloured shapes that depend on the seed, generated in the given style."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(2):
        x, y = rng.integers(4, 30, size=2)
        box = (x, y, x + int(rng.integers(18, 32)), y + int(rng.integers(18, 32)))
        colour = "black" if style == "contrast" else tuple(int(v) for v in rng.integers(0, 200, size=3))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape(box, fill=colour, outline="black" if style in ("twemoji", "noto") else None)
    if style == "brick":
        dots = Image.new("RGB", (SIDE, SIDE), "white")
        for x in range(2, SIDE, 8):
            for y in range(2, SIDE, 8):
                ImageDraw.Draw(dots).ellipse((x, y, x + 4, y + 4), fill=(150, 150, 150))
        image = Image.blend(image, dots, 0.4)
    if style == "3d":
        ramp = np.linspace(1.0, 0.3, SIDE)[:, None, None]
        image = Image.fromarray((np.asarray(image) * ramp).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.5))
    return image


@pytest.fixture(scope="session")
def concepts() -> list[Concept]:
    return make_concepts()


@pytest.fixture(scope="session")
def learned(concepts: list[Concept]) -> list[Concept]:
    """The concepts in the classifier's gallery."""
    return [concept for concept in concepts if concept.split == "pretrain"]


@pytest.fixture(scope="session")
def icons(tmp_path_factory: pytest.TempPathFactory, concepts: list[Concept]) -> Path:
    """A folder as `python -m samples.build icons` makes it."""
    folder = tmp_path_factory.mktemp("icons")
    rows = [{k: v for k, v in vars(concept).items() if v is not None} for concept in concepts]
    (folder / "concepts.json").write_text(json.dumps(rows))
    for style in STYLES:
        (folder / style).mkdir()
        for index, concept in enumerate(concepts):
            draw_icon(index, style).save(folder / style / f"{concept.code}.webp", lossless=True)
    return folder


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return Encoder()


@pytest.fixture(scope="session")
def features(encoder: Encoder, icons: Path, concepts: list[Concept]) -> dict[str, Features]:
    return {
        style: encoder([Image.open(icons / style / f"{concept.code}.webp") for concept in concepts]) for style in STYLES
    }


@pytest.fixture(scope="session")
def classifier(features: dict[str, Features], concepts: list[Concept]) -> Classifier:
    return fit_classifier(concepts, features, {"model": "none", "resolution": SIDE, "vae": "none"})


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model with random weights, in the format in which open_clip saves it for the hub."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder


@pytest.fixture(scope="session")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DINOv2's architecture, tiny, with random weights, in the format in which timm saves it for the hub."""
    import timm
    from timm.models import save_for_hf

    folder = tmp_path_factory.mktemp("dinov2")
    size = {"img_size": 28, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_small_patch14_dinov2", **size)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    save_for_hf(model, str(folder), model_args=size, safe_serialization=True)
    return folder
