"""The labelled contact sheets of jobs: what goes across and down, and what labels say."""

import weakref
from dataclasses import replace

import pytest
from PIL import Image

from dora_mm.sampling import contact_sheets
from dora_mm.sampling.batch.requests import ImageRequest, file_names
from dora_mm.sampling.contact_sheets import label, save_contact_sheets
from dora_mm.sampling.generating import BatchGeneration

STYLE = (("runs/my_style/001", 1.0),)
BUS = ImageRequest(1, "a bus", None, 0, 20, 3.0, 32, 32, None, STYLE, 1.0)


def batch_of_metadata(folder, images):
    """A job whose images were all generated."""
    job = BatchGeneration(folder, images, file_names(images), [], [], {})
    for index in range(len(images)):
        job.file(index).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), "red").save(job.file(index))
        job.done[index] = "digest"
    return job


def table(num_prompts, seeds, strengths):
    rows = [replace(BUS, row=row, prompt=f"a bus {row}") for row in range(1, num_prompts + 1)]
    return [replace(row, seed=seed, strength=strength) for row in rows for seed in seeds for strength in strengths]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Saves the contact sheets of images; returns the labels of each table, left and top, and the sizes of files."""

    def draw(images):
        tables, own = [], contact_sheets.image_grid

        def noted(rows, left, top):
            tables.append((list(left), list(top)))
            return own(rows, left, top)

        monkeypatch.setattr(contact_sheets, "image_grid", noted)
        sizes = [Image.open(file).size for file in save_contact_sheets(batch_of_metadata(tmp_path, images))]
        monkeypatch.undo()
        return tables, sizes

    return draw


def test_references_stand_before_the_images_of_their_row(drawn, tmp_path):
    for name, color in (("a", "blue"), ("b", "green")):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{name}.png")
    given = [(str(tmp_path / "a.png"), str(tmp_path / "b.png")), ()]
    images = [replace(request, images=given[request.row - 1]) for request in table(2, [0], (0.0, 1.0))]
    ((left, top),), ((width, _),) = drawn(images)
    assert top == ["reference 1", "reference 2", "no adapter", "strength 1"]
    assert left == ["a bus 1, a.png + b.png", "a bus 2, no reference"]
    with Image.open(tmp_path / "sheet.png") as page:
        found = {color for _, color in page.convert("RGB").getcolors(width * page.height)}
    assert {(0, 0, 255), (0, 128, 0), (255, 0, 0)} <= found


def test_seeds_and_strengths_go_across_and_prompts_down(drawn):
    ((left, top),), ((width, height),) = drawn(table(4, range(7), (0.0, 1.0)))
    assert left == ["a bus 1", "a bus 2", "a bus 3", "a bus 4"]
    assert top[:3] == ["seed 0, no adapter", "seed 0, strength 1", "seed 1, no adapter"]
    assert 14 * 128 < width < 14 * 160
    assert 4 * 128 < height < 4 * 160
    (_, top), *_ = drawn(table(2, [3, 4], [1.0]))[0]
    assert top == ["seed 3", "seed 4"]


def test_more_seeds_than_fit_go_to_other_sheets_of_one_width(drawn):
    tables, sizes = drawn(table(2, range(20), (0.0, 1.0)))
    assert [len(top) for _, top in tables] == [14, 14, 12]
    assert tables[1][1][0] == "seed 7, no adapter"
    assert len(sizes) == 3


@pytest.mark.parametrize("images", [table(130, [0], [1.0]), table(90, [0, 1], [1.0])], ids=["contact", "table"])
def test_one_sheet_is_in_memory_at_a_time(tmp_path, monkeypatch, images):
    save, before = contact_sheets.save_atomically, []

    def save_alone(file, image):
        assert not before or before[-1]() is None
        before.append(weakref.ref(image))
        save(file, image)

    monkeypatch.setattr(contact_sheets, "save_atomically", save_alone)
    assert len(save_contact_sheets(batch_of_metadata(tmp_path, images))) == len(before) == 3


def test_many_rows_stand_in_blocks_beside_each_other(drawn):
    tables, ((width, height),) = drawn(table(28, [0], (0.0, 1.0)))
    assert [left[0] for left, _ in tables[1:]] == ["a bus 1", "a bus 11", "a bus 21"]
    assert 0.5 < height / width < 1.5
    tables, ((width, height),) = drawn(table(1, range(20), (0.0, 1.0)))  # a single prompt: its seeds are the rows
    assert tables[1][0][:2] == ["a bus 1, seed 0", "a bus 1, seed 1"]
    assert 0.5 < height / width < 1.5


def test_a_label_that_no_font_has_keeps_its_number_in_another_block(drawn):
    images = [replace(each, prompt="猫") if each.row == 12 else each for each in table(28, [0], (0.0, 1.0))]
    assert drawn(images)[0][2][0][:2] == ["a bus 11", "#12"]


def test_a_label_says_what_tells_images_apart():
    both = replace(BUS, adapters=(("runs/my_style/001/adapter", 0.7), ("other.safetensors", (("unet.down", 0.5),))))
    shown = ["adapters", "strength"]
    assert label(BUS, shown) == "a bus, my_style/001, strength 1"
    assert label(replace(BUS, adapters=()), shown) == "a bus, no adapter"
    assert label(replace(BUS, strength=0.0), shown) == "a bus, no adapter"
    assert label(both, ["adapters"]) == "a bus, my_style/001:0.7 + other:unet.down=0.5"
    others = replace(BUS, negative_prompt="red", steps=9, width=64)
    assert label(others, ["negative_prompt", "steps", "width"]) == "a bus, 64 x 32, negative: red, 9 steps"
    assert label(BUS, ["negative_prompt", "scheduler"]) == "a bus, the model's own scheduler"


def test_a_row_without_adapter_has_no_strength(drawn):
    rows = [BUS, replace(BUS, row=2, adapters=())]
    ((left, top),), _ = drawn([replace(row, strength=strength) for row in rows for strength in (0.5, 1.0)])
    assert (left, top) == (["a bus, my_style/001", "a bus, no adapter"], ["strength 0.5", "strength 1"])
