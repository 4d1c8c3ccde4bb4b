"""python -m pipelines.build_samples [vl]: make the sample data.

Without an argument, the pretraining icons, samples/3d_icon and samples/lego:

    samples/concepts.jsonl             which things, chosen by hand, and what each serves for
    npm packages  -> build/packages    fetched with `npm pack`, only what is missing
    their icons   -> build/icons/<style>/<code>.webp   for flat, twemoji, noto, contrast and 3d
    flat icons    -> build/icons/brick                 as brick models, drawn by LeoCAD from LDraw parts
    two styles    -> samples/3d_icon, samples/lego     with captions

Pictures that exist are kept, so a run that was cut off goes on; to draw a style anew, delete its folder. Needs npm,
leocad, xvfb-run, the LDraw parts and resvg_py.

With vl, scenes for the vision-language tasks (npm, resvg_py, scikit-image and scipy), all of them anew:

    samples/things.jsonl               the things in them, chosen by hand: name, emoji, kind, colour
    build/vl                           the set to train on
    samples/vl                         a small one of the same kind, with a few clips

It has no config: its output is a fixed set of files, and the same packages give the same files again. The error for a
missing tool names the command that brings it.
"""

import importlib.util
import io
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TypeVar

from PIL import Image
from tqdm import tqdm

from dora_mm.data.bricks import brick_grid, cut_sheet, ldraw_sheet
from dora_mm.data.icons import Concept, IconSet, codepoint_key, dump_concepts, on_white, read_concepts, render_svg
from dora_mm.data.pretraining import with_article
from dora_mm.data.scene_clips import write_clips
from dora_mm.data.scene_files import SEED, Sizes, write_sets
from dora_mm.data.scene_pictures import Artist, describe_thing, load_photos
from dora_mm.data.things import dump_things

T = TypeVar("T")
logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "samples"
PACKAGES = ROOT / "build" / "packages"
ICONS = ROOT / "build" / "icons"

SVG_PACKAGES = {  # style: npm package. OpenMoji is share-alike and stays out.
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "noto": "@iconify-json/noto@1.2.9",
    "contrast": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
}
PACKAGE_3D = "@lobehub/fluent-emoji-3d@1.1.0"

TOOLS = {  # what is looked for: what brings it
    "npm": "apt install npm",
    "leocad": "apt install leocad libgl1-mesa-dri",
    "xvfb-run": "apt install xvfb xauth",
    "the LDraw parts": "apt install ldraw-parts-free",
    "resvg_py": "pip install 'dora_mm[samples]'",
}
VL_TOOLS = ("npm", "resvg_py")

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

SCENE_ICON = 144  # pixels; things in scenes have up to 104
VL_SETS = {  # pictures and questions; of NLVR2 sets of 8 pictures with 16 labelled sentences
    ROOT / "build" / "vl": Sizes(
        vqa={"train": (3000, 12500), "val": (600, 3000)},
        gqa={"train": (1000, 8000), "val": (250, 2000), "testdev": (250, 2000)},
        nlvr2={"train": 250, "dev": 63, "test1": 63},
        pretrain=9000,
    ),
    SAMPLES / "vl": Sizes(
        vqa={"train": (500, 3600), "val": (120, 720)},
        gqa={"train": (40, 300), "val": (12, 100), "testdev": (12, 100)},
        nlvr2={"train": 6, "dev": 2, "test1": 2},
    ),
}
CLIPS = {"train": 8, "val": 4}

SETS = {  # folder of samples/: style, role of its concepts, caption
    "3d_icon": ("3d", "icon3d", "a TOK icon of {thing}, in the style of TOK"),
    "lego": ("brick", "lego", "a lego set in the style of TOK, {thing}"),
}


def main(part: str | None = None) -> None:
    """Everything that is missing, in order. Raises ValueError with one sentence for a person's mistake."""
    if part not in (None, "vl"):
        raise ValueError(f"there is no part {part!r}: say `vl`, or nothing")
    concepts = read_concepts(SAMPLES / "concepts.jsonl")
    check_tools(VL_TOOLS if part == "vl" else TOOLS)
    packages = [*SVG_PACKAGES.values(), PACKAGE_3D]
    for package in progress([package for package in packages if not archive_of(package).exists()], "packages"):
        fetch(package)
    if part == "vl":
        build_vl(concepts)
    else:
        build_icons(concepts)


def build_icons(concepts: list[Concept]) -> None:
    """Icons and bricks on white, and the two folders of samples."""
    for style, package in SVG_PACKAGES.items():
        draw_svgs(style, archive_of(package), concepts)
    copy_3d(archive_of(PACKAGE_3D), concepts)
    build_bricks(archive_of(SVG_PACKAGES["flat"]), concepts)
    write_atomically(ICONS / "concepts.json", dump_concepts(concepts).encode())
    for name, (style, role, caption) in SETS.items():
        write_sample_set(SAMPLES / name, ICONS / style, [c for c in concepts if c.role == role], caption)
    logger.info("%d concepts in %s; samples in %s", len(concepts), ICONS, SAMPLES)


def check_tools(tools: Collection[str]) -> None:
    """Every one of these keys of TOOLS is there, or ValueError says which command brings the missing ones."""
    missing = {tool: TOOLS[tool] for tool in tools if not has_tool(tool)}
    if missing:
        raise ValueError("building the samples needs " + "; ".join(f"{tool} ({how})" for tool, how in missing.items()))


def has_tool(tool: str) -> bool:
    if tool == "the LDraw parts":
        return Path("/usr/share/ldraw/parts/3005.dat").exists() or "LEOCAD_LIB" in os.environ
    return shutil.which(tool) is not None or importlib.util.find_spec(tool) is not None


def archive_of(package: str) -> Path:
    """Where an npm package's archive lies, under the name that npm gives it."""
    name, version = package.rsplit("@", 1)
    return PACKAGES / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"


def fetch(package: str) -> None:
    PACKAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PACKAGES) as folder:
        command = ["npm", "pack", "--silent", "--pack-destination", folder, package]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise ValueError(f"npm pack {package} failed, is there a network? npm says: {last_line(result.stderr)}")
        (Path(folder) / archive_of(package).name).rename(archive_of(package))


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "it said nothing"


def draw_svgs(style: str, archive: Path, concepts: list[Concept]) -> None:
    """build/icons/<style>: the SVG icons of one set, drawn on white."""
    icon_set = read_icon_set(archive, concepts)
    for concept in progress(missing_pictures(style, concepts), style):
        save_picture(on_white(render_svg(icon_set.svg(concept.code), SIZE)), style, concept)


def read_icon_set(archive: Path, concepts: list[Concept]) -> IconSet:
    files = read_archive(archive, ".json")
    icon_set = IconSet(*(json.loads(files[f"package/{name}.json"]) for name in ("icons", "chars")))
    absent = [concept.name for concept in concepts if concept.code not in icon_set]
    if absent:
        raise ValueError(f"{archive} lacks {', '.join(absent)}: take them out of samples/concepts.jsonl")
    return icon_set


def copy_3d(archive: Path, concepts: list[Concept]) -> None:
    """build/icons/3d: the rendered icons (webp with transparency), on white."""
    missing = missing_pictures("3d", concepts)
    if not missing:
        return
    by_code = {codepoint_key(Path(name).stem): file for name, file in read_archive(archive, ".webp").items()}
    for concept in progress(missing, "3d"):
        save_picture(on_white(Image.open(io.BytesIO(by_code[concept.code]))), "3d", concept)


def read_archive(archive: Path, suffix: str) -> dict[str, bytes]:
    """Name and content of the files of a package that end in `suffix`; nothing is unpacked to disk."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            entries = [entry for entry in tar if entry.isfile() and entry.name.endswith(suffix)]
            return {entry.name: tar.extractfile(entry).read() for entry in entries}  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive} is damaged ({error}): delete it and run again") from error


def build_bricks(archive: Path, concepts: list[Concept]) -> None:
    """build/icons/brick: sheets of brick models rendered by LeoCAD, cut into pictures.

    A sheet holds the same neighbours every time, even where only some of its pictures are missing, so that a picture
    does not depend on what was there before.
    """
    missing = missing_pictures("brick", concepts)
    if not missing:
        return
    icon_set = read_icon_set(archive, concepts)
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
            raise ValueError(f"leocad drew nothing: {last_line(result.stderr + result.stdout)}")
        sheet_picture = Image.open(picture).convert("RGBA")
    return cut_sheet(sheet_picture, grids, SHEET_COLUMNS, STUDS, SIZE, squeeze=math.sin(math.radians(ELEVATION)))


def build_vl(concepts: list[Concept]) -> None:
    """build/vl and samples/vl: scenes of icons with questions, sentences and captions."""
    rows = [json.loads(line) for line in (SAMPLES / "things.jsonl").read_text().splitlines()]
    codes = {concept.name: concept.code for concept in concepts}
    rows = [{**row, "code": codes[row.pop("icon", row["name"])]} for row in rows]
    icons = read_scene_icons({row["name"]: row["code"] for row in rows}, concepts)
    things = [describe_thing(row, icons) for row in progress(rows, "colours")]
    artist = Artist(icons, load_photos())
    for folder, sizes in VL_SETS.items():
        write_atomically(folder / "things.jsonl", dump_things(things).encode())
        write_sets(folder, things, artist, sizes)
    write_clips(SAMPLES / "vl" / "video", things, artist, CLIPS, SEED)


def read_scene_icons(codes: dict[str, str], concepts: list[Concept]) -> dict[tuple[str, str], Image.Image]:
    """(style, name) -> RGBA icon, with its transparency."""
    icons = {}
    for style, package in progress(SVG_PACKAGES.items(), "icons"):
        icon_set = read_icon_set(archive_of(package), concepts)
        icons |= {(style, name): render_svg(icon_set.svg(code), SCENE_ICON) for name, code in codes.items()}
    by_code = {
        codepoint_key(Path(name).stem): file for name, file in read_archive(archive_of(PACKAGE_3D), ".webp").items()
    }
    for name, code in codes.items():
        icon = Image.open(io.BytesIO(by_code[code])).convert("RGBA")
        icons["3d", name] = icon.resize((SCENE_ICON, SCENE_ICON), Image.Resampling.LANCZOS)
    return icons


def write_sample_set(folder: Path, pictures: Path, concepts: list[Concept], caption: str) -> None:
    """A folder to train on: the pictures under readable names, and metadata.jsonl with their captions."""
    rows = []
    for concept in sorted(concepts, key=lambda concept: concept.name):
        file_name = concept.name.replace(" ", "_") + ".webp"
        write_atomically(folder / file_name, (pictures / f"{concept.code}.webp").read_bytes())
        rows.append({"file_name": file_name, "text": caption.format(thing=with_article(concept.name))})
    write_atomically(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    kept = {row["file_name"] for row in rows}
    for stale in [path for path in folder.glob("*.webp") if path.name not in kept]:
        stale.unlink()


def missing_pictures(style: str, concepts: list[Concept]) -> list[Concept]:
    return [concept for concept in concepts if not (ICONS / style / f"{concept.code}.webp").exists()]


def save_picture(picture: Image.Image, style: str, concept: Concept) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=WEBP_QUALITY.get(style, DEFAULT_QUALITY), method=6)
    write_atomically(ICONS / style / f"{concept.code}.webp", buffer.getvalue())


def write_atomically(path: Path, content: bytes) -> None:
    """A file appears whole or not at all; one that holds `content` already is left alone."""
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)


def progress(items: Collection[T], what: str) -> Iterator[T]:
    """The items, behind a bar on a terminal and behind a plain line elsewhere; nothing where there is nothing to do."""
    if not items:
        return
    if not sys.stderr.isatty():
        logger.info("%s: %d to do", what, len(items))
    yield from tqdm(items, desc=what, disable=None)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(*sys.argv[1:2])
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # a picture that Pillow cannot read is our bug; a full disk is not
        print(f"build_samples: {error}", file=sys.stderr)
        sys.exit(2)
