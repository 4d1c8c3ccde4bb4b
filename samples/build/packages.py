"""The npm packages of icons that the samples are made from, and helpers of both builders: tools, files, progress."""

import importlib.util
import json
import logging
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

from tqdm import tqdm

from dora_mm.eval.images.concepts import Concept
from dora_mm.utils.atomic import write_atomically
from samples.build.icons.sets import IconSet

T = TypeVar("T")
logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "samples"
PACKAGES = ROOT / "build" / "packages"
SVG_PACKAGES = {  # style: npm package. OpenMoji is share-alike and stays out.
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "noto": "@iconify-json/noto@1.2.9",
    "contrast": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
}
PACKAGE_3D = "@lobehub/fluent-emoji-3d@1.1.0"
WORDNET = Path("/usr/share/wordnet")  # of Debian's wordnet-base
TOOLS = {  # tool: the command that installs it
    "npm": "apt install npm",
    "leocad": "apt install leocad libgl1-mesa-dri",
    "xvfb-run": "apt install xvfb xauth",
    "the LDraw parts": "apt install ldraw-parts-free",
    "WordNet": "apt install wordnet-base",
    "resvg_py": "pip install 'dora_mm[samples]'",
}


def check_tools(tools: Collection[str]) -> None:
    """Checks that tools are installed.

    Args:
        tools: Keys of TOOLS.

    Raises:
        ValueError: Some are missing; the message names the command that installs each.
    """
    missing = {tool: TOOLS[tool] for tool in tools if not has_tool(tool)}
    if missing:
        raise ValueError("building the samples needs " + "; ".join(f"{tool} ({how})" for tool, how in missing.items()))


def has_tool(tool: str) -> bool:
    if tool == "the LDraw parts":
        return Path("/usr/share/ldraw/parts/3005.dat").exists() or "LEOCAD_LIB" in os.environ
    if tool == "WordNet":
        return WORDNET.is_dir()
    return shutil.which(tool) is not None or importlib.util.find_spec(tool) is not None


def archive_of(package: str) -> Path:
    """The path of an npm package's archive, with the file name that npm gives it."""
    name, version = package.rsplit("@", 1)
    return PACKAGES / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"


def fetch(package: str) -> None:
    """Downloads a package into PACKAGES; an interruption leaves no partial archive there.

    Args:
        package: Name and version, such as "@iconify-json/noto@1.2.9".

    Raises:
        ValueError: npm fails, for example without a network.
    """
    PACKAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PACKAGES) as folder:
        command = ["npm", "pack", "--silent", "--pack-destination", folder, package]
        result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if result.returncode:
            raise ValueError(f"npm pack {package} failed (is there a network?): {last_line(result.stderr)}")
        (Path(folder) / archive_of(package).name).rename(archive_of(package))


def last_line(output: str) -> str:
    """The last line of a command's output, for messages."""
    return output.strip().splitlines()[-1] if output.strip() else "no output"


def read_icon_set(archive: Path, concepts: list[Concept]) -> IconSet:
    """The icons of an @iconify-json package.

    Args:
        archive: The package.
        concepts: The concepts that it must contain.

    Raises:
        ValueError: The archive is damaged, or lacks a concept.
    """
    files = read_archive(archive, ".json")
    icon_set = IconSet(*(json.loads(files[f"package/{name}.json"]) for name in ("icons", "chars")))
    absent = [concept.name for concept in concepts if concept.code not in icon_set]
    if absent:
        raise ValueError(f"{archive} lacks {', '.join(absent)}: remove them from samples/concepts.jsonl")
    return icon_set


def read_archive(archive: Path, suffix: str) -> dict[str, bytes]:
    """The files of a package whose names end in `suffix`: name -> content. Nothing is unpacked to disk.

    Raises:
        ValueError: The archive is damaged.
    """
    try:
        with tarfile.open(archive, "r:gz") as tar:
            entries = [entry for entry in tar if entry.isfile() and entry.name.endswith(suffix)]
            return {entry.name: tar.extractfile(entry).read() for entry in entries}  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive} is damaged ({error}): delete it and run again") from error


def write_changed(path: Path, content: bytes) -> None:
    """Writes a file atomically; a file that has this content already is not touched."""
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, lambda partial: partial.write_bytes(content))


def fetch_missing() -> None:
    """Downloads the packages that are not in PACKAGES yet.

    Raises:
        ValueError: npm fails.
    """
    missing = [package for package in (*SVG_PACKAGES.values(), PACKAGE_3D) if not archive_of(package).exists()]
    for package in progress(missing, "packages"):
        fetch(package)


def progress(items: Collection[T], label: str) -> Iterator[T]:
    """Yields the items, with a progress bar on a terminal and one log line elsewhere; silent without items."""
    if not items:
        return
    if not sys.stderr.isatty():
        logger.info("%s: %d to do", label, len(items))
    yield from tqdm(items, desc=label, disable=None)
