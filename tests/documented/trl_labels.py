"""tests/models/vl/vlm/encoding/trl_labels.json: the labels that TRL's vision collator gives to rows of the tiny models.

`python -m tests.documented.trl_labels` writes it where `trl` is installed, with the templates of published models that
TRL carries: as they are published, which is how we read them, and with its marks of what the assistant says, which is
how it finds labels. Of every class with a chat template it writes the labels of prompts and their completions, too.
The file says on which day it was written, since some templates write the day into rows, which TRL takes from the clock.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from dora_mm.data.images.pixels import load_rgb
from tests.shared.data.vlm_rows import write_images
from tests.shared.vl import tiny_vlm as tiny
from tests.shared.vl.language_models import LANGUAGE_MODELS
from tests.shared.vl.rarest_models import UNTRAINED

PAGE = Path(__file__).parents[1] / "models" / "vl" / "vlm" / "encoding" / "trl_labels.json"
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
IMAGES = ("wide.png", "tall.png", "square.png")
Runs = list[tuple[int, list[int]]]  # of labels that follow each other: where they start, and their ids


def image() -> dict[str, str]:
    return {"type": "image"}


def said(role: str, *contents: str | dict[str, str]) -> dict[str, Any]:
    """A message; texts are items of their own."""
    items = [{"type": "text", "text": content} if isinstance(content, str) else content for content in contents]
    return {"role": role, "content": items}


def exchange(*contents: str | dict[str, str], answer: str) -> list[dict[str, Any]]:
    return [said("user", *contents), said("assistant", answer)]


ROWS = {  # messages as TRL takes them; the images are the first of PICTURES
    "one": exchange(image(), "What colour is it?", answer="It is red."),
    "several": [
        *exchange(image(), "Is it red or blue?", answer="red"),
        *exchange("Is red warm?", answer="red is\n\nwarm, too"),
        *exchange("Why?", answer="red"),
    ],
    "two images": exchange(image(), image(), "Which is 1 larger?", answer="The 2nd: 12,345 px"),
    "later image": [
        *exchange(image(), "A?", answer="a"),
        *exchange("And this?", image(), answer="élan 日本 b"),
    ],
    "text": exchange("What is one and one?", answer="two"),
    "system": [said("system", "Answer with one word."), *exchange(image(), "What?", answer="red")],
    "pages": exchange(
        "Page 1:\n", image(), "\nPage 2:\n\n", image(), "\n Compare  them.\n", answer="Page 1\n- longer\n\n"
    ),
    "break": exchange(image(), "\nWhat colour is it?\n", answer=" It is red. "),
    "breaks": exchange(image(), "\n", image(), "\n\nWhich?", answer="\nBoth."),
}


def row_of(name: str) -> dict[str, Any]:
    """A row as a file has it: its messages, and the names of its images."""
    count = sum(item["type"] == "image" for message in ROWS[name] for item in message["content"])
    return {"messages": ROWS[name], "images": [*IMAGES[:count]]}


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
    """What TRL makes of a row: its tokens and its labels, or why it makes nothing."""
    try:
        found = collator([copy.copy(row)])
    except Exception as error:  # whatever templates and processors raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return {"ids": repeated(found["input_ids"][0].tolist()), "labels": runs(found["labels"][0].tolist())}


def repeated(ids: Sequence[int]) -> list[int | list[int]]:
    """Token ids, with those that repeat, as of an image, as the id and their number."""
    counts = [(token, len([*group])) for token, group in groupby(ids)]
    return [token if count == 1 else [token, count] for token, count in counts]


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
    rows = {name: {**row_of(name), "images": images_of(name, folder)} for name in ROWS}
    for name, model in PUBLISHED.items():
        templates[name] = (files / f"{name}.jinja").read_text(encoding="utf-8")
        processor = with_template(processor_of(model, folder), name, templates[name])
        marked = name if name in MARKED else f"{name}_training"
        template = (files / f"{marked}.jinja").read_text(encoding="utf-8")
        collator = Collator(processor, assistant_only_loss=True, chat_template=template)
        answers[name] = {row: collated(collator, found) for row, found in rows.items()}
    for model in tiny.BUILDERS.keys() - tiny.PLAIN.keys() - UNTRAINED.keys() - LANGUAGE_MODELS.keys():
        if (processor := processor_of(model, folder)).chat_template:
            collator = Collator(processor, completion_only_loss=True)
            completions[model] = {
                row: collated(collator, {**parted(found["messages"]), "images": found["images"]})
                for row, found in rows.items()
            }
    return {
        "trl": trl.__version__,
        "date": date.today().isoformat(),
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


def parted(messages: Sequence[dict[str, Any]]) -> dict[str, Sequence[dict[str, Any]]]:
    """A conversation as a prompt and its completion, the last answer."""
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def images_of(name: str, folder: Path) -> list[Any]:
    return [load_rgb(folder / image) for image in row_of(name)["images"]]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = page(write_images(Path(folder)))
    PAGE.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")
