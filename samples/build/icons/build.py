"""python -m samples.build icons: the pretraining icons, samples/3d_icon and samples/lego.

    samples/concepts.jsonl             the concepts, chosen by hand, and what each is used for
    npm packages  -> build/packages    fetched with `npm pack`, only those missing
    their icons   -> build/icons/<style>/<code>.webp   for flat, twemoji, noto, contrast and 3d
    flat icons    -> build/icons/brick                 as brick models, rendered by LeoCAD from LDraw parts
    two styles    -> samples/3d_icon, samples/lego     with captions
    flat icons    -> samples/lego_flat                 small, as references of samples/lego for models that edit

Existing images are kept, so an interrupted run resumes where it stopped; to draw a style again, delete its folder.
Needs npm, leocad, xvfb-run, the LDraw parts and resvg_py. It has no config: its output is a fixed set of files, and the
same packages give the same files again. The error for a missing tool names the command that installs it.
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

SIZE = 256  # side of every image in pixels
# Longer side of a brick model. With a margin of one stud, a stud is 8 pixels of 128: it remains visible, and it is the
# patch that the embedded VAE encodes as one latent.
STUDS = 14
MODELS_PER_SHEET, CONTACT_SHEET_COLUMNS, SHEET_PIXELS = 16, 4, 1800  # LeoCAD takes 0.8 s to start and 0.1 s per model
ELEVATION = 65  # of the camera, in degrees: the icon keeps its outline, and the bricks have height
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

# Edges of bricks are hard for WebP: at 90 an image of bricks takes 22 kB, at 70 it takes 14 and looks the same.
WEBP_QUALITY = {"brick": 70}
DEFAULT_QUALITY = 90

SETS = {  # folder of samples/: style, role of its concepts, caption
    "3d_icon": ("3d", "icon3d", "a TOK icon of {thing}, in the style of TOK"),
    "lego": ("brick", "lego", "a lego set in the style of TOK, {thing}"),
}


REFERENCES, REFERENCE_SIZE, REFERENCE_QUALITY = "lego_flat", 128, 75  # the images of samples/lego before the edit


def main() -> None:
    """Makes everything that is missing, in order.

    Raises:
        ValueError: A tool is missing, a package cannot be fetched or is damaged, or a concept is invalid.
    """
    concepts = read_concepts(SAMPLES / "concepts.jsonl")
    packages.check_tools(TOOLS)
    packages.fetch_missing()
    build_icons(concepts)


def missing_images(style: str, concepts: list[Concept]) -> list[Concept]:
    """The concepts without an image in this style."""
    return [concept for concept in concepts if not (ICONS / style / f"{concept.code}.webp").exists()]


def build_icons(concepts: list[Concept]) -> None:
    """Makes the icons and bricks on white, and the two image folders in samples/."""
    for style, package in SVG_PACKAGES.items():
        draw_svgs(style, packages.archive_of(package), concepts)
    copy_3d(packages.archive_of(PACKAGE_3D), concepts)
    build_bricks(packages.archive_of(SVG_PACKAGES["flat"]), concepts)
    write_changed(ICONS / "concepts.json", dump_concepts(concepts).encode())
    for name, (style, role, caption) in SETS.items():
        write_sample_set(SAMPLES / name, ICONS / style, [c for c in concepts if c.role == role], caption)
    write_references(SAMPLES / REFERENCES, ICONS / "flat", [c for c in concepts if c.role == "lego"])
    logger.info("%d concepts in %s; samples in %s", len(concepts), ICONS, SAMPLES)


def draw_svgs(style: str, archive: Path, concepts: list[Concept]) -> None:
    """Makes build/icons/<style>: the SVG icons of one set, rendered on white."""
    icon_set = packages.read_icon_set(archive, concepts)
    for concept in progress(missing_images(style, concepts), style):
        save_image(on_white(render_svg(icon_set.svg(concept.code), SIZE)), style, concept)


def copy_3d(archive: Path, concepts: list[Concept]) -> None:
    """Makes build/icons/3d: the rendered icons (WebP with transparency), on white."""
    missing = missing_images("3d", concepts)
    if not missing:
        return
    by_code = {codepoint_key(Path(name).stem): file for name, file in packages.read_archive(archive, ".webp").items()}
    for concept in progress(missing, "3d"):
        save_image(on_white(Image.open(io.BytesIO(by_code[concept.code]))), "3d", concept)


def build_bricks(archive: Path, concepts: list[Concept]) -> None:
    """Makes build/icons/brick: sheets of brick models rendered by LeoCAD, cut into images.

    A sheet always has the same models, even if only some of its images are missing, so that an image does not depend on
    which files existed before.
    """
    missing = missing_images("brick", concepts)
    if not missing:
        return
    icon_set = packages.read_icon_set(archive, concepts)
    sheets = [concepts[start : start + MODELS_PER_SHEET] for start in range(0, len(concepts), MODELS_PER_SHEET)]
    for sheet in progress([sheet for sheet in sheets if not set(missing).isdisjoint(sheet)], "brick"):
        for concept, image in zip(sheet, draw_bricks(sheet, icon_set), strict=True):
            if concept in missing:
                save_image(image, "brick", concept)


def draw_bricks(sheet: list[Concept], icon_set: IconSet) -> list[Image.Image]:
    """Renders the brick models of at most MODELS_PER_SHEET concepts with one call of LeoCAD.

    Raises:
        ValueError: LeoCAD fails.
    """
    grids = [brick_grid(render_svg(icon_set.svg(concept.code), 2 * SIZE), STUDS) for concept in sheet]
    with tempfile.TemporaryDirectory() as folder:
        model, image = Path(folder) / "sheet.ldr", Path(folder) / "sheet.png"
        model.write_text(ldraw_sheet(grids, CONTACT_SHEET_COLUMNS, STUDS))
        size = ["-w", str(SHEET_PIXELS), "-h", str(SHEET_PIXELS)]
        command = ["xvfb-run", "-a", "leocad", str(model), "-i", str(image), *size, *LEOCAD]
        result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if result.returncode or not image.exists():
            raise ValueError(f"leocad rendered nothing: {packages.last_line(result.stderr + result.stdout)}")
        sheet_image = Image.open(image).convert("RGBA")
    return cut_sheet(sheet_image, grids, CONTACT_SHEET_COLUMNS, STUDS, SIZE, squeeze=math.sin(math.radians(ELEVATION)))


def write_sample_set(folder: Path, images: Path, concepts: list[Concept], caption: str) -> None:
    """Writes an image folder to train on, and deletes images in it that are not part of the set.

    Args:
        folder: Receives the images under readable names, and metadata.jsonl with their captions.
        images: The folder with the icons of one style.
        concepts: Which of them.
        caption: The caption of every image, with {thing} for the concept's name and its article.
    """
    rows = []
    for concept in sorted(concepts, key=lambda concept: concept.name):
        file_name = file_name_of(concept)
        write_changed(folder / file_name, (images / f"{concept.code}.webp").read_bytes())
        rows.append({"file_name": file_name, "text": caption.format(thing=with_article(concept.name))})
    write_changed(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    remove_others(folder, {row["file_name"] for row in rows})


def write_references(folder: Path, images: Path, concepts: list[Concept]) -> None:
    """Writes small references, named as the images of `write_sample_set` are, and deletes other images.

    Args:
        folder: Receives the images.
        images: The folder with the icons of one style.
        concepts: Which of them.
    """
    for concept in concepts:
        image = Image.open(images / f"{concept.code}.webp").convert("RGB")
        image = image.resize((REFERENCE_SIZE, REFERENCE_SIZE), Image.Resampling.LANCZOS)
        write_changed(folder / file_name_of(concept), webp(image, REFERENCE_QUALITY))
    remove_others(folder, {file_name_of(concept) for concept in concepts})


def file_name_of(concept: Concept) -> str:
    """The name of a file in samples/, which people can read."""
    return concept.name.replace(" ", "_") + ".webp"


def remove_others(folder: Path, kept: set[str]) -> None:
    """Deletes the images in a folder that are not among those of these names."""
    for stale in [path for path in folder.glob("*.webp") if path.name not in kept]:
        stale.unlink()


def webp(image: Image.Image, quality: int) -> bytes:
    """The content of a WebP file."""
    buffer = io.BytesIO()
    image.save(buffer, "webp", quality=quality, method=6)
    return buffer.getvalue()


def save_image(image: Image.Image, style: str, concept: Concept) -> None:
    content = webp(image, WEBP_QUALITY.get(style, DEFAULT_QUALITY))
    write_changed(ICONS / style / f"{concept.code}.webp", content)
