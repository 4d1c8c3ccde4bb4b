"""Questions about video clips (TVQA, How2QA) and captions of clips (TVC, YC2C), with subtitles, in the files of VALUE.

The text of an example, which the model reads before the prompt, has two parts:
    [Subs] the subtitles of the clip
    [Q] the question [TS] (12.1-20.5) [Choices] a0: first. a1: second.
The line break allows them to be separated again: subtitles are long, and only they may be truncated to fit. A clip that
the file of subtitles lacks, as some of How2QA do, has empty ones.
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple, NotRequired

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from dora_mm.config.schema import Text
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import json_lines
from dora_mm.data.vl.rows import BadRows, Id, Index, Line, RowError, good_rows

log = logging.getLogger(__name__)
SUBTITLES_END = "\n"  # occurs in neither part: their white space is normalised to single spaces
CHOICES = ("a0", "a1", "a2", "a3", "a4")  # How2QA has four
Times = Text | list[int | float]  # "12.1-20.5" or [12.1, 20.5], in seconds


class _SubtitleLine(TypedDict):
    text: str


class _SubtitleLines(TypedDict):
    vid_name: Text
    sub: list[_SubtitleLine]


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


QUESTION, CLIP, SUBTITLES = TypeAdapter(_Question), TypeAdapter(_Clip), TypeAdapter(_SubtitleLines)


class ClipSubtitles(NamedTuple):
    """All subtitles of one clip."""

    id: str  # the clip's name
    text: str


def video_text(subtitles: str | None, rest: str) -> str:
    """The text of an example, which `split_subtitles` separates again.

    Args:
        subtitles: The subtitles of the clip, None where the source has none.
        rest: Everything after the subtitles: question, time span and choices.
    """
    rest = " ".join(rest.split())
    return rest if subtitles is None else " ".join(["[Subs]", *subtitles.split()]) + SUBTITLES_END + rest


def split_subtitles(text: str) -> tuple[str, str]:
    """Splits a text into ("[Subs] ...", "[Q] ..."); a part that the text does not have is empty."""
    subtitles, marker, rest = text.partition(SUBTITLES_END)
    return (subtitles, rest) if marker else ("", text)


def read_video_qa(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of `{tvqa,how2qa}_{split}.jsonl`; the answer is "a" and the index of the correct choice.

    Raises:
        ValueError: A file cannot be read; `bad` is set to "stop" and a line is bad; or no clip has subtitles although
            the source names a file of them.
    """
    path = source.path
    subtitles = _Subtitles(source, bad)

    def example(row: _Question) -> Example:
        names = [name for name in CHOICES if name in row]
        correct = row.get("answer_idx")
        if tuple(names) != CHOICES[: len(names)]:
            raise RowError("has a gap in its choices a0, a1, ...")
        if correct is not None and correct >= len(names):
            raise RowError("has an answer_idx that is not the index of a choice")
        listed = " ".join(f"{name}: {row[name].strip('. ')}." for name in names)
        rest = f"[Q] {row['q']} [TS] ({row['ts']}) [Choices] {listed}"
        answers = () if correct is None else (f"a{correct}",)
        text = video_text(subtitles.of(row["vid_name"]), rest)
        return Example(str(row["qid"]), (row["vid_name"],), text, answers, (1.0,) * len(answers))

    return subtitles.reported(good_rows(path, json_lines(path), QUESTION, example, bad))


def read_video_captions(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every clip of `{tvc,yc2c}_{split}.jsonl` with all its descriptions; the text of YC2C has only subtitles.

    Raises:
        ValueError: As in `read_video_qa`.
    """
    path = source.path
    subtitles = _Subtitles(source, bad)

    def example(row: _Clip) -> Example:
        descriptions = row.get("descs", [])
        answers = tuple(description["desc"] for description in descriptions)
        kinds = tuple(description["type"] for description in descriptions if "type" in description)
        text = video_text(subtitles.of(row["vid_name"]), f"[TS] ({row['ts']})" if "ts" in row else "")
        return Example(str(row["clip_id"]), (row["vid_name"],), text, answers, (1.0,) * len(answers), kinds=kinds)

    return subtitles.reported(good_rows(path, json_lines(path), CLIP, example, bad))


class _Subtitles:
    """The subtitles of a source, all in memory (50 MB for TVQA's 22,000 clips), since questions come in any order."""

    def __init__(self, source: SourceConfig, bad: BadRows) -> None:
        self._source, self._texts = source, None
        self._clips: set[str] = set()  # of the rows so far
        if source.subtitles is not None:
            path = Path(source.subtitles)
            clips = good_rows(path, json_lines(path), SUBTITLES, _joined, bad)
            self._texts = {clip.id: clip.text for clip in clips}

    def of(self, clip: str) -> str | None:
        """The subtitles of a clip, "" if the file has none for it; None if the source has no file."""
        if self._texts is None:
            return None
        self._clips.add(clip)
        return self._texts.get(clip, "")

    def reported(self, rows: Iterable[Example]) -> Iterator[Example]:
        """The rows; after the last that is taken, a warning if clips have no subtitles.

        Raises:
            ValueError: No clip has any.
        """
        complete = False
        try:
            yield from rows
            complete = True
        finally:
            self._report(complete)

    def _report(self, complete: bool) -> None:
        missing = sorted(self._clips - set(self._texts or ()))
        if complete and missing and len(missing) == len(self._clips):
            raise ValueError(
                f"{self._source.subtitles} has no subtitles of any clip in {self._source.title}: give the file that "
                "belongs to it, or leave subtitles out"
            )
        if missing:
            log.warning(
                "%s: %d of %d clips have no subtitles in %s, so theirs are empty (one is %s)",
                *(self._source.title, len(missing), len(self._clips), self._source.subtitles, missing[0]),
            )


def _joined(row: _SubtitleLines) -> ClipSubtitles:
    return ClipSubtitles(row["vid_name"], " ".join(line["text"].strip() for line in row["sub"]))
