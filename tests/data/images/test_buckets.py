from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dora_mm.data.images.buckets import bucket_sizes, choose_bucket, frame

# SDXL's multi-aspect sizes (arXiv 2307.01952, appendix I); the wide ones are their transposes.
TALL = """512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344
768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024"""

resolutions = st.sampled_from([32, 64, 96, 128, 256, 512, 768, 1024])
sizes = st.tuples(st.integers(1, 6000), st.integers(1, 6000))
generators = st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))


def test_buckets_at_1024_are_those_of_sdxl():
    tall = {tuple(int(side) for side in text.split("x")) for text in TALL.split()}
    assert set(bucket_sizes(1024)) == tall | {(w, h) for h, w in tall}


@given(resolutions)
def test_buckets_have_the_area_of_the_resolution_and_come_in_both_orientations(resolution):
    step = 64 if resolution >= 512 else 32
    for h, w in bucket_sizes(resolution):
        assert h % step == w % step == 0
        assert 0.9 * resolution**2 <= h * w <= resolution**2
        assert (w, h) in bucket_sizes(resolution)


@given(st.integers(1, 6000), resolutions)
def test_square_images_get_the_square_bucket(side, resolution):
    assert choose_bucket((side, side), resolution) == (resolution, resolution)


@given(sizes, resolutions)
def test_no_bucket_has_a_closer_aspect_ratio(size, resolution):
    def gap(bucket):
        ratio = Fraction(bucket[0] * size[1], bucket[1] * size[0])
        return max(ratio, 1 / ratio)

    assert gap(choose_bucket(size, resolution)) == min(map(gap, bucket_sizes(resolution)))
    assert choose_bucket(size[::-1], resolution) == choose_bucket(size, resolution)[::-1]


def test_ties_are_resolved_alike_for_both_orientations():
    assert choose_bucket((1, 2), 64) == choose_bucket((2, 1), 64) == (64, 64)


def test_a_resolution_without_buckets_is_refused():
    with pytest.raises(ValueError, match=r"data\.resolution 1000 .*64"):
        bucket_sizes(1000)


@given(sizes, resolutions, st.sampled_from(["center", "random"]), generators, st.booleans())
def test_the_crop_lies_in_the_resized_image_which_keeps_its_aspect_ratio(size, resolution, crop, generator, flip):
    bucket = choose_bucket(size, resolution)
    framing = frame(size, bucket, crop, generator, flip)
    assert framing.original_size == size
    assert framing.target_size == bucket
    assert 0 <= framing.top <= framing.resized[0] - bucket[0]
    assert 0 <= framing.left <= framing.resized[1] - bucket[1]
    # The image covers the bucket and is no larger than needed: one side fits exactly, the other to half a pixel.
    assert min(framing.resized[0] - bucket[0], framing.resized[1] - bucket[1]) == 0
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    assert all(abs(new - old * scale) <= 0.5 + 1e-6 for new, old in zip(framing.resized, size, strict=True))


@given(sizes, resolutions, st.integers(0, 2**31))
def test_a_mirrored_crop_is_measured_from_the_other_side(size, resolution, seed):
    bucket = choose_bucket(size, resolution)
    plain = frame(size, bucket, "random", torch.Generator().manual_seed(seed))
    mirrored = frame(size, bucket, "random", torch.Generator().manual_seed(seed), flip=True)
    assert (plain.top, plain.left) == (mirrored.top, mirrored.left)
    assert plain.crop_top_left == (plain.top, plain.left)
    assert mirrored.crop_top_left == (plain.top, plain.resized[1] - bucket[1] - plain.left)


@pytest.mark.parametrize(
    ("size", "bucket", "resized", "crop_top_left"),
    [
        ((1024, 1024), (1024, 1024), (1024, 1024), (0, 0)),
        ((3000, 2000), (1216, 832), (1248, 832), (16, 0)),
        ((2000, 3000), (832, 1216), (832, 1248), (0, 16)),
        ((256, 300), (128, 128), (128, 150), (0, 11)),
    ],
)
def test_micro_conditioning_of_centre_crops(size, bucket, resized, crop_top_left):
    framing = frame(size, bucket)
    assert framing.resized == resized
    assert framing.crop_top_left == crop_top_left


def test_random_crops_reach_both_ends():
    draws = torch.Generator().manual_seed(0)
    lefts = {frame((64, 68), (64, 64), "random", draws).left for _ in range(100)}
    assert lefts == {0, 1, 2, 3, 4}
