"""A Chromium that serves the tests of all pages, and the gallery of two runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from dora_mm.sampling.gallery import write_gallery
from dora_mm.sampling.manifest import read_manifest, write_manifest
from tests.shared import browser
from tests.shared.pages import entry

BARE, ADAPTED = (40, 90, 200), (220, 120, 30)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    with browser.opened(tmp_path_factory.mktemp("profile")) as page:
        yield page


def save(path: Path, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), colour).save(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs, each of a bus, a cat and a key without and with an adapter of its own; a fourth thing failed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, factor in (("one", 1.0), ("two", -1.0)):
        entries = []
        for number, thing in enumerate(("a bus", "a cat", "a key"), 1):
            bare, file = f"bare/{number}.png", f"adapter/{number}.png"
            settings = {"prompt": thing, "seed": number}
            scores = {"log-odds": factor * number, "right": number % 2}
            save(folder / name / bare, BARE)
            save(folder / name / file, ADAPTED)
            entries.append(entry(number, bare, scores={"log-odds": -5.0, "right": 1}, **settings))
            adapter = f"runs/{name}/001/adapter"
            entries.append(entry(number, file, adapter=adapter, strength=1.0, scores=scores, **settings))
        entries.append(entry(4, "4.png", "failed", "the image is black", prompt="a hat"))
        write_manifest(folder / name, entries)
    return [folder / "one", folder / "two"]


@pytest.fixture
def one(chromium, runs, tmp_path) -> browser.Page:
    """The gallery of the first run, opened, all images in a grid."""
    chromium.problems.clear()
    chromium.open(write_gallery({runs[0]: read_manifest(runs[0])}, tmp_path / "gallery"))
    chromium.click("#view-grid")
    return chromium
