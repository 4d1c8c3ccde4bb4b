"""Checks the turns of a conversation, as all shapes of chat files have them, and makes an example of them."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, pairwise
from typing import NamedTuple

from dora_mm.data.vl.example import IMAGE, Example, Role, Turn
from dora_mm.data.vl.rows import RowError

ROLES: dict[str, Role] = {  # in lower case
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "system": "system",
}


class Dialogue(NamedTuple):
    """What a row says, by turn, before it is checked.

    Attributes:
        names: Who says it, in the words of the file.
        texts: With an IMAGE marker at the place of each image.
        losses: Whether it is learned; None where the file does not say so.
        places: The images of the turn's markers, None for the next one of `images`; None if all are of `images`.
        images: The images that are keys of the row, as paths or data URLs.
    """

    names: list[str]
    texts: list[str]
    losses: list[bool | None]
    places: list[list[str | None]] | None
    images: list[str]


def conversation(said: Dialogue, name: str) -> Example:
    """A conversation as an example. Only the assistant's turns carry loss: all, or those of which the file says so.

    Where a row has images and no marker, the markers come first in the user's first turn.

    Args:
        said: Its turns and images.
        name: Its id.

    Raises:
        RowError: The turns do not alternate, one is empty, an image or loss is where none can be, or there are not as
            many images as markers.
    """
    roles = _roles(tuple(said.names))
    first = roles.index("user")
    texts = said.texts
    if not all(texts) or any(map(str.isspace, texts)):
        raise RowError(_first_empty(roles, texts))
    if said.places is None:
        counts = [text.count(IMAGE) if IMAGE in text else 0 for text in texts]  # `in` alone takes half the time
    else:
        counts = [*map(len, said.places)]
    if any(counts[first + 1 :: 2]):
        raise RowError("has an image in a turn of the assistant, which can only have text")
    places = [None] * sum(counts) if said.places is None else [*chain.from_iterable(said.places)]
    images = _in_order(said.images, places)
    if len(images) > len(places):
        texts = [*texts[:first], IMAGE * len(images) + texts[first], *texts[first + 1 :]]
    turns = tuple(map(Turn._make, zip(roles, texts, _learned(roles, said.losses), strict=True)))  # faster than Turn()
    answers = (texts[-1],) if roles[-1] == "assistant" else ()
    question = texts[-2 if answers else -1].replace(IMAGE, "").strip()
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
    twice = next((role for role, following in pairwise(said) if role == following), None)
    if twice:
        raise RowError(f"has two turns of the {twice} in a row")
    return tuple(roles)


def _role(speaker: str) -> Role:
    role = ROLES.get(speaker.lower())
    if role is None:
        raise RowError(f"has a turn of {speaker[:20]!r}: the roles are {', '.join(ROLES)}")
    return role


def _first_empty(roles: Sequence[Role], texts: list[str]) -> str:
    role = next(role for role, text in zip(roles, texts, strict=True) if not text or text.isspace())
    return "has an empty answer" if role == "assistant" else f"has an empty turn of the {role}"


def _in_order(images: list[str], places: Sequence[str | None]) -> list[str]:
    """The images in the order of their markers."""
    if not places or places.count(None) == len(places) == len(images):
        return images
    num_own = len(places) - places.count(None)
    if len(images) + num_own != len(places):
        raise RowError(f"has {_count(len(images) + num_own, 'image')}, but {_count(len(places), f'{IMAGE} marker')}")
    remaining = iter(images)
    return [next(remaining) if place is None else place for place in places]


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
