"""Syntax of prompts and captions: weights, BREAK and alternatives, read as in A1111."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

WeightedText = tuple[str, float]  # a text, and the weight of its tokens
Chunks = tuple[tuple[WeightedText, ...], ...]  # the parts of a prompt between BREAKs, each in pieces
Wording = str | Chunks  # a prompt as plain text, or in pieces with weights

ROUND, SQUARE = 1.1, 1 / 1.1  # what a pair of brackets multiplies the weight by
_TOKEN = re.compile(r"\\.|[(\[]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[)\]]|[^\\()\[\]:]+|.", re.DOTALL)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_ALTERNATIVES = re.compile(r"(?<!\\)\{([^{}]*)\}")
_LORA = re.compile(r"<(?:lora|lyco|hypernet):([^:>]+)(?::([^:>]*))?[^>]*>")
_SYNTAX = {  # by what is said of it
    "(word:1.3)": re.compile(r"(?<!\\)\([^()]*:\s*[\d.]+\s*\)|\(\([^()]*\)\)"),
    "{a|b}": re.compile(r"\{[^{}]*\|[^{}]*\}"),
    "BREAK": re.compile(r"\bBREAK\b"),
    "<lora:...>": _LORA,
    "__name__": re.compile(r"(?<!\w)__[\w/*-]+?__(?!\w)"),
}


def alternatives(text: str, seed: int) -> str:
    """A text with one of each `{a|b|c}` in it: a pure function of the text and the seed, inner ones first.

    Args:
        text: A prompt or a caption. A brace after a backslash is none of these, nor is `{a}`.
        seed: Another seed draws others, each with the same probability.
    """
    for number in range(text.count("{")):  # each round replaces one
        found = next((each for each in _ALTERNATIVES.finditer(text) if "|" in each[1]), None)
        if found is None:
            break
        options = found[1].split("|")
        digest = hashlib.sha256(f"{seed}/{number}/{found.start()}/{found[1]}".encode()).digest()
        chosen = options[int.from_bytes(digest[:8], "little") % len(options)]
        text = text[: found.start()] + chosen.strip() + text[found.end() :]
    return text


def weighted(text: str) -> Chunks:
    """A prompt in pieces with weights, as A1111 reads it.

    `(a)` is 1.1 times the weight, `[a]` divides it by 1.1, `(a:1.3)` is 1.3 times. Brackets nest, one that is not
    closed counts to the end, and a backslash takes a bracket as it is.
    """
    pieces: list[WeightedText] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for token in _TOKEN.finditer(text):
        mark, weight = token[0], token[1]
        if mark in opened:
            opened[mark].append(len(pieces))
        elif weight is not None and opened["("]:
            _multiply(pieces, opened["("].pop(), float(weight))
        elif mark == ")" and opened["("]:
            _multiply(pieces, opened["("].pop(), ROUND)
        elif mark == "]" and opened["["]:
            _multiply(pieces, opened["["].pop(), SQUARE)
        else:
            pieces.append((mark[1] if len(mark) == 2 and mark[0] == "\\" else mark, 1.0))
    for kind, factor in (("(", ROUND), ("[", SQUARE)):
        for start in opened[kind]:
            _multiply(pieces, start, factor)
    return _between_breaks(_joined(pieces))


def _multiply(pieces: list[WeightedText], start: int, factor: float) -> None:
    pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]


def _joined(pieces: Iterable[WeightedText]) -> list[WeightedText]:
    """Neighbours of one weight as one piece: words are cut into tokens with what stands around them."""
    found: list[WeightedText] = []
    for text, weight in pieces:
        if found and found[-1][1] == weight:
            found[-1] = (found[-1][0] + text, weight)
        else:
            found.append((text, weight))
    return found


def _between_breaks(pieces: Iterable[WeightedText]) -> Chunks:
    chunks: list[list[WeightedText]] = [[]]
    for text, weight in pieces:
        first, *others = _BREAK.split(text)
        chunks[-1] += [(first, weight)] if first else []
        chunks += [[(other, weight)] if other else [] for other in others]
    if len(chunks) > 1 and not chunks[-1]:  # as in A1111, a last BREAK adds nothing
        chunks.pop()
    return tuple(tuple(chunk) or (("", 1.0),) for chunk in chunks)


def syntax_in(text: str) -> list[str]:
    """The constructs of this syntax that a text contains, such as `(word:1.3)` and `BREAK`."""
    return [name for name, pattern in _SYNTAX.items() if pattern.search(text)]


def problem_of(text: str) -> str | None:
    """Why the syntax of a prompt is not supported; None if it is."""
    if found := _LORA.search(text):
        adapter = f"{found[1]}:{found[2]}" if found[2] else found[1]
        return f"{found[0]} names an adapter: take it out, and put {adapter} (its path) in the column adapter"
    if found := _SYNTAX["__name__"].search(text):
        return f"{found[0]} is a wildcard of a file, which is not read: write {{a|b|c}}"
    if found := re.search(r"\[[^\[\]]*[:|][^\[\]]*\]|(?<!\\)\bAND\b", text):
        return f"{found[0]} changes the prompt from step to step in A1111, which is not done here: take it out"
    if found := re.search(r"\{[^{}]*(\$\$|::)[^{}]*\}", text):
        return f"{found[0]} has a number of alternatives, or weights of them, which are not read: only {{a|b}} is"
    return None
