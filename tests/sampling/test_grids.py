"""Sheets: every image once, labels in many alphabets, no more paper than needed."""

# ruff: noqa: RUF001

import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dora_mm.sampling.contact_sheets import save_grid
from dora_mm.sampling.grids import LINE, contact_sheet, image_grid
from dora_mm.sampling.labels import FONT, font_of, numbered_labels, wrap

RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)


def image(colour, width=128, height=128):
    return Image.new("RGB", (width, height), colour)


def box(page, colour):
    """Left, top, right and bottom of what has this colour."""
    ys, xs = np.nonzero((np.asarray(page) == colour).all(axis=-1))
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def size(page, colour):
    left, top, right, bottom = box(page, colour)
    return right - left, bottom - top


LABELS = {
    "French": "une vache à lait près d’une forêt, façon œuvre",
    "Greek": "ένα εικονίδιο λεωφορείου",
    "Russian": "значок автобуса, ёлка",
    "Ukrainian": "їжак і ґудзик",
    "Polish": "żółta łódź",
    "Turkish": "ışık İstanbul",
    "Vietnamese": "xe buýt màu đỏ ở Việt Nam",
    "German": "„Straßenbahn“ – groß → klein…",
    "signs": "50 % ± 2 °C × ½ ≤ 3 €",
}


@pytest.mark.parametrize("language", LABELS)
def test_labels_in_latin_greek_and_cyrillic_are_drawn(language):
    label = LABELS[language]
    assert numbered_labels([label, unicodedata.normalize("NFD", label)]) == {}
    page, plain, decomposed = (
        image_grid([[image(RED)]], [text], ["a"]) for text in (label, "", unicodedata.normalize("NFD", label))
    )
    assert page.width > plain.width
    assert page.tobytes() == decomposed.tobytes()


@pytest.mark.parametrize("label", ["トキ風のバス", "مرحبا", "a bus 🚌", "חתול", "\ud800"])
def test_other_labels_are_numbers(label):
    assert numbered_labels(["a bus", label, "a cat"]) == {2: label}
    rows = [[image(RED)]] * 3
    shown = image_grid(rows, ["a bus", "#2", "a cat"], ["a"])
    assert image_grid(rows, ["a bus", label, "a cat"], ["a"]).tobytes() == shown.tobytes()


def test_rows_are_as_high_and_columns_as_wide_as_their_images():
    page = image_grid([[image(RED, 160, 240), image(GREEN, 240, 160)]], ["seed 1"], ["a", "b"])
    assert size(page, RED) == (160, 240)
    assert size(page, GREEN) == (240, 160)
    assert box(page, GREEN)[0] - box(page, RED)[2] == 8
    portraits = image_grid([[image(RED, 96, 144)], [image(GREEN, 96, 144)]], ["1", "2"], ["a"])
    assert box(portraits, GREEN)[1] - box(portraits, RED)[3] == 8
    assert portraits.width < 96 + 40
    smaller = image_grid([[image(RED, 512, 512)], [image(GREEN, 256, 256)]], ["1", "2"], ["a"])
    assert (size(smaller, RED), size(smaller, GREEN)) == ((512, 512), (256, 256))  # sizes can be compared
    assert smaller.height - box(smaller, GREEN)[3] == 8


def test_the_images_of_a_grid_are_row_by_row(tmp_path, monkeypatch):
    colours = [RED, GREEN, BLUE, YELLOW, (0, 255, 255), (255, 0, 255)]
    monkeypatch.setattr("dora_mm.sampling.contact_sheets.thumbnail_of", lambda job, index: image(job.requests[index]))
    save_grid(SimpleNamespace(requests=colours), tmp_path / "sheet.png", ["1", "2"], ["a", "b", "c"])
    boxes = [box(Image.open(tmp_path / "sheet.png"), colour) for colour in colours]
    assert boxes[0][1] == boxes[1][1] == boxes[2][1] < boxes[3][1] == boxes[4][1] == boxes[5][1]
    assert boxes[0][0] == boxes[3][0] < boxes[1][0] == boxes[4][0] < boxes[2][0] == boxes[5][0]


def test_the_column_of_labels_is_as_wide_as_needed():
    short, long = (image_grid([[image(RED)]], [label], [""]) for label in ("1", "a TOK icon of a flying saucer " * 9))
    none = image_grid([[image(RED)]], [""], [""])
    assert none.size == (144, 144)
    assert none.width < short.width < none.width + 24
    assert none.width + 100 < long.width <= none.width + 128 + 8
    assert long.height < 160  # eight lines, and an ellipsis


def test_words_without_end_are_broken_and_long_texts_end():
    font = font_of(16)
    word = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft"
    lines = wrap(f"die {word} fährt", 120, font, 20)
    assert "".join(lines).replace(" ", "") == f"die{word}fährt"
    assert max(font.getlength(line) for line in lines) <= 120
    cut = wrap(f"die {word} fährt", 120, font, 2)
    assert len(cut) == 2
    assert cut[-1].endswith("…")
    assert font.getlength(cut[-1]) <= 120
    assert wrap(" ", 120, font, 2) == []


def test_missing_images_are_outlined():
    page = image_grid([[image(RED, 80, 120), None], [None, None]], ["1", "2"], ["a", "b"])
    grey = tuple(int(LINE[i : i + 2], 16) for i in (1, 3, 5))
    left, top, right, bottom = box(page, grey)
    assert right - left >= 2 * 85 + 8
    assert bottom - top >= 2 * 128 + 8
    assert size(page, RED) == (85, 128)
    assert contact_sheet([None], ["a"], columns=1).width == 144


def test_a_contact_sheet_is_in_reading_order():
    colours = [RED, GREEN, BLUE, YELLOW]
    page = contact_sheet([image(colour) for colour in colours], ["1", "2", "3", "4"], columns=3)
    boxes = [box(page, colour) for colour in colours]
    assert boxes[0][1] == boxes[1][1] == boxes[2][1] < boxes[3][1]
    assert boxes[0][0] == boxes[3][0] < boxes[1][0] < boxes[2][0]
    ink = (np.asarray(page.convert("L")) < 60).nonzero()[0]
    assert boxes[3][3] < ink.max() < page.height  # the last label is under its image
    assert contact_sheet([image(RED)] * 4, ["1"] * 4, columns=2).width == 2 * 128 + 24
    with pytest.raises(ValueError, match="one label for each"):
        contact_sheet([image(RED)], [], columns=1)


def test_many_large_images_make_a_sheet_that_opens():
    page = image_grid([[image(RED, 1024, 1024)]] * 40, [""] * 40, ["a"])
    assert max(page.size) < 20_000


def test_the_font_is_small_and_comes_with_its_licence():
    assert FONT.stat().st_size < 100_000
    assert "Bitstream" in (FONT.parent / "LICENSE").read_text()
    assert not {"Bitstream", "Vera", "Arev"} & set(" ".join(font_of(12).getname()).split())
