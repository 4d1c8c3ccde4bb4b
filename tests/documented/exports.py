"""What the pages say about which tool reads which target of `dora-mm convert`.

A claim is a place that names a target and tools:

- a command in a fence, with the tools in the comment behind it, or in the question in bold above it;
- a row of a table with `--to TARGET`, or with a target in the first cell and tools in the second; of the table with the
  column `convert --to`, the tool in the first cell and the targets in that column;
- a clause of prose with `--to TARGET`, between full stops and semicolons.
"""

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from dora_mm.registries.tools import EXPORT_FORMATS
from tests.documented.texts import FENCE, PROGRAM, is_synopsis

WEB_UIS = ("comfy", "forge", "a1111", "sdnext", "invokeai")
NO_DORA = "no DoRA"  # stands for the programs that load plain LoRA alone
TOOLS = {  # how pages name them, the longer ones first
    r"(?:all|every) web UIs?": WEB_UIS,
    r"ComfyUI|reForge": ("comfy",),
    r"Forge": ("forge",),
    r"A1111|AUTOMATIC1111": ("a1111",),
    r"SD\.Next": ("sdnext",),
    r"InvokeAI": ("invokeai",),
    r"LyCORIS|sd-scripts|kohya's scripts": ("kohya",),
    r"OneTrainer": ("onetrainer",),
    r"ai-toolkit": ("ai-toolkit",),
    r"diffusers": ("diffusers",),
    r"PEFT": ("peft",),
    r"vLLM|SGLang|llama\.cpp": (NO_DORA,),
}
NAME = re.compile("|".join(f"({pattern})" for pattern in TOOLS))
CODE = re.compile(r"`[^`]*`")
TO = re.compile(r"--to ([a-z0-9-]+)")
WHOLE = "merged"  # a whole model, which every program reads


class Claim(NamedTuple):
    """That each of some tools reads one of some targets."""

    text: str
    targets: tuple[str, ...]
    tools: tuple[str, ...]


def tools_in(text: str) -> tuple[str, ...]:
    """The tools that a text names outside of code."""
    names = (match.lastindex for match in NAME.finditer(CODE.sub("", text)))
    groups = list(TOOLS.values())
    return tuple(dict.fromkeys(tool for number in names if number for tool in groups[number - 1]))


def targets_in(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(TO.findall(text)))


def claims(text: str) -> list[Claim]:
    """All claims of a page; a command in a fence without a tool is one with none."""
    return [*_of_fences(text), *_of_tables(FENCE.sub("\n", text)), *_of_prose(FENCE.sub("\n\n", text))]


def _of_fences(text: str) -> Iterator[Claim]:
    for fence in FENCE.finditer(text):
        section = re.split(r"^#+ ", text[: fence.start()], flags=re.MULTILINE)[-1]
        question = re.findall(r"^\*\*(.*?)\*\*", section, re.MULTILINE | re.DOTALL)[-1:]
        body = re.sub(r"\\\n\s*", " ", fence[3])
        for line in (line.strip().removeprefix("$ ") for line in body.splitlines()):
            if not line.startswith((f"{PROGRAM}convert ", f"{PROGRAM}extract ")):
                continue
            code, _, comment = line.partition(" # ")
            if not is_synopsis(shlex.split(code)) and (targets := targets_in(code)) and targets != (WHOLE,):
                yield Claim(line, targets, tools_in(" ".join([*question, comment])))


def _of_tables(text: str) -> Iterator[Claim]:
    column = None
    for line in text.splitlines():
        cells = re.split(r"(?<!\\)\|", line.strip())[1:-1]
        if not cells:
            column = None
            continue
        heads = [number for number, cell in enumerate(cells) if "`convert --to`" in cell]
        column = heads[0] if heads else column
        first = [name for name in re.findall(r"`([^`]+)`", cells[0]) if name in EXPORT_FORMATS]
        if heads:
            continue
        if column is not None:
            for target in re.findall(r"`([a-z0-9-]+)`", cells[column].partition(":")[0]):
                yield Claim(line, (target,), tools_in(cells[0]))
        elif targets := targets_in(line):
            yield Claim(line, targets, tools_in(line))
        elif first:
            yield Claim(line, tuple(first), tools_in(cells[1]))


def _of_prose(text: str) -> Iterator[Claim]:
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line for line in paragraph.splitlines() if not line.lstrip().startswith("|")]
        for clause in re.split(r"(?<=[.;])\s", " ".join(lines)):
            targets = targets_in(" ".join(CODE.findall(clause)))
            if targets and (tools := tools_in(clause)):
                yield Claim(clause, targets, tools)
