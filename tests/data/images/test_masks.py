"""Masks: found, refused, brought to the latents through the crop of their image, and noticed when they change."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image

from dora_mm.config.images import DataConfig
from dora_mm.data.images.buckets import frame
from dora_mm.data.images.folder import digest_of, read_captioned_images, read_images, uncaptioned_images
from dora_mm.data.images.masks import MaskFile, load_mask, render_mask
from tests.shared.data.images_made import SIZES, half, write_mask


def read(folder, masks="file"):
    return read_captioned_images(folder, masks=masks)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("size", "left"), [((64, 128), 16), ((128, 64), 0), ((128, 128), 0)])
def test_masks_are_averaged_through_the_crop_and_flip_of_their_image(tmp_path, size, left, flip):
    values = np.random.default_rng(0).integers(0, 2, size)
    write_mask(tmp_path / "a.mask.png", values)
    framing = frame(size, (64, 64), flip=flip)._replace(left=left)
    mask = load_mask(tmp_path / "a.png", MaskFile(tmp_path / "a.mask.png", ".mask.png"))
    assert mask is not None
    found = render_mask(mask, framing, (8, 8))
    scale = size[0] // framing.resized[0]
    shrunk = F.interpolate(torch.from_numpy(values).float()[None, None], scale_factor=1 / scale, mode="area")
    cropped = shrunk[..., framing.top : framing.top + 64, left : left + 64]
    expected = F.interpolate(cropped.flip(-1) if flip else cropped, size=(8, 8), mode="area")[0, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_masks_of_another_resolution_cover_the_same_place(tmp_path):
    write_mask(tmp_path / "a.mask.png", half(30, 50))
    mask = load_mask(tmp_path / "a.png", MaskFile(tmp_path / "a.mask.png", ".mask.png"))
    assert mask is not None
    found = render_mask(mask, frame((60, 100), (60, 60)), (6, 6))
    assert torch.allclose(found, torch.from_numpy(half(6, 6)).float())


def test_transparency_is_a_mask_and_turned_with_its_image(tmp_path):
    rgba = np.full((40, 80, 4), 255, dtype=np.uint8)
    rgba[..., 3] = half(40, 80) * 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned by a quarter: what is left lies on top
    Image.fromarray(rgba).save(tmp_path / "a.png", exif=exif)
    mask = load_mask(tmp_path / "a.png", None)
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


ONETRAINER = ("0-masklabel.png", "1-masklabel.png", "3-masklabel.png", "0-condlabel.png")


def test_masks_of_onetrainer_are_masks_and_what_it_conditions_on_is_left_out(image_folder, caplog):
    """They were trained on as images, under the caption of the instance prompt."""
    (image_folder / "metadata.jsonl").unlink()
    for name in ONETRAINER:
        height, width = SIZES[int(name[0])]
        write_mask(image_folder / name, half(height, width))
    for masks, used in ((None, set()), ("alpha", set()), ("file", {"0.png", "1.png", "3.png"})):
        caplog.clear()
        images = read_captioned_images(image_folder, instance_prompt="x", masks=masks)
        assert [image.path.name for image in images] == [f"{number}.png" for number in range(5)]
        assert {image.path.name for image in images if image.mask} == used
        assert [bool(image.mask_file) for image in images] == [True, True, False, True, False]
        left_out = "3 images (0-masklabel.png, 1-masklabel.png, 3-masklabel.png) are the mask of an image, and not used"
        assert (left_out in caplog.text) == (masks != "file")
        assert "1 image (0-condlabel.png) is what OneTrainer or ai-toolkit conditions on" in caplog.text
    assert "2 images (2.png, 4.png) are without a mask" in caplog.text
    mask = load_mask(images[0].path, images[0].mask_file)
    assert np.array_equal(np.asarray(mask), half(64, 64))
    write_mask(image_folder / "0.mask.png", half(64, 64))
    with pytest.raises(ValueError, match=r"0 has 2 masks \(.*0-masklabel\.png, .*0\.mask\.png\): keep one"):
        read_captioned_images(image_folder, instance_prompt="x", masks="file")
    (image_folder / "0.mask.png").unlink()
    (image_folder / "3.png").unlink()
    for masks in (None, "file"):
        with pytest.raises(ValueError, match=r"1 image \(3-masklabel\.png\) is the mask of no image"):
            read_captioned_images(image_folder, instance_prompt="x", masks=masks)


def test_names_of_masks_are_no_captions_and_get_none(image_folder):
    """A line that a captioner wrote for a mask does not make an image of it."""
    write_mask(image_folder / "0-masklabel.png", half(64, 64))
    write_mask(image_folder / "masklabel.png", half(64, 64))  # of no image: it has no name before the ending
    with (image_folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "0-masklabel.png", "text": "a white square"}\n')
    assert len(read_captioned_images(image_folder, instance_prompt="x")) == 6
    without, captioned = uncaptioned_images(image_folder)
    assert ([path.name for path in without], captioned) == (["masklabel.png"], 5)


def with_masks(image_folder, folder, names=("0.png", "1.jpg", "2.webp", "3.png", "4.png")):
    """Masks of kohya's kind: in a folder of their own, named as the images, of any suffix; what counts is red."""
    folder.mkdir(parents=True)
    for name in names:
        height, width = SIZES[int(name[0])]
        values = np.zeros((height, width, 3), dtype=np.uint8)
        values[..., 0] = half(height, width) * 255
        Image.fromarray(values).save(folder / name, lossless=True)
    return folder


def data_of(image_folder, **mask):
    return DataConfig.model_validate({"folder": str(image_folder), "resolution": 64, "mask": mask})


def test_a_folder_of_masks_as_of_kohya(image_folder, tmp_path):
    masks = with_masks(image_folder, tmp_path / "pictures_mask")
    (masks / "Thumbs.db").touch()
    images = read_images(data_of(image_folder, folder=str(masks)), "train")
    assert [image.mask_file.path.name for image in images if image.mask_file] == [
        "0.png",
        "1.jpg",
        "2.webp",
        "3.png",
        "4.png",
    ]
    for image in images:
        mask = load_mask(image.path, image.mask_file)
        assert mask is not None
        assert np.allclose(np.asarray(mask), half(*image.size), atol=0.2 if image.path.stem == "1" else 0)  # JPEG
    write_mask(image_folder / "0-masklabel.png", half(64, 64))
    with pytest.raises(ValueError, match=r"0 has 2 masks"):
        read_images(data_of(image_folder, folder=str(masks)), "train")
    (image_folder / "0-masklabel.png").unlink()
    (image_folder / "2.png").rename(image_folder / "two.png")
    with pytest.raises(ValueError, match=r"1 image \(2\.webp\) is the mask of no image"):
        read_captioned_images(image_folder, instance_prompt="x", masks="file", mask_folder=str(masks))
    with pytest.raises(ValueError, match=r"data\.mask\.folder: .*pictures is the folder of the images"):
        read_images(data_of(image_folder, folder=str(image_folder)), "train")


@pytest.mark.parametrize("subfolders", [False, True])
def test_each_folder_has_its_own_masks(image_folder, tmp_path, subfolders):
    masks = with_masks(image_folder, image_folder / "masks", ["0.png"])
    other = tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(other / "a.png")
    Image.new("RGB", (64, 64)).save(other / "deep" / "a.png")
    (tmp_path / "m" / "deep").mkdir(parents=True)
    write_mask(tmp_path / "m" / "deep" / "a.png", half(64, 64))
    folders = [
        {"path": str(image_folder), "masks": str(masks)},
        {"path": str(other), "prompt": "x", "masks": str(tmp_path / "m")},
    ]
    data = DataConfig.model_validate({"folders": folders, "resolution": 64, "mask": {}, "subfolders": subfolders})
    images = read_images(data, "train")
    assert [image.path for image in images if image.mask] == [
        image_folder / "0.png",
        *([other / "deep" / "a.png"] if subfolders else []),
    ]
    assert len(images) == (7 if subfolders else 6)  # those in masks are none


def test_subfolders_with_masks_are_not_trained_on_unseen(image_folder, tmp_path, caplog):
    """As kohya's and ai-toolkit's layouts have them below the folder of a training."""
    with_masks(image_folder, image_folder / "masks")
    read(image_folder)
    assert "masks has images with the names of those in" in caplog.text
    assert "reads these, too" not in caplog.text
    (image_folder / "_controls").mkdir()
    Image.new("RGB", (64, 64)).save(image_folder / "_controls" / "0.depth.jpg")
    both = {"subfolders": True, "instance_prompt": "x"}
    with pytest.raises(ValueError, match=r"masks has images with the names of those in .*data\.mask\.folder"):
        read_captioned_images(image_folder, **both)
    caplog.clear()
    found = read_captioned_images(image_folder, masks="file", mask_folder=str(image_folder / "masks"), **both)
    assert len(found) == sum(bool(image.mask) for image in found) == 5
    assert "1 image (0.depth.jpg) is what OneTrainer or ai-toolkit conditions on" in caplog.text
    root = tmp_path / "kohya"
    root.mkdir()
    image_folder.joinpath("masks").rename(root / "10_style_mask")
    image_folder.rename(root / "10_style")
    with pytest.raises(ValueError, match=r"10_style_mask has images with the names of those in .*10_style"):
        read_captioned_images(root, **both)
    (root / "10_style_mask").rename(root / "5_other")  # no name of masks
    assert len(read_captioned_images(root, **both)) == 10


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"folder": ".", "mask": {"source": "alpha", "folder": "."}}, "folder has no effect with source alpha"),
        ({"folders": [{"path": "."}], "mask": {"folder": "."}}, "mask.folder belongs to data.folder"),
        ({"folders": [{"path": ".", "masks": "."}]}, "masks of folders have no effect without mask"),
        ({"folders": [{"path": "."}, {"path": ".", "role": "preserve", "masks": "."}], "mask": {}}, "role preserve"),
    ],
)
def test_settings_without_effect(data, named):
    with pytest.raises(ValueError, match=named):
        DataConfig.model_validate({"resolution": 64, **data})


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

    with pytest.raises(ValueError, match=r"no image has a mask: that of cat\.jpg is cat\.mask\.png or cat-mask"):
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
