"""Videos as the processors of transformers take them: frames that are already chosen, and when each is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.video_utils import VideoMetadata

from dora_mm.config.models import VLMModelConfig
from dora_mm.data.images.frames import Video

FPS, MAX_FRAMES = 1.0, 16  # where a config has none
# In which frames are counted for processors, per second. They write when a frame is shown, its number divided by this,
# and a video's own rate is a mean, which tells no such time where frames are at uneven distances.
COUNTED = 1000


def reads_videos(processor: Any) -> bool:
    """Whether a processor takes videos."""
    return getattr(processor, "video_processor", None) is not None and isinstance(
        getattr(processor, "video_token", None), str
    )


def check_video_keys(processor: Any, config: VLMModelConfig) -> None:
    """Checks that keys for videos have an effect.

    Raises:
        ValueError: The model reads no videos.
    """
    given = [key for key in ("fps", "max_frames") if getattr(config, key) is not None]
    if given and not reads_videos(processor):
        raise ValueError(f"model.{given[0]}: {config.path} reads no videos: leave it out")


def video_inputs(processor: Any, videos: Sequence[Video]) -> dict[str, Any]:
    """The arguments of a processor for the videos of a text."""
    settings = {
        "video_metadata": [_metadata(video) for video in videos],
        "return_metadata": True,  # without it, some cannot write when a frame is shown
        "do_sample_frames": False,
    }
    if (getattr(processor, "videos_kwargs", None) or {}).get("do_resize") is False:
        settings["do_resize"] = True  # MiniMax's leaves that to whoever reads the file
    return {"videos": [video.frames for video in videos], "videos_kwargs": settings}


def _metadata(video: Video) -> VideoMetadata:
    return VideoMetadata(
        total_num_frames=max(1, round(video.duration * COUNTED)),
        fps=COUNTED,
        height=video.frames.shape[1],
        width=video.frames.shape[2],
        duration=video.duration,
        frames_indices=[round(time * COUNTED) for time in video.times],
    )
