"""The page of examples: its text, and how Chromium renders it."""

import base64
import html
import io
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from dora_mm.data.vl.example import Example, Turn
from dora_mm.eval.vl.pages import PageExample, PageSection, data_uri, write_examples_page
from tests.shared import browser

RED, BLUE = (220, 40, 30), (30, 60, 220)
LONG = "a very long caption of a kitchen with three bananas and a cat that sleeps by the window " * 3


def plain_image(colour: tuple[int, int, int], size: tuple[int, int] = (400, 300)) -> Image.Image:
    return Image.new("RGB", size, colour)


def sections() -> list[PageSection]:
    vqa = [
        PageExample("11", "What colour is it?", "red", (("red", 1.0), ("dark red", 0.3)), 1.0, (plain_image(RED),)),
        PageExample(
            "12", "<b>Is</b> 3 < 5?", "<script>alert(1)</script>", (("yes & no", 0.9),), 0.0, (plain_image(RED),)
        ),
        PageExample("13", "Что это? 这是什么", "🍌", (("香蕉", 0.6), ("موز", 0.3)), 0.6),
        PageExample("14", "How many?", "", (("2", 1.0),), 0.0),
    ]
    pair = (plain_image(BLUE), plain_image(BLUE, (300, 900)))
    nlvr2 = [PageExample("dev-1-0-0", "Both are blue.", "true", (("true", 1.0),), 1.0, pair)]
    captions = [PageExample("391895", "", LONG, ((LONG, 1.0), ("x" * 200, 1.0)), None, (plain_image(RED, (60, 40)),))]
    return [PageSection("VQA", vqa), PageSection("NLVR2", nlvr2), PageSection("captions", captions)]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "examples.html"
    write_examples_page(path, "Examples <of> everything", sections())
    return path


class Reader(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_contains_all_texts(page):
    reader = Reader(page.read_text(encoding="utf-8"))
    for section in sections():
        assert section.title in reader.texts
        for example in section.examples:
            texts = [example.name, example.prediction or "(nothing)", *(answer for answer, _ in example.answers)]
            assert all(text in reader.texts for text in [*texts, *([example.question] if example.question else [])])
    assert reader.texts.count("Examples <of> everything") == 2  # its title and heading


def test_the_page_loads_no_other_files(page):
    reader = Reader(page.read_text(encoding="utf-8"))
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object"}
    sources = [attributes["src"] for tag, attributes in reader.tags if tag == "img"]
    assert len(sources) == 5
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    policy = next(attributes["content"] for _, attributes in reader.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")
    assert "url(" not in page.read_text(encoding="utf-8")


def test_images_are_scaled_down_and_on_white():
    transparent = Image.new("RGBA", (900, 300), (0, 0, 0, 0))
    embedded = Image.open(io.BytesIO(base64.b64decode(data_uri(transparent).partition(",")[2])))
    assert (embedded.format, embedded.size) == ("WEBP", (320, 107))
    assert min(embedded.convert("RGB").getpixel((5, 5))) > 250


def test_from_example():
    example = Example("7", ("a.jpg",), "How many?", ("2", "3"), (1.0, 0.3), ("2",) * 9 + ("3",))
    shown = PageExample.from_example(example, "3", 0.3, [plain_image(RED)])
    assert (shown.name, shown.question, shown.answers) == ("7", "How many?", (("2", 1.0), ("3", 0.3)))
    assert [PageExample.from_example(example, "", score).verdict for score in (None, 0.0, 0.3, 0.9, 1.0)] == [
        None, "wrong", "part", "part", "right",
    ]  # fmt: skip


def test_the_question_of_a_conversation_is_all_of_it():
    turns = (Turn("user", "<image>Q", False), Turn("assistant", "A", True), Turn("user", "Q2", False))
    unanswered = Example("7", ("a.jpg",), "Q2", turns=turns)
    answered = Example("7", ("a.jpg",), "Q2", ("A2",), (1.0,), turns=(*turns, Turn("assistant", "A2", True)))
    for example in (unanswered, answered):
        shown = PageExample.from_example(example, "x", None)
        assert shown.question == "user: <image>Q\nassistant: A\nuser: Q2"
    single = Example("7", ("a.jpg",), "Q", ("A",), (1.0,), turns=turns[:2])
    assert PageExample.from_example(single, "x", 0.0).question == "Q"


def test_a_page_without_scores_has_no_filter_and_one_without_answers_no_list(tmp_path):
    path = tmp_path / "page.html"
    write_examples_page(path, "test split", [PageSection("captions", [PageExample("1", "", "a dog", ())])])
    text = path.read_text(encoding="utf-8")
    assert "<input" not in text
    assert "answers" not in text


def test_halves_of_surrogate_pairs_become_question_marks(tmp_path):
    path = tmp_path / "page.html"
    write_examples_page(path, "odd", [PageSection("VQA", [PageExample("1", "?", json.loads('"\\ud83d x"'), (), 0.0)])])
    assert "? x" in path.read_text(encoding="utf-8")


needs_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")

# A page that contains ours in a frame as wide as a phone: its script clicks each filter and records what is visible.
PROBE = """
<iframe style="width: 360px; height: 800px; border: 0" srcdoc="{page}"></iframe>
<pre id="found"></pre>
<script>
onload = () => {{
  const inner = document.querySelector("iframe").contentDocument, found = {{}};
  const visible = (selector) => [...inner.querySelectorAll(selector)].filter((node) => node.offsetParent !== null);
  for (const key of ["all", "right", "part", "wrong"]) {{
    inner.querySelector(`label[for=show-${{key}}]`).click();
    found[key] = visible(".name").map((node) => node.textContent);
    found[key + " sections"] = visible("h2").map((node) => node.textContent);
  }}
  inner.querySelector("label").click();
  found.wide = [...inner.querySelectorAll("body *")].filter((n) => n.getBoundingClientRect().right > 360.5).length;
  found.loaded = [...inner.images].filter((image) => image.naturalWidth > 0).length;
  const [first, second] = inner.querySelectorAll("#s1 img");
  found.sideBySide = first.getBoundingClientRect().right <= second.getBoundingClientRect().left;
  document.querySelector("#found").textContent = JSON.stringify(found);
}};
</script>
"""


@needs_chromium
def test_filters_at_the_width_of_a_phone(page, tmp_path):
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    probe = tmp_path / "probe.html"
    probe.write_text("<meta charset=utf-8>" + PROBE.format(page=html.escape(text.replace(' loading="lazy"', ""))))
    document = browser.run(probe, "--dump-dom", profile=tmp_path / "profile")
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', document, re.DOTALL).group(1)))
    assert found["all"] == ["11", "12", "13", "14", "dev-1-0-0", "391895"]
    assert found["right"] == ["11", "dev-1-0-0"]
    assert found["part"] == ["13"]
    assert found["wrong"] == ["12", "14"]
    assert found["wrong sections"] == ["VQA"]
    assert found["wide"] == 0  # nothing reaches beyond the screen
    assert found["loaded"] == 5
    assert found["sideBySide"]


@pytest.mark.slow
@needs_chromium
def test_light_and_dark_rendering(page, tmp_path):
    shots = {}
    for dark in (False, True):
        png = tmp_path / f"{dark}.png"
        browser.screenshot(page, png, 1000, 1400, profile=tmp_path / "profile", dark=dark)
        with Image.open(png) as image:
            shots[dark] = image.convert("RGB")
            assert image.size == (1000, 1400)
    for shot in shots.values():
        colours = shot.resize((250, 350), Image.Resampling.NEAREST).getcolors(250 * 350)
        near = {
            name: sum(count for count, c in colours if max(abs(a - b) for a, b in zip(c, expected, strict=True)) < 12)
            for name, expected in {"red": RED, "blue": BLUE}.items()
        }
        assert near["red"] > 5_000  # two images and one smaller, of about 280 x 210 pixels, a sixteenth counted
        assert near["blue"] > 1_000
    assert min(shots[False].getpixel((995, 5))) > 230
    assert max(shots[True].getpixel((995, 5))) < 40


def compared_rows(count: int = 9) -> list[PageExample]:
    before = [("cat", 1.0), ("dog", 0.0), ("cow", 0.0)]
    return [PageExample(f"row {n}/ü", "Q?", "cat", (("cat", 1.0),), 1.0, (), before[n % 3]) for n in range(count)]


@pytest.mark.parametrize(
    ("said", "score", "before", "change"),
    [
        ("cat", 1.0, ("cat", 1.0), None),
        ("cat", 1.0, ("dog", 0.0), "better"),
        ("cat", 0.3, ("dog", 1.0), "worse"),
        ("cat", 0.0, ("dog", 0.0), "other"),
        ("a caption", None, ("another", None), "other"),
        ("cat", 1.0, None, None),
    ],
)
def test_what_changed_between_two_runs(said, score, before, change):
    assert PageExample("1", "", said, (), score, (), before).change == change


def test_every_row_has_an_address(tmp_path):
    path = tmp_path / "page.html"
    write_examples_page(path, "two runs", [PageSection("VQA", compared_rows())])
    tags = Reader(path.read_text(encoding="utf-8")).tags
    ids = {attributes["id"] for tag, attributes in tags if tag == "article"}
    links = {attributes["href"] for tag, attributes in tags if tag == "a"}
    assert len(ids) == 9
    assert {f"#{name}" for name in ids} <= links


@needs_chromium
@pytest.mark.slow
def test_changed_rows_are_shown_and_thousands_open_at_once(tmp_path):
    path = tmp_path / "page.html"
    write_examples_page(path, "two runs", [PageSection("VQA", compared_rows(5000))])
    with browser.opened(tmp_path / "profile") as page:
        started = time.monotonic()
        page.open(path)
        shown = "[...document.querySelectorAll('.card')].filter((node) => node.offsetParent !== null).length"
        assert page.evaluate(shown) == 5000
        assert time.monotonic() - started < 20  # 2 s for all of it on a busy processor
        page.click("label[for=show-better]")
        page.wait_for(f"{shown} === 3333")
        page.evaluate("location.hash = document.querySelectorAll('.card')[4000].id")
        page.wait_for("document.querySelector('.card:target').getBoundingClientRect().top < innerHeight")
        for width in (360, 1200):
            page.open(path, width=width)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.problems == []
