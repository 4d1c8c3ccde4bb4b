"""Conversations in the shapes of all trainers, as rows of files, and small embedded images."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example, Turn
from dora_mm.data.vl.readers.chat import read_chat
from dora_mm.data.vl.rows import BadRows


def image(colour: str = "red", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(file, kind)
    return file.getvalue()


def packed(content: bytes) -> str:
    return base64.b64encode(content).decode()


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{packed(content)}"


def turns(*texts: str, system: str | None = None) -> tuple[Turn, ...]:
    """Turns that alternate, beginning with the user's."""
    said = (Turn("assistant", text, True) if n % 2 else Turn("user", text, False) for n, text in enumerate(texts))
    return (*([Turn("system", system, False)] if system else []), *said)


def said(*texts: str, **changes: Any) -> list[dict[str, Any]]:
    """LLaVA's turns."""
    return [{"from": ("human", "gpt")[n % 2], "value": text} | changes for n, text in enumerate(texts)]


def messages(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def items(*parts: Any) -> list[dict[str, Any]]:
    """Content items: texts, or the keys of an image."""
    return [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} | part for part in parts]


def as_json(folder: Path, rows: list[Any], **settings: Any) -> SourceConfig:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return SourceConfig(format="chat", file=str(path), **settings)


def as_lines(folder: Path, rows: list[Any], **settings: Any) -> SourceConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return SourceConfig(format="chat", file=str(path), **settings)


def as_parquet(folder: Path, rows: list[Any], **settings: Any) -> SourceConfig:
    """As the `datasets` library writes it: each key of any row is a column, null where a row has none."""
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return SourceConfig(format="chat", file=str(path), **settings)


QA = ("<image>\nWhat is it?", "A dog.")


def read(source: SourceConfig) -> list[Example]:
    return list(read_chat(source, BadRows("stop")))


def only(source: SourceConfig) -> Example:
    (row,) = read(source)
    return row


def refusal(source: SourceConfig) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        read(source)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(source.file)
    return message.removeprefix(source.file)


def llava(*texts: str, **keys) -> dict:
    return {"id": 17, "conversations": said(*texts)} | keys
