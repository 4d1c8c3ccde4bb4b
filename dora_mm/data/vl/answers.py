"""The record of a model's answer: its text, the thought before it, why it ended, and whether there is one at all."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from dora_mm.data.vl.example import Example, Predictions
from dora_mm.utils.messages import shown

STOP, LENGTH = "stop", "length"  # why an answer ended, in the words of OpenAI's protocol
FAIL_MESSAGE = "Failed to obtain answer via API."  # VLMEvalKit's `fail_msg` in place of an answer (vlmeval/api/base.py)
MOST_NAMED = 5  # ids in a sentence
# How chat templates write a thought: the first tag begins it, the second one ends it.
Tags = tuple[tuple[str, str], ...]
TAGS: Tags = (
    ("<think>", "</think>"),  # Qwen3, Qwen3.5, GLM-4.5V, InternVL3.5, MiMo-VL
    ("<thinking>", "</thinking>"),
    ("◁think▷", "◁/think▷"),  # Kimi-VL-Thinking
    ("[THINK]", "[/THINK]"),  # Magistral, Ministral
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis", "<|channel|>final<|message|>"),  # gpt-oss
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<seed:think>", "</seed:think>"),
)


@lru_cache
def patterns(tags: Tags) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What finds the tags that begin a thought, and those that end one."""
    begin, end = ("|".join(map(re.escape, side)) for side in zip(*tags, strict=True))
    return re.compile(begin), re.compile(end)


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """An answer.

    Attributes:
        text: The text without the thought; "": there is none.
        thought: What was taken off before the text, with its tags; "": nothing.
        ended: Why it ended: "stop", "length" at the most tokens, or another reason of a server; None: not known.
        failure: Why it did not arrive; "": it did.
    """

    text: str
    thought: str = ""
    ended: str | None = None
    failure: str = ""

    @classmethod
    def of(cls, found: "str | ModelAnswer") -> "ModelAnswer":
        """An answer of which no more than its text may be known."""
        return cls(found) if isinstance(found, str) else found

    @property
    def missing(self) -> bool:
        """Whether no text was given: such an answer scores 0."""
        return not self.text.strip()

    @property
    def has_thought(self) -> bool:
        """Whether a thought was taken off; an empty pair of tags is none."""
        begin, end = patterns(TAGS)
        return bool(end.sub("", begin.sub("", self.thought)).strip())

    def without_thought(
        self, references: Sequence[str] = (), *, opened: bool = False, tags: Tags = TAGS
    ) -> "ModelAnswer":
        """The answer with its thought apart, unless references have thoughts, too.

        A thought is all up to the last tag that ends one, since many templates write the tag that begins it into the
        prompt; and all of an answer that begins with a tag and never ends the thought.

        Args:
            references: The accepted answers.
            opened: Whether the prompt has begun a thought: an answer that was cut before its end has no text.
            tags: The tags of thoughts.
        """
        begin, end = patterns(tags)
        if any(end.search(reference) for reference in references):
            return self
        ends = [found.end() for found in end.finditer(self.text)]
        is_unfinished = begin.match(self.text.lstrip()) or (opened and self.ended == LENGTH)
        cut = ends[-1] if ends else len(self.text) if is_unfinished else 0
        text = self.text[cut:].lstrip()
        taken = self.text[: len(self.text) - len(text)]  # with the white space behind the tag
        return replace(self, text=text.rstrip(), thought=self.thought + taken) if cut else self

    def before(self, stops: Sequence[str]) -> "ModelAnswer":
        """The answer with the part of its text in front of the first stop text."""
        ends = [end for stop in stops if (end := self.text.find(stop)) >= 0]
        return replace(self, text=self.text[: min(ends)], ended=STOP) if ends else self

    def with_thought(self) -> "ModelAnswer":
        """The answer with the thought as a part of its text."""
        return replace(self, text=self.thought + self.text, thought="")

    def stripped(self) -> "ModelAnswer":
        """The answer without white space around its text."""
        return replace(self, text=self.text.strip())

    def fields(self) -> dict[str, str]:
        """What is known of it, for a file of JSON: `ModelAnswer(**fields)` is the answer."""
        return {name: value for name, value in asdict(self).items() if value or name == "text"}


# Examples and the folder of their images -> answers; a text where no more is known of one
Answer = Callable[[Sequence[Example], str | None], Sequence[str | ModelAnswer]]
AnsweredRows = Sequence[tuple[Example, ModelAnswer]]  # each example with the record of the answer


def texts_of(answers: Sequence[str | ModelAnswer]) -> list[str]:
    """The texts of answers."""
    return [ModelAnswer.of(answer).text for answer in answers]


def predictions_of(rows: AnsweredRows) -> Predictions:
    """The rows with the texts of their answers, which scorers read."""
    return [(example, answer.text) for example, answer in rows]


def message_answer(message: Mapping[str, Any], ended: Any = None) -> ModelAnswer:
    """The answer in a message of OpenAI's protocol.

    Args:
        message: The message.
        ended: Its `finish_reason`.

    Raises:
        TypeError: See `message_texts`.
    """
    text, thought = message_texts(message)
    return ModelAnswer(text, f"<think>{thought}</think>" if thought else "", None if ended is None else str(ended))


def message_texts(message: Mapping[str, Any]) -> tuple[str, str]:
    """The text and the thought of a message of OpenAI's protocol, or of a part of one.

    vLLM, SGLang and others send the thoughts that they found apart, as `reasoning_content` or `reasoning`; Mistral's
    content is a list of thoughts and texts.

    Raises:
        TypeError: Its content is of another kind.
    """
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    content = message.get("content") or ""
    if isinstance(content, list):
        thoughts = [piece["text"] for part in content if part["type"] == "thinking" for piece in part["thinking"]]
        thought += "".join(thoughts)
        content = "".join(part["text"] for part in content if part["type"] == "text")
    if not isinstance(content, str) or not isinstance(thought, str):
        raise TypeError("a message whose content is no text")
    return content, thought


def answer_notes(rows: Iterable[tuple[str, ModelAnswer]]) -> tuple[str, ...]:
    """Sentences on answers by id: how many are missing, ended at the most tokens, or had thoughts; empty: all is well.

    Args:
        rows: Ids of examples with their answers.
    """
    rows = list(rows)
    missing = [key for key, answer in rows if answer.missing]
    cut = [key for key, answer in rows if answer.ended == LENGTH]
    num_thoughts = sum(answer.has_thought for _, answer in rows)
    notes = []
    if missing:
        failures = Counter(answer.failure for _, answer in rows if answer.failure)
        reasons = "".join(f"; {count} {failure}" for failure, count in failures.items())
        notes.append(f"{len(missing)} of {len(rows)} answers are missing, and score 0 ({_named(missing)}){reasons}")
    if cut:
        notes.append(f"{len(cut)} of {len(rows)} answers were cut at decode.max_new_tokens ({_named(cut)})")
    others = dict.fromkeys(answer.ended for _, answer in rows if answer.ended not in (None, STOP, LENGTH))
    for reason in others:
        ids = [key for key, answer in rows if answer.ended == reason]
        notes.append(f"{len(ids)} of {len(rows)} answers ended by {shown(reason, 40)} ({_named(ids)})")
    if num_thoughts:
        notes.append(f"thoughts were removed from {num_thoughts} of {len(rows)} answers")
    return tuple(notes)


def _named(ids: Sequence[str]) -> str:
    first = [*ids[:MOST_NAMED], *(["..."] if len(ids) > MOST_NAMED else [])]
    return f"{'id' if len(ids) == 1 else 'ids'} {', '.join(first)}"
