"""Runs with images for pages that show them, and the data that a browser finds in a page."""

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from dora_mm.sampling.manifest import MANIFEST, ManifestEntry

HOSTILE = [
    "</script><script>document.title = 'broken'</script>",
    "<!-- <script>",
    "<img src=x onerror=\"document.title = 'broken'\">",
    "javascript:document.title='broken'",
    "\u2028\u2029 \ud83d a half \udc00",
    "'\"`${document.title = 'broken'}",
    "$data $policy {{style}}",
    "é Ω Ж 漢字 \u202e reversed",
]


def entry(row=1, file="1.png", status="done", reason=None, scores=(), **settings) -> ManifestEntry:
    settings = {"prompt": "a bus", "seed": 0, "model": "tiny", "adapter": None, "strength": None, **settings}
    return ManifestEntry(row, file, status, 1, settings, reason=reason, scores=dict(scores))


def make_run(folder: Path, entries: list[ManifestEntry], size: tuple[int, int] = (48, 32)) -> Path:
    """A run with an image for every entry that is done, in a colour of its own."""
    for number, made in enumerate(entries):
        if made.status == "done":
            (folder / made.file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (40 * number % 256, 90, 160)).save(folder / made.file)
    lines = [json.dumps(dataclasses.asdict(made)) + "\n" for made in entries]  # halves of surrogate pairs, too
    (folder / MANIFEST).write_text("".join(lines), encoding="utf-8")
    return folder


def data_of(page: Path) -> dict:
    """The data of a page, read as a browser does: up to the end of the element."""
    found: list[str] = []

    class Reader(HTMLParser):
        inside = False

        def handle_starttag(self, tag, attrs):
            self.inside = dict(attrs).get("id") == "data"

        def handle_data(self, data):
            if self.inside:
                found.append(data)
                self.inside = False

    Reader().feed(page.read_text(encoding="utf-8"))
    return json.loads(found[0])
