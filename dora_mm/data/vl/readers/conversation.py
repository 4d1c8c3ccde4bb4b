"""Checks the turns of a conversation, as all shapes of chat files have them, and makes an example of them."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any, NamedTuple

from dora_mm.data.vl.example import BOX, IMAGE, PLACEHOLDER, REF, VIDEO, Example, Role, Turn, plain_text
from dora_mm.data.vl.readers.boxes import check_boxes
from dora_mm.data.vl.rows import RowError, count_of

ROLES: dict[str, Role] = {  # in lower case
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
}
Frames = tuple[str, ...]  # the images of a video
# Of a marker's image: its own one, the number of one of the row, or None: the next of the row; VIDEO: its next video
ImageReference = str | Frames | int | None


class Dialogue(NamedTuple):
    """The turns of a row, before they are checked.

    Attributes:
        names: The speaker of each turn, as the file names it.
        texts: The text of each turn, with IMAGE and VIDEO markers, and ESCAPED ones where the text has these.
        losses: Whether each turn is learned; None where the file does not specify it.
        references: The images of the turn's markers.
        calls: The calls of tools of each turn, see `Turn`.
        images: The images that are keys of the row, as paths or data URLs.
        videos: The videos that are keys of the row, as paths, or as the paths or data URLs of their frames.
        tools: The tools of the row, see `Example`.
        boxes: The boxes of the row, see `Example`.
    """

    names: list[str]
    texts: list[str]
    losses: list[bool | None]
    references: list[Sequence[ImageReference]]
    calls: list[str]
    images: Sequence[str] = ()
    videos: Sequence[str | Frames] = ()
    tools: str = ""
    boxes: str = ""

    def followed_by(self, other: "Dialogue") -> "Dialogue":
        """The turns of both."""
        fields: Any = zip(self, other, strict=True)
        return Dialogue(*(ours + theirs for ours, theirs in fields))


def conversation(dialogue: Dialogue, name: str) -> Example:
    """A conversation as an example.

    Only the assistant's turns carry loss: all that are not empty, or those of them of which the file says so.

    Where a row has images or videos and no marker, the markers come first in the user's first turn. Where it has videos
    alone and as many IMAGE markers, these are the places of its videos, as in LLaVA's files.

    Args:
        dialogue: Its turns and images.
        name: Its id.

    Raises:
        RowError: The turns are in an order that is none, one of another than the assistant is empty, an image or loss
            is where none can be, or there are not as many images, videos or boxes as markers.
    """
    roles = _roles(tuple(dialogue.names))
    texts, references = dialogue.texts, [*chain.from_iterable(dialogue.references)]
    if references and any(
        found and role == "assistant" for role, found in zip(roles, dialogue.references, strict=True)
    ):
        raise RowError(
            "has an image in a turn of the assistant, which can only have text (with a backslash, it is text)"
        )
    if dialogue.videos and not dialogue.images and references == [None] * len(dialogue.videos):
        texts, references = [PLACEHOLDER.sub(VIDEO, text) for text in texts], [VIDEO] * len(references)
    shown = _in_order(dialogue.images, dialogue.videos, references)
    if not references and shown:
        first = roles.index("user")
        marked = IMAGE * len(dialogue.images) + VIDEO * len(dialogue.videos) + texts[first]
        texts = [*texts[:first], marked, *texts[first + 1 :]]
    losses = dialogue.losses
    if not all(texts) or any(map(str.isspace, texts)):
        losses = _without_empty(roles, texts, losses, dialogue.calls)
    if dialogue.boxes:
        check_boxes(dialogue.boxes, texts)
    answers, learned = _answers(roles, texts, dialogue), _learned(roles, losses)
    if answers and True not in learned:
        raise RowError("has `loss: false` for every answer")
    turns = zip(roles, texts, learned, dialogue.calls, strict=True)
    question = plain_text(texts[-2 if roles[-1] == "assistant" and len(texts) > 1 else -1]).strip()
    images, frames = _files(shown)
    return Example(
        name,
        images,
        question,
        answers,
        (1.0,) * len(answers),
        turns=tuple(map(Turn._make, turns)),  # faster than Turn()
        frames=frames,
        tools=dialogue.tools,
        boxes=dialogue.boxes,
    )


def _answers(roles: Sequence[Role], texts: Sequence[str], dialogue: Dialogue) -> tuple[str, ...]:
    """The last turn, if it is the assistant's and a text: calls and boxes are written as each model writes them."""
    if roles[-1] != "assistant" or not texts[-1].strip() or dialogue.calls[-1]:
        return ()
    return () if dialogue.boxes and (BOX in texts[-1] or REF in texts[-1]) else (plain_text(texts[-1]),)


def _files(shown: Sequence[str | Frames]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """All files of a row, and how many of them are the frames of each video; see `Example`."""
    lists = [(one,) if isinstance(one, str) else one for one in shown]
    frames = tuple(0 if isinstance(one, str) else len(one) for one in shown) if tuple in map(type, shown) else ()
    return tuple(chain.from_iterable(lists)), frames


@lru_cache(maxsize=1000)  # most rows have one of a few sequences
def _roles(names: tuple[str, ...]) -> tuple[Role, ...]:
    """The roles of turns, which are the user's and the assistant's, after at most one system turn.

    Whether the user may speak twice in a row, or the assistant first, a model's chat template says.
    """
    unknown = [name for name in names if name.lower() not in ROLES]
    if unknown:
        raise RowError(f"has a turn of {unknown[0][:20]!r}: the roles are {', '.join(ROLES)}")
    roles: list[Role] = [ROLES[name.lower()] for name in names]
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    if not dialogue:
        raise RowError("has no turns")
    if "system" in dialogue:
        raise RowError("has a system turn that is not the first")
    if dialogue[0] == "tool":
        raise RowError("begins with a tool")
    if "user" not in dialogue:
        raise RowError("has no turn of the user")
    for role, following in pairwise(dialogue):
        if role == following == "assistant":
            raise RowError("has two turns of the assistant in a row")
        if (role, following) in (("user", "tool"), ("tool", "user")):
            raise RowError(f"has a turn of the {following} after one of the {role}: between them is the assistant's")
    return tuple(roles)


def _without_empty(
    roles: Sequence[Role], texts: Sequence[str], losses: list[bool | None], calls: Sequence[str]
) -> list[bool | None]:
    """The values of `losses`, in which answers that are empty are not learned."""
    empty = [not (text.strip() or call) for text, call in zip(texts, calls, strict=True)]
    nobody = [role for role, is_empty in zip(roles, empty, strict=True) if is_empty and role != "assistant"]
    if nobody:
        raise RowError(f"has an empty turn of the {nobody[0]}")
    dialogue = [role == "assistant" if loss is None else loss for role, loss in zip(roles, losses, strict=True)]
    return [loss and not is_empty for loss, is_empty in zip(dialogue, empty, strict=True)] if any(empty) else losses


def _in_order(
    images: Sequence[str], videos: Sequence[str | Frames], references: Sequence[ImageReference]
) -> Sequence[str | Frames]:
    """The images and videos in the order of their markers."""
    if not references or (not videos and references.count(None) == len(references) == len(images)):
        return [*images, *videos]
    if references.count(VIDEO) != len(videos):
        raise RowError(
            f"has {count_of(len(videos), 'video')}, but {count_of(references.count(VIDEO), f'{VIDEO} marker')}"
        )
    following = iter(videos)
    references = [next(following) if reference == VIDEO else reference for reference in references]
    if numbers := {reference for reference in references if isinstance(reference, int)}:
        return _by_number(images, references, numbers)
    num_own = len(references) - references.count(None)
    if len(images) + num_own != len(references):
        raise RowError(
            f"has {count_of(len(images) + num_own, 'image')}, but {count_of(len(references), f'{IMAGE} marker')}"
        )
    remaining = iter(images)
    return [
        next(remaining) if reference is None else reference
        for reference in references
        if not isinstance(reference, int)
    ]


def _by_number(images: Sequence[str], references: Sequence[ImageReference], numbers: set[int]) -> list[str | Frames]:
    """The images in the order of their markers, which have numbers."""
    if None in references:
        raise RowError("has markers of images with a number and others without")
    if numbers != set(range(len(images))):
        raise RowError("has markers of images with numbers that are not those of its images")
    return [
        images[reference] if isinstance(reference, int) else reference
        for reference in references
        if reference is not None
    ]


def _learned(roles: tuple[Role, ...], losses: list[bool | None]) -> Sequence[bool]:
    """Which turns carry loss: none where nothing that is asked has an answer."""
    if "assistant" not in roles[roles.index("user") :]:
        return [False] * len(roles)
    if losses.count(None) == len(losses):
        return [role == "assistant" for role in roles]
    learned = [role == "assistant" and loss is not False for role, loss in zip(roles, losses, strict=True)]
    if True in losses and any(loss and not learns for loss, learns in zip(losses, learned, strict=True)):
        raise RowError("asks for loss on a turn that is not the assistant's")
    return learned
