"""python -m samples.build icons: the pretraining icons, samples/3d_icon and samples/lego.

    samples/concepts.jsonl             which things, chosen by hand, and what each serves for
    npm packages  -> build/packages    fetched with `npm pack`, only what is missing
    their icons   -> build/icons/<style>/<code>.webp   for flat, twemoji, noto, contrast and 3d
    flat icons    -> build/icons/brick                 as brick models, drawn by LeoCAD from LDraw parts
    two styles    -> samples/3d_icon, samples/lego     with captions

Pictures that exist are kept, so a run that was cut off goes on; to draw a style anew, delete its folder. Needs npm,
leocad, xvfb-run, the LDraw parts and resvg_py. It has no config: its output is a fixed set of files, and the same
packages give the same files again. The error for a missing tool names the command that brings it.
"""

import io
import json
import logging
import math
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from dora_mm.data.images.pixels import on_white
from dora_mm.eval.images.concepts import Concept
from dora_mm.eval.images.prompts import with_article
from samples.build import packages
from samples.build.icons.bricks import brick_grid, cut_sheet, ldraw_sheet
from samples.build.icons.sets import IconSet, codepoint_key, dump_concepts, read_concepts, render_svg
from samples.build.packages import PACKAGE_3D, ROOT, SAMPLES, SVG_PACKAGES, progress, write_changed

logger = logging.getLogger(__name__)

ICONS = ROOT / "build" / "icons"
TOOLS = ("npm", "leocad", "xvfb-run", "the LDraw parts", "resvg_py")

SIZE = 256  # pixels of every picture
# Longer side of a brick model. With one stud's margin a stud is 8 pixels of 128: one still sees it, and it is what the
# embedded VAE turns into one latent.
STUDS = 14
MODELS_PER_SHEET, SHEET_COLUMNS, SHEET_PIXELS = 16, 4, 1800  # LeoCAD takes 0.8 s to start and 0.1 s per model
ELEVATION = 65  # of the camera, in degrees: the outline stays the icon's, and the bricks have height
LEOCAD = [
    "--camera-angles",
    str(ELEVATION),
    "0",
    "--orthographic",
    "--shading",
    "full",
    "--line-width",
    "3",
    "--aa-samples",
    "8",
]

# Edges of bricks are hard for webp: at 90 a brick picture takes 22 kB, at 70 it takes 14 and looks the same.
WEBP_QUALITY = {"brick": 70}
DEFAULT_QUALITY = 90


SETS = {  # folder of samples/: style, role of its concepts, caption
    "3d_icon": ("3d", "icon3d", "a TOK icon of {thing}, in the style of TOK"),
    "lego": ("brick", "lego", "a lego set in the style of TOK, {thing}"),
}


def main() -> None:
    """Makes everything that is missing, in order. Raises ValueError with one sentence for a user's mistake."""
    concepts = read_concepts(SAMPLES / "concepts.jsonl")
    packages.check_tools(TOOLS)
    packages.fetch_missing()
    build_icons(concepts)


def missing_pictures(style: str, concepts: list[Concept]) -> list[Concept]:
    """The concepts whose picture in this style has not been drawn yet."""
    return [concept for concept in concepts if not (ICONS / style / f"{concept.code}.webp").exists()]


def build_icons(concepts: list[Concept]) -> None:
    """Icons and bricks on white, and the two folders of samples."""
    for style, package in SVG_PACKAGES.items():
        draw_svgs(style, packages.archive_of(package), concepts)
    copy_3d(packages.archive_of(PACKAGE_3D), concepts)
    build_bricks(packages.archive_of(SVG_PACKAGES["flat"]), concepts)
    write_changed(ICONS / "concepts.json", dump_concepts(concepts).encode())
    for name, (style, role, caption) in SETS.items():
        write_sample_set(SAMPLES / name, ICONS / style, [c for c in concepts if c.role == role], caption)
    logger.info("%d concepts in %s; samples in %s", len(concepts), ICONS, SAMPLES)


def draw_svgs(style: str, archive: Path, concepts: list[Concept]) -> None:
    """build/icons/<style>: the SVG icons of one set, drawn on white."""
    icon_set = packages.read_icon_set(archive, concepts)
    for concept in progress(missing_pictures(style, concepts), style):
        save_picture(on_white(render_svg(icon_set.svg(concept.code), SIZE)), style, concept)


def copy_3d(archive: Path, concepts: list[Concept]) -> None:
    """build/icons/3d: the rendered icons (webp with transparency), on white."""
    missing = missing_pictures("3d", concepts)
    if not missing:
        return
    by_code = {codepoint_key(Path(name).stem): file for name, file in packages.read_archive(archive, ".webp").items()}
    for concept in progress(missing, "3d"):
        save_picture(on_white(Image.open(io.BytesIO(by_code[concept.code]))), "3d", concept)


def build_bricks(archive: Path, concepts: list[Concept]) -> None:
    """build/icons/brick: sheets of brick models rendered by LeoCAD, cut into pictures.

    A sheet holds the same neighbours every time, even where only some of its pictures are missing, so that a picture
    does not depend on what was there before.
    """
    missing = missing_pictures("brick", concepts)
    if not missing:
        return
    icon_set = packages.read_icon_set(archive, concepts)
    sheets = [concepts[start : start + MODELS_PER_SHEET] for start in range(0, len(concepts), MODELS_PER_SHEET)]
    for sheet in progress([sheet for sheet in sheets if not set(missing).isdisjoint(sheet)], "brick"):
        for concept, picture in zip(sheet, draw_bricks(sheet, icon_set), strict=True):
            if concept in missing:
                save_picture(picture, "brick", concept)


def draw_bricks(sheet: list[Concept], icon_set: IconSet) -> list[Image.Image]:
    """Pictures of the brick models of at most MODELS_PER_SHEET concepts, by one call of LeoCAD."""
    grids = [brick_grid(render_svg(icon_set.svg(concept.code), 2 * SIZE), STUDS) for concept in sheet]
    with tempfile.TemporaryDirectory() as folder:
        model, picture = Path(folder) / "sheet.ldr", Path(folder) / "sheet.png"
        model.write_text(ldraw_sheet(grids, SHEET_COLUMNS, STUDS))
        size = ["-w", str(SHEET_PIXELS), "-h", str(SHEET_PIXELS)]
        command = ["xvfb-run", "-a", "leocad", str(model), "-i", str(picture), *size, *LEOCAD]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode or not picture.exists():
            raise ValueError(f"leocad drew nothing: {packages.last_line(result.stderr + result.stdout)}")
        sheet_picture = Image.open(picture).convert("RGBA")
    return cut_sheet(sheet_picture, grids, SHEET_COLUMNS, STUDS, SIZE, squeeze=math.sin(math.radians(ELEVATION)))


def write_sample_set(folder: Path, pictures: Path, concepts: list[Concept], caption: str) -> None:
    """A folder to train on: the pictures under readable names, and metadata.jsonl with their captions."""
    rows = []
    for concept in sorted(concepts, key=lambda concept: concept.name):
        file_name = concept.name.replace(" ", "_") + ".webp"
        write_changed(folder / file_name, (pictures / f"{concept.code}.webp").read_bytes())
        rows.append({"file_name": file_name, "text": caption.format(thing=with_article(concept.name))})
    write_changed(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    kept = {row["file_name"] for row in rows}
    for stale in [path for path in folder.glob("*.webp") if path.name not in kept]:
        stale.unlink()


def save_picture(picture: Image.Image, style: str, concept: Concept) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=WEBP_QUALITY.get(style, DEFAULT_QUALITY), method=6)
    write_changed(ICONS / style / f"{concept.code}.webp", buffer.getvalue())
