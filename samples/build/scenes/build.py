"""python -m samples.build scenes: scenes for the vision-language tasks; replaces existing ones.

    samples/things.jsonl               input: the objects in the scenes, chosen by hand: name, emoji, kind, colour
    build/vl                           the set to train on
    samples/vl                         a small set of the same kind, with a few clips

Needs npm, resvg_py, scikit-image and scipy. It has no config: its output is a fixed set of files, and the same packages
give the same files again.
"""

import io
import json
from pathlib import Path

from PIL import Image

from dora_mm.eval.images.concepts import Concept
from samples.build import packages
from samples.build.icons.sets import codepoint_key, read_concepts, render_svg
from samples.build.packages import PACKAGE_3D, ROOT, SAMPLES, SVG_PACKAGES, progress, write_changed
from samples.build.scenes.clips import write_clips
from samples.build.scenes.files import SEED, Sizes, write_sets
from samples.build.scenes.pictures import Artist, describe_thing, load_photos
from samples.build.scenes.things import Thing, dump_things

TOOLS = ("npm", "resvg_py")
SCENE_ICON = 144  # pixels; in a scene, objects have up to 104
SETS = {  # images and questions; for NLVR2, sets of 8 images with 16 labelled sentences
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
CLIPS = {"train": 8, "val": 4}  # split: number of clips


def main() -> None:
    """Makes all scenes.

    Raises:
        ValueError: A tool is missing, a package cannot be fetched or is damaged, or a concept is invalid.
    """
    build_scenes(prepare())


def prepare() -> list[Concept]:
    """Downloads the packages of icons that are missing, and reads the concepts.

    Raises:
        ValueError: As `main`.
    """
    concepts = read_concepts(SAMPLES / "concepts.jsonl")
    packages.check_tools(TOOLS)
    packages.fetch_missing()
    return concepts


def build_scenes(concepts: list[Concept]) -> None:
    """Makes build/vl and samples/vl: scenes of icons with questions, sentences and captions."""
    things, artist = load_artist(concepts)
    for folder, sizes in SETS.items():
        write_changed(folder / "things.jsonl", dump_things(things).encode())
        write_sets(folder, things, artist, sizes)
    write_clips(SAMPLES / "vl" / "video", things, artist, CLIPS, SEED)


def load_artist(concepts: list[Concept]) -> tuple[list[Thing], Artist]:
    """The objects of scenes, and what draws them."""
    rows = [json.loads(line) for line in (SAMPLES / "things.jsonl").read_text(encoding="utf-8").splitlines()]
    codes = {concept.name: concept.code for concept in concepts}
    rows = [{**row, "code": codes[row.pop("icon", row["name"])]} for row in rows]
    icons = read_scene_icons({row["name"]: row["code"] for row in rows}, concepts)
    return [describe_thing(row, icons) for row in progress(rows, "colours")], Artist(icons, load_photos())


def read_scene_icons(codes: dict[str, str], concepts: list[Concept]) -> dict[tuple[str, str], Image.Image]:
    """Reads the icons of all styles from the packages.

    Args:
        codes: Name of an object -> code point of its icon.
        concepts: The concepts that the packages must contain.

    Returns:
        (style, name) -> RGBA icon of SCENE_ICON x SCENE_ICON pixels.
    """
    icons = {}
    for style, package in progress(SVG_PACKAGES.items(), "icons"):
        icon_set = packages.read_icon_set(packages.archive_of(package), concepts)
        icons |= {(style, name): render_svg(icon_set.svg(code), SCENE_ICON) for name, code in codes.items()}
    by_code = {
        codepoint_key(Path(name).stem): file
        for name, file in packages.read_archive(packages.archive_of(PACKAGE_3D), ".webp").items()
    }
    for name, code in codes.items():
        icon = Image.open(io.BytesIO(by_code[code])).convert("RGBA")
        icons["3d", name] = icon.resize((SCENE_ICON, SCENE_ICON), Image.Resampling.LANCZOS)
    return icons
