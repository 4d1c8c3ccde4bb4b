"""Short videos, written with PyAV."""

from pathlib import Path

import av
import numpy as np

STEP = 12  # grey levels between one frame and the next


def write_video(path: Path, *, frames: int = 20, size: tuple[int, int] = (48, 64), seed: int = 0) -> Path:
    """A video of ten frames a second, which get lighter and lighter, with a little noise.

    Args:
        path: The file; its suffix says which kind.
        frames: Their number.
        size: Height and width.
        seed: Of the noise.
    """
    noise = np.random.default_rng(seed).integers(-8, 9, (*size, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.bit_rate = *size, 4_000_000
        for number in range(frames):
            pixels = np.clip(10 + STEP * number + noise, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def number_of(frame: np.ndarray) -> int:
    """Which of the frames this is."""
    return round((float(frame.mean()) - 10) / STEP)
