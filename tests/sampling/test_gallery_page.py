"""The page of a gallery in Chromium, opened from the disk: filters, sorting, large view, slider, keyboard."""

import json
import shlex
import shutil

import pytest
from PIL import Image

from dora_mm.cli.commands import take_prompts_file
from dora_mm.cli.parser import build_parser
from dora_mm.config import load_config
from dora_mm.sampling.batch.reading import read_prompts_file
from dora_mm.sampling.gallery import write_gallery
from dora_mm.sampling.manifest import read_manifest
from tests.sampling.conftest import ADAPTED, BARE
from tests.shared import browser
from tests.shared.pages import HOSTILE, entry, make_run

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")

PROMPTS = "[...document.querySelectorAll('.card .caption')].map((node) => node.textContent)"
FOCUSED = "document.activeElement.querySelector('.caption')?.textContent ?? document.activeElement.id"
CHOOSE = """(() => {{
  const pill = [...document.querySelectorAll('.pill')].find((node) => node.querySelector('span').textContent === {0});
  const select = pill.querySelector('select');
  select.value = [...select.options].find((option) => option.textContent === {1}).value;
  select.dispatchEvent(new Event('change', {{ bubbles: true }}));
}})()"""


@pytest.fixture
def both(chromium, runs, tmp_path) -> browser.Page:
    chromium.problems.clear()
    chromium.open(write_gallery({run: read_manifest(run) for run in runs}, tmp_path / "gallery"))
    return chromium


def choose(page: browser.Page, name: str, value: str) -> None:
    page.evaluate(CHOOSE.format(json.dumps(name), json.dumps(value)))


def test_all_images_and_failures_are_shown(one):
    assert one.evaluate(PROMPTS) == ["a bus", "a bus", "a cat", "a cat", "a key", "a key", "a hat"]
    assert one.evaluate("document.querySelector('.missing').innerText") == "failed\nthe image is black"
    assert one.evaluate("document.querySelector('#count').textContent") == "7 images, 1 not generated"
    decoded = "Promise.all([...document.querySelectorAll('.card img')].map((image) => image.decode().then(() => 1)))"
    assert one.evaluate(decoded) == [1] * 6
    assert one.problems == []


def test_search_filters_and_clearing(one):
    one.click("#search")
    one.press(*"A CAT")
    assert one.evaluate(PROMPTS) == ["a cat", "a cat"]
    choose(one, "adapter", "none")
    assert one.evaluate(PROMPTS) == ["a cat"]
    assert one.evaluate("document.querySelector('#count').textContent") == "1 of 7 images"
    choose(one, "adapter", "one/001")
    one.click("#clear")
    assert len(one.evaluate(PROMPTS)) == 7
    choose(one, "right", "0")  # a score of two values is a choice, one of many is not
    assert one.evaluate(PROMPTS) == ["a cat"]
    assert "log-odds" not in one.evaluate("document.querySelector('#filters').innerText")
    choose(one, "strength", "none")
    assert one.evaluate("document.querySelector('main').innerText") == "No image matches."
    assert one.problems == []


def test_sorting_by_scores_and_settings(one):
    choose(one, "adapter", "one/001")
    choose(one, "sort by", "log-odds")  # the best first
    assert one.evaluate(PROMPTS) == ["a key", "a cat", "a bus"]
    assert one.evaluate("[...document.querySelectorAll('.badge')].map((b) => b.textContent)") == ["3", "2", "1"]
    one.click("#direction")
    assert one.evaluate(PROMPTS) == ["a bus", "a cat", "a key"]
    one.click("#clear")
    one.click("#direction")
    assert one.evaluate(PROMPTS)[-1] == "a hat"  # without a score: at the end in both directions
    choose(one, "sort by", "prompt")
    assert one.evaluate(PROMPTS)[2:6] == ["a cat", "a cat", "a hat", "a key"]


def test_the_large_view_by_keyboard(one):
    one.evaluate("document.querySelector('.card').focus()")
    one.press("ArrowRight", "Enter")
    assert one.evaluate("document.querySelector('#viewer').open")
    assert one.evaluate("document.querySelector('#position').textContent") == "2 of 7"
    assert one.evaluate("document.querySelector('#after').alt") == "a bus"
    one.press("ArrowRight", "ArrowRight", "ArrowLeft")
    assert one.evaluate("document.querySelector('#prompt').textContent") == "a cat"
    one.press("End")
    assert one.evaluate("document.querySelector('#failure').innerText") == "the image is black"
    assert one.evaluate("document.querySelector('#stage').offsetParent") is None
    one.press("ArrowRight", "Home", "ArrowRight", "ArrowRight", "Escape")
    assert not one.evaluate("document.querySelector('#viewer').open")
    one.wait_for(f"({FOCUSED}) === 'a cat'")  # the focus is on the picture that was looked at last
    assert one.problems == []


def test_the_large_view_shows_all_settings_and_copies_them(one):
    one.click(".grid li:nth-child(4) .card")
    words = one.evaluate("document.querySelector('.words').innerText").split("\n")
    for text in ("a cat", "seed", "2", "adapter", "runs/one/001/adapter", "log-odds", "model", "tiny"):
        assert text in words
    one.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    one.click("#copy")
    one.wait_for("document.querySelector('#copy').textContent === 'Copied'")
    assert json.loads(one.evaluate("navigator.clipboard.readText()")) == {
        "prompt": "a cat", "seed": 2, "model": "tiny", "adapter": "runs/one/001/adapter", "strength": 1,
    }  # fmt: skip
    one.click("#close")
    assert not one.evaluate("document.querySelector('#viewer').open")


def test_the_slider_shows_before_and_after(one, tmp_path):
    def left_and_right() -> list[str]:
        one.evaluate("document.querySelector('#before').decode()")
        one.screenshot(tmp_path / "shot.png")
        x, y, width, height = one.evaluate(
            "(() => { const b = document.querySelector('#stage').getBoundingClientRect();"
            "return [b.x, b.y, b.width, b.height]; })()"
        )
        with Image.open(tmp_path / "shot.png") as shot:
            colours = [shot.convert("RGB").getpixel((x + part * width, y + height / 3)) for part in (0.25, 0.75)]
        names = {BARE: "before", ADAPTED: "after"}
        return [names[min(names, key=lambda c: sum(abs(a - b) for a, b in zip(c, found, strict=True)))]
                for found in colours]  # fmt: skip

    one.click(".grid li:nth-child(2) .card")
    assert left_and_right() == ["before", "after"]
    one.press(*["Shift+Tab"] * 8)
    while one.evaluate(FOCUSED) != "split":
        one.press("Tab")
    one.press("ArrowRight", "ArrowLeft", "ArrowRight")  # these move the slider and nothing else
    assert one.evaluate("document.querySelector('#split').value") == "51"
    assert one.evaluate("document.querySelector('#position').textContent") == "2 of 7"
    assert "51 % before" in one.evaluate("document.querySelector('#split').getAttribute('aria-valuetext')")
    one.press("Home")
    assert left_and_right() == ["after", "after"]
    one.press("End")
    assert left_and_right() == ["before", "before"]
    one.click("#split")  # in its middle; then arrow keys go through the pictures again
    assert left_and_right() == ["before", "after"]
    one.press("ArrowLeft")
    assert one.evaluate("document.querySelector('#position').textContent") == "1 of 7"
    assert one.evaluate("document.querySelector('#compare').offsetParent") is None  # it has no adapter
    assert one.problems == []


def test_everything_is_reached_by_tab(one):
    reached = []
    for _ in range(30):
        one.press("Tab")
        reached.append(one.evaluate(FOCUSED) or one.evaluate("document.activeElement.parentNode.innerText"))
    assert [name for name in ("search", "sort", "direction", "a bus", "a hat") if name not in reached] == []
    names = one.evaluate(
        "[...document.querySelectorAll('button, input, select, a')].filter((node) => "
        "!(node.ariaLabel || node.innerText || node.closest('label') || node.textContent)).map((node) => node.id)"
    )
    assert names == []  # each has a name for screen readers


def test_runs_side_by_side(both):
    both.click("#view-runs")
    rows = both.evaluate(
        "[...document.querySelectorAll('.group')].map((group) => [group.querySelector('h2').textContent,"
        "[...group.querySelectorAll('h3')].map((node) => node.textContent.split('/').at(-1)),"
        "group.querySelectorAll('.card img').length])"
    )
    assert rows[1] == ["a bus", ["one", "two"], 2]
    assert len(rows) == 7
    choose(both, "adapter", "one/001")
    assert both.evaluate("document.querySelectorAll('.group .hole').length") == 3
    both.click("#view-grid")
    assert len(both.evaluate(PROMPTS)) == 3
    assert both.problems == []


def test_it_opens_with_before_and_after_side_by_side(one, runs, tmp_path):
    one.open(tmp_path / "gallery" / "index.html")
    assert one.evaluate(PROMPTS) == ["a bus", "a cat", "a key", "a hat"]  # a bare picture is in its pair
    assert one.evaluate(
        "[...document.querySelectorAll('.card')].map((card) => card.querySelectorAll('img').length)"
    ) == [*(2, 2, 2, 0)]
    files = one.evaluate("[...document.querySelectorAll('.card img')].slice(0, 2).map((i) => i.src.split('/').at(-2))")
    assert files == ["bare", "adapter"]
    choose(one, "adapter", "none")
    assert one.evaluate(PROMPTS) == ["a bus", "a cat", "a key", "a hat"]  # without their pairs
    assert one.problems == []


def test_what_differs_between_neighbours_stands_first(one):
    one.click("#view-grid")
    facts = (
        "[...document.querySelectorAll('.card .facts')]"
        ".map((line) => [...line.children].map((node) => [node.textContent, node.className]))"
    )
    bare, adapted = one.evaluate(facts)[:2]
    assert bare == [["no adapter", "setting differs"], ["seed 1", "setting"]]
    assert [name for name, kind in adapted if kind == "setting differs"] == ["seed 1", "one/001", "strength 1"]
    choose(one, "seed", "1")
    assert [name for name, _ in one.evaluate(facts)[1]] == ["one/001", "strength 1", "seed 1"]


def test_favourites_stay_and_become_a_job(one, tmp_path, monkeypatch):
    one.click(".grid li:nth-child(2) .card")
    one.click("#favourite")
    one.press("ArrowRight", "f", "ArrowRight", "f", "f", "Escape")
    assert one.evaluate("document.querySelector('#favourites').textContent") == "Favourites (2)"
    one.open(tmp_path / "gallery" / "index.html")  # again
    one.click("#view-grid")
    one.click("#favourites")
    one.wait_for("document.querySelectorAll('.grid li').length === 2")  # the page is drawn anew
    assert one.evaluate(PROMPTS) == ["a bus", "a cat"]
    assert one.evaluate("document.querySelectorAll('.star:not(.off)').length") == 2
    one.evaluate("URL.createObjectURL = (blob) => { window.saved = blob; return '#'; }")
    one.click("#export")
    (tmp_path / "favourites.jsonl").write_text(one.evaluate("saved.text()"))
    (tmp_path / "runs/one/001/adapter").mkdir(parents=True)  # a job's paths are looked for when it is read
    monkeypatch.chdir(tmp_path)
    first, second = read_prompts_file(tmp_path / "favourites.jsonl")
    assert (first.prompt, first.seed, first.strength) == ("a bus", (1,), 1)
    assert first.adapter == (("runs/one/001/adapter", 1.0),)
    assert (second.prompt, second.adapter) == ("a cat", None)
    assert one.problems == []
    one.evaluate("localStorage.clear()")


def test_prompt_and_command_are_copied_by_one_click(one):
    one.click(".grid li:nth-child(4) .card")
    one.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    one.click("#copy-prompt")
    one.wait_for("document.querySelector('#copy-prompt').textContent === 'Copied'")
    assert one.evaluate("navigator.clipboard.readText()") == "a cat"
    one.click("#copy-command")
    one.wait_for("document.querySelector('#copy-command').textContent === 'Copied'")
    words = shlex.split(one.evaluate("navigator.clipboard.readText()"))
    assert words == [
        *("dora-mm", "sample", "--set", 'prompts=["a cat"]', "seeds=[2]", 'model.path="tiny"'),
        *('adapter.path="runs/one/001/adapter"', "strengths=[1]"),
    ]
    arguments = build_parser().parse_args(words[1:])
    take_prompts_file(arguments)
    assert load_config(arguments.config, arguments.overrides).prompts == ("a cat",)


def test_hostile_texts_do_nothing(chromium, tmp_path):
    entries = [
        entry(number, f"{number}.png", prompt=text, adapter=text, scores={text: number}, **{text: text})
        for number, text in enumerate(HOSTILE)
    ]
    entries += [entry(99, "99.png", "failed", HOSTILE[2], prompt=HOSTILE[0], __proto__="x", constructor="y")]
    run = make_run(tmp_path / "run", entries)
    chromium.problems.clear()
    chromium.open(write_gallery({run: read_manifest(run)}, tmp_path / "gallery"))
    shown = [text.replace("\ud83d", "\ufffd").replace("\udc00", "\ufffd") for text in HOSTILE]
    prompts = chromium.evaluate(f"{PROMPTS}.map((text) => text.toWellFormed())")
    assert prompts == [*shown, HOSTILE[0]]
    chromium.click(".card")
    for text in [*shown, HOSTILE[0]]:
        assert chromium.evaluate("document.querySelector('#prompt').textContent.toWellFormed()") == text
        chromium.press("ArrowRight")
    chromium.click("#close")
    for name in chromium.evaluate("[...document.querySelectorAll('#sort option')].map((o) => o.textContent)"):
        choose(chromium, "sort by", name)
    assert chromium.evaluate("document.title").endswith("run")
    assert chromium.evaluate("document.querySelectorAll('script, img[src=x]').length") == 2
    assert chromium.problems == []
    script = "Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'})"
    chromium.evaluate(f"document.body.append({script})")
    assert chromium.evaluate("window.ran") is None  # what the policy is for
    chromium.problems.clear()


def test_on_a_phone_and_in_the_dark(chromium, runs, tmp_path):
    three = [*runs, shutil.copytree(runs[0], tmp_path / "three")]
    page = write_gallery({run: read_manifest(run) for run in three}, tmp_path / "gallery")
    for dark in (False, True):
        chromium.open(page, 360, 740, dark)
        chromium.click("#view-grid")
        wide = "[...document.querySelectorAll('main *')].filter((n) => n.getBoundingClientRect().right > 360.5).length"
        assert chromium.evaluate(wide) == 0
        assert chromium.evaluate("document.documentElement.scrollWidth") == 360
        first, second = chromium.evaluate(
            "[...document.querySelectorAll('.card')].slice(0, 2).map((card) => card.getBoundingClientRect().top)"
        )
        assert first == second  # two in a row
        chromium.click(".grid li:nth-child(2) .card")
        chromium.screenshot(tmp_path / "shot.png")
        with Image.open(tmp_path / "shot.png") as shot:
            brightness = sum(shot.convert("RGB").getpixel((180, 735))) / 3
        assert brightness < 60 if dark else brightness > 220
        assert chromium.evaluate("document.querySelector('#copy').getBoundingClientRect().bottom") <= 740
        chromium.press("Escape")
        chromium.click("#view-runs")
        assert chromium.evaluate(wide) == 0
