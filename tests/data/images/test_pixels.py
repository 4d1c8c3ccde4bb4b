"""The model is trained on what a viewer shows, for every pixel format that a file can have."""

import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from dora_mm.data.images.buckets import choose_bucket, frame
from dora_mm.data.images.pixels import MAX_PIXELS, load_rgb, load_rgba, on_white, render, upright_size

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quadrants(size=16):
    """Red, green / blue, white: all eight orientations differ."""
    image = Image.new("RGB", (2 * size, size))
    for index, colour in enumerate((RED, GREEN, BLUE, WHITE)):
        image.paste(
            colour, (index % 2 * size, index // 2 * size // 2, (index % 2 + 1) * size, (index // 2 + 1) * size // 2)
        )
    return image


def corners(image):
    right, bottom = image.width - 2, image.height - 2
    return [image.getpixel(place) for place in ((1, 1), (right, 1), (1, bottom), (right, bottom))]


def close(one, other, tolerance=3):
    return np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= tolerance


TRANSPOSES = {  # from the upright image to the stored pixels, by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    stored = quadrants().transpose(TRANSPOSES[orientation]) if orientation > 1 else quadrants()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a{suffix}", exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    loaded = load_rgb(tmp_path / f"a{suffix}")
    assert loaded.size == (32, 16)
    assert close(corners(loaded), [RED, GREEN, BLUE, WHITE], 12 if suffix == ".jpg" else 0)


def ramp():
    return np.linspace(0, 65535, 64 * 16).reshape(16, 64)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, suffix, order):
    values = ramp().astype(f"{order}u2")
    Image.fromarray(values.astype("u2")).save(tmp_path / f"a{suffix}")
    loaded = load_rgb(tmp_path / f"a{suffix}")
    assert loaded.mode == "RGB"
    assert np.array_equal(np.asarray(loaded)[..., 0], np.round(values / 65535 * 255))


def png(width, height, bit_depth, colour_type, rows, *chunks):
    """A PNG written by hand, for formats that Pillow cannot write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*item) for item in chunks) + body + chunk(b"IEND", b"")


def test_16_bit_colour_is_scaled(tmp_path):
    row = struct.pack(">6H", 65535, 32768, 0, 257 * 10, 257 * 20, 257 * 30)
    (tmp_path / "a.png").write_bytes(png(2, 1, 16, 2, [row]))
    assert np.asarray(load_rgb(tmp_path / "a.png")).tolist() == [[[255, 128, 0], [10, 20, 30]]]


def test_16_bit_grey_with_alpha_and_with_a_transparent_value(tmp_path):
    (tmp_path / "alpha.png").write_bytes(png(2, 1, 16, 4, [struct.pack(">4H", 0, 65535, 0, 0)]))
    assert np.asarray(load_rgb(tmp_path / "alpha.png", "red")).tolist() == [[[0, 0, 0], [255, 0, 0]]]
    (tmp_path / "key.png").write_bytes(
        png(2, 1, 16, 0, [struct.pack(">2H", 51400, 1000)], (b"tRNS", struct.pack(">H", 1000)))
    )
    assert np.asarray(load_rgb(tmp_path / "key.png", "#0000ff")).tolist() == [[[200, 200, 200], [0, 0, 255]]]


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "LA", "PA"])
def test_opaque_images_keep_their_colours(tmp_path, mode):
    source = (
        ImageOps.grayscale(quadrants()).point(lambda value: 255 * (value > 100))
        if mode in ("L", "1", "LA")
        else quadrants()
    )
    path = tmp_path / ("a.tiff" if mode == "PA" else "a.png")
    source.convert("P").convert(mode).save(path) if mode == "PA" else source.convert(mode).save(path)
    loaded = load_rgb(path)
    assert loaded.mode == "RGB"
    assert corners(loaded) == corners(source.convert("RGB"))


@pytest.mark.parametrize(("background", "colour"), [("white", WHITE), ("#102030", (16, 32, 48))])
def test_transparency_is_composed_on_the_background(tmp_path, background, colour):
    image = Image.new("RGBA", (4, 1))
    for place, pixel in enumerate([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 128)]):
        image.putpixel((place, 0), pixel)
    image.save(tmp_path / "a.png")
    pixels = np.asarray(load_rgb(tmp_path / "a.png", background))[0]
    half = np.asarray(colour) * 127 / 255
    assert pixels[0].tolist() == list(RED)
    assert pixels[1].tolist() == pixels[2].tolist() == list(colour)
    assert close(pixels[3], np.round(half), 1)


@pytest.mark.parametrize("orientation", [1, 6])
def test_alpha_is_kept_upright_and_composes_to_what_load_rgb_gives(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 4), dtype=np.uint8)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    found = load_rgba(tmp_path / "a.png")
    assert found.mode == "RGBA"
    assert np.array_equal(np.asarray(found), pixels if orientation == 1 else np.rot90(pixels, -1))
    both = (np.asarray(each, int) for each in (on_white(found), load_rgb(tmp_path / "a.png")))
    assert abs(next(both) - next(both)).max() <= 1
    Image.fromarray(pixels[..., :3]).save(tmp_path / "opaque.png")
    assert load_rgba(tmp_path / "opaque.png").getchannel("A").getextrema() == (255, 255)


def test_transparent_palette_grey_and_colour_keys(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *GREEN])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=1)
    palette.save(tmp_path / "p.gif", transparency=1)
    Image.fromarray(np.array([[7, 200]], dtype=np.uint8)).save(tmp_path / "l.png", transparency=7)
    Image.fromarray(np.array([[RED, GREEN]], dtype=np.uint8)).save(tmp_path / "rgb.png", transparency=RED)
    for name, expected in {
        "p.png": [RED, BLUE], "p.gif": [RED, BLUE], "l.png": [BLUE, (200, 200, 200)], "rgb.png": [BLUE, GREEN],
    }.items():  # fmt: skip
        assert np.asarray(load_rgb(tmp_path / name, "blue"))[0].tolist() == [list(pixel) for pixel in expected], name


@pytest.mark.parametrize("suffix", [".jpg", ".tiff"])
def test_cmyk_is_not_inverted(tmp_path, suffix):
    quadrants(64).convert("CMYK").save(tmp_path / f"a{suffix}", **({"quality": 95} if suffix == ".jpg" else {}))
    assert close(corners(load_rgb(tmp_path / f"a{suffix}")), [RED, GREEN, BLUE, WHITE], 8)


def swapped_profile():
    """sRGB with the red and green primaries exchanged, under another name: no image editor shows it unconverted."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {}
    for index in range(struct.unpack_from(">I", data, 128)[0]):
        name, offset, size = struct.unpack_from(">4sII", data, 132 + 12 * index)
        tags[name] = slice(offset, offset + size)
    data[tags[b"rXYZ"]], data[tags[b"gXYZ"]] = data[tags[b"gXYZ"]], data[tags[b"rXYZ"]]
    return bytes(data).replace("sRGB".encode("utf-16-be"), "GRBs".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colour_profiles_are_applied(tmp_path, mode):
    image = Image.new("RGB", (8, 8), (200, 100, 50)).convert(mode)
    image.save(tmp_path / "a.png", icc_profile=swapped_profile())
    assert close(load_rgb(tmp_path / "a.png").getpixel((3, 3)), (100, 200, 50))


def test_damaged_profiles_and_those_for_other_modes_are_ignored(tmp_path):
    profiles = {
        "none": None,
        "damaged": b"not a profile",
        "xyz": ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes(),
        "srgb": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    }
    for name, profile in profiles.items():
        Image.new("RGB", (8, 8), (200, 100, 50)).save(tmp_path / f"{name}.png", icc_profile=profile)
        assert load_rgb(tmp_path / f"{name}.png").getpixel((3, 3)) == (200, 100, 50), name


def test_a_file_with_two_images_gives_the_first(tmp_path):
    quadrants(64).save(tmp_path / "a.mpo", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")
    assert close(corners(load_rgb(tmp_path / "a.jpg")), [RED, GREEN, BLUE, WHITE], 8)


def test_32_bit_values_are_refused(tmp_path):
    Image.fromarray(ramp().astype(np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"a\.tiff has 32-bit pixels"):
        load_rgb(tmp_path / "a.tiff")


def test_missing_empty_and_broken_files_are_named(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    quadrants(200).save(tmp_path / "complete.jpg")
    (tmp_path / "truncated.jpg").write_bytes((tmp_path / "complete.jpg").read_bytes()[:-400])
    quadrants(200).save(tmp_path / "complete.png")
    broken = bytearray((tmp_path / "complete.png").read_bytes())
    broken[60:80] = bytes(20)
    (tmp_path / "broken.png").write_bytes(broken)
    for name, message in {
        "missing.png": "does not exist", "empty.png": r"is empty \(0 bytes\)", "text.png": "is not a complete image",
        "truncated.jpg": "is not a complete image", "broken.png": "is not a complete image",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name} {message}"):
            load_rgb(tmp_path / name)


@pytest.mark.parametrize("side", [9_000, 20_000, 2**31 - 1])
def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path, side):
    """Headers that claim 81 megapixels, 400 megapixels, and more than fits in any memory."""
    assert side * side > MAX_PIXELS
    (tmp_path / "bomb.png").write_bytes(png(side, side, 8, 0, [b""]))
    with pytest.raises(ValueError, match=r"bomb\.png is larger than 80 megapixels"):
        load_rgb(tmp_path / "bomb.png")


def test_unsupported_formats_are_not_opened(tmp_path):
    quadrants().save(tmp_path / "really_a.ppm")
    (tmp_path / "really_a.ppm").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is not a complete image"):
        load_rgb(tmp_path / "a.png")


def test_pixels_span_minus_one_to_one_in_channel_order():
    framing = frame((64, 128), (64, 128), "center")
    pixels = render(quadrants(64), framing)
    assert pixels.shape == (3, 64, 128)
    assert pixels.dtype == torch.float32
    assert pixels[:, 1, 1].tolist() == [1, -1, -1]
    assert pixels[:, 1, -2].tolist() == [-1, 1, -1]
    assert pixels[:, -2, 1].tolist() == [-1, -1, 1]
    assert (framing.original_size, framing.crop_top_left, framing.target_size) == ((64, 128), (0, 0), (64, 128))


def test_the_conditioned_crop_is_the_crop_that_was_taken():
    """A horizontal ramp of 4 grey values per pixel: the first column shows where the crop begins."""
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (32, 1))).convert("RGB")
    for seed in range(5):
        for flip in (False, True):
            framing = frame((32, 64), (32, 32), "random", torch.Generator().manual_seed(seed), flip)
            columns = ((render(ramp, framing)[0, 0] + 1) * 127.5 / 4).round().int().tolist()
            assert framing.crop_top_left[0] == 0
            first = framing.crop_top_left[1]
            if flip:  # the mirrored image's column j shows column 63 - j of the stored one
                assert columns == [63 - first - index for index in range(32)]
            else:
                assert columns == [first + index for index in range(32)]


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 20_000)])
def test_extreme_aspect_ratios_need_little_memory(size):
    bucket = choose_bucket(size, 512)
    pixels = render(Image.new("RGB", size[::-1], RED), frame(size, bucket, "center"))
    assert pixels.shape == (3, *bucket)
    assert pixels.amin(dim=(1, 2)).tolist() == [1, -1, -1]


def test_resizing_only_the_crop_gives_the_crop_of_the_resized_image():
    noise = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy()).resize((240, 160), Image.Resampling.BICUBIC)
    framing = frame((160, 240), (96, 96), "random", torch.Generator().manual_seed(1))
    resized = image.resize(framing.resized[::-1], Image.Resampling.LANCZOS)
    expected = np.asarray(resized)[framing.top :, framing.left :][:96, :96].astype(float)
    found = ((render(image, framing) + 1) * 127.5).permute(1, 2, 0).numpy()
    # Only one of them filters with the 3 pixels outside the crop; further inside the two are equal except for rounding.
    assert np.abs(found - expected)[4:-4, 4:-4].max() <= 1
    assert np.abs(found - expected).mean() < 1


def test_original_size_is_before_resizing_and_after_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 200)).save(tmp_path / "a.jpg", exif=exif)
    image = load_rgb(tmp_path / "a.jpg")
    framing = frame((image.height, image.width), (128, 96), "center")
    assert framing.original_size == (300, 200)
    assert framing.crop_top_left == (8, 0)
    assert framing.target_size == (128, 96)


@settings(max_examples=40)
@given(st.sampled_from(["jpg", "png", "webp", "tif", "gif", "bmp"]), st.integers(0, 9), *[st.integers(1, 40)] * 2)
def test_the_size_in_a_header_is_that_of_the_pixels(tmp_path_factory, suffix, orientation, width, height):
    """With any value of the orientation, also those that mean nothing."""
    path = tmp_path_factory.mktemp("size") / f"image.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    kept = {} if suffix in ("gif", "bmp") else {"exif": exif}
    Image.new("RGB", (width, height)).save(path, **kept)
    image = load_rgb(path)
    assert upright_size(path) == (image.height, image.width)


def test_the_size_of_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    for name, message in (("none.png", "does not exist"), ("empty.png", "is empty")):
        with pytest.raises(ValueError, match=f"{name} {message}"):
            upright_size(tmp_path / name)
