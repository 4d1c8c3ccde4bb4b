"""Images inside a data file: readers give each as a data URL, and tables keep it as a file named after its content."""

import base64
import io
import os
import re
from dataclasses import replace
from pathlib import Path

from dora_mm.data.images.decoders import MissingDecoderError, open_image
from dora_mm.data.seen import content_name
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.rows import RowError
from dora_mm.utils.atomic import flush
from dora_mm.utils.partials import partial_of

PREFIX = "data:"
SHORTEST = 64  # characters: no image is smaller in base64
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")  # without the dot that names of files have


def image_name(text: str) -> str:
    """A reference to an image as a path or a data URL.

    Args:
        text: A path, a `file://` address, a data URL, or the bare base64 of an image file.

    Raises:
        RowError: It is an address on the network, or contains something else than an image.
    """
    if len(text) >= SHORTEST and BASE64.fullmatch(text):
        return decoded(text)
    if "://" in text[:10]:
        if text[:7].lower() == "file://":
            return text[7:]
        raise RowError("names an image by its address on the network: download the images first")
    if text[:5].lower() == PREFIX:
        head, comma, content = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise RowError("has an image as a data URL that is not base64")
        return decoded(content)
    if not text.strip():
        raise RowError("has an image with an empty name")
    return text


def decoded(text: str) -> str:
    """The data URL of an image file in base64, with or without white space and padding.

    Raises:
        RowError: It is not base64, or not of an image.
    """
    packed = "".join(text.split()).rstrip("=")
    try:
        content = base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except ValueError:  # a wrong length, or characters that do not belong there
        raise RowError("has an image that is not valid base64") from None
    return data_url(content)


def data_url(content: bytes) -> str:
    """An image file as a data URL.

    Raises:
        RowError: The bytes do not start as an image file does.
    """
    try:
        with open_image(io.BytesIO(content)) as image:
            kind = (image.format or "").lower()
    except MissingDecoderError as error:
        raise RowError(f"has an embedded image in {error.kind}, which is not read: {error.advice}") from None
    except Exception as error:  # each decoder has errors of its own for damaged headers
        raise RowError("has an embedded image that cannot be read: it is damaged or of an unknown format") from error
    return f"{PREFIX}image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def without_content(example: Example) -> Example:
    """The example with a digest in place of the content of each embedded image: a benchmark's are gigabytes."""
    names = (PREFIX + content_name(name.encode(), "") if name.startswith(PREFIX) else name for name in example.images)
    return replace(example, images=tuple(names))


class ImageStore:
    """A folder of images named after their content, so that each is written once.

    Args:
        folder: The folder, created when it is needed.

    Attributes:
        folder: Its absolute path.
        names: The names of all files that examples were given.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.names: set[str] = set()
        self._written: list[Path] = []

    def stored(self, example: Example) -> Example:
        """The example with a file of this folder, by its absolute path, in place of each embedded image.

        A file appears complete or not at all; it is on disk after `flush`.

        Raises:
            OSError: A file cannot be written.
        """
        if not any(name.startswith(PREFIX) for name in example.images):
            return example
        return replace(example, images=tuple(map(self._stored, example.images)))

    def flush(self) -> None:
        """Waits until all new files are on disk: at the end, when it takes less than once for each."""
        for path in self._written:
            flush(path)
        if self._written:
            flush(self.folder)
        self._written.clear()

    def _stored(self, name: str) -> str:
        if not name.startswith(PREFIX):
            return name
        head, _, text = name.partition(",")
        content = base64.b64decode(text)
        suffix = head.removeprefix(f"{PREFIX}image/").removesuffix(";base64")
        path = self.folder / content_name(content, suffix)
        if path.name not in self.names and not (path.is_file() and path.read_bytes() == content):
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial_of(path) as partial:
                partial.write_bytes(content)
                os.replace(partial, path)
            self._written.append(path)
        self.names.add(path.name)
        return str(path)
