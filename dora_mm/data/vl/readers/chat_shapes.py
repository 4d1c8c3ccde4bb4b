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
    captions           {"image": "a.jpg", "text" or "caption": "A"}, as the metadata of a folder of images has them

A file has the shape that the keys of its first row say. `system`, `image`, `images`, `video`, `videos`, `tools` and
ms-swift's `objects` may be keys of any row. Of a message of the assistant `loss` (ms-swift), `weight` (OpenAI) and
`train` (axolotl) say whether it is learned. What cannot be trained on is refused by the name of its key. Types are
checked here and not by a schema, which would copy every row: a file may have millions of turns.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dora_mm.data.images.frames import is_video
from dora_mm.data.vl.readers.boxes import boxes_of
from dora_mm.data.vl.readers.contents import LOCATIONS, content_of, image_of, text_of, video_name
from dora_mm.data.vl.readers.conversation import Dialogue, ImageReference
from dora_mm.data.vl.readers.tools import tools_of, with_calls
from dora_mm.data.vl.rows import RowError

JsonRow = dict[str, Any]
UNREAD = {  # keys of a row that must be empty, and what they hold
    "audio": "sounds",
    "audios": "sounds",
    "bbox": "boxes beside `objects`",
    "kto_tag": "verdicts on single answers",
}
PAIRED = ("chosen", "rejected", "rejected_response", "rejected_messages")  # keys of a row with two answers
REFUSED = frozenset((*UNREAD, *PAIRED))
COMMON = frozenset(("id", "image", "images", "video", "videos", "system", "tools", "objects"))  # keys of any row
LEARNED = ("loss", "weight", "train", "training")  # keys of a message that say whether it is learned: true or 1, or not
KEYS = frozenset(LEARNED)


class Shape(NamedTuple):
    """One shape of rows.

    Attributes:
        name: Whose shape it is, and its keys.
        read: Takes a row apart; raises RowError for what does not fit or is not read.
        keys: The keys of a row that it reads, beside COMMON.
    """

    name: str
    read: Callable[[JsonRow], Dialogue]
    keys: frozenset[str]


def read_turns(row: JsonRow) -> Dialogue:
    """Reads a row with a list of turns, which say `from` whom they are or have a `role`."""
    if "conversations" in row:
        return _with_keys(row, _dialogue(row["conversations"], speaker="from"))
    return _with_keys(row, _dialogue(row.get("messages")))


def read_prompt(row: JsonRow) -> Dialogue:
    """Reads a row of TRL with `prompt` and `completion`: as there, the answers inside the prompt carry no loss."""
    prompt, completion = (
        _dialogue([{"role": role, "content": given}] if isinstance(given, str) else given or [])
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
    texts = [row.get(key) or "" for key in ("instruction", "input")]
    if set(map(type, texts)) != {str}:
        raise RowError("has a instruction or input that is not a text")
    instruction = "\n".join(filter(None, texts))
    return _with_keys(row, _exchanged([*_history(row), (instruction, row.get("output"))]))


def read_query(row: JsonRow) -> Dialogue:
    """Reads a row with `query` and `response`, with `history` before them."""
    return _with_keys(row, _exchanged([*_history(row), (row.get("query"), row.get("response"))]))


def read_caption(row: JsonRow) -> Dialogue:
    """Reads a row of an image and its caption: the answer to the image alone."""
    texts = captions_of(row)
    if len(texts) > 1:
        raise RowError("has several captions, of which `format: chat` reads one: `format: captions` reads all")
    return _with_keys(row, _exchanged([("", texts[0] if texts else None)]))


def captions_of(row: JsonRow) -> list[str]:
    """The captions of a row, of which there may be several."""
    given = row.get("text") if row.get("text") is not None else row.get("caption")
    texts = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(text, str) for text in texts):
        raise RowError("has a caption that is not a text")
    return texts


def images_of(row: JsonRow) -> list[str]:
    """The images that are keys of a row, as paths or data URLs."""
    return list(map(image_of, _one_or_several(row, "image")))


CONVERSATIONS, MESSAGES = frozenset(("conversations",)), frozenset(("messages",))
LLAVA = Shape("LLaVA (conversations, image)", read_turns, CONVERSATIONS)
LLAMA_FACTORY = Shape("LLaMA-Factory (conversations, images)", read_turns, CONVERSATIONS)
LLAMA_FACTORY_MESSAGES = Shape("LLaMA-Factory (messages, images)", read_turns, MESSAGES)
SWIFT = Shape("ms-swift (messages with loss, or beside objects, videos, audios)", read_turns, MESSAGES)
HUGGING_FACE = Shape("Hugging Face (messages)", read_turns, MESSAGES)
TRL = Shape("TRL (prompt, completion)", read_prompt, frozenset(("prompt", "completion")))
AXOLOTL = Shape("axolotl (messages whose items name their images)", read_turns, MESSAGES)
TEXTS = Shape("FineVision (texts, images)", read_texts, frozenset(("texts",)))
ALPACA = Shape("Alpaca (instruction, output)", read_alpaca, frozenset(("instruction", "input", "output", "history")))
QUERY = Shape("ms-swift (query, response)", read_query, frozenset(("query", "response", "history")))
CAPTIONS = Shape("image and caption (image, text or caption)", read_caption, frozenset(("text", "caption")))
SHAPES = (
    *(LLAVA, LLAMA_FACTORY, LLAMA_FACTORY_MESSAGES, SWIFT, HUGGING_FACE, TRL, AXOLOTL, TEXTS, ALPACA, QUERY),
    CAPTIONS,
)
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
    captions = CAPTIONS if row.keys() & {"image", "images"} and row.keys() & {"text", "caption"} else None
    return next((shape for key, shape in BY_KEY.items() if key in row), captions)


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
    """Whether each turn is learned; None where it does not say so."""
    return [None if KEYS.isdisjoint(turn) else _loss(turn) for turn in turns]


def _loss(turn: JsonRow) -> bool | None:
    given = {key: turn[key] for key in LEARNED if turn.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):  # false and true are equal to them
            raise RowError(f"has a `{key}` that is neither true (1) nor false (0)")
    found = {bool(value) for value in given.values()}
    if len(found) > 1:
        raise RowError(f"has {' and '.join(given)} in a message, which say different things")
    return found.pop() if found else None


def _dialogue(turns: Any, speaker: str = "role") -> Dialogue:
    """The dialogue of turns; `speaker` is the key of the speaker, unless the first turn has the other one."""
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    if "from" in first or (speaker == "from" and "role" not in first):
        names, texts, losses = _texts(turns, "from"), _texts(turns, "value"), _losses(turns)
        references: list[Sequence[ImageReference]] = [()] * len(texts)
        for number, text in enumerate(texts):
            if "<" in text:  # few have: a call for each would take as long as all else
                texts[number], references[number] = text_of(text)
    else:
        names = _texts(turns, "role")
        contents = [content_of(message) for message in turns]
        texts, references = [text for text, _ in contents], [found for _, found in contents]
        losses = _losses(turns)
    return with_calls(Dialogue(names, texts, losses, references, [""] * len(names)), turns)


def _exchanged(pairs: Any) -> Dialogue:
    """The dialogue of pairs of a question and an answer; a null answer at the end is left out."""
    turns = [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    turns = turns[:-1] if turns and turns[-1][1] is None else turns
    contents = [text_of(text) for _, text in turns]
    texts, references = [text for text, _ in contents], [found for _, found in contents]
    return Dialogue([role for role, _ in turns], texts, [None] * len(turns), references, [""] * len(turns))


def _history(row: JsonRow) -> list[Any]:
    """The questions and answers before the last ones."""
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RowError("has a `history` that is no list of pairs")
    return pairs


def _with_keys(row: JsonRow, turns_read: Dialogue) -> Dialogue:
    """Adds the images, videos, tools, boxes and the system turn that are keys of a row to its dialogue."""
    if not REFUSED.isdisjoint(row):
        _check_unread(row)
    images, videos = images_of(row), list(map(video_name, _videos(row)))
    tools = tools_of(row["tools"]) if row.get("tools") else ""
    boxes = "" if _is_empty(row.get("objects")) else boxes_of(row["objects"])
    if row.get("system"):
        text, references = text_of(*_texts([row], "system"))
        turns_read = Dialogue(["system"], [text], [None], [references], [""]).followed_by(turns_read)
    return turns_read._replace(images=images, videos=videos, tools=tools, boxes=boxes)


def _videos(row: JsonRow) -> list[Any]:
    """The videos of a row; a `video` that is a list of images has these as its frames."""
    one = row.get("video")
    if isinstance(one, list) and one and all(isinstance(name, str) and not is_video(name) for name in one):
        row = row | {"video": [one]}
    return _one_or_several(row, "video")


def _one_or_several(row: JsonRow, key: str) -> list[Any]:
    """The values that a row has under a key or its plural, as a list."""
    several, one = row.get(f"{key}s") or [], row.get(key)
    if one and several:
        raise RowError(f"has both {key} and {key}s")
    found = one or several
    return found if isinstance(found, list) else [found]


def _check_unread(row: JsonRow) -> None:
    for key, what in UNREAD.items():
        if not _is_empty(row.get(key)):
            raise RowError(f"has {key}, but {what} are not read: leave it out")
    for key in PAIRED:
        if not _is_empty(row.get(key)):
            raise RowError(f"has {key}: preferences are read by task: preference, with format: preferences")


def _is_empty(value: Any) -> bool:
    """Whether there is nothing in a value: Arrow files have every key in every row."""
    if isinstance(value, dict):
        return all(_is_empty(member) for member in value.values())
    return value is None or (isinstance(value, str | list) and not value)
