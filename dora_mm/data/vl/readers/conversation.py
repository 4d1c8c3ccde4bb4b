"""Checks the turns of a conversation, as all shapes of chat files have them, and makes an example of them."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, pairwise
from typing import NamedTuple

from dora_mm.data.vl.example import IMAGE, PLACE, VIDEO, Example, Role, Turn, plain_text
from dora_mm.data.vl.rows import RowError

ROLES: dict[str, Role] = {  # in lower case
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
}
CALLS = ("function_call", "tool_call")  # each model writes them in a form of its own
# Of a marker's image: its own one, the number of one of the row, or None: the next of the row; VIDEO: its next video
ImagePlace = str | int | None


class Dialogue(NamedTuple):
    """What a row says, by turn, before it is checked.

    Attributes:
        names: Who says it, in the words of the file.
        texts: With IMAGE and VIDEO markers, and ESCAPED ones where the text has these.
        losses: Whether it is learned; None where the file does not say so.
        places: The images of the turn's markers.
        images: The images that are keys of the row, as paths or data URLs.
        videos: The videos that are keys of the row, as paths.
    """

    names: list[str]
    texts: list[str]
    losses: list[bool | None]
    places: list[Sequence[ImagePlace]]
    images: list[str]
    videos: list[str]

    def followed_by(self, other: "Dialogue") -> "Dialogue":
        """The turns of both."""
        turns = (self.names + other.names, self.texts + other.texts, self.losses + other.losses)
        files = (self.images + other.images, self.videos + other.videos)
        return Dialogue(*turns, self.places + other.places, *files)


def conversation(said: Dialogue, name: str) -> Example:
    """A conversation as an example. Only the assistant's turns carry loss: all, or those of which the file says so.

    Where a row has images or videos and no marker, the markers come first in the user's first turn. Where it has videos
    alone and as many IMAGE markers, these are the places of its videos, as in LLaVA's files.

    Args:
        said: Its turns and images.
        name: Its id.

    Raises:
        RowError: The turns do not alternate, one is empty, an image or loss is where none can be, or there are not as
            many images or videos as markers.
    """
    roles = _roles(tuple(said.names))
    first = roles.index("user")
    texts = said.texts
    if not all(texts) or any(map(str.isspace, texts)):
        raise RowError(_first_empty(roles, texts))
    places = [*chain.from_iterable(said.places)]
    if places and any(found and role == "assistant" for role, found in zip(roles, said.places, strict=True)):
        raise RowError(
            "has an image in a turn of the assistant, which can only have text (with a backslash, it is text)"
        )
    if said.videos and not said.images and places == [None] * len(said.videos):
        texts, places = [PLACE.sub(VIDEO, text) for text in texts], [VIDEO] * len(places)
    images = _in_order(said.images, said.videos, places)
    if not places:
        marked = IMAGE * len(said.images) + VIDEO * len(said.videos) + texts[first]
        texts = [*texts[:first], marked, *texts[first + 1 :]]
    turns = tuple(map(Turn._make, zip(roles, texts, _learned(roles, said.losses), strict=True)))  # faster than Turn()
    answers = (plain_text(texts[-1]),) if roles[-1] == "assistant" else ()
    question = plain_text(texts[-2 if answers else -1]).strip()
    return Example(name, tuple(images), question, answers, (1.0,) * len(answers), turns=turns)


@lru_cache(maxsize=1000)  # most rows have one of a few sequences
def _roles(names: tuple[str, ...]) -> tuple[Role, ...]:
    """The roles of turns, which must alternate and begin with the user's, after at most one system turn."""
    roles: list[Role] = [_role(name) for name in names]
    said = roles[1:] if roles[:1] == ["system"] else roles
    if not said:
        raise RowError("has no turns")
    if "system" in said:
        raise RowError("has a system turn that is not the first")
    if said[0] == "assistant":
        raise RowError("begins with the assistant")
    if said[0] == "tool":
        raise RowError("begins with a tool")
    for role, following in pairwise(said):
        if role == following != "tool":
            raise RowError(f"has two turns of the {role} in a row")
        if (role, following) in (("user", "tool"), ("tool", "user")):
            raise RowError(f"has a turn of the {following} after one of the {role}: between them is the assistant's")
    return tuple(roles)


def _role(speaker: str) -> Role:
    role = ROLES.get(speaker.lower())
    if speaker.lower() in CALLS:
        raise RowError(f"has a turn of {speaker!r}: write the call as the assistant's text, as the model writes it")
    if role is None:
        raise RowError(f"has a turn of {speaker[:20]!r}: the roles are {', '.join(ROLES)}")
    return role


def _first_empty(roles: Sequence[Role], texts: list[str]) -> str:
    role = next(role for role, text in zip(roles, texts, strict=True) if not text or text.isspace())
    return "has an empty answer" if role == "assistant" else f"has an empty turn of the {role}"


def _in_order(images: list[str], videos: list[str], places: Sequence[ImagePlace]) -> list[str]:
    """The images and videos in the order of their markers."""
    if not places or (not videos and places.count(None) == len(places) == len(images)):
        return images + videos
    if places.count(VIDEO) != len(videos):
        raise RowError(f"has {_count(len(videos), 'video')}, but {_count(places.count(VIDEO), f'{VIDEO} marker')}")
    following = iter(videos)
    places = [next(following) if place == VIDEO else place for place in places]
    if numbers := {place for place in places if isinstance(place, int)}:
        return _by_number(images, places, numbers)
    num_own = len(places) - places.count(None)
    if len(images) + num_own != len(places):
        raise RowError(f"has {_count(len(images) + num_own, 'image')}, but {_count(len(places), f'{IMAGE} marker')}")
    remaining = iter(images)
    return [next(remaining) if place is None else str(place) for place in places]


def _by_number(images: list[str], places: Sequence[ImagePlace], numbers: set[int]) -> list[str]:
    """The images in the order of their markers, which have numbers."""
    if None in places:
        raise RowError("has markers of images with a number and others without")
    if numbers != set(range(len(images))):
        raise RowError("has markers of images with numbers that are not those of its images")
    return [images[place] if isinstance(place, int) else str(place) for place in places]


def _learned(roles: tuple[Role, ...], losses: list[bool | None]) -> Sequence[bool]:
    """Which turns carry loss."""
    if losses.count(None) == len(losses):
        return [role == "assistant" for role in roles]
    learned = [role == "assistant" and loss is not False for role, loss in zip(roles, losses, strict=True)]
    if True in losses and any(loss and not learns for loss, learns in zip(losses, learned, strict=True)):
        raise RowError("asks for loss on a turn that is not the assistant's")
    if roles[-1] == "assistant" and True not in learned:
        raise RowError("has `loss: false` for every answer")
    return learned


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"
