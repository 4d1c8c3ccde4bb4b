"""The shapes of rows of conversations: what the files of each trainer look like, and one function for each that reads it.

    LLaVA                {"conversations": [{"from": "human", "value": "<image>\nQ"}, ...], "image": "a.jpg" | [...]}
    LLaMA-Factory        {"conversations" or "messages": [...], "images": ["a.jpg"]}
    ms-swift             {"messages": [{"role": "user", "content": "<image>Q"}, ...], "images": [...], "objects": {}, ...}
    Hugging Face, TRL    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}]},
                         or "prompt" and "completion"; with "image" or "images"
    axolotl              content items that name their images: {"type": "image", "path" | "image" | "url" | "base64": ...}

A file is taken for one shape by the keys of its first row. `system` may be a key of any row, and `loss` of any of the
assistant's messages, as ms-swift has it. What no image-text model can be trained on is refused by the name of its key.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from typing_extensions import NotRequired, TypedDict

from dora_mm.data.vl.embedded import data_url, decoded, image_name
from dora_mm.data.vl.example import IMAGE, Role, Turn
from dora_mm.data.vl.rows import RowError

ROLES: dict[str, Role] = {  # in lower case
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "system": "system",
}
UNREAD = {  # keys of a row that must be empty, and what they hold
    "video": "videos",
    "videos": "videos",
    "audio": "audio",
    "audios": "audio",
    "objects": "boxes",
    "bbox": "boxes",
    "tools": "tools",
    "chosen": "preferences",
    "rejected": "preferences",
    "rejected_response": "preferences",
    "rejected_messages": "preferences",
}
# Keys of a message that must be empty. Trainers name the last three in a setting, or differ in what they mean.
UNREAD_IN_MESSAGES = {"tool_calls": "tool calls", "train": "`train`", "training": "`training`", "weight": "`weight`"}
LOCATIONS = ("image", "path", "url", "base64", "image_url")  # keys of a content item that name its image


# An image as the `datasets` library writes it; in JSON the bytes are base64.
class _Stored(TypedDict):
    bytes: NotRequired[str | bytes | None]
    path: NotRequired[str | None]


_Image = str | bytes | _Stored


class _Address(TypedDict):
    url: str


class _Item(TypedDict):
    type: str
    text: NotRequired[str | None]
    image: NotRequired[_Image | None]
    path: NotRequired[str | None]
    url: NotRequired[str | None]
    base64: NotRequired[str | None]
    image_url: NotRequired[str | _Address | None]


class _Message(TypedDict):
    role: str
    content: str | list[_Item] | None
    loss: NotRequired[bool | None]
    tool_calls: NotRequired[Any]
    train: NotRequired[Any]
    training: NotRequired[Any]
    weight: NotRequired[Any]


_Said = TypedDict("_Said", {"from": str, "value": str, "loss": NotRequired[bool | None]})


class _Row(TypedDict):
    id: NotRequired[int | str | None]
    system: NotRequired[str | None]
    image: NotRequired[_Image | list[_Image] | None]
    images: NotRequired[_Image | list[_Image] | None]
    video: NotRequired[Any]
    videos: NotRequired[Any]
    audio: NotRequired[Any]
    audios: NotRequired[Any]
    objects: NotRequired[Any]
    bbox: NotRequired[Any]
    tools: NotRequired[Any]
    chosen: NotRequired[Any]
    rejected: NotRequired[Any]
    rejected_response: NotRequired[Any]
    rejected_messages: NotRequired[Any]


class _Conversations(_Row):
    conversations: list[_Said]


class _Messages(_Row):
    messages: list[_Message]


class _Prompt(_Row):
    prompt: str | list[_Message]
    completion: NotRequired[str | list[_Message] | None]


class Parts(NamedTuple):
    """What a row consists of.

    Attributes:
        turns: The turns, with an IMAGE marker at the place of each image.
        places: One for each marker, in order: the image, or None for the next one of `images`.
        images: The images of the row's own key, as paths or data URLs.
    """

    turns: list[Turn]
    places: list[str | None]
    images: list[str]


class Shape(NamedTuple):
    """One shape of rows.

    Attributes:
        name: Whose shape it is, and its keys.
        schema: The types of a row.
        read: Takes a valid row apart; raises RowError for what is not read.
    """

    name: str
    schema: TypeAdapter[Any]
    read: Callable[[Any], Parts]


def read_conversations(row: _Conversations) -> Parts:
    """Reads a row of LLaVA or LLaMA-Factory with turns that say `from` whom they are."""
    parts = _start(row)
    for said in row["conversations"]:
        _add(parts, said["from"], said["value"], said.get("loss"))
    return parts


def read_messages(row: _Messages) -> Parts:
    """Reads a row of LLaMA-Factory, ms-swift, Hugging Face or axolotl with `messages`."""
    parts = _start(row)
    for message in row["messages"]:
        _add_message(parts, message, message.get("loss"))
    return parts


def read_prompt(row: _Prompt) -> Parts:
    """Reads a row of TRL with `prompt` and `completion`: as there, the answers inside the prompt carry no loss."""
    parts = _start(row)
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        given = row.get(key) or []
        messages = [_Message(role=role, content=given)] if isinstance(given, str) else given
        for message in messages:
            loss = message.get("loss")
            if loss is None and key == "prompt":
                loss = False
            _add_message(parts, message, loss)
    return parts


CONVERSATIONS, MESSAGES, PROMPT = TypeAdapter(_Conversations), TypeAdapter(_Messages), TypeAdapter(_Prompt)
LLAVA = Shape("LLaVA (conversations, image)", CONVERSATIONS, read_conversations)
LLAMA_FACTORY = Shape("LLaMA-Factory (conversations, images)", CONVERSATIONS, read_conversations)
LLAMA_FACTORY_MESSAGES = Shape("LLaMA-Factory (messages, images)", MESSAGES, read_messages)
SWIFT = Shape("ms-swift (messages with loss, or beside objects, videos, audios)", MESSAGES, read_messages)
HUGGING_FACE = Shape("Hugging Face (messages)", MESSAGES, read_messages)
TRL = Shape("TRL (prompt, completion)", PROMPT, read_prompt)
AXOLOTL = Shape("axolotl (messages whose items name their images)", MESSAGES, read_messages)
SHAPES = (LLAVA, LLAMA_FACTORY, LLAMA_FACTORY_MESSAGES, SWIFT, HUGGING_FACE, TRL, AXOLOTL)


def shape_of(row: Any) -> Shape | None:
    """The shape of a row by its keys alone, None if it has none of these shapes."""
    if not isinstance(row, dict):
        return None
    if "conversations" in row:
        return LLAMA_FACTORY if "images" in row else LLAVA
    if "messages" in row:
        return _shape_of_messages(row)
    return TRL if "completion" in row or isinstance(row.get("prompt"), list) else None


def _shape_of_messages(row: dict[str, Any]) -> Shape:
    messages = row["messages"] if isinstance(row["messages"], list) else []
    messages = [message for message in messages if isinstance(message, dict)]
    contents = [message.get("content") for message in messages]
    items = [item for content in contents if isinstance(content, list) for item in content if isinstance(item, dict)]
    if any(item.get(key) is not None for item in items for key in LOCATIONS):
        return AXOLOTL
    if items:
        return HUGGING_FACE
    if row.keys() & {"objects", "videos", "audios"} or any("loss" in message for message in messages):
        return SWIFT
    return LLAMA_FACTORY_MESSAGES if "images" in row else HUGGING_FACE


def _start(row: _Row) -> Parts:
    """The images and the system turn that are keys of a row."""
    for key in UNREAD.keys() & row.keys():
        if not _is_empty(row[key]):
            raise RowError(f"has {key}, but {UNREAD[key]} are not read: leave it out")
    if row.get("image") and row.get("images"):
        raise RowError("has both image and images")
    given = row.get("image") or row.get("images") or []
    images = [_name(image) for image in (given if isinstance(given, list) else [given])]
    parts = Parts([], [], images)
    if system := row.get("system"):
        _add(parts, "system", system, None)
    return parts


def _add_message(parts: Parts, message: _Message, loss: bool | None) -> None:
    for key in UNREAD_IN_MESSAGES.keys() & message.keys():
        if message[key] not in (None, [], {}, ""):
            raise RowError(
                f"has {UNREAD_IN_MESSAGES[key]} in a message: use `loss`, true or false, for what is learned"
            )
    content = message["content"]
    if isinstance(content, list):
        texts, places = zip(*map(_item, content), strict=True) if content else ((), ())
        _add(parts, message["role"], "".join(texts), loss, [place for found in places for place in found])
    else:
        _add(parts, message["role"], content or "", loss)


def _add(parts: Parts, role: str, text: str, loss: bool | None, places: Sequence[str | None] | None = None) -> None:
    """Adds a turn; `places` are the images of its markers, None: all are keys of the row."""
    known = ROLES.get(role) or ROLES.get(role.lower())
    if known is None:
        raise RowError(f"has a turn of {role[:20]!r}: the roles are {', '.join(ROLES)}")
    places = [None] * text.count(IMAGE) if places is None else places
    if known == "assistant":
        if places:
            raise RowError("has an image in a turn of the assistant, which can only have text")
        parts.turns.append(Turn(known, text, loss is not False))
        return
    if loss:
        raise RowError("asks for loss on a turn that is not the assistant's")
    parts.turns.append(Turn(known, text, False))
    parts.places.extend(places)


def _item(item: _Item) -> tuple[str, list[str | None]]:
    """A content item as text with markers, and the images of these."""
    kind = item["type"]
    if kind == "text":
        text = item.get("text") or ""
        return text, [None] * text.count(IMAGE)
    if kind not in ("image", "image_url"):
        raise RowError(f"has content of the type {kind[:20]!r}: only text and images are read")
    given = [key for key in LOCATIONS if item.get(key) is not None]
    if len(given) > 1:
        raise RowError(f"has an image with both {' and '.join(given)}")
    if not given:
        return IMAGE, [None]
    value: Any = item[given[0]]
    if given[0] == "base64":
        return IMAGE, [decoded(value)]
    return IMAGE, [_name(value["url"] if given[0] == "image_url" and isinstance(value, dict) else value)]


def _name(image: _Image) -> str:
    """An image as a path or a data URL."""
    if isinstance(image, dict):
        content = image.get("bytes")
        if isinstance(content, str):
            return decoded(content)
        image = content if content is not None else image.get("path") or ""
    return data_url(image) if isinstance(image, bytes) else image_name(image)


def _is_empty(value: Any) -> bool:
    """Whether there is nothing in a value: Arrow files have every key in every row."""
    if isinstance(value, dict):
        return all(_is_empty(member) for member in value.values())
    return value is None or (isinstance(value, str | list) and not value)
