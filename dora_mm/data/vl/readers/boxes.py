"""Boxes around things in images, as ms-swift has them: the `objects` of a row, and markers in its texts."""

import json
from collections.abc import Sequence
from typing import Any

from dora_mm.data.vl.example import BOX, REF
from dora_mm.data.vl.rows import RowError, count_of


def boxes_of(objects: Any) -> str:
    """The boxes of ms-swift's `objects`; see `Example.boxes`."""
    if not isinstance(objects, dict):
        raise RowError("has `objects` that are no object with `bbox` and `ref`")
    boxes, names, images = ([] if (found := objects.get(key)) is None else found for key in ("bbox", "ref", "image_id"))
    if not all(isinstance(found, list) for found in (boxes, names, images)):
        raise RowError("has `objects` whose bbox, ref or image_id is no list")
    if not all(isinstance(box, list) and len(box) in (2, 4) and set(map(type, box)) <= {int, float} for box in boxes):
        raise RowError("has a `bbox` that is neither two numbers (x, y) nor four (x1, y1, x2, y2)")
    if not all(isinstance(name, str) for name in names) or not all(type(number) is int for number in images):
        raise RowError("has a `ref` that is not a text, or an `image_id` that is not a number")
    kind = objects.get("bbox_type") or "real"
    if kind not in ("real", "norm1"):
        raise RowError("has a `bbox_type` that is neither real (pixels) nor norm1 (shares of width and height)")
    found = {"bbox": boxes, "ref": names, "norm1": kind == "norm1", "image": images + [0] * (len(boxes) - len(images))}
    return json.dumps(found, ensure_ascii=False)


def check_boxes(boxes: str, texts: Sequence[str]) -> None:
    """Checks that there are as many boxes as markers, and as many names, unless these have no markers."""
    given, text = json.loads(boxes), "".join(texts)
    for marker, key in ((BOX, "bbox"), (REF, "ref")):
        number, wanted = len(given[key]), text.count(marker)
        if number != wanted and not (key == "ref" and wanted == 0):
            raise RowError(
                f"has {count_of(number, f'`{key}`')} in its objects, but {count_of(wanted, f'{marker} marker')}"
            )
