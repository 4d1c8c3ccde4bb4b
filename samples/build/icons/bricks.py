"""Brick sculptures: a flat icon becomes an LDraw model, one 1 x 1 brick per opaque pixel of the downscaled icon.

The model lies flat, studs up, and is seen from steeply above: the render keeps the icon's outline (so the object stays
recognisable) and shows every stud and every seam (so the material does). Shape legend: R, C rows and columns of the
brick grid; S samples of one brick; P colours of the palette.
"""

import numpy as np
from PIL import Image

# LDraw colour code -> sRGB, copied from LDConfig.ldr (2024-12-19). Left out on purpose: dark red, dark blue and other
# shades that come out nearly black in a render, and near-duplicates that would only speckle a plain surface.
PALETTE: dict[int, tuple[int, int, int]] = {
    0: (27, 42, 52),  # black
    15: (244, 244, 244),  # white
    71: (150, 150, 150),  # light bluish grey
    72: (100, 100, 100),  # dark bluish grey
    4: (180, 0, 0),  # red
    25: (214, 121, 35),  # orange
    191: (252, 172, 0),  # bright light orange
    14: (250, 200, 10),  # yellow
    226: (255, 236, 108),  # bright light yellow
    27: (165, 202, 24),  # lime
    10: (88, 171, 65),  # bright green
    2: (0, 133, 43),  # green
    288: (0, 69, 26),  # dark green
    1: (30, 90, 168),  # blue
    73: (115, 150, 200),  # medium blue
    322: (104, 195, 226),  # medium azure
    321: (70, 155, 195),  # dark azure
    212: (157, 195, 247),  # bright light blue
    323: (211, 242, 234),  # light aqua
    85: (68, 26, 145),  # medium lilac
    30: (160, 110, 185),  # medium lavender
    31: (205, 164, 222),  # lavender
    5: (211, 53, 157),  # dark pink
    29: (255, 158, 205),  # bright pink
    19: (215, 186, 140),  # tan
    84: (170, 125, 85),  # medium nougat
    78: (255, 201, 149),  # light nougat
    70: (95, 49, 9),  # reddish brown
    28: (137, 125, 98),  # dark tan
}

BRICK = "3005.dat"  # LDraw's 1 x 1 brick: 20 x 20 units, 24 high, stud up
STUD_PITCH = 20  # LDraw units from stud to stud
EMPTY = -1
_MARKER = -5  # of the first marker brick of a sheet, in studs; every cell begins two studs before its sculpture

_CODES = np.array(list(PALETTE))
_SAMPLES = 10  # samples per brick and axis when colours vote
# A colour's vote is divided by its count in the whole icon to this power: with plain majority the eyes of an owl and
# the buttons of a telephone lose to the surface around them; with 1.0 stray shading colours win.
_RARITY = 0.4


def srgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """CIE Lab (D65) of sRGB values in 0..255, (..., 3) -> (..., 3); distances in it are roughly perceptual."""
    linear = rgb.astype(np.float64) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


_LAB_P3 = srgb_to_lab(np.array(list(PALETTE.values())))


def brick_grid(icon: Image.Image, studs: int) -> np.ndarray:
    """Converts an icon to a grid of bricks.

    Args:
        icon: An RGBA icon.
        studs: The longer side of its opaque part, in bricks.

    Returns:
        LDraw colour codes, (R, C); EMPTY where there is no brick.

    Raises:
        ValueError: The icon has no opaque pixel.
    """
    box = icon.getchannel("A").point([255 * (alpha > 40) for alpha in range(256)]).getbbox()
    if box is None:
        raise ValueError("the icon has no opaque pixel, so there is nothing to build with bricks")
    icon = icon.crop(box)
    scale = studs / max(icon.size)
    C, R = (max(1, round(side * scale)) for side in icon.size)
    pixels = np.asarray(icon.resize((C * _SAMPLES, R * _SAMPLES), Image.Resampling.BOX))
    opaque_RCS = _blocks(pixels[..., 3] > 128, R, C)
    lab = _darks_to_black(srgb_to_lab(pixels[..., :3]))
    nearest_RCS = _blocks(((lab[:, :, None] - _LAB_P3) ** 2).sum(-1).argmin(-1), R, C)

    votes_RCP = np.stack([(opaque_RCS & (nearest_RCS == p)).sum(-1) for p in range(len(_CODES))], axis=-1)
    totals_P = votes_RCP.sum((0, 1))
    winner_RC = (votes_RCP / np.maximum(totals_P, 1) ** _RARITY).argmax(-1)
    return np.where(_covered(opaque_RCS.mean(-1)), _CODES[winner_RC], EMPTY)


def _darks_to_black(lab: np.ndarray) -> np.ndarray:
    """Removes the hue of the darkest blues and violets: the icons draw black as violet, and a panda is not blue."""
    keep = np.where(lab[..., 2:] < 0, np.clip((lab[..., :1] - 20) / 20, 0.2, 1), 1)
    return lab * np.concatenate([np.ones_like(keep), keep, keep], axis=-1)


def _blocks(samples: np.ndarray, R: int, C: int) -> np.ndarray:
    """(R * S, C * S) samples -> (R, C, S * S): all samples of one brick along the last axis."""
    return samples.reshape(R, _SAMPLES, C, _SAMPLES).transpose(0, 2, 1, 3).reshape(R, C, -1)


def _covered(coverage_RC: np.ndarray) -> np.ndarray:
    """Which cells get a brick, (R, C): as many as the icon covers in area, in the order of coverage.

    A fixed threshold of one half would break thin things (a bicycle, a pair of glasses) into crumbs.
    """
    count = max(1, round(float(coverage_RC.sum())))
    threshold = np.sort(coverage_RC, axis=None)[::-1][count - 1]
    return coverage_RC >= np.clip(threshold, 0.25, 0.5)


def ldraw_sheet(grids: list[np.ndarray], columns: int, studs: int) -> str:
    """A sheet of many sculptures side by side, because the renderer takes a second to start.

    Two black marker bricks are at the outer corners; from their outline in the render follows where each cell is.

    Args:
        grids: LDraw colour codes of each sculpture, (R, C).
        columns: Sculptures in a row of the sheet.
        studs: The largest side of a sculpture, in bricks.

    Returns:
        The text of an LDraw file.
    """
    pitch, num_rows = _cell_pitch(studs), -(-len(grids) // columns)
    corners = (_MARKER, _MARKER), (columns * pitch, num_rows * pitch)
    lines = ["0 brick sculptures", *(_brick(0, *corner) for corner in corners)]
    for index, grid in enumerate(grids):
        top, left = index // columns * pitch, index % columns * pitch
        lines += [_brick(int(grid[row, col]), left + col, top + row) for row, col in np.argwhere(grid != EMPTY)]
    return "\n".join(lines) + "\n"


def _cell_pitch(studs: int) -> int:
    return studs + 4  # a gap of four studs between sculptures: far more than the tilt can hide


def _brick(code: int, x: int, y: int) -> str:
    """The line of one brick at grid position (x right, y down). LDraw's y axis points down: (x, z) is the ground."""
    return f"1 {code} {STUD_PITCH * x} 0 {-STUD_PITCH * y} 1 0 0 0 1 0 0 0 1 {BRICK}"


def cut_sheet(
    sheet: Image.Image, grids: list[np.ndarray], columns: int, studs: int, size: int, squeeze: float
) -> list[Image.Image]:
    """Cuts a rendered `ldraw_sheet` into one image per sculpture.

    An image is `studs` + 2 studs wide and high, and its sculpture is aligned with that grid, in the middle: where a
    stud is as large as the patch that a VAE encodes as one latent, all bricks are aligned with the latents alike.

    Args:
        sheet: The render: orthographic, RGBA, transparent ground.
        grids: As for `ldraw_sheet`.
        columns: As for `ldraw_sheet`.
        studs: As for `ldraw_sheet`.
        size: Side of an image in pixels.
        squeeze: Height of a stud in the render divided by its width: the sine of the camera's elevation.

    Returns:
        RGB images on white, in the order of `grids`.

    Raises:
        ValueError: The render is empty.
    """
    box = sheet.getchannel("A").getbbox()
    if box is None:
        raise ValueError("the renderer returned an empty image")
    pitch, stud = _cell_pitch(studs), size // (studs + 2)
    # The markers' outlines extend from _MARKER to columns * pitch + 1 studs. Vertically the front side of the lower
    # marker adds to that, so the height of a stud is computed from its width.
    wide = (box[2] - box[0]) / (columns * pitch + 1 - _MARKER)
    high = wide * squeeze
    squares = []
    for index, grid in enumerate(grids):
        left = box[0] + (index % columns * pitch - 2 - _MARKER) * wide
        top = box[1] + (index // columns * pitch - 2 - _MARKER) * high
        cell = sheet.resize(
            (pitch * stud, pitch * stud),
            Image.Resampling.LANCZOS,
            box=(left, top, min(left + pitch * wide, sheet.width), min(top + pitch * high, sheet.height)),
        )
        rows, cols = grid.shape
        corner = ((studs + 2 - cols) // 2 - 2) * stud, ((studs + 2 - rows) // 2 - 2) * stud
        square = Image.new("RGB", (size, size), "white")
        square.paste(cell, corner, cell)
        squares.append(square)
    return squares
