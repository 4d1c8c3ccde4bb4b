"""The losses of single images and rows on the page of a training: sorted, marked, with their images, and escaped."""

import hashlib

import pytest
from PIL import Image

from dora_mm.sampling.gallery import update_page
from dora_mm.sampling.gallery.losses import rows_apart
from dora_mm.utils.example_losses import ExampleLoss, ExampleLosses, read_losses
from tests.sampling.training_run import make_training
from tests.shared import browser
from tests.shared.pages import data_of

ATTACK = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


@pytest.fixture
def run(tmp_path):
    """A training with three measurements of twelve images, the fourth of which is another kind of image."""
    run = make_training(tmp_path / "run")
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(images / f"{number}.png")
    for step in (0, 20, 40):
        ExampleLosses(run.path, 20, lambda step=step: rows(images, step), writes=True)(step)
    return run


def rows(images, step):
    found = []
    for number in range(12):
        path = images / f"{number}.png"
        about = {"path": str(path), "digest": hashlib.sha256(path.read_bytes()).hexdigest(), "answer": "red"}
        scale = (1 - step / 80) * (1 + 0.05 * (number % 5)) * (9 if number == 3 else 1)
        found += [ExampleLoss(str(number), size, f"{number} {ATTACK}", [scale, scale / 10], **about) for size in "AB"]
    return found


def test_the_page_has_them_sorted_with_their_images_and_those_apart_first(run, tmp_path):
    (tmp_path / "images" / "2.png").write_bytes((tmp_path / "images" / "1.png").read_bytes())  # not as it was
    update_page(run.path)
    losses = data_of(run.path / "gallery" / "index.html")["trainings"][0]["losses"]
    assert (losses["steps"], losses["count"]) == ([0, 20, 40], 12)
    first, *others = losses["rows"]
    assert (first["name"], first["mark"], first["group"]) == ("3.png", "higher than the others", "A, B")
    assert first["losses"] == pytest.approx([9 * 1.15 * 0.55 * share for share in (1, 0.75, 0.5)])
    assert [row["level"] for row in others] == sorted((row["level"] for row in others), reverse=True)
    assert not any(row["mark"] for row in others)
    shown = {row["name"]: row["file"] for row in losses["rows"]}
    assert shown.pop("2.png") is None
    assert all((run.path / "gallery" / file).is_file() for file in shown.values())


def test_measurements_behind_the_last_step_are_left_out(run):
    assert list(read_losses(run.path, 39)) == [0, 20]


def test_a_damaged_file_is_named(run):
    file = run.path / "losses" / "step-000020.jsonl"
    for damage in ('{"id": "1"}', '{"id": 1, "group": "A", "text": "", "losses": [1.0]}'):
        file.write_text(damage + "\n")
        with pytest.raises(
            ValueError, match="step-000020.jsonl, line 1 is not as a training wrote it: delete the file"
        ):
            read_losses(run.path, 40)


def test_the_report_of_rows(run):
    count, line = rows_apart(run.path, 40)
    assert count == f"\n1 of 12 rows have losses that stay apart; dora-mm gallery {run.path} shows the loss of each"
    assert line.startswith("higher than the others: '3 <img")
    assert line.endswith("right: 'red', loss 2.85")


def test_when_it_is_measured(tmp_path):
    losses = ExampleLosses(tmp_path, 20, list, writes=True)
    assert [step for step in range(61) if losses.is_due(step, 60)] == [20, 40]
    assert not ExampleLosses(tmp_path, 0, list, writes=True).is_due(20, 60)


@pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1400, 390])
def test_in_a_browser_nothing_of_the_files_runs(run, tmp_path, width):
    update_page(run.path)
    dom = browser.run(
        run.path / "gallery" / "index.html", "--dump-dom", f"--window-size={width},900", profile=tmp_path / "profile"
    )
    listed = dom[dom.index('<section class="losses">') :]
    listed = listed[: listed.index("</section>")]
    assert listed.count("<li ") == listed.count("<img ") == 12
    assert listed.count('class="apart"') == 1
    assert "&lt;img src=x onerror" in listed
    assert "1 of 12 stays apart" in listed
