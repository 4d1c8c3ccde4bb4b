"""Contents of conversation messages: texts with markers of images and videos, and the files of these."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dora_mm.data.images.frames import VIDEO_SUFFIXES, is_video
from dora_mm.data.vl.embedded import data_url, decoded, image_name
from dora_mm.data.vl.example import ESCAPED, IMAGE, VIDEO, Example, Turn, escaped
from dora_mm.data.vl.readers.conversation import Frames, ImageReference
from dora_mm.data.vl.rows import RowError

UNREAD = ("train_detail", "loss_scale")  # keys of a message that must be empty: parts and weights of an answer
MARKS = re.compile(  # where an image is shown, by its path, its number or in turn; or with a backslash, the text itself
    r"\\?(?:<image>|<img>(?P<path>[^<>]*)</img>|<image[ _](?P<number>\d+)>|(?P<video><video>)|(?P<unread><audio>))"
)
LOCATIONS = ("image", "path", "url", "base64", "image_url")  # keys of a content item that name its image
TEXT_ITEMS, IMAGE_ITEMS = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
VIDEO_LOCATIONS = ("video", "path", "url", "video_url")

NUMBERED = re.compile(r"<image[ _](\d+)>")  # in a question or its options, as MMMU has them: the place of an image
Part = tuple[str, Sequence[ImageReference]]  # a text with markers, and the images of these


def content_of(message: dict[str, Any]) -> Part:
    """The text and the images of a message."""
    for key in UNREAD:
        if message.get(key) not in (None, [], {}, ""):
            raise RowError(f"has `{key}` in a message, which is not read: an answer is learned as a whole, or not")
    content = message.get("content") or ""
    if isinstance(content, dict):  # of a tool, or the call of one
        content = json.dumps(content, ensure_ascii=False)
    if isinstance(content, str):
        return text_of(content)
    if not isinstance(content, list):
        raise RowError("has a message whose content is neither a text nor a list")
    parts = [_item(item) for item in content]
    return "".join(text for text, _ in parts), [reference for _, references in parts for reference in references]


def interleaved(example: Example) -> Example:
    """An example whose images stand where its text names them by number; those that it does not name come first.

    Raises:
        RowError: It names one that it does not have.
    """
    numbers = [int(number) - 1 for number in NUMBERED.findall(example.text)]
    if not numbers:
        return example
    if not all(0 <= number < len(example.images) for number in numbers):
        raise RowError("names an image by a number that it does not have")
    first = [image for number, image in enumerate(example.images) if number not in numbers]
    prompt = Turn("user", IMAGE * len(first) + NUMBERED.sub(IMAGE, escaped(example.text)), False)
    answers = [Turn("assistant", escaped(answer), True) for answer in example.answers[:1]]
    images = (*first, *(example.images[number] for number in numbers))
    return replace(example, images=images, turns=(prompt, *answers))


def text_of(text: Any) -> Part:
    """A text with an IMAGE or VIDEO marker at the place of each, however the file marks these."""
    if not isinstance(text, str):
        raise RowError("has content whose text is not a text")
    number = text.count(IMAGE)
    if number == text.count("<") and "\\" not in text:  # most texts; a search takes ten times as long
        return text, [None] * number
    references: list[ImageReference] = []

    def marked(found: re.Match[str]) -> str:
        if found[0][0] == "\\":
            return found[0] if found[0] in ESCAPED else found[0][1:]
        if found["unread"]:
            raise RowError("has a <audio> marker, but sounds are not read; a backslash makes it text")
        if found["video"]:
            references.append(VIDEO)
            return VIDEO
        if found["number"]:
            references.append(int(found["number"]) - 1)
        else:
            references.append(None if found["path"] is None else image_of(found["path"].strip()))
        return IMAGE

    return MARKS.sub(marked, text), references


def _item(item: Any) -> Part:
    if isinstance(item, str):
        return text_of(item)
    kind = item.get("type") if isinstance(item, dict) else None
    if kind in TEXT_ITEMS:
        return text_of(item.get("text") or "")
    if kind in ("video", "video_url"):
        values = [value for key in VIDEO_LOCATIONS if (value := item.get(key)) is not None]
        return VIDEO, [video_name(values[0]) if values else VIDEO]
    if kind not in IMAGE_ITEMS:
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
    return IMAGE, [image_of(value.get("url") if given[0] == "image_url" and isinstance(value, dict) else value)]


def video_name(video: Any) -> str | Frames:
    """A video as a path, which may have no suffix, or as its frames."""
    if isinstance(video, list) and video:
        return tuple(map(image_of, video))
    if isinstance(video, dict):  # of OpenAI's `video_url`, or as the `datasets` library writes it
        video = video.get("url") or video.get("path")
    if not isinstance(video, str):
        raise RowError("has a video that is neither the path of a file nor a list of its frames")
    name = video[7:] if video[:7].lower() == "file://" else video
    if "://" in name[:10]:
        raise RowError("names a video by its address on the network: download the videos first")
    if not is_video(name) and Path(name).suffix:  # without one, it is the id of a file
        raise RowError(f"has a video whose name does not end in {', '.join(VIDEO_SUFFIXES)}")
    return name


def image_of(image: Any) -> str:
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
