"""Conversations as text: a model's chat template, and the places of the answers in what it renders.

Where something is in a rendered text is not searched for in it, since an answer may occur in its question: the same
turns are rendered once more with a mark in place of the answer. The same shows what a template leaves out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateError

import dora_mm.models.chat_templates  # noqa: F401  bounds what models' files render
from dora_mm.data.vl.example import Turn, leading, pieces_of, plain_text

Span = tuple[int, int]  # from one place of a text to another
Pieces = tuple[tuple[str, str], ...]  # of a turn: ("text", "What is it?"), or ("image", "") or ("video", "")
THOUGHT = re.compile(r"\s*</?think>\s*")
PROBE = Turn("user", "@@next@@", False)


def chat_template(processor: Any, *, tools: bool = False) -> str | None:
    """The chat template of a model: that of its processor's files, or else of its tokenizer's (Phi-4-multimodal).

    Args:
        processor: The processor, or what stands for one.
        tools: Of several templates, the one for conversations with tools, where there is one; else the default one.

    Raises:
        ValueError: There are several, and none is the default one.
    """
    found = processor.chat_template or processor.tokenizer.chat_template
    if not isinstance(found, Mapping):
        return found
    chosen = (found.get("tool_use") if tools else None) or found.get("default")
    if chosen is None:
        raise ValueError(f"model.path: the model has chat templates named {', '.join(sorted(found))}, and no default")
    return chosen


def render(processor: Any, turns: Sequence[Turn], tools: str = "") -> tuple[str, list[Span], list[int]]:
    """Renders a conversation for training, up to its last answer.

    An answer follows the very text that asks for it when the model answers, also where the template renders an answered
    turn in another way (LLaVA-OneVision). Where the template puts no special token behind an answer, the one that
    begins the next turn ends it (GLM), or else the end-of-sequence token is inserted (LLaVA 1.5): without it, the model
    would never learn to stop. An earlier answer of which the template drops a part, its thoughts, is only read.

    Args:
        processor: A processor with a chat template.
        turns: The conversation, with at least one answer.
        tools: Its tools; see `Example`.

    Returns:
        What the model reads, with the processor's token in the place of each image or video; where in it the learned
        answers are, the token that ends each turn included; and where all exchanges end, learned or not.

    Raises:
        ValueError: The template refuses the conversation, leaves out a text of it, a tool or a call, or renders none of
            the learned answers as it was given.
    """
    numbers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    template = _Template(processor, turns[: numbers[-1]], tools)
    text, spans, ends, done, rest = "", [], [], "", ""
    for number in numbers:
        found = template.exchange(turns[: number + 1], turns[number + 1 : numbers[-1]])
        text += found.prompt.removeprefix(done)
        if turns[number].loss and found.is_complete:
            spans.append((len(text), len(text) + len(found.answer_text)))
        text, done, rest = text + found.answer_text, found.end, found.rest
        ends += [len(text)] if is_prompt(turns[:number]) else []
    if not spans and any(turn.loss for turn in turns):
        learned = next(turn.text for turn in turns if turn.loss)
        raise ValueError(f"the chat template does not render this answer as it is: {learned[:80]!r}")
    return text + rest, spans, ends


def is_prompt(turns: Sequence[Turn]) -> bool:
    """Whether anything is asked in these turns. What the assistant says before that is of the first exchange."""
    return any(turn.role in ("user", "tool") for turn in turns)


def render_prompt(processor: Any, turns: Sequence[Turn], tools: str = "") -> str:
    """Renders a conversation up to the place where the model answers.

    Raises:
        ValueError: The template refuses the conversation, or leaves out a text of it, a tool or a call.
    """
    return _Template(processor, turns, tools).apply(turns, generation_prompt=True)


class _Exchange(NamedTuple):
    """An answer and what comes before it.

    Attributes:
        prompt: What is between the answer before and this one.
        answer_text: The answer, from where the model begins to write to the end of its turn.
        end: The end of `answer_text`, which the template puts in front of the next question.
        rest: The white space behind it, where no turn follows.
        is_complete: Whether the answer is rendered as it was given.
    """

    prompt: str
    answer_text: str
    end: str
    rest: str = ""
    is_complete: bool = True


class _Template:
    """The chat template of a processor, given the contents of turns as it can read them.

    Args:
        processor: The processor.
        prompt: The turns in front of an answer.
        tools: The tools of the conversation; see `Example`.

    Raises:
        ValueError: The template refuses the conversation, or leaves out a text of it.
    """

    def __init__(self, processor: Any, prompt: Sequence[Turn], tools: str):
        self.processor, self.tools = processor, json.loads(tools) if tools else None
        template = chat_template(processor, tools=bool(tools))
        assert template is not None  # others read one question
        self.template = template
        tokenizer = processor.tokenizer
        self.tokens = tuple(filter(None, (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())))
        shape = tuple((turn.role, tuple(kind for kind, _ in _pieces(turn.text))) for turn in prompt)
        self.content, self.breaks = _readable_content(processor, self.template, shape)

    def apply(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> str:
        """Renders turns; with `generation_prompt`, the beginning of the model's next turn follows.

        Raises:
            ValueError: The template refuses them, or leaves out a tool or a call.
        """
        rendered = _apply(self.processor, self.template, list(map(self._message, turns)), generation_prompt, self.tools)
        calls = [call for turn in turns if turn.calls for call in json.loads(turn.calls)]
        for one in [*(self.tools or ()), *calls]:
            if one["function"]["name"] not in rendered:
                what = "the call of a tool" if one in calls else "a tool"
                raise ValueError(f"the chat template does not show {what}, {one['function']['name']!r}")
        return rendered

    def _message(self, turn: Turn) -> dict[str, Any]:
        marks, text = leading(turn.text)  # some templates write the line breaks behind leading images themselves
        text = ("".join(marks.split()) if self.breaks else marks) + text
        content = self.content(_pieces(text), self.processor) if text or not turn.calls else ""
        calls = {"tool_calls": json.loads(turn.calls)} if turn.calls else {}
        return {"role": turn.role, "content": content} | calls

    def exchange(self, turns: Sequence[Turn], later: Sequence[Turn]) -> _Exchange:
        """The last turn of these, an answer, as it is rendered; `later` are the turns that follow up to another one."""
        marked, answer = _marked(turns), turns[-1]
        text = plain_text(answer.text).strip()
        answer_only = self.apply(marked)
        prompt = (
            self.apply(marked[:-1], generation_prompt=True)
            if len(marked) > 1
            else answer_only.partition(marked[-1].text)[0]
        )
        full_tail = answer_only.rpartition(marked[-1].text)[2].rstrip()
        tail = self._before_others(full_tail, marked, later) if later else full_tail
        if later and "think" in text:
            read, history = self._history(marked, answer, later)
            if not _occurs(text, history):
                return _Exchange(read, history + tail, tail, is_complete=False)
        answered = self.apply([*marked[:-1], answer])
        if tail != full_tail:
            answered = answered.rstrip().removesuffix(full_tail) + tail
        answer_text = _answer_text(prompt, answered, plain_text(answer.text), tail)
        if not _occurs(text, answer_text):
            raise ValueError(f"the chat template does not render this answer as it is: {text[:80]!r}")
        rest, end = answered[len(answered.rstrip()) :], tail
        if not tail.endswith(self.tokens):
            end = self._end(marked)
            answer_text += end
        return _Exchange(_behind(prompt, marked[:-1]), answer_text, end, rest)

    def _before_others(self, tail: str, marked: Sequence[Turn], later: Sequence[Turn]) -> str:
        """The text that ends an answer before other turns: `tail` without the end of the conversation (Phi-4)."""
        shorter = tail.removesuffix(self.processor.tokenizer.eos_token or "").rstrip()
        if shorter in ("", tail):
            return tail
        behind = self.apply([*marked, *_marked([*marked, *later])[len(marked) :]]).partition(marked[-1].text)[2]
        return tail if behind.startswith(tail) else shorter

    def _history(self, marked: Sequence[Turn], answer: Turn, later: Sequence[Turn]) -> tuple[str, str]:
        """The text in front of an answer, and the answer, as rendered where other turns follow."""
        following = _marked([*marked, *later])[len(marked) :]
        before, _, behind = self.apply([*marked, *following], generation_prompt=True).partition(marked[-1].text)
        full_text = self.apply([*marked[:-1], answer, *following], generation_prompt=True)
        return _behind(before, marked[:-1]), full_text[len(before) : len(full_text) - len(behind)]

    def _end(self, marked: Sequence[Turn]) -> str:
        """The token that ends an answer without a special token behind it: that of the next user turn, else EOS."""
        behind = self.apply([*marked, PROBE]).rpartition(marked[-1].text)[2]
        found = behind.lstrip()
        token = max((token for token in self.tokens if found.startswith(token)), key=len, default="")
        if "user" not in token.lower():  # [INST] begins a turn, too, but does not end one
            return self.processor.tokenizer.eos_token
        return behind[: len(behind) - len(found)] + token


def _marked(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with a mark in place of each answer and its calls."""
    return [
        turn._replace(text=f"@@answer {number}@@", calls="") if turn.role == "assistant" else turn
        for number, turn in enumerate(turns)
    ]


def _behind(text: str, marked: Sequence[Turn]) -> str:
    """The text behind the last answer of these turns."""
    marks = [turn.text for turn in marked if turn.role == "assistant"]
    if not marks:
        return text
    _, found, behind = text.rpartition(marks[-1])
    if not found:
        raise ValueError("the chat template leaves out an earlier answer of a conversation")
    return behind


def _answer_text(prompt: str, answered: str, text: str, tail: str) -> str:
    """The rendered text from the end of the prompt to the end of the turn; "" if the answer is not at its end."""
    full_text = answered.rstrip()
    if answered.startswith(prompt):
        return full_text[len(prompt) :]
    body = full_text.removesuffix(tail)
    if not body.endswith(text):  # white space around it is trimmed
        body, text = body.rstrip(), text.strip()
    return full_text[len(body) - len(text) :] if body.endswith(text) else ""


def _occurs(text: str, rendered: str) -> bool:
    """Whether an answer is in a rendered text; white space beside the marks of its thoughts may differ."""
    if text in rendered:
        return True
    pieces = [piece for piece in THOUGHT.split(text) if piece]
    return "think" in text and bool(re.search(r"[\s\S]*?".join(map(re.escape, pieces)), rendered))


# --- contents --------------------------------------------------------------------------------------------------------


def _pieces(text: str) -> Pieces:
    """The pieces of a turn, with the text as it is."""
    pieces = enumerate(pieces_of(text))
    found = [(piece, "") if number % 2 else ("text", piece) for number, piece in pieces if piece]
    return tuple(found) or (("text", ""),)


def _items(pieces: Pieces, processor: Any) -> Any:
    return [{"type": kind} | ({"text": text} if kind == "text" else {}) for kind, text in pieces]


def _items_of_images(pieces: Pieces, processor: Any) -> Any:
    only_text = all(kind == "text" for kind, _ in pieces)
    return "".join(text for _, text in pieces) if only_text else _items(pieces, processor)


def _string(pieces: Pieces, processor: Any) -> Any:
    return "".join(text if kind == "text" else _token(kind, processor) for kind, text in pieces)


def _token(kind: str, processor: Any) -> str:
    """The token that stands for an image or a video in a text."""
    token = getattr(processor, f"{kind}_token", None)
    if not isinstance(token, str):
        raise ValueError("the chat template leaves out a text beside an image, and the model has no token for one")
    return token


Content = Callable[[Pieces, Any], Any]
CONTENTS: tuple[Content, ...] = (_items, _items_of_images, _string)


@lru_cache(maxsize=1000)
def _readable_content(
    processor: Any, template: str, shape: tuple[tuple[str, tuple[str, ...]], ...]
) -> tuple[Content, bool]:
    """The form of contents in which a template renders all texts, the first of CONTENTS that does.

    Args:
        processor: The processor.
        template: Its template.
        shape: The turns in front of an answer: their roles, and the kinds of their pieces.

    Returns:
        The form, and whether the template itself writes a line break behind an image that begins a turn.

    Raises:
        ValueError: The template refuses the conversation, or leaves out a text of it in each form.
    """
    marks: list[Pieces] = [
        tuple((kind, f"@@{number} {index}@@" if kind == "text" else "") for index, kind in enumerate(kinds))
        for number, (_, kinds) in enumerate(shape)
    ]
    roles, answer, problem = [role for role, _ in shape], (("text", "@@answer@@"),), None
    for content in CONTENTS:
        try:
            answer_text = zip([*roles, "assistant"], [*marks, answer], strict=True)
            messages = [{"role": role, "content": content(pieces, processor)} for role, pieces in answer_text]
            prompt = _apply(processor, template, messages[:-1], True)
            answered = _apply(processor, template, messages, False)
        except ValueError as error:
            if type(error.__cause__) is TemplateError:  # as templates raise it that refuse a conversation
                raise
            problem = problem or error
            continue
        lost = [role for role, pieces in zip(roles, marks, strict=True) if not _shown(pieces, prompt)]
        lost += [] if _shown(answer, answered) else ["assistant"]
        if not lost and _all_videos_shown(marks, prompt, processor):
            return content, _breaks(marks, prompt)
        what = f"the text of a turn of the {lost[0]}" if lost else "a video"
        problem = problem or ValueError(f"the chat template leaves out {what}")
    assert problem is not None
    raise problem


def _shown(marks: Pieces, rendered: str) -> bool:
    """Whether all texts are in what a template rendered, and not as a list that is printed, in quotation marks."""
    texts = [text for kind, text in marks if kind == "text"]
    return all(text in rendered and not re.search(f"['\"]{text}['\"]", rendered) for text in texts)


def _breaks(marks: Sequence[Pieces], rendered: str) -> bool:
    """Whether a template writes a line break in front of the first text of a turn that begins with an image."""
    illustrated = [pieces for pieces in marks if pieces[0][0] != "text"]
    texts = [next((text for kind, text in pieces if kind == "text"), None) for pieces in illustrated]
    return any(text is not None and f"\n{text}" in rendered for text in texts)


def _all_videos_shown(marks: Sequence[Pieces], rendered: str, processor: Any) -> bool:
    """Whether each video has its place in what a template rendered: many templates were written for images alone."""
    count = sum(kind == "video" for pieces in marks for kind, _ in pieces)
    return not count or rendered.count(processor.video_token) == count


def _apply(
    processor: Any,
    template: str,
    messages: Sequence[dict[str, Any]],
    generation_prompt: bool,
    tools: Sequence[dict[str, Any]] | None = None,
) -> str:
    """Applies a chat template.

    Raises:
        ValueError: The template refuses the conversation, for example its order of roles.
    """
    try:
        settings = {"chat_template": template, "add_generation_prompt": generation_prompt} | (
            {"tools": tools} if tools else {}
        )
        return processor.apply_chat_template(messages, tokenize=False, **settings)
    except AssertionError:  # no day was set, which is no fault of the conversation
        raise
    except Exception as error:  # templates raise jinja2's errors, and whatever their filters do
        raise ValueError(f"the chat template refuses a conversation: {' '.join(str(error).split())[:300]}") from error
