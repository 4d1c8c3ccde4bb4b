"""Conversations without images, and commonsense questions in the layout of LLM-Adapters."""

from pathlib import Path
from typing import Any

from dora_mm.data.vl.example import Example
from tests.shared.data.vl_files import write_json

OPTIONS = ("true/false", "answer1/answer2/answer3", "option1/option2")
BALL = Example("1", (), "What colour is the ball?", ("red",), (1.0,))
BOXES = Example("2", (), "How many boxes are there in the image?", ("two blue ones",), (1.0,))
QUESTION = "is it?\n\nAnswer format: true/false"
BOOL = Example("3", (), QUESTION, ("the correct answer is true",), (1.0,), options=("true", "false"))


def write_texts(folder: Path) -> dict[str, Any]:
    """The `data` section of four questions with an answer each."""
    said = [
        ("What is one and one?", "two"),
        ("What is red?", "The ball."),
        ("And the cat?", "yellow"),
        ("Is it?", "no"),
    ]
    rows = [{"messages": [_message("user", asked), _message("assistant", told)]} for asked, told in said]
    source = {"format": "chat", "file": str(write_json(folder / "texts.json", rows))}
    return {"train": source, "valid": {**source, "limit": 2}}


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def question(number: int, **changed: str) -> dict[str, str]:
    """A row as `commonsense_170k.json` and the test files have them."""
    words = OPTIONS[number % len(OPTIONS)]
    answer = words.split("/")[number % 2]
    row = {
        "instruction": f"Please answer question {number}: is it?\n\nAnswer format: {words}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }
    return row | changed


def write_commonsense(path: Path, count: int = 6) -> Path:
    return write_json(path, [question(number) for number in range(count)])
