"""Short videos, written with PyAV."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

STEP = 12  # grey levels between one frame and the next
RATE, BLOCK = 8000, 1024  # of sound: samples a second, and those of a frame


def write_video(
    path: Path, *, frames: int = 20, size: tuple[int, int] = (48, 64), seed: int = 0, sound: float = 0, **options: str
) -> Path:
    """A video of ten frames a second, which get lighter and lighter, with a little noise.

    Args:
        path: The file; its suffix says which kind.
        frames: Their number.
        size: Height and width.
        seed: Of the noise.
        sound: Seconds of silence beside the images.
        **options: Of the container.
    """
    noise = np.random.default_rng(seed).integers(-8, 9, (*size, 3))
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.bit_rate = *size, 4_000_000
        track = container.add_stream("aac", rate=RATE, layout="mono") if sound else None
        for number in range(frames):
            pixels = np.clip(10 + STEP * number + noise, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
        if track is not None:
            for number in range(int(sound * RATE / BLOCK)):
                block = av.AudioFrame.from_ndarray(np.zeros((1, BLOCK), np.float32), format="fltp", layout="mono")
                block.sample_rate, block.pts, block.time_base = RATE, number * BLOCK, Fraction(1, RATE)
                container.mux(track.encode(block))
            container.mux(track.encode())
    return path


def write_timed_video(path: Path, times: Sequence[int]) -> Path:
    """A video whose frames, lighter and lighter, are shown at these times, in milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width = 48, 64
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 + STEP * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def number_of(frame: np.ndarray) -> int:
    """Which of the frames this is."""
    return round((float(frame.mean()) - 10) / STEP)
