"""Examples, which the readers of all data sets yield: one per question, sentence, captioned image or conversation."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

IMAGE, VIDEO = "<image>", "<video>"  # inside the text of a user's or system turn: the place of the next one
ESCAPED = (rf"\{IMAGE}", rf"\{VIDEO}")  # stand for the text of the markers themselves
BOX, REF = "<bbox>", "<ref-object>"  # inside any turn, of rows with boxes: the place of the next, or of what is in it
PLACEHOLDER = re.compile(r"(?<!\\)<(image|video)>")
LEADING = re.compile(r"(?:<(?:image|video)>(?:\r?\n)?)+")  # markers that begin a turn, and the line breaks behind them
Role = Literal["system", "user", "assistant", "tool"]


def pieces_of(text: str) -> list[str]:
    """The texts of a turn, with escaped markers as the text that they stand for; "image" or "video" between two."""
    if "<" not in text:
        return [text]
    found = PLACEHOLDER.split(text)
    found[::2] = [piece.replace(rf"\{IMAGE}", IMAGE).replace(rf"\{VIDEO}", VIDEO) for piece in found[::2]]
    return found


def plain_text(text: str) -> str:
    """The text of a turn without its markers."""
    return "".join(pieces_of(text)[::2])


def leading(text: str) -> tuple[str, str]:
    """The markers that begin a turn, with the line breaks behind them, and the rest of it."""
    marks = LEADING.match(text)
    end = marks.end() if marks else 0
    return text[:end], text[end:]


def escaped(text: str) -> str:
    """A text in which nothing is a marker, as that of a turn."""
    return text.replace(IMAGE, rf"\{IMAGE}").replace(VIDEO, rf"\{VIDEO}")


class Turn(NamedTuple):
    """One message of a conversation.

    Attributes:
        role: Whose message it is.
        text: The text as the file has it, with an IMAGE or VIDEO marker at the place of each, and an ESCAPED one where
            the text has the marker itself.
        loss: Whether the model is trained to write this text.
        calls: The calls of tools behind the text: JSON of a list of `{"type": "function", "function": {"name": ...,
            "arguments": {...}}}`; "" for none.
    """

    role: Role
    text: str
    loss: bool
    calls: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a data set.

    Attributes:
        id: The data set's own id (question_id, identifier, image id, qid), as text.
        images: File names relative to the folder of images (`COCO_val2014_000000000042.jpg`, or `val2014/...` for a
            file in a subfolder), or absolute paths: two for NLVR2, any number for conversations, which may also have
            video files, one otherwise. For tasks of clips the name of the clip. Features are looked up by `stem` of
            this name.
        text: The question or sentence as the file has it, without the prompt of the task; "" for captions. For videos
            everything that the model reads before the prompt, see readers/video.py; for multiple choice also the hint
            and the options with their letters; for conversations the user's last turn without markers.
        answers: The accepted answers: for VQA every normalised answer, for GQA and NLVR2 ("true", "false") the only
            one, for captions every reference, for multiple choice the letter, for conversations the last turn, if it is
            the assistant's and a text: what has boxes or calls is written as each model writes it. Empty where the file
            has no answers (a test split, or an empty label of the Karpathy form).
        scores: The training score of each of `answers`, from 0 to 1: min(1, 0.3 n) for a VQA answer that n people gave,
            1 in all other data sets.
        raw_answers: The ten answers of VQA, TextVQA and A-OKVQA as the file has them; empty for formats that do not
            contain them.
        kinds: The categories by which tables of scores are grouped: (answer_type, question_type) for VQA, (structural,
            semantic) for GQA, the type of each reference for video captions, (category,) for multiple choice; empty
            where the file has none.
        turns: All turns of a conversation, after at most one system turn. They have as many markers as there are
            `images`, where frames of one video count as one. Empty for all other data sets.
        options: The options of a multiple choice question, A, B, ... by position; empty for all other data sets.
        frames: For each marker, how many of `images` are the frames of its video; 0: it is of one image, or of a video
            file. Empty where all are.
        tools: The tools of a conversation: JSON of a list of `{"type": "function", "function": {"name": ...}}`; "" for
            none.
        boxes: JSON of what is in place of BOX and REF in the texts of a conversation: {"bbox": a list of lists of
            numbers, "ref": a list of texts, "norm1": whether the numbers are shares of width and height and not pixels,
            "image": for each box the number of its image}; "" for none. Of a question whose answer is a box also
            "size", the width and height of its image in pixels.
        rejected: Of preferences, the turns of the same conversation with the rejected answer; `turns` are those with
            the chosen one. Only what follows the turns that both have is learned. Empty for all other data sets.
        group: What rows have in common that are not independent, where that is more than an image: the document of a
            page; "" for nothing.
    """

    id: str
    images: tuple[str, ...]
    text: str
    answers: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    raw_answers: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()
    options: tuple[str, ...] = ()
    frames: tuple[int, ...] = ()
    tools: str = ""
    boxes: str = ""
    rejected: tuple[Turn, ...] = ()
    group: str = ""

    @property
    def prompt_turns(self) -> tuple[Turn, ...]:
        """The turns in front of the answer that ends a conversation."""
        return self.turns[:-1] if self.turns and self.turns[-1].role == "assistant" else self.turns

    def with_rejected(self) -> "Example":
        """The same conversation with the rejected answer in place of the chosen one."""
        answers = (plain_text(self.rejected[-1].text),)
        return replace(self, turns=self.rejected, answers=answers, scores=(1.0,), rejected=())


Predictions = Sequence[tuple[Example, str]]  # each example with the text of the model's answer


def stem(image: str) -> str:
    """The name under which an image's features are stored: its file name without folder and extension."""
    return image.rpartition("/")[2].rpartition(".")[0] or image.rpartition("/")[2]
