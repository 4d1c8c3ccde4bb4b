"""Icons to bricks, and rendered sheets to images, without a renderer."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from samples.build.icons.bricks import EMPTY, PALETTE, brick_grid, cut_sheet, ldraw_sheet, srgb_to_lab

RED, WHITE, BLACK, GREEN = 4, 15, 0, 2


def canvas(size=(260, 260)):
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    return image, ImageDraw.Draw(image)


def test_lab_of_known_colours():
    lab = srgb_to_lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]]))
    np.testing.assert_allclose(lab, [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]], atol=0.05)


@pytest.mark.parametrize("code", [code for code in PALETTE if code != 85])  # deep violet is replaced by black
def test_every_palette_colour_gives_its_brick(code):
    image, draw = canvas()
    draw.rectangle((0, 0, 259, 259), fill=PALETTE[code])
    assert set(brick_grid(image, 4).ravel()) == {code}


def test_grid_fits_the_opaque_part():
    image, draw = canvas()
    draw.rectangle((40, 100, 169, 164), fill=PALETTE[RED])  # 130 x 65 pixels inside the image
    grid = brick_grid(image, 13)
    assert grid.shape in {(6, 13), (7, 13)}
    assert (grid == RED).all()


def test_holes_stay_open_and_shapes_keep_their_position():
    image, draw = canvas()
    draw.rectangle((0, 0, 259, 259), fill=PALETTE[GREEN])
    draw.rectangle((100, 100, 159, 159), fill=(0, 0, 0, 0))
    draw.rectangle((0, 0, 259, 19), fill=PALETTE[WHITE])
    grid = brick_grid(image, 13)
    assert (grid[0] == WHITE).all()
    assert (grid[5:8, 5:8] == EMPTY).all()
    assert (grid == EMPTY).sum() == 9


def test_a_small_eye_survives_the_face_around_it():
    image, draw = canvas()
    draw.rectangle((0, 0, 259, 259), fill=PALETTE[WHITE])
    draw.rectangle((60, 60, 79, 66), fill=PALETTE[BLACK])  # a third of one brick
    assert brick_grid(image, 13)[3, 3] == BLACK


def test_thin_lines_are_not_interrupted():
    image, draw = canvas()
    draw.line((0, 0, 259, 259), fill=PALETTE[RED], width=9)  # less than half of any brick
    grid = brick_grid(image, 13)
    assert (np.diag(grid) == RED).all()


def test_deep_violet_becomes_black_and_brown_stays_brown():
    image, draw = canvas()
    draw.rectangle((0, 0, 129, 259), fill=(49, 37, 84))
    draw.rectangle((130, 0, 259, 259), fill=PALETTE[70])
    assert set(brick_grid(image, 2).ravel()) == {BLACK, 70}


def test_an_empty_icon_raises():
    with pytest.raises(ValueError, match="no opaque pixel"):
        brick_grid(canvas()[0], 13)


def test_ldraw_lines():
    text = ldraw_sheet([np.array([[RED, EMPTY], [WHITE, BLACK]])], columns=1, studs=2)
    lines = text.splitlines()
    assert lines[0].startswith("0 ")
    assert len(lines) == 1 + 2 + 3  # title, two markers, three bricks
    assert "1 4 0 0 0 1 0 0 0 1 0 0 0 1 3005.dat" in lines
    assert "1 15 0 0 -20 1 0 0 0 1 0 0 0 1 3005.dat" in lines  # the second row is nearer to the viewer: smaller z
    assert "1 0 20 0 -20 1 0 0 0 1 0 0 0 1 3005.dat" in lines


def draw_from_above(ldraw: str, pixels_per_stud: float, squeeze: float) -> Image.Image:
    """What an orthographic renderer would draw: flat squares, squeezed by the tilt of the camera."""
    bricks = [line.split() for line in ldraw.splitlines() if line.startswith("1 ")]
    xs, ys = [int(b[2]) // 20 for b in bricks], [-int(b[4]) // 20 for b in bricks]
    image = Image.new("RGBA", (2000, 2000), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    for brick, x, y in zip(bricks, xs, ys, strict=True):
        left, top = 30 + (x - min(xs)) * pixels_per_stud, 50 + (y - min(ys)) * pixels_per_stud * squeeze
        box = (left, top, left + pixels_per_stud - 1, top + pixels_per_stud * squeeze - 1)
        draw.rectangle(box, fill=PALETTE[int(brick[1])])
    return image


def test_every_sculpture_is_aligned_with_the_grid_of_its_image():
    rng = np.random.default_rng(0)
    codes = [RED, BLACK, GREEN, EMPTY]
    grids = [rng.choice(codes, size=(rng.integers(1, 15), 14)) for _ in range(11)]
    sheet = draw_from_above(ldraw_sheet(grids, columns=4, studs=14), pixels_per_stud=23, squeeze=20 / 23)
    squares = cut_sheet(sheet, grids, columns=4, studs=14, size=256, squeeze=20 / 23)
    assert len(squares) == len(grids)
    for grid, square in zip(grids, squares, strict=True):
        assert (square.mode, square.size) == ("RGB", (256, 256))
        middles = np.asarray(square)[8::16, 8::16].astype(int)
        rows, cols = grid.shape
        top, left = (16 - rows) // 2, (16 - cols) // 2
        expected = np.full((16, 16, 3), 255)
        for row, col in np.argwhere(grid != EMPTY):
            expected[top + row, left + col] = PALETTE[grid[row, col]]
        assert np.abs(middles - expected).max() < 25


def test_an_empty_render_raises():
    with pytest.raises(ValueError, match="empty image"):
        cut_sheet(canvas()[0], [np.zeros((1, 1), int)], columns=1, studs=14, size=256, squeeze=0.9)
