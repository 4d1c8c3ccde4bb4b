"""Icon sets by code point: which things there are, their SVG drawings, and pictures of them on white.

Every set names a thing by the hex code points of its emoji, joined by "-". Some keep the variation selector fe0f,
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
    """The concepts of a JSONL file, in its order. Raises ValueError with file and line for a bad or repeated one."""
    concepts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            concepts.append(Concept(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a concept ({error})") from error
    for field in ("code", "name"):
        repeated = [value for value, count in Counter(getattr(c, field) for c in concepts).items() if count > 1]
        if repeated:
            raise ValueError(f"{path}: the {field} {repeated[0]!r} stands there twice, and must be unique")
    return concepts


def dump_concepts(concepts: list[Concept]) -> str:
    """The same as one JSON list, one concept a line; concepts without a role leave the key out."""
    rows = [{key: value for key, value in asdict(c).items() if value is not None} for c in concepts]
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def codepoint_key(code: str) -> str:
    """ "2764-fe0f" -> "2764": the name under which all sets agree."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


class IconSet:
    """The drawings of one @iconify-json package, from its parsed icons.json and chars.json."""

    def __init__(self, icons: dict[str, Any], chars: dict[str, str]) -> None:
        self._icons = icons
        self._names = {codepoint_key(code): name for code, name in chars.items()}

    def __contains__(self, code: str) -> bool:
        return code in self._names

    def svg(self, code: str) -> str:
        """A whole SVG document; `currentColor`, the ink of one-coloured sets, is black."""
        name = self._names[code]
        name = self._icons.get("aliases", {}).get(name, {}).get("parent", name)
        icon = self._icons["icons"][name]
        width, height = (icon.get(side, self._icons.get(side, 16)) for side in ("width", "height"))
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
            f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )


def render_svg(svg: str, size: int) -> Image.Image:
    """RGBA picture of `size` x `size` pixels. Needs resvg_py; fonts are left out, so that every machine draws alike."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")
