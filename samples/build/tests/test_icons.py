"""The concept file, the icon sets, and the folders of samples that are made from them."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from dora_mm.data.images.pixels import on_white
from dora_mm.eval.images.concepts import Concept
from samples.build.icons.sets import IconSet, codepoint_key, dump_concepts, read_concepts, render_svg

SAMPLES = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def concepts():
    return read_concepts(SAMPLES / "concepts.jsonl")


def test_there_are_enough_concepts_in_every_split_and_role(concepts):
    splits = Counter(concept.split for concept in concepts)
    roles = Counter(concept.role for concept in concepts if concept.split == "pretrain")
    assert splits["pretrain"] >= 320
    assert splits["judge"] >= 400
    assert (roles["icon3d"], roles["lego"], roles["tune"]) == (23, 61, 24)
    assert roles["report"] >= 48


def test_names_are_plain_words(concepts):
    for concept in concepts:
        assert concept.name == concept.name.strip().lower()
        if concept.split == "pretrain":
            assert concept.name.isascii()
            assert 1 <= len(concept.name.split()) <= 4, concept.name


def test_no_two_concepts_are_almost_the_same(concepts):
    """Twelve o'clock and half past, seven mailboxes: neither retrieval nor a human could distinguish them."""
    pretrained = [concept for concept in concepts if concept.split == "pretrain"]
    last_words = Counter(concept.name.split()[-1] for concept in pretrained)
    assert max(last_words.values()) <= 4, last_words.most_common(3)


def test_read_concepts_names_the_bad_line(tmp_path):
    path = tmp_path / "concepts.jsonl"
    good = '{"code": "1f34c", "name": "banana", "group": "Food", "split": "judge"}\n'
    path.write_text(good + '{"code": "1f34d", "name": "pineapple", "group": "Food", "split": "pretrain"}\n')
    with pytest.raises(ValueError, match=r"concepts\.jsonl, line 2.*pineapple.*role None"):
        read_concepts(path)
    path.write_text(good + "{\n")
    with pytest.raises(ValueError, match="line 2"):
        read_concepts(path)
    path.write_text(good + good)
    with pytest.raises(ValueError, match=r"concepts\.jsonl: the code '1f34c' is repeated"):
        read_concepts(path)


def test_dump_concepts_is_json_and_leaves_out_absent_roles():
    kept = [Concept("1f34c", "banana", "Food", "pretrain", "lego"), Concept("1f34d", "pineapple", "Food", "judge")]
    rows = json.loads(dump_concepts(kept))
    assert [Concept(**row) for row in rows] == kept
    assert "role" not in rows[1]


@pytest.mark.parametrize(
    ("code", "key"), [("2764-fe0f", "2764"), ("1F34C", "1f34c"), ("2764-fe0f-200d-1f525", "2764-200d-1f525")]
)
def test_codepoint_key(code, key):
    assert codepoint_key(code) == key


def red_square() -> IconSet:
    body = '<path fill="#f00" d="M0 0h8v16H0z"/>'
    icons = {
        "width": 32,
        "height": 16,
        "icons": {"half": {"body": body, "width": 16}},
        "aliases": {"same": {"parent": "half"}},
    }
    return IconSet(icons, {"2b1b-fe0f": "half", "2b1c": "same"})


def test_icon_set_finds_icons_by_key_and_through_aliases():
    icon_set = red_square()
    assert "2b1b" in icon_set
    assert "1f34c" not in icon_set
    assert icon_set.svg("2b1b") == icon_set.svg("2b1c")
    assert 'viewBox="0 0 16 16"' in icon_set.svg("2b1b")


def test_render_svg_and_on_white():
    pytest.importorskip("resvg_py", reason="resvg_py is not installed: pip install 'dora_mm[samples]'")
    image = render_svg(red_square().svg("2b1b"), 64)
    assert (image.size, image.mode) == ((64, 64), "RGBA")
    assert image.getpixel((10, 30)) == (255, 0, 0, 255)
    assert image.getpixel((60, 30))[3] == 0
    assert on_white(image).getpixel((60, 30)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("folder", "role", "count", "start"),
    [
        ("3d_icon", "icon3d", 23, "a TOK icon of "),
        ("lego", "lego", 61, "a lego set in the style of TOK, "),
    ],
)
def test_sample_folders_are_complete(concepts, folder, role, count, start):
    rows = [json.loads(line) for line in (SAMPLES / folder / "metadata.jsonl").read_text().splitlines()]
    images = sorted(path.name for path in (SAMPLES / folder).glob("*.webp"))
    names = {concept.name for concept in concepts if concept.role == role}
    assert len(rows) == count
    assert [row["file_name"] for row in rows] == images
    assert {name.removesuffix(".webp").replace("_", " ") for name in images} == names
    for row in rows:
        assert row["text"].startswith(start)
        assert row["file_name"].removesuffix(".webp").replace("_", " ") in row["text"]
        path = SAMPLES / folder / row["file_name"]
        assert path.stat().st_size < 25_000
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((256, 256), "RGB")
            assert min(image.getpixel((0, 0))) > 250  # on white
    assert (SAMPLES / folder / "SOURCES.md").exists()


def test_every_brick_model_has_its_flat_icon_as_a_reference():
    references = sorted((SAMPLES / "lego_flat").iterdir())
    assert [path.name for path in references] == sorted(path.name for path in (SAMPLES / "lego").glob("*.webp"))
    assert sum(path.stat().st_size for path in references) < 75_000
    for path in references:
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((128, 128), "RGB")
            assert min(image.getpixel((0, 0))) > 250  # on white
