"""The page of a gallery: one HTML file with its style, its script and its data, which loads nothing but images."""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

GENERATOR = '<meta name="generator" content="dora-mm gallery">'  # by this a page of ours is known
HERE = Path(__file__).parent
STYLES = ("gallery.css", "viewer.css", "training.css")
SCRIPTS = ("gallery.js", "favourites.js", "viewer.js", "training.js", "controls.js")  # the last one starts the page


def page(data: Mapping[str, Any]) -> str:
    """Returns the HTML of the page.

    Nothing in the data can run: it is JSON without the character `<` in an element that is not a script to browsers,
    the page's own script only ever sets texts, and the policy admits that one script by its digest and no other.

    Args:
        data: What `gallery_data` returns, and trainings.
    """
    style, script = ("".join(map(_text, names)) for names in (STYLES, SCRIPTS))
    # ASCII, so that halves of surrogate pairs are no problem, and nothing that an HTML parser takes for a tag
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")
    template = Template(_text("index.html"))
    return template.substitute(
        generator=GENERATOR, policy=_policy(style, script), style=style, script=script, data=text
    )


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Images from the gallery's folder, on a disk or a server, and this style and script; nothing else."""
    return (
        f"default-src 'none'; img-src 'self' file:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
