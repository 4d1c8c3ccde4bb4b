"""tests/models/vl/vlm/rows/trl_labels.json: the labels that TRL's vision collator gives to rows of the tiny models.

`python -m tests.documented.trl_labels` writes it where `trl` is installed, with the templates of published models that
TRL carries: as they are published, which is how we read them, and with its marks of what the assistant says, which is
how it finds labels. Of every class with a chat template it writes the labels of prompts and their completions, too.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from dora_mm.data.images.pixels import load_rgb
from dora_mm.data.vl.example import IMAGE, Example, Turn, pieces_of
from tests.models.vl.vlm import tiny
from tests.models.vl.vlm.classes.rarest_models import UNTRAINED
from tests.models.vl.vlm.vlm_rows import write_pictures

PAGE = Path(__file__).parents[1] / "models" / "vl" / "vlm" / "rows" / "trl_labels.json"
PUBLISHED = {  # TRL's name of a published template: the tiny model that reads with it
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_5_think": "qwen3_5",
    "qwen3_5_nothink": "qwen3_5",
    "smolvlm": "smolvlm",
    "idefics3": "idefics3",
    "gemma3": "gemma3",
    "llava_next": "llava_next",
    "lfm2_2_5_vl": "lfm2_vl",
    "muse_glimmer": "muse_glimmer",
}
MARKED = {"lfm2_2_5_vl"}  # published with marks
TOKENS = {"llava_next": ["</s>"], "muse_glimmer": ["<|start|>", "<|message|>", "<|eot|>"]}  # of templates
PICTURES = ("wide.png", "tall.png", "square.png")
Runs = list[tuple[int, list[int]]]  # of labels that follow each other: where they start, and their ids


def _turns(*texts: str, system: str = "") -> tuple[Turn, ...]:
    said = [Turn("assistant", text, True) if n % 2 else Turn("user", text, False) for n, text in enumerate(texts)]
    return (*([Turn("system", system, False)] if system else []), *said)


CONVERSATIONS = {
    "one": (1, _turns(f"{IMAGE}\nWhat colour is it?", "It is red.")),
    "several": (1, _turns(f"{IMAGE}\nIs it red or blue?", "red", "Is red warm?", "red is\n\nwarm, too", "Why?", "red")),
    "two images": (2, _turns(f"{IMAGE}{IMAGE}\nWhich is 1 larger?", "The 2nd: 12,345 px")),
    "later image": (2, _turns(f"{IMAGE}\nA?", "a", f"And this?\n{IMAGE}", "élan 日本 b")),
    "text": (0, _turns("What is one and one?", "two")),
    "system": (1, _turns(f"{IMAGE}\nWhat?", "red", system="Answer with one word.")),
}


def example(name: str) -> Example:
    """A conversation as a row."""
    count, turns = CONVERSATIONS[name]
    return Example(name, PICTURES[:count], "", (turns[-1].text,), (1.0,), turns=turns)


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as messages whose contents are lists."""
    return [{"role": turn.role, "content": [*_items(turn.text)]} for turn in turns]


def _items(text: str) -> Iterator[dict[str, str]]:
    for number, piece in enumerate(pieces_of(text)):
        if number % 2:
            yield {"type": piece}
        elif piece.strip("\n"):
            yield {"type": "text", "text": piece.strip("\n")}


def runs(labels: Sequence[int]) -> Runs:
    """The labels that are not ignored."""
    found, start = [], 0
    for learned, group in groupby(labels, key=lambda label: label != -100):
        ids = [*group]
        if learned:
            found.append((start, ids))
        start += len(ids)
    return found


def collated(collator: Any, row: dict[str, Any]) -> dict[str, Any] | str:
    """What TRL makes of a row: the number of its tokens and its labels, or why it makes nothing."""
    try:
        labels = collator([copy.copy(row)])["labels"][0].tolist()
    except Exception as error:  # whatever templates and processors raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return {"length": len(labels), "labels": runs(labels)}


def page(folder: Path) -> dict[str, Any]:
    """The content of the file; it takes a minute or two.

    Args:
        folder: For the tiny models.
    """
    import trl  # pyright: ignore[reportMissingImports]
    from trl.trainer.sft_trainer import (  # pyright: ignore[reportMissingImports]
        DataCollatorForVisionLanguageModeling as Collator,
    )

    files, templates, answers, completions = Path(trl.__file__).parent / "chat_templates", {}, {}, {}
    rows = {name: (messages_of(turns), images_of(name, folder)) for name, (_, turns) in CONVERSATIONS.items()}
    for name, model in PUBLISHED.items():
        templates[name] = (files / f"{name}.jinja").read_text(encoding="utf-8")
        processor = with_template(processor_of(model, folder), name, templates[name])
        marked = name if name in MARKED else f"{name}_training"
        template = (files / f"{marked}.jinja").read_text(encoding="utf-8")
        collator = Collator(processor, assistant_only_loss=True, chat_template=template)
        answers[name] = {
            row: collated(collator, {"messages": said, "images": images}) for row, (said, images) in rows.items()
        }
    for model in tiny.BUILDERS.keys() - tiny.PLAIN.keys() - UNTRAINED.keys():
        if (processor := processor_of(model, folder)).chat_template:
            collator = Collator(processor, completion_only_loss=True)
            completions[model] = {
                row: collated(collator, {"prompt": said[:-1], "completion": said[-1:], "images": images})
                for row, (said, images) in rows.items()
            }
    return {
        "trl": trl.__version__,
        "templates": templates,
        "answers": answers,
        "completions": dict(sorted(completions.items())),
    }


def with_template(processor: Any, name: str, template: str) -> Any:
    """Gives a processor a published template and the tokens in it."""
    processor.chat_template = template
    processor.tokenizer.add_tokens(TOKENS.get(name, []), special_tokens=True)
    return processor


def processor_of(model: str, folder: Path) -> Any:
    base = folder / model
    return AutoProcessor.from_pretrained(base if base.exists() else tiny.build(model, base))


def images_of(name: str, folder: Path) -> list[Any]:
    return [load_rgb(folder / picture) for picture in example(name).images]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = page(write_pictures(Path(folder)))
    PAGE.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")
