"""Masks: found, refused, brought to the latents through the crop of their image, and noticed when they change."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image

from dora_mm.config.images import DataConfig
from dora_mm.data.images.buckets import frame
from dora_mm.data.images.folder import digest_of, read_captioned_images, read_images
from dora_mm.data.images.masks import load_mask, render_mask


def write_mask(file, values):
    Image.fromarray((np.asarray(values) * 255).astype(np.uint8)).save(file)


def half(height, width):
    """White on the left."""
    return np.repeat((np.arange(width) < width // 2)[None], height, axis=0)


def read(folder, masks="file"):
    return read_captioned_images(folder, masks=masks)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("size", "left"), [((64, 128), 16), ((128, 64), 0), ((128, 128), 0)])
def test_masks_are_averaged_through_the_crop_and_flip_of_their_image(tmp_path, size, left, flip):
    values = np.random.default_rng(0).integers(0, 2, size)
    write_mask(tmp_path / "a.mask.png", values)
    framing = frame(size, (64, 64), flip=flip)._replace(left=left)
    mask = load_mask(tmp_path / "a.png", "file")
    assert mask is not None
    found = render_mask(mask, framing, (8, 8))
    scale = size[0] // framing.resized[0]
    shrunk = F.interpolate(torch.from_numpy(values).float()[None, None], scale_factor=1 / scale, mode="area")
    cropped = shrunk[..., framing.top : framing.top + 64, left : left + 64]
    expected = F.interpolate(cropped.flip(-1) if flip else cropped, size=(8, 8), mode="area")[0, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_masks_of_another_resolution_cover_the_same_place(tmp_path):
    write_mask(tmp_path / "a.mask.png", half(30, 50))
    mask = load_mask(tmp_path / "a.png", "file")
    assert mask is not None
    found = render_mask(mask, frame((60, 100), (60, 60)), (6, 6))
    assert torch.allclose(found, torch.from_numpy(half(6, 6)).float())


def test_transparency_is_a_mask_and_turned_with_its_image(tmp_path):
    rgba = np.full((40, 80, 4), 255, dtype=np.uint8)
    rgba[..., 3] = half(40, 80) * 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned by a quarter: what is left lies on top
    Image.fromarray(rgba).save(tmp_path / "a.png", exif=exif)
    mask = load_mask(tmp_path / "a.png", "alpha")
    assert mask is not None
    assert np.array_equal(np.asarray(mask), half(40, 80).T)


def test_files_of_masks_are_no_images(image_folder, caplog):
    write_mask(image_folder / "0.mask.png", half(64, 64))
    for masks, count in (("file", 1), (None, 0)):
        images = read(image_folder, masks)
        assert len(images) == 5
        assert sum(bool(image.mask) for image in images) == count
    assert "1 image (0.mask.png) is the mask of an image, and not used: set data.mask" in caplog.text
    assert "4 images (1.png, 2.png, 3.png, 4.png) are without a mask: all of it counts alike" in caplog.text


def test_a_new_a_redrawn_and_a_removed_mask_are_noticed(image_folder, caplog):
    """Other trainers go on with the latents and masks that they have kept."""
    caplog.set_level(logging.ERROR)
    write_mask(image_folder / "0.mask.png", half(64, 64))
    digests = [digest_of(read(image_folder))]
    write_mask(image_folder / "1.mask.png", half(80, 80))
    digests.append(digest_of(read(image_folder)))
    write_mask(image_folder / "1.mask.png", ~half(80, 80))
    digests.append(digest_of(read(image_folder)))
    assert len(set(digests)) == 3
    (image_folder / "1.mask.png").unlink()
    assert digest_of(read(image_folder)) == digests[0]


def test_masks_that_cannot_be_meant_are_refused_by_name(image_folder):
    def folders(source, *others):
        both = [{"path": str(image_folder)}, *({"path": str(image_folder), "role": role} for role in others)]
        return DataConfig.model_validate({"folders": both, "resolution": 64, "mask": {"source": source}})

    with pytest.raises(ValueError, match=r"no image has a mask: that of cat\.jpg is looked for in cat\.mask\.png"):
        read_images(folders("file"), "train")
    Image.new("RGBA", (64, 64), (1, 2, 3, 255)).save(image_folder / "0.png")  # opaque, as most with that channel are
    with pytest.raises(ValueError, match="no image is transparent anywhere, and data.mask.source alpha"):
        read_images(folders("alpha"), "train")
    for role in ("preserve", "validate"):  # count as a whole
        assert not any(image.mask for image in read_images(folders("file", role), role))
    write_mask(image_folder / "gone.mask.png", half(64, 64))
    with pytest.raises(ValueError, match=r"1 image \(gone\.mask\.png\) is the mask of no image"):
        read(image_folder)
    (image_folder / "gone.mask.png").unlink()
    write_mask(image_folder / "0.mask.png", half(64, 64))
    write_mask(image_folder / "1.mask.png", np.zeros((80, 80)))
    write_mask(image_folder / "3.mask.png", half(44, 160))
    with pytest.raises(ValueError, match="2 problems") as caught:
        read(image_folder)
    assert "1.mask.png is black all over: nothing of the image would be trained" in str(caught.value)
    assert "3.mask.png is 160 x 44, and its image 44 x 160: it needs the same shape" in str(caught.value)
    Image.new("RGBA", (8, 8)).save(image_folder / "0.png")
    with pytest.raises(ValueError, match=r"0\.png is transparent all over"):
        read(image_folder, "alpha")
