"""Video files to frames: a few images at even distances, decoded by PyAV."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dora_mm.data.images.pixels import load_rgb
from dora_mm.utils.messages import first_line

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp")
FEWEST = 2  # frames of a video: some models read them in pairs
USUAL_RATE = 24.0  # frames per second of a file that does not say it
# FFmpeg tells a format by the content, whatever the name of the file: playlists open other files, and most of its
# published holes are in formats and codecs in which nobody has such videos
FORMATS = ("mov", "matroska", "avi", "mpeg", "mpegts", "mpegvideo", "asf", "flv")
CODECS = (
    *("h264", "hevc", "av1", "libdav1d", "libaom-av1", "vp8", "vp9", "libvpx", "libvpx-vp9", "theora"),
    *("mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4", "wmv1", "wmv2", "wmv3", "vc1", "flv"),
    *("h263", "mjpeg", "ffv1", "huffyuv", "ffvhuff", "prores", "dnxhd", "rawvideo", "png"),
)
ALLOWED = {"format_whitelist": ",".join(FORMATS), "codec_whitelist": ",".join(CODECS), "protocol_whitelist": "file"}
# Containers that state the duration of each stream. That of others is measured in what is there, or is the file's.
STATE_DURATIONS = ("mov", "matroska", "avi")
MISSING = (0.5, 0.05)  # seconds, and share of a video, by which its images may end early: sound often lasts longer


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


def load_video(
    path: str | Path, fps: float, max_frames: int, check: Callable[[Path], object] = lambda path: None
) -> Video:
    """Decodes frames of a video: those shown in the middle of each of T stretches of equal length.

    Args:
        path: The video file.
        fps: Frames per second to take; of a short video FEWEST are taken.
        max_frames: The most to take, of a long video at greater distances.
        check: Called with a file that is there, and may compare its content: see `data/seen.py`.

    Raises:
        ValueError: PyAV is not installed, or the file is missing, broken or incomplete as far as it was read; the
            message names the file.
    """
    with _opened(Path(path)) as container:
        check(Path(path))
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
        if len(found) < count:
            _check_end(container, stream, shown[1])
        found += [(shown[0], _upright(shown[1]))] * (count - len(found))
        times = tuple(time for time, _ in found)
        rate = float(stream.average_rate or USUAL_RATE)
        return Video(np.stack([frame for _, frame in found]), times, duration, rate)


def frames_as_video(
    paths: Sequence[Path], fps: float, max_frames: int, read: Callable[[Path], bytes] = Path.read_bytes
) -> Video:
    """A video whose frames are images: all, or as many in the middle of stretches of equal length.

    Args:
        paths: The images of a size, in order.
        fps: How many of them are a second, which nothing else says.
        max_frames: The most to take.
        read: Reads an image file: see `data/seen.py`.

    Raises:
        ValueError: An image cannot be read, or two are not of one size; the message names the file.
    """
    count = min(max_frames, max(FEWEST, len(paths)))
    chosen = [int((number + 0.5) * len(paths) / count) for number in range(count)]
    frames = [np.asarray(load_rgb(paths[index], "white", read)) for index in chosen]
    for index, frame in zip(chosen, frames, strict=True):
        if frame.shape != frames[0].shape:
            raise ValueError(f"{paths[index]} is not of the size of {paths[chosen[0]]}: frames of a video are of one")
    times = tuple((index + 0.5) / fps for index in chosen)
    return Video(np.stack(frames), times, len(paths) / fps, fps)


def check_video(path: str | Path) -> None:
    """Decodes a whole video.

    Raises:
        ValueError: As `load_video`.
    """
    with _opened(Path(path)) as container:
        last = deque(_timed(container), maxlen=1)
        if not last:
            raise ValueError("has no frames")
        _check_end(container, container.streams.video[0], last[0][1])


def stills(path: str | Path) -> list[Image.Image]:
    """Four frames of a video, to look at.

    Raises:
        ValueError: As `load_video`.
    """
    return [Image.fromarray(frame) for frame in load_video(path, 4.0, 4).frames]


def _timed(container: Any) -> Iterator[tuple[float, Any]]:
    """The frames of a video with their times, in seconds from the first.

    Raises:
        ValueError: A frame is damaged. A transport stream may begin in the middle of a group of images, whose first
            frames then are, so there they pass.
    """
    start, strict = None, _states_durations(container)
    for frame in container.decode(video=0):
        time = frame.time or 0.0
        start = time if start is None else start
        if strict and frame.is_corrupt:
            raise ValueError(_incomplete(f"its frame at {time - start:.1f} seconds is damaged"))
        yield time - start, frame


def _check_end(container: Any, stream: Any, last: Any) -> None:
    """Checks that the last frame that could be decoded ends about where the file says that its images do.

    Raises:
        ValueError: It ends well before.
    """
    stated = _stated_duration(container, stream) if _states_durations(container) else None
    if stated is None:
        return
    end = (last.time or 0.0) + float((last.duration or 0) * last.time_base) - _start(stream)
    if stated - end > max(MISSING[0], MISSING[1] * stated):
        raise ValueError(_incomplete(f"its images end at {end:.1f} of {stated:.1f} seconds"))


def _incomplete(reason: str) -> str:
    return f"is not a complete video ({reason}): replace or delete it"


def _states_durations(container: Any) -> bool:
    return container.format.name.split(",")[0] in STATE_DURATIONS


def _start(stream: Any) -> float:
    """When the first frame of a video is shown, in seconds of the file's clock."""
    return float((stream.start_time or 0) * stream.time_base)


def _stated_duration(container: Any, stream: Any) -> float | None:
    """Seconds of the images as the file states them for their stream; None: it does not.

    Matroska states none but in a tag: when the last frame ends, by the file's clock (FFmpeg's muxer), or how long the
    frames last (mkvmerge's, which names itself beside).
    """
    if container.format.name == "avi" and stream.frames and stream.average_rate:
        return float(stream.frames / stream.average_rate)  # the duration is that of the frames which are there
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if not (tag := stream.metadata.get("DURATION")):
        return None
    hours, minutes, seconds = map(float, tag.split(":"))
    end = 3600 * hours + 60 * minutes + seconds
    return end if "_STATISTICS_WRITING_APP" in stream.metadata else end - _start(stream)


def _duration(container: Any, stream: Any) -> float:
    """Seconds of a video: what its file says of its images, or of all, or when its last packet is shown."""
    if stated := _stated_duration(container, stream):
        return stated
    if container.duration:
        duration = (
            container.duration - (container.start_time or 0)
        ) / 1e6  # Matroska counts from 0, not from the start
        return duration if duration > 0 else container.duration / 1e6
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
        ValueError: PyAV is not installed, the file is missing or has no images, or anything fails inside the block.
    """
    if find_spec("av") is None:
        raise ValueError(f"{path}: videos need PyAV: pip install 'dora_mm[vl]'")
    if not path.is_file():
        raise ValueError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    av: Any = import_module("av")
    try:
        with av.open(str(path), options=ALLOWED) as container:
            if not container.streams.video:
                raise ValueError("has no images")
            if (codec := container.streams.video[0].codec_context.name) not in CODECS:
                raise ValueError(f"has images in the codec {codec}, which is not read: convert it to H.264")
            yield container
    except av.FFmpegError as error:  # some of which are ValueErrors, too
        reason = first_line(error).partition(": '")[0]  # without the name of the file
        raise ValueError(f"{path} {_incomplete(reason)}") from error
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
