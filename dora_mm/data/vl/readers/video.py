"""Questions about clips (TVQA, How2QA) and their captions (TVC, YC2C), with subtitles, in the files of VALUE.

What the model reads of a clip, before the prompt, is two parts in one text:
    [Subs] all that is said
    [Q] the question [TS] (12.1-20.5) [Choices] a0: first. a1: second.
The line break is there to part them again: subtitles are long, and what does not fit must be cut from them alone.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from dora_mm.config.vl import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import json_lines
from dora_mm.data.vl.rows import BadRows, Id, Index, Line, RowError, Text, good_rows

__all__ = ["SUBTITLES_END", "read_video_captions", "read_video_qa", "split_subtitles", "video_text"]

SUBTITLES_END = "\n"  # in neither part: white space within them is made single spaces
CHOICES = ("a0", "a1", "a2", "a3", "a4")  # How2QA has four
Times = Text | list[int | float]  # "12.1-20.5" or [12.1, 20.5], in seconds


class _Spoken(TypedDict):
    text: str


class _Subtitles(TypedDict):
    vid_name: Text
    sub: list[_Spoken]


class _Question(TypedDict):
    qid: Id
    vid_name: Text
    q: Text
    ts: Times
    a0: str
    a1: str
    a2: NotRequired[str]
    a3: NotRequired[str]
    a4: NotRequired[str]
    answer_idx: NotRequired[Index]


class _Description(TypedDict):
    desc: Line
    type: NotRequired[str]


class _Clip(TypedDict):
    clip_id: Id
    vid_name: Text
    ts: NotRequired[Times]
    descs: NotRequired[Annotated[list[_Description], Field(min_length=1)]]


QUESTION, CLIP, SUBTITLES = TypeAdapter(_Question), TypeAdapter(_Clip), TypeAdapter(_Subtitles)


class Spoken(NamedTuple):
    id: str  # of the clip
    text: str


def video_text(subtitles: str | None, rest: str) -> str:
    """The whole text of a clip; `split_subtitles` takes it apart. Where there are no subtitles it is `rest` alone."""
    rest = " ".join(rest.split())
    return rest if subtitles is None else " ".join(["[Subs]", *subtitles.split()]) + SUBTITLES_END + rest


def split_subtitles(text: str) -> tuple[str, str]:
    """("[Subs] ...", "[Q] ..."), either of them empty where the clip has none."""
    subtitles, marker, rest = text.partition(SUBTITLES_END)
    return (subtitles, rest) if marker else ("", text)


def read_video_qa(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Every question of `{tvqa,how2qa}_{split}.jsonl`; the answer is "a" and the index of the right choice.

    Raises:
        ValueError: a file cannot be read, or a line is bad, or its clip is not among the subtitles, and `bad` stops.
    """
    path = Path(source.file)
    spoken = _read_subtitles(source, bad)

    def example(row: _Question) -> Example:
        names = [name for name in CHOICES if name in row]
        right = row.get("answer_idx")
        if tuple(names) != CHOICES[: len(names)]:
            raise RowError("has a gap in its choices a0, a1, ...")
        if right is not None and right >= len(names):
            raise RowError("answer_idx points at none of its choices")
        listed = " ".join(f"{name}: {row[name].strip('. ')}." for name in names)
        rest = f"[Q] {row['q']} [TS] ({row['ts']}) [Choices] {listed}"
        answers = () if right is None else (f"a{right}",)
        text = video_text(_of_clip(spoken, row["vid_name"]), rest)
        return Example(str(row["qid"]), (row["vid_name"],), text, answers, (1.0,) * len(answers))

    return good_rows(path, json_lines(path), QUESTION, example, bad)


def read_video_captions(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Every clip of `{tvc,yc2c}_{split}.jsonl` with all its descriptions; of YC2C the model reads the subtitles alone.

    Raises:
        ValueError: as `read_video_qa`.
    """
    path = Path(source.file)
    spoken = _read_subtitles(source, bad)

    def example(row: _Clip) -> Example:
        descriptions = row.get("descs", [])
        answers = tuple(description["desc"] for description in descriptions)
        kinds = tuple(description["type"] for description in descriptions if "type" in description)
        text = video_text(_of_clip(spoken, row["vid_name"]), f"[TS] ({row['ts']})" if "ts" in row else "")
        return Example(str(row["clip_id"]), (row["vid_name"],), text, answers, (1.0,) * len(answers), kinds=kinds)

    return good_rows(path, json_lines(path), CLIP, example, bad)


def _read_subtitles(source: SourceConfig, bad: BadRows) -> dict[str, str] | None:
    """What is said, by clip (50 MB for TVQA's 22,000): a clip comes in any order, and with many questions."""
    if source.subtitles is None:
        return None
    path = Path(source.subtitles)

    def joined(row: _Subtitles) -> Spoken:
        return Spoken(row["vid_name"], " ".join(line["text"].strip() for line in row["sub"]))

    return {clip.id: clip.text for clip in good_rows(path, json_lines(path), SUBTITLES, joined, bad)}


def _of_clip(spoken: dict[str, str] | None, clip: str) -> str | None:
    if spoken is None:
        return None
    if clip not in spoken:
        raise RowError("is about a clip that has no usable line among the subtitles")
    return spoken[clip]
