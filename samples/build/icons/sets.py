"""Icon sets by code point: the list of concepts, and their SVG drawings.

Every set names a concept by the hex code points of its emoji, joined by "-". Some keep the variation selector fe0f,
others drop it; it is dropped here on both sides.
"""

import io
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from dora_mm.eval.images.concepts import Concept


def read_concepts(path: Path) -> list[Concept]:
    """The concepts of a JSONL file, in its order.

    Raises:
        ValueError: A line is not a valid concept, or a code or name is repeated; the message names file and line.
    """
    concepts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            concepts.append(Concept(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a valid concept ({error})") from error
    for field in ("code", "name"):
        repeated = [value for value, count in Counter(getattr(c, field) for c in concepts).items() if count > 1]
        if repeated:
            raise ValueError(f"{path}: the {field} {repeated[0]!r} is repeated but must be unique")
    return concepts


def dump_concepts(concepts: list[Concept]) -> str:
    """The concepts as a JSON list, one per line; without the key `role` where a concept has none."""
    rows = [{key: value for key, value in asdict(c).items() if value is not None} for c in concepts]
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def codepoint_key(code: str) -> str:
    """Drops the variation selector, as in "2764-fe0f" -> "2764", so that the names of all sets agree."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


class IconSet:
    """The drawings of one @iconify-json package.

    Args:
        icons: Its parsed icons.json.
        chars: Its parsed chars.json: code points -> name of the drawing.
    """

    def __init__(self, icons: dict[str, Any], chars: dict[str, str]) -> None:
        self._icons = icons
        self._names = {codepoint_key(code): name for code, name in chars.items()}

    def __contains__(self, code: str) -> bool:
        return code in self._names

    def svg(self, code: str) -> str:
        """The drawing as an SVG document, in which `currentColor`, the ink of one-coloured sets, is black.

        Args:
            code: A `codepoint_key` that is in the set.
        """
        name = self._names[code]
        name = self._icons.get("aliases", {}).get(name, {}).get("parent", name)
        icon = self._icons["icons"][name]
        width, height = (icon.get(side, self._icons.get(side, 16)) for side in ("width", "height"))
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
            f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )


def render_svg(svg: str, size: int) -> Image.Image:
    """Renders an RGBA image of `size` x `size` pixels with resvg_py, without fonts: the same on every machine."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")
