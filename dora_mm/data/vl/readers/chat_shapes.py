"""The shapes of rows of conversations, as the trainers have them, and one function for each that takes a row apart.

    LLaVA              {"conversations": [{"from": "human", "value": "<image> Q"}, ...], "image": "a.jpg" or ["a.jpg"]}
    LLaMA-Factory      {"conversations" or "messages": [...], "images": ["a.jpg"]}
    ms-swift           {"messages": [{"role": "user", "content": "<image>Q"}, ...], "images": ["a.jpg"], "objects": {}}
    Hugging Face, TRL  {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}],
                       "images": [...]}, or "prompt" and "completion" instead of "messages", or "image"
    axolotl            content items that name their images: {"type": "image", "path", "image", "url" or "base64": ...}
    FineVision         {"texts": [{"user": "Q", "assistant": "A"}, ...], "images": [...]}, as the Cauldron
    Alpaca             {"instruction": "Q", "input": "", "output": "A", "history": [["Q", "A"], ...]}
    query, response    {"query": "<image>Q", "response": "A", "history": [["Q", "A"], ...]}, of ms-swift

A file has the shape that the keys of its first row say. `system`, `image`, `images`, `video` and `videos` may be keys
of any row, and `loss` of any message of the assistant, as in ms-swift. What cannot be trained on is refused by the name
of its key. Types are checked here and not by a schema, which would copy every row: a file may have millions of turns.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dora_mm.data.images.frames import VIDEO_SUFFIXES, is_video
from dora_mm.data.vl.embedded import data_url, decoded, image_name
from dora_mm.data.vl.example import ESCAPED, IMAGE, VIDEO
from dora_mm.data.vl.readers.conversation import Dialogue, ImagePlace
from dora_mm.data.vl.rows import RowError

JsonRow = dict[str, Any]
UNREAD = {  # keys of a row that must be empty, and what they hold
    "audio": "sounds",
    "audios": "sounds",
    "objects": "boxes",
    "bbox": "boxes",
    "tools": "tools",
    "chosen": "preferences",
    "rejected": "preferences",
    "rejected_response": "preferences",
    "rejected_messages": "preferences",
    "kto_tag": "preferences",
}
# Keys of a message that must be empty. Trainers name the last three in a setting, or differ in what they mean.
UNREAD_IN_MESSAGES = {"tool_calls": "tool calls", "train": "`train`", "training": "`training`", "weight": "`weight`"}
MARKS = re.compile(  # where an image is shown, by its path, its number or in turn; or with a backslash, the text itself
    r"\\?(?:<image>|<img>(?P<path>[^<>]*)</img>|<image[ _](?P<number>\d+)>|(?P<video><video>)|(?P<unread><audio>))"
)
LOCATIONS = ("image", "path", "url", "base64", "image_url")  # keys of a content item that name its image
VIDEO_LOCATIONS = ("video", "path", "url", "video_url")


class Shape(NamedTuple):
    """One shape of rows.

    Attributes:
        name: Whose shape it is, and its keys.
        read: Takes a row apart; raises RowError for what does not fit or is not read.
    """

    name: str
    read: Callable[[JsonRow], Dialogue]


def read_turns(row: JsonRow) -> Dialogue:
    """Reads a row with a list of turns, which say `from` whom they are or have a `role`."""
    if "conversations" in row:
        return _with_keys(row, _said(row["conversations"], speaker="from"))
    return _with_keys(row, _said(row.get("messages")))


def read_prompt(row: JsonRow) -> Dialogue:
    """Reads a row of TRL with `prompt` and `completion`: as there, the answers inside the prompt carry no loss."""
    prompt, completion = (
        _said([{"role": role, "content": given}] if isinstance(given, str) else given or [])
        for given, role in ((row.get("prompt"), "user"), (row.get("completion"), "assistant"))
    )
    prompt.losses[:] = [False if loss is None else loss for loss in prompt.losses]
    return _with_keys(row, prompt.followed_by(completion))


def read_texts(row: JsonRow) -> Dialogue:
    """Reads a row of FineVision or the Cauldron, with `texts`: a question and its answer in each."""
    pairs = row.get("texts")
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise RowError("has no list of `texts` that each have `user` and `assistant`")
    return _with_keys(row, _exchanged((pair.get("user"), pair.get("assistant")) for pair in pairs))


def read_alpaca(row: JsonRow) -> Dialogue:
    """Reads a row with `instruction` and `output`; `input` follows the instruction, and `history` is before it."""
    asked = "\n".join(text for text in _strings(row, "instruction", "input") if text)
    return _with_keys(row, _exchanged([*_history(row), (asked, row.get("output"))]))


def read_query(row: JsonRow) -> Dialogue:
    """Reads a row with `query` and `response`, with `history` before them."""
    return _with_keys(row, _exchanged([*_history(row), (row.get("query"), row.get("response"))]))


LLAVA = Shape("LLaVA (conversations, image)", read_turns)
LLAMA_FACTORY = Shape("LLaMA-Factory (conversations, images)", read_turns)
LLAMA_FACTORY_MESSAGES = Shape("LLaMA-Factory (messages, images)", read_turns)
SWIFT = Shape("ms-swift (messages with loss, or beside objects, videos, audios)", read_turns)
HUGGING_FACE = Shape("Hugging Face (messages)", read_turns)
TRL = Shape("TRL (prompt, completion)", read_prompt)
AXOLOTL = Shape("axolotl (messages whose items name their images)", read_turns)
TEXTS = Shape("FineVision (texts, images)", read_texts)
ALPACA = Shape("Alpaca (instruction, output)", read_alpaca)
QUERY = Shape("ms-swift (query, response)", read_query)
SHAPES = (LLAVA, LLAMA_FACTORY, LLAMA_FACTORY_MESSAGES, SWIFT, HUGGING_FACE, TRL, AXOLOTL, TEXTS, ALPACA, QUERY)
BY_KEY = {"texts": TEXTS, "instruction": ALPACA, "query": QUERY, "completion": TRL, "chosen": TRL}


def shape_of(row: Any) -> Shape | None:
    """The shape of a row by its keys alone, None if it has none of these shapes."""
    if not isinstance(row, dict):
        return None
    if "conversations" in row:
        return LLAMA_FACTORY if "images" in row else LLAVA
    if "messages" in row:
        return _shape_of_messages(row)
    if isinstance(row.get("prompt"), list):
        return TRL
    return next((shape for key, shape in BY_KEY.items() if key in row), None)


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


def _said(turns: Any, speaker: str = "role") -> Dialogue:
    """What turns say; `speaker` is the key that says whose turn it is, unless the first has the other one."""
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    if "from" in first or (speaker == "from" and "role" not in first):
        return Dialogue(_texts(turns, "from"), *_marked(_texts(turns, "value"), _losses(turns)))
    names = _texts(turns, "role")
    contents = [_content(message) for message in turns]
    return Dialogue(names, [text for text, _ in contents], _losses(turns), [found for _, found in contents], [], [])


def _marked(texts: list[str], losses: list[bool | None]) -> tuple[list[str], list[bool | None], list[Any], Any, Any]:
    """What a `Dialogue` has beside its names."""
    places: list[Sequence[ImagePlace]] = [()] * len(texts)
    for number, text in enumerate(texts):
        if "<" in text:  # few have: a call for each would take as long as all else
            texts[number], places[number] = _text(text)
    return texts, losses, places, [], []


def _exchanged(pairs: Any) -> Dialogue:
    """What questions and answers say; an answer that is null is missing."""
    turns = [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    turns = turns[:-1] if turns and turns[-1][1] is None else turns
    contents = [_text(text) for _, text in turns]
    texts, places = [text for text, _ in contents], [found for _, found in contents]
    return Dialogue([role for role, _ in turns], texts, [None] * len(turns), places, [], [])


def _history(row: JsonRow) -> list[Any]:
    """The questions and answers before the last ones."""
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RowError("has a `history` that is no list of pairs")
    return pairs


def _strings(row: JsonRow, *keys: str) -> list[str]:
    """The texts under these keys, "" where there is none."""
    found = [row.get(key) or "" for key in keys]
    if set(map(type, found)) != {str}:
        raise RowError(f"has a {' or '.join(keys)} that is not a text")
    return found


Part = tuple[str, Sequence[ImagePlace]]  # a text with markers, and the images of these


def _content(message: JsonRow) -> Part:
    """The text and the images of a message."""
    for key, what in UNREAD_IN_MESSAGES.items():
        if message.get(key) not in (None, [], {}, ""):
            raise RowError(f"has {what} in a message: only `loss`, true or false, says what is learned")
    content = message.get("content") or ""
    if isinstance(content, str):
        return _text(content)
    if not isinstance(content, list):
        raise RowError("has a message whose content is neither a text nor a list")
    parts = [_item(item) for item in content]
    return "".join(text for text, _ in parts), [place for _, places in parts for place in places]


def _text(text: Any) -> Part:
    """A text with an IMAGE or VIDEO marker at the place of each, however the file marks these."""
    if not isinstance(text, str):
        raise RowError("has content whose text is not a text")
    number = text.count(IMAGE)
    if number == text.count("<") and "\\" not in text:  # most texts; a search takes ten times as long
        return text, [None] * number
    places: list[ImagePlace] = []

    def marked(found: re.Match[str]) -> str:
        if found[0][0] == "\\":
            return found[0] if found[0] in ESCAPED else found[0][1:]
        if found["unread"]:
            raise RowError("has a <audio> marker, but sounds are not read; a backslash makes it text")
        if found["video"]:
            places.append(VIDEO)
            return VIDEO
        if found["number"]:
            places.append(int(found["number"]) - 1)
        else:
            places.append(None if found["path"] is None else _name(found["path"].strip()))
        return IMAGE

    return MARKS.sub(marked, text), places


def _item(item: Any) -> Part:
    if isinstance(item, str):
        return _text(item)
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text":
        return _text(item.get("text") or "")
    if kind in ("video", "video_url"):
        values = [value for key in VIDEO_LOCATIONS if (value := item.get(key)) is not None]
        return VIDEO, [_video(values[0]) if values else VIDEO]
    if kind not in ("image", "image_url"):
        raise RowError(f"has content of the type {str(kind)[:20]!r}: only text, images and videos are read")
    given = [key for key in LOCATIONS if item.get(key) is not None]
    if len(given) > 1:
        raise RowError(f"has an image with both {' and '.join(given)}")
    if not given:
        number = item.get("index")
        if number is not None and type(number) is not int:
            raise RowError("has an image whose `index` is not a number")
        return IMAGE, [number]
    value = item[given[0]]
    if given[0] == "base64" and isinstance(value, str):
        return IMAGE, [decoded(value)]
    return IMAGE, [_name(value.get("url") if given[0] == "image_url" and isinstance(value, dict) else value)]


def _with_keys(row: JsonRow, said: Dialogue) -> Dialogue:
    """What a row says, with the images, videos and the system turn that are keys of the row."""
    if not UNREAD.keys().isdisjoint(row):
        _check_unread(row)
    said.images.extend(map(_name, _one_or_several(row, "image")))
    said.videos.extend(map(_video, _one_or_several(row, "video")))
    if row.get("system"):
        text, places = _text(*_texts([row], "system"))
        said.names.insert(0, "system")
        said.texts.insert(0, text)
        said.losses.insert(0, None)
        said.places.insert(0, places)
    return said


def _one_or_several(row: JsonRow, key: str) -> list[Any]:
    """What a row has under a key or its plural."""
    several, one = row.get(f"{key}s") or [], row.get(key)
    if one and several:
        raise RowError(f"has both {key} and {key}s")
    found = one or several
    return found if isinstance(found, list) else [found]


def _check_unread(row: JsonRow) -> None:
    for key, what in UNREAD.items():
        if not _is_empty(row.get(key)):
            raise RowError(f"has {key}, but {what} are not read: leave it out")


def _is_empty(value: Any) -> bool:
    """Whether there is nothing in a value: Arrow files have every key in every row."""
    if isinstance(value, dict):
        return all(_is_empty(member) for member in value.values())
    return value is None or (isinstance(value, str | list) and not value)


def _video(video: Any) -> str:
    """A video as a path."""
    if isinstance(video, dict):  # of OpenAI's `video_url`, or as the `datasets` library writes it
        video = video.get("url") or video.get("path")
    if not isinstance(video, str):
        raise RowError("has a video that is not the path of a file")
    name = video[7:] if video[:7].lower() == "file://" else video
    if "://" in name[:10]:
        raise RowError("names a video by its address on the network: download the videos first")
    if not is_video(name):
        raise RowError(f"has a video whose name does not end in {', '.join(VIDEO_SUFFIXES)}")
    return name


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
