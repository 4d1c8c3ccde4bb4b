"""Predictions in the files of other tools: tables that VLMEvalKit scores, and samples that lmms-eval compares with."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.eval.vl.metrics import score_row
from dora_mm.utils.atomic import write_atomically, write_text


def write_vlmevalkit(path: Path, task: str, predictions: Predictions) -> None:
    """Writes the table of results (.xlsx) that VLMEvalKit's `evaluate` reads: its columns and `prediction`.

    Raises:
        ValueError: openpyxl is missing.
    """
    try:
        from openpyxl import Workbook
    except ModuleNotFoundError:
        raise ValueError("--to vlmevalkit needs the package openpyxl: pip install 'dora_mm[sheets]'") from None
    letters = ascii_uppercase[: max((len(example.options) for example, _ in predictions), default=0)]
    book = Workbook()
    sheet = book.active
    assert sheet is not None
    header = ["index", "question", *letters, "answer", "category", "prediction"]
    for line, cells in enumerate([header, *(_cells(*row, len(letters)) for row in predictions)], 1):
        for column, value in enumerate(cells, 1):
            cell = sheet.cell(line, column, value)
            if isinstance(value, str):
                cell.data_type = "s"  # an answer such as "=1" is no formula
    write_atomically(path, lambda partial: book.save(partial))


def _cells(example: Example, prediction: str, num_options: int) -> list[str | int]:
    """The cells of a row; its index is a number where the id is one, which some data sets compute with."""
    index = int(example.id) if example.id.isdecimal() else example.id
    options = [*example.options, *[""] * (num_options - len(example.options))]
    answers = list(example.raw_answers or example.answers)
    answer = answers[0] if len(answers) == 1 else str(answers)
    texts = [_question(example), *options, answer, *(example.kinds[:1] or ("",)), prediction]
    return [index, *(_storable(text) for text in texts)]


def _question(example: Example) -> str:
    """The text without the lines of its options, which have columns of their own."""
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, example.options, strict=False)]
    return example.text.removesuffix("\n".join(lines)).removesuffix("\n") if lines else example.text


def _storable(text: str) -> str:
    """A text without control characters, which no cell may have."""
    return "".join(character for character in text if character >= " " or character in "\n\t\r")


def write_lmms_eval(path: Path, task: str, predictions: Predictions) -> None:
    """Writes samples (.jsonl) as lmms-eval's `--log_samples` does, with the score of each row under `<task>_score`."""
    lines = []
    for number, (example, prediction) in enumerate(predictions):
        answers = example.raw_answers or example.answers
        sample = {
            "doc_id": number,
            "target": answers[0] if len(answers) == 1 else str(list(answers)),
            "filtered_resps": prediction,
            "doc_hash": hashlib.sha256(example.id.encode()).hexdigest(),
            "input": example.text,
            f"{task}_score": score_row(task, example, prediction),
        }
        lines.append(json.dumps(sample, ensure_ascii=False))
    write_text(path, "".join(f"{line}\n" for line in lines))


WRITERS: Mapping[str, tuple[str, Callable[[Path, str, Predictions], None]]] = {
    "vlmevalkit": (".xlsx", write_vlmevalkit),
    "lmms-eval": (".jsonl", write_lmms_eval),
}


def write_for(tool: str, path: Path, task: str, predictions: Sequence[tuple[Example, str]]) -> None:
    """Writes predictions for another tool.

    Raises:
        ValueError: The suffix is not that of its files, or the file exists.
    """
    suffix, write = WRITERS[tool]
    if path.suffix.lower() != suffix:
        raise ValueError(f"--out: files for {tool} end in {suffix}, not as {path} does")
    if path.exists():
        raise ValueError(f"--out: {path} exists: name a new file")
    write(path, task, predictions)
