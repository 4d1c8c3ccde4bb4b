"""Faults that somebody found from outside, as changes of the files of a door: cases with a name in place of a seed."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tests.fuzz.forked import FINE, Outcome

LONG = 60_000  # characters
FACE = "\N{GRINNING FACE}"  # four bytes in memory


class Fault(NamedTuple):
    """A case that once ended otherwise.

    Attributes:
        door: Of the door.
        changes: What makes the content of its files another, by file.
        ends: How it has to end: "read", or as all cases may.
        unsaid: What its sentence must not say.
    """

    door: str
    changes: Mapping[str, Callable[[bytes], bytes]]
    ends: tuple[str, ...] = FINE
    unsaid: str = "zip()"  # as Python says what a library did not expect

    def is_mended(self, outcome: Outcome) -> bool:
        return outcome.kind in self.ends and self.unsaid not in outcome.text


def with_values(**values: Any) -> Callable[[bytes], bytes]:
    """A JSON file with other values of some keys."""
    return lambda content: json.dumps({**json.loads(content), **values}).encode()


def instead(text: str) -> Callable[[bytes], bytes]:
    return lambda content: text.encode()


def cell(column: str, value: str) -> Callable[[bytes], bytes]:
    """A table with tabs with another value in a column of its first row."""

    def change(content: bytes) -> bytes:
        header, row, *rows = [line.split("\t") for line in content.decode().split("\n")]
        row[header.index(column)] = value
        return "\n".join(map("\t".join, (header, row, *rows))).encode()

    return change


def long_answer(content: bytes) -> bytes:
    rows = json.loads(content)
    return json.dumps([rows[0] | {"prediction": "ab" * (LONG // 2)}, *rows[1:]]).encode()


def long_reference(content: bytes) -> bytes:
    found = json.loads(content)
    found["data"][0]["answers"] = ["ac" * (LONG // 2)]
    return json.dumps(found).encode()


def template(text: str) -> Fault:
    return Fault("chat template", {"chat_template.jinja": instead(text)})


def tokenizer(**values: Any) -> Fault:
    return Fault("tokenizer of texts", {"tokenizer.json": with_values(**values)})


HOLE = {"Regex": "(a+)+$"}  # of a row of its letter it tries all divisions
FAULTS: dict[str, Fault] = {
    "a pattern that divides texts": tokenizer(
        pre_tokenizer={"type": "Split", "pattern": HOLE, "behavior": "Isolated", "invert": False}
    ),
    "a pattern that is replaced": tokenizer(normalizer={"type": "Replace", "pattern": HOLE, "content": "b"}),
    "a damaged map of characters": tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "texts of six tokens": Fault("tokenizer", {"tokenizer_config.json": with_values(model_max_length=6)}),
    "a template that keeps gigabytes": template(
        "{% set own = namespace(kept=[]) %}{% for i in range(130) %}"
        f"{{% set own.kept = own.kept + ['{FACE}' * 4000000] %}}{{% endfor %}}"
    ),
    "a template of slow calls": template(
        "{% set text = 'a' * 6000 %}{% for i in range(90000) %}{% if text.title() %}{% endif %}{% endfor %}"
    ),
    **{
        f"code of {key}": Fault("model configs", {"config.json": with_values(**{key: "somebody/kernel"})}, ("read",))
        for key in ("_attn_implementation", "attn_implementation")
    },
    "brackets in an answer": Fault("predictions table.tsv", {"table.tsv": cell("answer", "[" * 150 + "-" * 9999)}),
    "brackets in the name of an image": Fault("suite", {"data.tsv": cell("image_path", "[" + "-" * LONG)}),
    "long answers": Fault("predictions plain.json", {"plain.json": long_answer, "data.json": long_reference}),
}  # fmt: skip
