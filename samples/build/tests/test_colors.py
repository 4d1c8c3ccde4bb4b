"""Names of colours, and icons painted in them."""

import numpy as np
import pytest
from PIL import Image

from samples.build.scenes.colors import PAINTS, PALE, color_of, color_shares, paint, two_tone
from samples.build.tests.scene_things import shape


@pytest.mark.parametrize("name", PAINTS)
def test_a_paint_is_called_by_its_name(name):
    assert color_of(shape("disc", PAINTS[name])) == name


def test_a_multi_coloured_image_has_no_colour():
    image = shape("box", PAINTS["red"])
    image.paste(PAINTS["blue"], (0, 0, 60, 20))
    assert color_of(image) is None
    assert color_shares(image) == pytest.approx({"red": 2 / 3, "blue": 1 / 3})
    image.paste(PAINTS["red"], (0, 0, 60, 14))  # a tenth is left
    assert color_of(image) == "red"


def test_only_opaque_pixels_count():
    assert color_shares(shape("wedge", PAINTS["green"])) == {"green": 1.0}
    with pytest.raises(ValueError, match="without an opaque pixel"):
        color_of(Image.new("RGBA", (4, 4)))


@pytest.mark.parametrize("color", PAINTS)
@pytest.mark.parametrize("before", ["red", "yellow", "blue"])
def test_paint_changes_the_main_hue_and_keeps_shape_and_other_colours(before, color):
    image = shape("box", PAINTS[before])
    image.paste((20, 20, 20), (0, 0, 60, 8))
    painted = paint(image, color)
    assert color_of(painted) == color
    assert painted.getpixel((30, 4)) == (20, 20, 20, 255)
    assert np.array_equal(np.asarray(painted)[..., 3], np.asarray(image)[..., 3])


def test_paint_keeps_light_and_shade():
    image = shape("box", (200, 30, 30))
    image.paste((120, 18, 18), (0, 30, 60, 60))
    painted = paint(image, "blue")
    assert sum(painted.getpixel((5, 5))) > sum(painted.getpixel((5, 50))) + 60
    assert color_of(painted) == "blue"


def test_an_image_without_a_hue_is_not_painted():
    gray = shape("disc", (128, 128, 128))
    assert paint(gray, "red").tobytes() == gray.tobytes()


@pytest.mark.parametrize("color", ["red", "yellow", "blue", "purple"])
def test_two_tone_gives_the_larger_part_the_colour(color):
    frame = Image.new("RGBA", (60, 60))
    frame.paste((0, 0, 0, 255), (5, 5, 55, 55))
    solid = two_tone(frame, color)
    assert color_of(solid) == color
    frame.paste((0, 0, 0, 0), (10, 10, 50, 50))  # now only an outline
    paper = two_tone(frame, color)
    assert paper.getpixel((30, 30)) == (*PAINTS[color], 255)
    assert paper.getpixel((7, 7))[:3] != PAINTS[color]
    assert paper.getpixel((1, 1))[3] == 0


def test_pale_colours_are_far_from_each_other():
    colors = np.array(list(PALE.values()), dtype=float)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + 1e3 * np.eye(len(colors))
    assert distances.min() > 38
