"""Video files to frames: a few pictures at even distances, decoded by PyAV."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dora_mm.utils.messages import first_line

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp")
FEWEST = 2  # frames of a video: some models read them in pairs
USUAL_RATE = 24.0  # frames per second of a file that does not say it


@dataclass(frozen=True)
class Video:
    """Frames of a video.

    Attributes:
        frames: (T, h, w, 3), uint8.
        times: When each is shown (T,), in seconds.
        duration: Of the whole video, in seconds.
        rate: Frames per second in the file.
    """

    frames: np.ndarray
    times: tuple[float, ...]
    duration: float
    rate: float


def is_video(name: str | Path) -> bool:
    """Whether the name of a file is that of a video."""
    return str(name).lower().endswith(VIDEO_SUFFIXES)


def load_video(path: str | Path, fps: float, max_frames: int) -> Video:
    """Decodes frames of a video: those shown in the middle of each of T stretches of equal length.

    Args:
        path: The video file.
        fps: Frames per second to take; of a short video FEWEST are taken.
        max_frames: The most to take, of a long video at greater distances.

    Raises:
        ValueError: PyAV is not installed, or the file is missing or broken; the message names the file.
    """
    with _opened(Path(path)) as container:
        stream = container.streams.video[0]
        duration = _duration(container, stream)
        count = min(max_frames, max(FEWEST, round(duration * fps)))
        wanted = [(number + 0.5) * duration / count for number in range(count)]
        found: list[tuple[float, np.ndarray]] = []
        shown = None
        for time, frame in _timed(container):
            while shown and len(found) < count and wanted[len(found)] < time:
                found.append((shown[0], _upright(shown[1])))
            if len(found) == count:
                break
            shown = time, frame
        if shown is None:
            raise ValueError("has no frames")
        found += [(shown[0], _upright(shown[1]))] * (count - len(found))
        times = tuple(time for time, _ in found)
        rate = float(stream.average_rate or USUAL_RATE)
        return Video(np.stack([frame for _, frame in found]), times, duration, rate)


def check_video(path: str | Path) -> None:
    """Decodes a whole video.

    Raises:
        ValueError: As `load_video`.
    """
    with _opened(Path(path)) as container:
        if not sum(1 for _ in container.decode(video=0)):
            raise ValueError("has no frames")


def stills(path: str | Path, count: int = 4) -> list[Image.Image]:
    """A few frames of a video, to look at.

    Raises:
        ValueError: As `load_video`.
    """
    return [Image.fromarray(frame) for frame in load_video(path, float(count), count).frames]


def _timed(container: Any) -> Iterator[tuple[float, Any]]:
    """The frames of a video with their times, in seconds from the first."""
    start = None
    for frame in container.decode(video=0):
        time = frame.time or 0.0
        start = time if start is None else start
        yield time - start, frame


def _duration(container: Any, stream: Any) -> float:
    """Seconds of a video: what its file says of its pictures, or of all, or when its last packet is shown."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if container.duration:
        return container.duration / 1e6
    times = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    container.seek(0)
    return float((max(times) - min(times)) * stream.time_base) if times else 0.0


def _upright(frame: Any) -> np.ndarray:
    """The pixels (h, w, 3) of a frame as they are shown: phones store how they were held."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens a video file; the caller decodes it inside the `with` block.

    Raises:
        ValueError: PyAV is not installed, the file is missing or has no pictures, or anything fails inside the block.
    """
    if find_spec("av") is None:
        raise ValueError(f"{path}: videos need PyAV: pip install 'dora_mm[vl]'")
    if not path.is_file():
        raise ValueError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    av: Any = import_module("av")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("has no pictures")
            yield container
    except av.FFmpegError as error:  # some of which are ValueErrors, too
        reason = first_line(error).partition(": '")[0]  # without the name of the file
        raise ValueError(f"{path} is not a complete video ({reason}): replace or delete it") from error
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
