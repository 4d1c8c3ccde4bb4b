"""The shapes of rows of conversations, as the trainers have them, and one function for each that takes a row apart.

    LLaVA              {"conversations": [{"from": "human", "value": "<image> Q"}, ...], "image": "a.jpg" or ["a.jpg"]}
    LLaMA-Factory      {"conversations" or "messages": [...], "images": ["a.jpg"]}
    ms-swift           {"messages": [{"role": "user", "content": "<image>Q"}, ...], "images": ["a.jpg"], "objects": {}}
    Hugging Face, TRL  {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}],
                       "images": [...]}, or "prompt" and "completion" instead of "messages", or "image"
    axolotl            content items that name their images: {"type": "image", "path", "image", "url" or "base64": ...}

A file has the shape that the keys of its first row say. `system` may be a key of any row, and `loss` of any message of
the assistant, as in ms-swift. What cannot be trained on is refused by the name of its key. Types are checked here and
not by a schema, which would copy every row: a file may have millions of turns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from dora_mm.data.vl.embedded import data_url, decoded, image_name
from dora_mm.data.vl.example import IMAGE
from dora_mm.data.vl.readers.conversation import Dialogue
from dora_mm.data.vl.rows import RowError

JsonRow = dict[str, Any]
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


class Shape(NamedTuple):
    """One shape of rows.

    Attributes:
        name: Whose shape it is, and its keys.
        read: Takes a row apart; raises RowError for what does not fit or is not read.
    """

    name: str
    read: Callable[[JsonRow], Dialogue]


def read_conversations(row: JsonRow) -> Dialogue:
    """Reads a row of LLaVA or LLaMA-Factory with turns that say `from` whom they are."""
    turns = row.get("conversations")
    said = Dialogue(_texts(turns, "from"), _texts(turns, "value"), _losses(turns), None, [])
    return _with_keys(row, said)


def read_messages(row: JsonRow) -> Dialogue:
    """Reads a row of LLaMA-Factory, ms-swift, Hugging Face or axolotl with `messages`."""
    return _with_keys(row, _said(row.get("messages")))


def read_prompt(row: JsonRow) -> Dialogue:
    """Reads a row of TRL with `prompt` and `completion`: as there, the answers inside the prompt carry no loss."""
    prompt, completion = (
        _said([{"role": role, "content": given}] if isinstance(given, str) else given or [])
        for given, role in ((row.get("prompt"), "user"), (row.get("completion"), "assistant"))
    )
    losses = [False if loss is None else loss for loss in prompt.losses]
    places = [*(prompt.places or ()), *(completion.places or ())]
    said = Dialogue(
        prompt.names + completion.names, prompt.texts + completion.texts, losses + completion.losses, places, []
    )
    return _with_keys(row, said)


LLAVA = Shape("LLaVA (conversations, image)", read_conversations)
LLAMA_FACTORY = Shape("LLaMA-Factory (conversations, images)", read_conversations)
LLAMA_FACTORY_MESSAGES = Shape("LLaMA-Factory (messages, images)", read_messages)
SWIFT = Shape("ms-swift (messages with loss, or beside objects, videos, audios)", read_messages)
HUGGING_FACE = Shape("Hugging Face (messages)", read_messages)
TRL = Shape("TRL (prompt, completion)", read_prompt)
AXOLOTL = Shape("axolotl (messages whose items name their images)", read_messages)
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


def _shape_of_messages(row: JsonRow) -> Shape:
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


def _texts(turns: Any, key: str) -> list[str]:
    """The texts of all turns under a key."""
    try:
        texts = [turn[key] for turn in turns]
    except (TypeError, KeyError):
        raise RowError(f"has no list of turns that each have `{key}`") from None
    if texts and set(map(type, texts)) != {str}:
        raise RowError(f"has a turn whose `{key}` is not a text")
    return texts


def _losses(turns: Any) -> list[bool | None]:
    losses = [turn.get("loss") for turn in turns]
    if losses.count(None) < len(losses) and not {bool, type(None)}.issuperset(map(type, losses)):
        raise RowError("has a `loss` that is neither true nor false")
    return losses


def _said(messages: Any) -> Dialogue:
    """What messages say."""
    names = _texts(messages, "role")
    contents = [_content(message) for message in messages]
    texts = ["".join(text for text, _ in parts) for parts in contents]
    places = [[place for _, found in parts for place in found] for parts in contents]
    return Dialogue(names, texts, _losses(messages), places, [])


Part = tuple[str, list[str | None]]  # a text with markers, and the images of these, None for keys of the row


def _content(message: JsonRow) -> list[Part]:
    """The parts of a message."""
    for key, what in UNREAD_IN_MESSAGES.items():
        if message.get(key) not in (None, [], {}, ""):
            raise RowError(f"has {what} in a message: only `loss`, true or false, says what is learned")
    content = message.get("content") or ""
    if isinstance(content, str):
        return [_text(content)]
    if not isinstance(content, list):
        raise RowError("has a message whose content is neither a text nor a list")
    return [_item(item) for item in content]


def _text(text: Any) -> Part:
    if not isinstance(text, str):
        raise RowError("has content whose text is not a text")
    return text, [None] * text.count(IMAGE)


def _item(item: Any) -> Part:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text":
        return _text(item.get("text") or "")
    if kind not in ("image", "image_url"):
        raise RowError(f"has content of the type {str(kind)[:20]!r}: only text and images are read")
    given = [key for key in LOCATIONS if item.get(key) is not None]
    if len(given) > 1:
        raise RowError(f"has an image with both {' and '.join(given)}")
    if not given:
        return IMAGE, [None]
    value = item[given[0]]
    if given[0] == "base64" and isinstance(value, str):
        return IMAGE, [decoded(value)]
    return IMAGE, [_name(value.get("url") if given[0] == "image_url" and isinstance(value, dict) else value)]


def _with_keys(row: JsonRow, said: Dialogue) -> Dialogue:
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
        said.texts.insert(0, *_texts([row], "system"))
        said.losses.insert(0, None)
        if said.places is not None:
            said.places.insert(0, _text(system)[1])
    return said


def _check_unread(row: JsonRow) -> None:
    for key, what in UNREAD.items():
        if not _is_empty(row.get(key)):
            raise RowError(f"has {key}, but {what} are not read: leave it out")


def _is_empty(value: Any) -> bool:
    """Whether there is nothing in a value: Arrow files have every key in every row."""
    if isinstance(value, dict):
        return all(_is_empty(member) for member in value.values())
    return value is None or (isinstance(value, str | list) and not value)


def _name(image: Any) -> str:
    """An image as a path or a data URL; a dict is what the `datasets` library writes, in JSON with base64."""
    if isinstance(image, dict):
        content = image.get("bytes")
        if isinstance(content, str):
            return decoded(content)
        image = content if content is not None else image.get("path") or ""
    if isinstance(image, bytes):
        return data_url(image)
    if not isinstance(image, str):
        raise RowError("has an image that is neither a path nor the bytes of a file")
    return image_name(image)
