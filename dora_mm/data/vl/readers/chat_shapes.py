"""The shapes of rows of conversations, as the trainers have them, and one function for each that takes a row apart.

    LLaVA              {"conversations": [{"from": "human", "value": "<image> Q"}, ...], "image": "a.jpg" or ["a.jpg"]}
    LLaMA-Factory      {"conversations" or "messages": [...], "images": ["a.jpg"]}
    ms-swift           {"messages": [{"role": "user", "content": "<image>Q"}, ...], "images": ["a.jpg"], "objects": {}}
    Hugging Face, TRL  {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}],
                       "images": [...]}, or "prompt" and "completion" instead of "messages", or "image"
    axolotl            content items that name their images: {"type": "image", "path", "image", "url" or "base64": ...}

A file has the shape that the keys of its first row say. `system` may be a key of any row, and `loss` of any message of
the assistant, as in ms-swift. What cannot be trained on is refused by the name of its key.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from typing_extensions import NotRequired, TypedDict

from dora_mm.data.vl.embedded import data_url, decoded, image_name
from dora_mm.data.vl.example import IMAGE
from dora_mm.data.vl.readers.conversation import Said
from dora_mm.data.vl.rows import RowError

UNREAD = {  # keys of a row that must be empty, and what they hold
    "video": "videos",
    "videos": "videos",
    "audio": "sounds",
    "audios": "sounds",
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


class Shape(NamedTuple):
    """One shape of rows.

    Attributes:
        name: Whose shape it is, and its keys.
        schema: The types of a row.
        read: Takes a valid row apart; raises RowError for what is not read.
    """

    name: str
    schema: TypeAdapter[Any]
    read: Callable[[Any], Said]


def read_conversations(row: _Conversations) -> Said:
    """Reads a row of LLaVA or LLaMA-Factory with turns that say `from` whom they are."""
    said = row["conversations"]
    names, texts = [turn["from"] for turn in said], [turn["value"] for turn in said]
    return _with_keys(row, Said(names, texts, [turn.get("loss") for turn in said], None, []))


def read_messages(row: _Messages) -> Said:
    """Reads a row of LLaMA-Factory, ms-swift, Hugging Face or axolotl with `messages`."""
    return _with_keys(row, _said(row["messages"]))


def read_prompt(row: _Prompt) -> Said:
    """Reads a row of TRL with `prompt` and `completion`: as there, the answers inside the prompt carry no loss."""
    prompt, completion = (
        _said([_Message(role=role, content=given)] if isinstance(given, str) else given or [])
        for given, role in ((row["prompt"], "user"), (row.get("completion"), "assistant"))
    )
    losses = [False if loss is None else loss for loss in prompt.losses]
    places = [*(prompt.places or []), *(completion.places or [])]
    return _with_keys(
        row,
        Said(
            prompt.names + completion.names,
            prompt.texts + completion.texts,
            losses + completion.losses,
            places,
            [],
        ),
    )


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


def _with_keys(row: _Row, said: Said) -> Said:
    """What a row says, with the images and the system turn that are keys of the row."""
    if not UNREAD.keys().isdisjoint(row):
        _check_unread(row)
    images = row.get("images") or []
    if image := row.get("image"):
        if images:
            raise RowError("has both image and images")
        images = image
    said.images.extend(map(_name, images if isinstance(images, list) else [images]))
    if system := row.get("system"):
        said.names.insert(0, "system")
        said.texts.insert(0, system)
        said.losses.insert(0, None)
        if said.places is not None:
            said.places.insert(0, [None] * system.count(IMAGE))
    return said


def _check_unread(row: _Row) -> None:
    for key, what in UNREAD.items():
        if not _is_empty(row.get(key)):
            raise RowError(f"has {key}, but {what} are not read: leave it out")


def _said(messages: list[_Message]) -> Said:
    """What messages say."""
    all_places: list[list[str | None]] = []
    said = Said([], [], [], all_places, [])
    for message in messages:
        for key in UNREAD_IN_MESSAGES.keys() & message.keys():
            if message[key] not in (None, [], {}, ""):
                what = UNREAD_IN_MESSAGES[key]
                raise RowError(f"has {what} in a message: only `loss`, true or false, says what is learned")
        content = message["content"] or ""
        items = [_item(item) for item in content] if isinstance(content, list) else [_text(content)]
        said.names.append(message["role"])
        said.texts.append("".join(text for text, _ in items))
        said.losses.append(message.get("loss"))
        all_places.append([place for _, places in items for place in places])
    return said


def _text(text: str) -> tuple[str, list[str | None]]:
    """A text and the images of its markers."""
    return text, [None] * text.count(IMAGE)


def _item(item: _Item) -> tuple[str, list[str | None]]:
    """A content item as text with markers, and the images of these."""
    kind = item["type"]
    if kind == "text":
        return _text(item.get("text") or "")
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
