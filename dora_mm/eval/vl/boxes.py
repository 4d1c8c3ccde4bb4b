"""RefCOCO: whether the box that a model writes overlaps the right one by half, whatever notation its class has.

Intersection over union of at least 0.5, as Qwen-VL's eval_mm/evaluate_grounding.py and lmms-eval count it.
"""

import json
import re
from collections.abc import Callable, Sequence

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl.scores import mean_scorer

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 as shares of width and height
WidthHeight = tuple[float, float]  # width and height in pixels
ENOUGH = 0.5
NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
FOUR = ",".join([NUMBER] * 4)
PALIGEMMA = re.compile(r"<loc(\d{4})>" * 4)  # y1, x1, y2, x2 of 1,024
FLORENCE = re.compile(r"<loc_(\d+)>" * 4)
POINTS = re.compile(rf"\({NUMBER},{NUMBER}\)\s*,\s*\({NUMBER},{NUMBER}\)")  # of Qwen-VL and others, of 1,000
NESTED = re.compile(rf"\[\[{FOUR}\]")  # of InternVL, of 1,000
PLAIN = re.compile(rf"\[{FOUR}\]")  # shares where all are at most 1, else pixels
QWEN = re.compile(r"\((.*?)\),\((.*?)\)")


def box_of(answer: str, size: WidthHeight) -> Box | None:
    """Returns the first box in an answer, by its notation; None if it has none.

    Args:
        answer: The answer.
        size: Of the image, for boxes in pixels.
    """
    if found := PALIGEMMA.search(answer):
        y1, x1, y2, x2 = (int(text) / 1024 for text in found.groups())
        return x1, y1, x2, y2
    for pattern in (FLORENCE, POINTS, NESTED):
        if found := pattern.search(answer):
            return _scaled([float(text) for text in found.groups()], (1000, 1000))
    if not (found := PLAIN.search(answer)):
        return None
    numbers = [float(text) for text in found.groups()]
    return _scaled(numbers, (1, 1) if max(numbers) <= 1 else size)


def qwen_box(answer: str, size: WidthHeight) -> Box | None:
    """Returns the first box as Qwen-VL's script reads it: two points of 999 steps."""
    try:
        first, second = QWEN.findall(answer)[0]
        (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in (first, second))
    except (IndexError, ValueError):
        return None
    return _scaled((x1, y1, x2, y2), (999, 999))


def share_box(answer: str, size: WidthHeight) -> Box | None:
    """Returns the first box as lmms-eval reads it: four shares in square brackets."""
    found = PLAIN.search(answer)
    return _scaled([float(text) for text in found.groups()], (1, 1)) if found else None


def _scaled(box: Sequence[float], whole: WidthHeight) -> Box:
    x1, y1, x2, y2 = box
    return x1 / whole[0], y1 / whole[1], x2 / whole[0], y2 / whole[1]


def overlap(first: Box, second: Box) -> float:
    """Returns intersection over union; 0 where neither box has an area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    both = max(width, 0.0) * max(height, 0.0)
    union = _area(first) + _area(second) - both
    return both / union if union else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def right_box(example: Example) -> tuple[Box, WidthHeight]:
    """The box of an example, and the size of its image in pixels."""
    if not example.boxes:
        raise ValueError(f"row {example.id} has no box to compare with: name the data with --data")
    given = json.loads(example.boxes)
    size = (given["size"][0], given["size"][1])
    return _scaled(given["bbox"][0], (1, 1) if given["norm1"] else size), size


def reads(read: Callable[[str, WidthHeight], Box | None]) -> Callable[[Example, str], float]:
    def accuracy(example: Example, prediction: str) -> float:
        right, size = right_box(example)
        found = read(prediction, size)
        return float(found is not None and overlap(found, right) >= ENOUGH)

    return accuracy


def _notes(predictions: Predictions, values: Sequence[float]) -> list[str]:
    without = sum(box_of(prediction, (1, 1)) is None for _, prediction in predictions)
    return [f"{without} of {len(predictions)} answers have no box, and are wrong"] if without else []


SCORER = mean_scorer(
    {
        "accuracy": (
            reads(box_of),
            "IoU of 0.5 or more; PaliGemma's and Florence's tokens, points and nested lists of "
            "1,000, else shares or pixels",
        ),
        "accuracy (Qwen-VL)": (reads(qwen_box), "Qwen-VL's evaluate_grounding.py: (x1,y1),(x2,y2) of 999"),
        "accuracy (lmms-eval)": (reads(share_box), "lmms-eval's refcoco: [x1, y1, x2, y2] as shares"),
    },
    notes=_notes,
)
