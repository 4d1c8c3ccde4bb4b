"""Prompt syntax (weights, alternatives, BREAK) in the prompts of a job: `prompt_syntax` of the config."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from dora_mm.data.syntax import alternatives, problem_of, syntax_in
from dora_mm.sampling.batch.requests import ImageRequest

log = logging.getLogger(__name__)


def check_syntax(requests: Sequence[ImageRequest]) -> None:
    """Checks the prompts that are read as more than plain text.

    Raises:
        ValueError: A prompt has a tag or syntax that is not read.
    """
    for request in requests:
        texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt or ""}
        for name, text in texts.items() if request.prompt_syntax != "plain" else ():
            if problem := problem_of(text):
                raise ValueError(f"row {request.row}: {name}: {problem}")


def with_alternatives(requests: Sequence[ImageRequest]) -> list[ImageRequest]:
    """The images of a job, each with one of the alternatives of its prompts, by its seed.

    Prompts that are read as plain text stay as they are, and a warning names what looks like more.

    Raises:
        ValueError: See `check_syntax`.
    """
    check_syntax(requests)
    literal = {p.prompt: found for p in requests if p.prompt_syntax == "plain" and (found := syntax_in(p.prompt))}
    if literal:
        first, *_ = literal
        names = ", ".join(dict.fromkeys(name for found in literal.values() for name in found))
        log.warning(
            "%d prompts have %s, generated as plain text; prompt_syntax=a1111 reads weights, alternatives and BREAK. "
            "The first: %s",
            *(len(literal), names, first),
        )
    return [_chosen(request) for request in requests]


def _chosen(request: ImageRequest) -> ImageRequest:
    if request.prompt_syntax == "plain":
        return request
    negative = request.negative_prompt and alternatives(request.negative_prompt, request.seed)
    return replace(request, prompt=alternatives(request.prompt, request.seed), negative_prompt=negative)
