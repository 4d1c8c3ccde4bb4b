"""RefCOCO: whether the box that a model writes overlaps the right one by half, whatever notation its class has.

Intersection over union of at least 0.5, as Qwen-VL's eval_mm/evaluate_grounding.py and lmms-eval count it. The
notations are those of the classes' own processors in transformers, and of their published prompts.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple, TypeVar

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl.scores import mean_scorer

AnswerT = TypeVar("AnswerT")
Box = tuple[float, float, float, float]  # x1, y1, x2, y2 as shares of width and height
WidthHeight = tuple[float, float]  # width and height in pixels
ENOUGH = 0.5
NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
FOUR = ",".join([NUMBER] * 4)
PALIGEMMA = re.compile(r"<loc(\d{4})>" * 4)  # y1, x1, y2, x2 of 1,024
FLORENCE = re.compile(r"<loc_(\d+)>" * 4)  # of 1,000 bins, which stand for their centers
KOSMOS = re.compile(r"<patch_index_(\d{4})>\s*<patch_index_(\d{4})>")  # first and last of 32 x 32 patches
GEMMA = re.compile(rf'"box_2d"\s*:\s*\[{FOUR}\]')  # y1, x1, y2, x2 of 1,000
POINTS = re.compile(rf"\({NUMBER},{NUMBER}\)\s*,\s*\({NUMBER},{NUMBER}\)")  # of Qwen-VL and others
NESTED = re.compile(rf"\[\[{FOUR}\]")  # of InternVL
BRACKETED = re.compile(rf"\[{FOUR}\]")
PATCHES = 32  # of Kosmos-2, on each side
THOUSAND = (1000.0, 1000.0)
QWEN = re.compile(r"\((.*?)\),\((.*?)\)")


class BoxScale(NamedTuple):
    """The coordinate system of the numbers of a box.

    Attributes:
        size: The width and height of the image in pixels.
        grid: The width and height in the units of the model's class, such as the pixels of the image as it resizes it,
            or 1,000; None: not known.
    """

    size: WidthHeight
    grid: WidthHeight | None = None


def box_of(answer: str, scale: BoxScale) -> Box | None:
    """Returns the first box in an answer, by its notation; None if it has none.

    Numbers that are at most 1 are shares. Others are of what the class counts in; where that is not known, points and
    nested lists are of 1,000, and four numbers in brackets are pixels of the image.
    """
    for pattern, read in ((PALIGEMMA, _paligemma), (FLORENCE, _florence), (KOSMOS, _kosmos), (GEMMA, _gemma)):
        if found := pattern.search(answer):
            return read(*map(float, found.groups()))
    for pattern, usual in ((POINTS, THOUSAND), (NESTED, THOUSAND), (BRACKETED, scale.size)):
        if found := pattern.search(answer):
            numbers = [float(text) for text in found.groups()]
            return _scaled(numbers, (1, 1) if max(numbers) <= 1 else scale.grid or usual)
    return None


def _paligemma(y1: float, x1: float, y2: float, x2: float) -> Box:
    return _scaled((x1, y1, x2, y2), (1024, 1024))


def _gemma(y1: float, x1: float, y2: float, x2: float) -> Box:
    return _scaled((x1, y1, x2, y2), THOUSAND)


def _florence(*bins: float) -> Box:
    return _scaled([number + 0.5 for number in bins], THOUSAND)


def _kosmos(first: float, last: float) -> Box:
    """A box from the centers of two patches, or from their outer edges where they are in one row or column."""
    (y1, x1), (y2, x2) = divmod(first, PATCHES), divmod(last, PATCHES)
    inset = 0.0 if x1 == x2 or y1 == y2 else 0.5
    return _scaled((x1 + inset, y1 + inset, x2 + 1 - inset, y2 + 1 - inset), (PATCHES, PATCHES))


def qwen_box(answer: str, scale: BoxScale) -> Box | None:
    """Returns the first box as Qwen-VL's script reads it: two points of 999 steps."""
    try:
        first, second = QWEN.findall(answer)[0]
        (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in (first, second))
    except (IndexError, ValueError):
        return None
    return _scaled((x1, y1, x2, y2), (999, 999))


def share_box(answer: str, scale: BoxScale) -> Box | None:
    """Returns the first box as lmms-eval reads it: four shares in square brackets."""
    found = BRACKETED.search(answer)
    return _scaled([float(text) for text in found.groups()], (1, 1)) if found else None


def _scaled(box: Sequence[float], size: WidthHeight) -> Box:
    x1, y1, x2, y2 = box
    return x1 / size[0], y1 / size[1], x2 / size[0], y2 / size[1]


def overlap(first: Box, second: Box) -> float:
    """Returns intersection over union; 0 where neither box has an area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    both = max(width, 0.0) * max(height, 0.0)
    union = _area(first) + _area(second) - both
    return both / union if union else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def right_box(example: Example) -> tuple[Box, BoxScale]:
    """The box of an example, and what those of answers are of."""
    if not example.boxes:
        raise ValueError(f"row {example.id} has no box to compare with: name the data with --data")
    given = json.loads(example.boxes)
    size = (given["size"][0], given["size"][1])
    grid = (given["grid"][0], given["grid"][1]) if given.get("grid") else None
    return _scaled(given["bbox"][0], (1, 1) if given["norm1"] else size), BoxScale(size, grid)


def with_grids(
    rows: Sequence[tuple[Example, AnswerT]], grid_of: Callable[[tuple[int, int]], Sequence[int] | None]
) -> list[tuple[Example, AnswerT]]:
    """Rows that say what the class of the model that answered counts in; those without a size of an image stay.

    Args:
        rows: Examples with answers of any kind.
        grid_of: What it counts in, of an image of a width and height in pixels; None: not known.
    """
    grid = cache(grid_of)

    def known(example: Example) -> Example:
        given = json.loads(example.boxes) if example.boxes else {}
        found = grid((given["size"][0], given["size"][1])) if "size" in given else None
        return replace(example, boxes=json.dumps(given | {"grid": [*found]})) if found else example

    return [(known(example), answer) for example, answer in rows]


def reads(read: Callable[[str, BoxScale], Box | None]) -> Callable[[Example, str], float]:
    def accuracy(example: Example, prediction: str) -> float:
        right, scale = right_box(example)
        found = read(prediction, scale)
        return float(found is not None and overlap(found, right) >= ENOUGH)

    return accuracy


def _notes(predictions: Predictions, values: Sequence[float]) -> list[str]:
    scales = [right_box(example)[1] for example, _ in predictions]
    boxes = [box_of(text, scale) for (_, text), scale in zip(predictions, scales, strict=True)]
    larger = [BoxScale((2 * scale.size[0], 2 * scale.size[1]), scale.grid) for scale in scales]
    moved = [box_of(text, scale) for (_, text), scale in zip(predictions, larger, strict=True)]
    in_pixels = sum(box != other for box, other in zip(boxes, moved, strict=True))
    notes = [f"{boxes.count(None)} of {len(boxes)} answers have no box, and are wrong"] if None in boxes else []
    read = f"{in_pixels} of {len(boxes)} answers are read as pixels of the original image: --boxes MODEL, if its class"
    return [*notes, *([f"{read} counts in others"] if in_pixels else [])]


SCORER = mean_scorer(
    {
        "accuracy": (
            reads(box_of),
            "IoU of 0.5 or more; tokens of PaliGemma, Florence-2 and Kosmos-2, box_2d, shares, or numbers of what the "
            "class counts in, else points and nested lists of 1,000, and pixels",
        ),
        "accuracy (Qwen-VL)": (reads(qwen_box), "Qwen-VL's evaluate_grounding.py: (x1,y1),(x2,y2) of 999"),
        "accuracy (lmms-eval)": (reads(share_box), "lmms-eval's refcoco: [x1, y1, x2, y2] as shares"),
    },
    notes=_notes,
)
