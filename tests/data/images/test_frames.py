"""Videos are read as frames at even distances, and each that cannot be read is named."""

import numpy as np
import pytest

from dora_mm.data.images.frames import check_video, is_video, load_video, stills
from tests.shared.data.videos import number_of, write_timed_video, write_video


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
@pytest.mark.parametrize(
    ("fps", "most", "numbers"),
    [(1, 16, [5, 15]), (2, 16, [2, 7, 12, 17]), (5, 4, [2, 7, 12, 17]), (0.1, 16, [5, 15]), (10, 99, range(20))],
)
def test_frames_are_those_in_the_middle_of_equal_stretches(tmp_path, suffix, fps, most, numbers):
    video = load_video(write_video(tmp_path / f"a{suffix}"), fps, most)
    assert video.frames.shape == (len(numbers), 48, 64, 3)
    assert video.frames.dtype == np.uint8
    found = [number_of(frame) for frame in video.frames]
    assert np.abs(np.array(found) - np.array(numbers)).max() <= 1
    assert sorted(found) == found
    assert (video.rate, round(video.duration, 1)) == (10, 2.0)
    assert [round(time * 10) for time in video.times] == found


def test_a_video_of_one_frame_and_a_few_to_look_at(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=1)
    assert load_video(path, 1, 16).frames.shape == (2, 48, 64, 3)
    assert {still.size for still in stills(path)} == {(64, 48)}
    assert len(stills(write_video(tmp_path / "b.mp4"))) == 4


def test_what_is_no_video_is_named(tmp_path):
    whole = write_video(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("no video")
    for read in (check_video, lambda path: load_video(path, 1, 16)):
        for name in ("cut.mp4", "text.mp4"):
            with pytest.raises(ValueError, match=rf"{name} is not a complete video \(.*\): replace or delete it"):
                read(tmp_path / name)
        with pytest.raises(ValueError, match=r"none\.mp4 does not exist"):
            read(tmp_path / "none.mp4")
    check_video(tmp_path / "whole.mp4")


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_the_duration_is_that_of_the_images_from_the_first_one(tmp_path, suffix):
    later = load_video(write_timed_video(tmp_path / f"a{suffix}", range(5000, 7000, 100)), 1, 16)
    beside = load_video(write_video(tmp_path / f"b{suffix}", sound=5), 1, 16)
    for video in (later, beside):
        assert video.duration == pytest.approx(2, abs=0.1)
        assert video.times == pytest.approx((0.45, 1.45), abs=0.1)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("a.mkv", {}, r"its images end at \d\.\d of 10\.0 seconds"),
        ("a.mp4", {"movflags": "faststart"}, r"its (frame at|images end at) \d\.\d .*"),
        ("a.avi", {}, r".*"),
    ],
)
def test_a_video_that_was_cut_is_named(tmp_path, name, options, reason):
    path = write_video(tmp_path / name, frames=100, **options)
    check_video(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for read in (check_video, lambda path: load_video(path, 1, 16)):
        with pytest.raises(ValueError, match=rf"{name} is not a complete video \({reason}\): replace or delete it"):
            read(path)


def test_a_damaged_frame_is_named(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=100)
    data = bytearray(path.read_bytes())
    start = 2 * len(data) // 5
    data[start : start + 200] = bytes(37 * number % 256 for number in range(200))
    path.write_bytes(data)
    for read in (check_video, lambda path: load_video(path, 1, 16)):
        with pytest.raises(ValueError, match=r"its frame at \d\.\d seconds is damaged"):
            read(path)


def test_without_pyav_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("dora_mm.data.images.frames.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"videos need PyAV: pip install 'dora_mm\[vl\]'"):
        load_video(tmp_path / "a.mp4", 1, 16)


def test_names_tell_videos():
    assert all(map(is_video, ("a.mp4", "b/C.MKV", "c.webm")))
    assert not any(map(is_video, ("a.gif", "mp4", "clip")))
