"""The page of a training: what is kept of each sheet, what the page knows, and how it looks and behaves in Chromium."""

import shlex
import struct
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from dora_mm.cli import main
from dora_mm.cli.commands import take_prompts_file
from dora_mm.cli.parser import build_parser
from dora_mm.config import load_config
from dora_mm.config.loader import dump_config
from dora_mm.sampling.gallery import folder, read_images, update_page, write_gallery
from dora_mm.sampling.gallery import training as about
from dora_mm.sampling.gallery.thumbnails import Thumbnails
from dora_mm.sampling.manifest import read_manifest
from dora_mm.utils.run_directory import RunDirectory
from tests.sampling.training_run import draw, image, make_training, training_config, write_rows
from tests.shared import browser
from tests.shared.pages import data_of

in_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")


# --- the pictures that are kept of each sheet -------------------------------------------------------------------------


def steps_of(run: RunDirectory) -> list[int | None]:
    return [entry.settings["step"] for entry in read_manifest(run.path) if entry.settings["seed"] == 0][::2]


def test_each_image_of_a_sheet_is_kept_with_its_settings_and_those_of_the_base_model_once(tmp_path):
    run = make_training(tmp_path / "run", drawn=(0, 10, 40))
    entries = read_manifest(run.path)
    assert steps_of(run) == [None, 10, 40]  # a fresh adapter draws what the base model does
    assert [entry.settings["prompt"] for entry in entries[:4]] == ["a bus", "a cat"] * 2
    assert [entry.settings["seed"] for entry in entries[:4]] == [0, 0, 5, 5]
    last = entries[-1]
    assert last.file == "samples/step-000040/0002-seed5.png"
    assert (last.settings["adapter"], last.settings["strength"], last.settings["steps"]) == (str(run.path), 1.0, 2)
    with Image.open(run.path / last.file) as shown:
        assert (shown.size, shown.getpixel((0, 0))) == ((16, 16), (40, 200, 0))


def test_steps_behind_the_one_that_a_run_resumed_from_are_drawn_again(tmp_path):
    run = make_training(tmp_path / "run", drawn=(10, 20, 40))
    draw(run, training_config(), 20)
    assert steps_of(run) == [None, 10, 20]
    draw(run, training_config(), 40)
    assert steps_of(run) == [None, 10, 20, 40]


def test_other_prompts_of_a_resumed_run_replace_no_image(tmp_path):
    run = make_training(tmp_path / "run", drawn=(10,))
    draw(run, training_config(sample={"prompts": ["a key"], "seeds": [0]}), 20)
    entries = [(entry.settings["prompt"], entry.settings["step"]) for entry in read_manifest(run.path)]
    assert entries[-2:] == [("a key", None), ("a key", 20)]
    assert len({entry.file for entry in read_manifest(run.path)}) == len(entries) == 10


def test_an_adapter_that_begins_with_another_one_is_shown_before_its_first_step(tmp_path):
    run = RunDirectory(tmp_path / "run")
    draw(run, training_config(adapter={"init_from": "earlier"}), 0)
    assert steps_of(run) == [None, 0]


def test_the_average_has_images_of_its_own_and_full_training_no_strength(tmp_path):
    run = RunDirectory(tmp_path / "run")
    draw(run, training_config(), 10, ("before", "after", "average"))
    adapters = [entry.settings["adapter"] for entry in read_manifest(run.path)][::4]
    assert adapters == [None, str(run.path), str(run.adapter_ema)]
    draw(RunDirectory(tmp_path / "full"), training_config(adapter={"method": "full"}), 10, ("after",))
    assert {entry.settings["strength"] for entry in read_manifest(tmp_path / "full")} == {None}


# --- what the page knows ----------------------------------------------------------------------------------------------


def training_of(run: Path) -> dict:
    update_page(run)
    (found,) = data_of(run / "gallery" / "index.html")["trainings"]
    return found


def test_curves_of_losses_and_of_scores(tmp_path):
    training = [{"step": step, "loss": float("nan") if step == 3 else step} for step in range(1, 6)]
    validation = [
        {"step": 0, "vqa/loss": 2.0, "vqa": 1.0, "overall": 1.0, "vqa/other": 3.0},
        {"step": 4, "vqa/loss": 1.0, "vqa": 9.0, "overall": 9.0, "vqa/loss_minus_base": -1.0},
    ]
    losses, scores = about.charts(training, validation)
    assert {curve["name"]: curve["points"] for curve in losses["curves"]} == {
        "loss of the steps": [(1, 1), (2, 2), (4, 4), (5, 5)],  # what is no number is left out
        "vqa/loss": [(0, 2.0), (4, 1.0)],
    }
    assert {curve["name"]: curve["points"] for curve in scores["curves"]} == {"vqa": [(0, 1.0), (4, 9.0)]}
    assert about.charts([], []) == []


def test_a_long_curve_is_thinned_and_smoothed_without_a_shift(tmp_path):
    rows = [{"step": step, "loss": step + (-1) ** step} for step in range(1, 5001)]
    raw, smooth = (curve["points"] for curve in about.charts(rows, [])[0]["curves"])
    assert len(raw) == len(smooth) <= about.MOST_POINTS
    assert raw[-1][0] == smooth[-1][0] == 5000
    middle = [(step, value) for step, value in smooth if 200 < step < 4800]
    assert all(abs(value - step) < 8 for step, value in middle)  # a slope stays where it is, the zigzag goes


def test_settings_are_those_that_are_looked_for_and_those_that_were_changed(tmp_path):
    found = about.chosen_settings(training_config(loss={"min_snr_gamma": None}))
    assert found["optimizer.lr"] == "0.01"
    assert found["optimizer.name"] == "adamw"  # the default
    assert found["adapter.parts"] == "unet.attn, unet.ff"
    assert found["loss.min_snr_gamma"] == "null"
    assert not {"train.compile", "sample.prompts", "name"} & set(found)


def test_training_images_are_spread_over_the_folder_without_masks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for number in range(48):
        image((number, 0, 0)).save(f"pictures/{number:02d}.png")
    image((0, 0, 0)).save("pictures/00.mask.png")
    found, note = about.training_images(training_config())
    assert [path.name for path in found] == [f"{number:02d}.png" for number in range(0, 48, 2)]
    assert note == "24 of 48"
    held_out = training_config(data={"folder": "pictures", "valid": {"share": 0.1}})
    assert about.training_images(held_out)[1] == "24 of 48, held-out ones are among them"
    shown = training_of(make_training(Path("run"), drawn=()).path)["images"]
    assert [item["name"] for item in shown] == [path.name for path in found]
    with Image.open(Path("run/gallery") / shown[1]["file"]) as thumbnail:
        assert thumbnail.size == (16, 16)


@pytest.mark.parametrize("place", ["../private", "link", "absolute"])
def test_the_page_of_a_run_of_others_shows_no_folder_of_this_machine(tmp_path, monkeypatch, place):
    """Its config names what it likes, and a page may be passed on; that of one's own training shows all."""
    (tmp_path / "private").mkdir()
    image((1, 2, 3)).save(tmp_path / "private" / "me.png")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("link").symlink_to(tmp_path / "private")
    run = make_training(Path("run"), drawn=())
    named = str(tmp_path / "private") if place == "absolute" else place
    (run.path / "config.yaml").write_text(dump_config(training_config(data={"folder": named})))
    page = write_gallery({run.path: read_images(run.path)}, tmp_path / "page")
    (shown,) = data_of(page)["trainings"]
    assert shown["images"] == []
    assert "is outside of the current folder" in shown["note"]
    update_page(run.path)
    assert [each["name"] for each in data_of(run.path / "gallery" / "index.html")["trainings"][0]["images"]] == [
        "me.png"
    ]


def test_a_training_without_images_and_data_has_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = make_training(tmp_path / "run", drawn=(), finished=False)
    assert main(["gallery", str(run.path)]) == 0
    found = data_of(run.path / "gallery" / "index.html")
    assert found["images"] == []
    (training,) = found["trainings"]
    assert training["note"].startswith("data.folder: pictures does not exist")
    assert training["next"] == {
        "after a stop": f"dora-mm train --resume {shlex.quote(str(run.path))}",
        "a contact sheet now": f"touch {shlex.quote(str(run.path / 'sample-now'))}",
    }  # fmt: skip
    (run.path / "config.yaml").write_text("pipeline: train_diffusion\nmodel: 7\n")
    assert main(["gallery", str(run.path)]) == 2
    assert "config.yaml is not as the training wrote it" in capsys.readouterr().err


def test_a_training_of_questions_shows_curves_and_answers_by_step(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.samples.mkdir(parents=True)
    (run.path / "config.yaml").write_text(dump_config(load_config("configs/vlm/demo.yaml")))
    write_rows(run.path / "metrics.jsonl", [{"step": 4, "loss": 2.0}])
    for step, answer in ((2, "red"), (4, "blue")):
        row = {"task": "vqa", "id": 7, "question": "Which colour?", "answer": answer, "references": ["blue"]}
        write_rows(run.samples / f"step-{step:06d}.jsonl", [row])
    found = training_of(run.path)
    assert (found["done"], found["finished"], found["images"]) == (4, False, [])
    assert found["answers"] == [
        {"question": "Which colour?", "references": ["blue"], "answers": {"2": "red", "4": "blue"}}
    ]
    assert "answers now" in found["next"]


def test_a_page_that_cannot_be_written_does_not_end_the_training(tmp_path, caplog):
    run = make_training(tmp_path / "run")
    (run.path / "gallery").mkdir()
    (run.path / "gallery" / "notes.txt").touch()
    update_page(run.path)
    assert "The page of the training was not written: output" in caplog.text
    assert [path.name for path in (run.path / "gallery").iterdir()] == ["notes.txt"]


def test_large_images_are_decoded_for_the_first_page_alone(tmp_path, monkeypatch):
    run = make_training(tmp_path / "run", drawn=())
    large = tmp_path / "pictures"
    large.mkdir()
    for number in range(3):
        Image.new("RGB", (600, 600), (number, 0, 0)).save(run.path / f"{number}.png")
    rows = [
        {"row": 1, "file": f"{number}.png", "status": "done", "batch": 1, "settings": {"prompt": "a", "adapter": None}}
        for number in range(3)
    ]
    write_rows(run.path / "manifest.jsonl", rows)
    scaled, add = [], Thumbnails.add
    monkeypatch.setattr(
        Thumbnails, "add", lambda self, path, image: scaled.append(image.size) or add(self, path, image)
    )
    update_page(run.path)
    assert scaled == [(600, 600)] * 3
    Image.new("RGB", (700, 600), "red").save(run.path / "1.png")
    update_page(run.path)
    assert scaled[3:] == [(700, 600)]  # the one that has changed
    shown = data_of(run.path / "gallery" / "index.html")["images"]
    assert [item["size"] for item in shown] == [[600, 600], [700, 600], [600, 600]]
    assert len(list((run.path / "gallery" / "thumbnails").iterdir())) == 3


def test_a_image_with_damaged_exif_has_a_thumbnail_all_the_same(tmp_path):
    """Pillow raises a TypeError where it is to be turned, which ended the training before its summary."""
    turned, white_point = struct.pack(">HHIHH", 0x112, 3, 1, 6, 0), struct.pack(">HHII", 0x13E, 2, 6, 38)
    exif = struct.pack(">2sHIH", b"MM", 42, 8, 2) + turned + white_point + bytes(4) + b"text.\0"  # and no numbers
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif)
    thumbnails = Thumbnails(tmp_path / "thumbnails", tmp_path / "earlier")
    path = thumbnails.path(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        with pytest.raises(TypeError):
            ImageOps.exif_transpose(image)
        thumbnails.add(path, image)
    with Image.open(path) as small:
        assert small.size == (40, 30)


def test_a_image_that_changes_while_it_is_read_has_its_own_thumbnail_on_the_next_page(tmp_path, monkeypatch):
    run, read = make_training(tmp_path / "run", drawn=()), folder._read
    write_rows(
        run.path / "manifest.jsonl",
        [{"row": 1, "file": "1.png", "status": "done", "batch": 1, "settings": {"prompt": "a", "adapter": None}}],
    )
    Image.new("RGB", (600, 600), "red").save(run.path / "1.png")

    def read_and_change(path, **settings):
        found = read(path, **settings)
        Image.new("RGB", (700, 600), "blue").save(path)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(folder, "_read", read_and_change)
        update_page(run.path)
    update_page(run.path)
    (thumbnail,) = (run.path / "gallery" / "thumbnails").iterdir()
    red, _, blue = Image.open(thumbnail).convert("RGB").getpixel((0, 0))
    assert blue > red


# --- in a browser -----------------------------------------------------------------------------------------------------

SOURCES = "[...document.querySelectorAll('.steps img')].map((image) => image.src.match(/step-0*(\\d+)/)[1])"
SAID = "[...document.querySelectorAll('.step output')].map((node) => node.textContent)"
# Whether each command is seen to its end: no box around it scrolls or cuts it off
SEEN = (
    "[...document.querySelectorAll('.next code')].map((code) => [code, code.closest('.next')].every((box) =>"
    "box.scrollHeight <= box.clientHeight && box.scrollWidth <= box.clientWidth)"
    "&& code.getBoundingClientRect().bottom <= code.closest('.panels').getBoundingClientRect().bottom)"
)
SLIDE = (
    "(() => {{ const node = document.querySelector({0!r}); node.value = {1};"
    "node.dispatchEvent(new Event('input', {{ bubbles: true }})); }})()"
)


@pytest.fixture
def page(chromium, tmp_path, monkeypatch) -> browser.Page:
    """The page of a finished training, opened."""
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    image((250, 0, 0)).save("pictures/one.png")
    run = make_training(Path("runs/style/001"))
    assert main(["gallery", str(run.path)]) == 0
    chromium.problems.clear()
    chromium.open(tmp_path / run.path / "gallery" / "index.html")
    return chromium


@in_chromium
def test_a_slider_goes_through_the_steps_of_a_prompt(page):
    assert page.evaluate(SAID) == ["step 40"] * 4  # two prompts, two seeds
    page.evaluate(SLIDE.format(".step input", 1))
    assert page.evaluate(SAID) == ["step 10", "step 40", "step 40", "step 40"]
    assert page.evaluate(SOURCES) == ["10", "40", "40", "40"]
    page.evaluate(SLIDE.format("#all-steps", 0))
    assert page.evaluate(SAID) == ["bare model"] * 4
    page.evaluate(SLIDE.format("#all-steps", 2))
    assert page.evaluate(SOURCES) == ["20"] * 4
    page.click(".steps .card")
    assert page.evaluate("document.querySelector('#after').src").endswith("step-000020/0001-seed0.png")
    assert page.evaluate("document.querySelector('#before').src").endswith("step-000000/0001-seed0-before.png")
    page.press("ArrowRight", "Escape")  # the next step; the card then shows it
    assert page.evaluate(SAID) == ["step 40", "step 20", "step 20", "step 20"]
    assert page.problems == []


@in_chromium
def test_curves_have_the_checkpoints_and_follow_the_slider(page):
    assert page.evaluate("document.querySelector('.training h2 + span').textContent") == "finished after 40 steps"
    legend = page.evaluate("[...document.querySelectorAll('.legend li')].map((node) => node.textContent)")
    assert legend == ["loss of the steps", "held-out loss", "checkpoint"]
    points = page.evaluate("[...document.querySelectorAll('.curve polyline')].map((line) => line.points.numberOfItems)")
    assert points == [40, 5]
    at = "[...document.querySelectorAll('g.checkpoint line')].map((line) => line.x1.baseVal.value)"
    twenty, _ = page.evaluate(at)
    lowest = page.evaluate(
        "[...document.querySelectorAll('.series-0 circle')].sort((a, b) => b.cy.baseVal.value - a.cy.baseVal.value)[0]"
        ".cx.baseVal.value"
    )
    assert (twenty, "best" in page.evaluate("document.querySelector('.best').textContent")) == (lowest, True)
    page.evaluate(SLIDE.format("#all-steps", 1))
    reading = page.evaluate("document.querySelector('.reading').textContent")
    assert reading == "step 10 · loss of the steps 0.1 · held-out loss 1.25"
    assert page.evaluate("document.querySelector('.plot').scrollWidth <= document.querySelector('.plot').clientWidth")
    page.click(".plot")  # its middle is nearest to step 20
    assert page.evaluate(SAID) == ["step 20"] * 4
    assert page.problems == []


@in_chromium
def test_settings_training_images_and_commands(page):
    assert "optimizer.lr\n0.01" in page.evaluate("document.querySelector('.settings').innerText")
    decoded = "document.querySelector('.learned img').decode().then(() => document.querySelector('.learned img').alt)"
    assert page.evaluate(decoded) == "one.png"
    page.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.click(".next button")
    page.wait_for("document.querySelector('.next button').textContent === 'Copied'")
    words = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    arguments = build_parser().parse_args(words[1:])
    Path("runs/style/001/adapter/adapter_model.safetensors").touch()
    take_prompts_file(arguments)
    assert load_config(arguments.config, arguments.overrides).seeds == (0, 5)


@in_chromium
def test_a_image_is_drawn_again_with_the_checkpoint_of_its_step(page):
    page.click(".steps .card")
    commands = {}
    for step in (40, 20, 10):
        shown = page.evaluate("commandOf(state.shown[state.open])")
        commands[step] = [word for word in shlex.split(shown) if word.startswith("adapter.path")]
        page.press("ArrowLeft")
    assert commands == {
        40: ['adapter.path="runs/style/001"'],
        20: ['adapter.path="runs/style/001/checkpoints/step-000020"'],
        10: [],  # its adapter was not kept
    }
    page.press("ArrowRight", "f", "ArrowRight", "f", "Escape")  # steps 10 and 20
    assert page.evaluate("find('export').textContent") == "Save 1 of them as a job"
    assert page.evaluate("favouriteJobs().map(adapterOf)") == ["runs/style/001/checkpoints/step-000020"]
    page.evaluate("localStorage.clear()")


@in_chromium
def test_a_training_on_a_phone(chromium, page, tmp_path):
    for dark in (False, True):
        chromium.open(tmp_path / "runs/style/001/gallery/index.html", 390, 800, dark)
        assert chromium.evaluate("document.documentElement.scrollWidth") == 390
        tops = (
            "[...document.querySelectorAll('.steps .card')].slice(0, 2).map((card) => card.getBoundingClientRect().top)"
        )
        first, second = chromium.evaluate(tops)
        assert first == second  # two in a row
        assert chromium.evaluate("document.querySelector('.plot svg').getBoundingClientRect().width") > 300
        assert chromium.evaluate(SEEN) == [True] * 3


@in_chromium
def test_a_training_on_a_wide_screen_has_no_gap(chromium, page, tmp_path):
    chromium.open(tmp_path / "runs/style/001/gallery/index.html", 1400, 900)
    assert chromium.evaluate(SEEN) == [True] * 3
    bottoms = (
        "[...document.querySelector('.panels').children].map((part) => part.lastElementChild.getBoundingClientRect())"
    )
    curves, *_ = chromium.evaluate(f"{bottoms}.map((box) => box.bottom)")
    bottom = chromium.evaluate("document.querySelector('.panels').getBoundingClientRect().bottom")
    assert bottom - curves < 10  # the training images are below the curves
    settings = "document.querySelector('.settings')"
    assert chromium.evaluate(f"{settings}.getBoundingClientRect().bottom") == bottom
    assert chromium.evaluate(f"{settings}.scrollHeight > {settings}.clientHeight")  # the rest scrolls
