"""AVIF and HEIC are read as other images are, and are refused in one sentence where nothing installed decodes them."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, features

from dora_mm.cli import main
from dora_mm.data.images import decoders
from dora_mm.data.images.decoders import MissingDecoderError, open_image
from dora_mm.data.images.folder import read_captioned_images
from dora_mm.data.images.pixels import load_rgb, load_rgba, upright_size
from dora_mm.data.vl.embedded import data_url
from dora_mm.data.vl.rows import RowError
from pipelines.unpack import write_image
from tests.data.images.test_pixels import BLUE, GREEN, RED, TRANSPOSES, WHITE, close, corners, quadrants


def iso_file(major, *brands):
    """The start of a file with a codec that its brands name, and no image."""
    box = b"ftyp" + major + bytes(4) + b"".join(brands)
    return struct.pack(">I", len(box) + 4) + box + bytes(200)


HEIC = iso_file(b"heic", b"mif1", b"heic")
WITHOUT = "pip install --upgrade 'dora_mm[heic]', or save as PNG or JPEG"


@pytest.fixture
def heif(monkeypatch):
    """HEIC can be made and read."""
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    return pillow_heif


@pytest.fixture
def without_heif(monkeypatch):
    """The package is not installed; where it is, another test may have registered it."""
    installed = decoders.unmet_requirements
    monkeypatch.setattr(
        decoders, "unmet_requirements", lambda extra: iter([extra]) if extra == "heic" else installed(extra)
    )
    decoders._register_heif.cache_clear()
    yield
    decoders._register_heif.cache_clear()


def make(format, image, **settings):
    file = io.BytesIO()
    image.save(file, format, quality=100 if format == "AVIF" else -1, **settings)
    return file.getvalue()


@pytest.fixture(params=["AVIF", "HEIF"])
def format(request):
    if request.param == "HEIF":
        request.getfixturevalue("heif")
    return request.param


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(tmp_path, format, orientation):
    stored = quadrants(64).transpose(TRANSPOSES[orientation]) if orientation > 1 else quadrants(64)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "a.jpg").write_bytes(make(format, stored, exif=exif.tobytes()))  # as messengers rename them
    loaded = load_rgb(tmp_path / "a.jpg")
    assert loaded.size == (128, 64)
    assert upright_size(tmp_path / "a.jpg") == (64, 128)
    assert close(corners(loaded), [RED, GREEN, BLUE, WHITE], 12)


def test_transparency_is_composed(tmp_path, format):
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    image.paste((255, 0, 0, 0), (0, 0, 32, 64))
    (tmp_path / "a.heic").write_bytes(make(format, image))
    assert close(load_rgb(tmp_path / "a.heic", "#0000ff").getpixel((8, 8)), BLUE, 6)
    assert close(load_rgb(tmp_path / "a.heic", "#0000ff").getpixel((56, 8)), RED, 6)
    assert load_rgba(tmp_path / "a.heic").getchannel("A").getextrema() == (0, 255)


def resized(content, size):
    """The file with another size in its header."""
    at = content.index(b"ispe") + 8
    return content[:at] + struct.pack(">II", *size) + content[at + 8 :]


def test_bombs_in_avif_and_heic_are_refused_before_they_are_decoded(tmp_path, format, monkeypatch):
    content = make(format, Image.new("RGB", (64, 64)))
    for size in ((20_000, 20_000), (9_000, 9_000)):
        (tmp_path / "a.heic").write_bytes(resized(content, size))
        for read in (load_rgb, upright_size):
            with pytest.raises(ValueError, match=r"a\.heic is (larger than 80 megapixels|not a complete image)"):
                read(tmp_path / "a.heic")


def test_a_header_that_claims_a_smaller_image_bounds_what_is_decoded(tmp_path, heif):
    large = make("HEIF", Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)))
    (tmp_path / "a.heic").write_bytes(resized(large, (64, 64)))
    with pytest.raises(ValueError, match=r"a\.heic is not a complete image"):
        load_rgb(tmp_path / "a.heic")


def test_damaged_files_end_in_a_sentence(tmp_path, format):
    content = make(format, quadrants(64))
    for end in range(12, len(content) - 1, 23):
        (tmp_path / "a.heif").write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"a\.heif is not a complete image"):
            load_rgb(tmp_path / "a.heif")


def test_a_folder_with_heic_and_avif_is_read(tmp_path, heif):
    for name, format in (("a.heic", "HEIF"), ("b.avif", "AVIF"), ("c.HEIC", "HEIF")):
        (tmp_path / name).write_bytes(make(format, quadrants(64)))
        (tmp_path / name).with_suffix(".txt").write_text(f"a thing {name}")
    images = read_captioned_images(tmp_path)
    assert [(image.path.name, image.caption, image.size) for image in images] == [
        (name, f"a thing {name}", (64, 128)) for name in ("a.heic", "b.avif", "c.HEIC")
    ]


def test_pages_and_tables_take_them(tmp_path, format):
    content = make(format, quadrants(64))
    assert data_url(content).startswith(f"data:image/{format.lower()};base64,")
    name = write_image(tmp_path, "000001", content, "image")
    assert load_rgb(tmp_path / name).size == (128, 64)


# --- where nothing decodes them --------------------------------------------------------------------------------------


def write_folder(folder):
    folder.mkdir()
    for name in ("a.heic", "b.HEIC", "c.png", "d.heif"):
        if name == "c.png":
            quadrants().save(folder / name)
        else:
            (folder / name).write_bytes(HEIC)
        (folder / name).with_suffix(".txt").write_text("a TOK thing")
    return folder


def test_a_folder_with_heic_is_refused_without_the_package(tmp_path, without_heif, capsys):
    folder = write_folder(tmp_path / "images")
    with pytest.raises(ValueError, match="3 images") as error:
        read_captioned_images(folder)
    said = f"{folder}: 3 images (a.heic, b.HEIC, d.heif) are in HEIC and not read: {WITHOUT}"
    assert str(error.value) == f"data.folder {said}"
    command = ["train", "configs/sdxl/demo.yaml", "--dry-run", "--set", f"data.folder={folder}"]
    assert main(command) == 2
    assert said in capsys.readouterr().err


def test_a_table_with_heic_is_refused_without_the_package(tmp_path, without_heif):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.heic").write_bytes(HEIC)
    (tmp_path / "metadata.csv").write_text("file_name,text\nimages/a.heic,a TOK thing\n")
    with pytest.raises(ValueError, match=r"1 image \(a\.heic\) is in HEIC and not read: pip install"):
        read_captioned_images(tmp_path)


def test_one_image_is_refused_without_the_package(tmp_path, without_heif):
    (path := tmp_path / "a.jpg").write_bytes(iso_file(b"mif1", b"miaf", b"heic"))
    for read in (load_rgb, upright_size):
        with pytest.raises(MissingDecoderError) as error:
            read(path)
        assert str(error.value) == f"{path} is in HEIC and is not read: {WITHOUT}"
    with pytest.raises(RowError, match="embedded image in HEIC, which is not read: pip install"):
        data_url(HEIC)
    with pytest.raises(ValueError, match="image: the image is in HEIC and is not read: pip install"):
        write_image(tmp_path, "000001", HEIC, "image")


def test_an_older_release_is_refused(monkeypatch):
    from dora_mm.utils import requirements

    monkeypatch.setattr(requirements, "installed", lambda name: "1.5.0" if name == "pillow-heif" else "99")
    decoders._register_heif.cache_clear()
    with pytest.raises(MissingDecoderError, match="--upgrade"):
        open_image(io.BytesIO(HEIC))


def test_avif_without_its_decoder_is_named(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(MissingDecoderError, match="in AVIF and is not read: install a Pillow that has it"):
        open_image(io.BytesIO(iso_file(b"avif", b"mif1")))


@pytest.mark.parametrize("content", [b"", b"GIF89a", iso_file(b"qt  "), iso_file(b"isom", b"mp42"), b"\0\0\0\x18ftyp"])
def test_other_files_are_no_images(content, without_heif):
    with pytest.raises(Image.UnidentifiedImageError):
        open_image(io.BytesIO(content))
