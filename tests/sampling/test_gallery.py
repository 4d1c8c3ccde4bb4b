"""Galleries: what belongs together, what hostile texts can do (nothing), and which folders are replaced."""

import base64
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

from dora_mm.cli import main
from dora_mm.sampling.gallery import write_gallery
from dora_mm.sampling.gallery.data import NOTHING_SHOWN, Listed, befores, gallery_data, groups
from dora_mm.sampling.manifest import read_manifest, write_manifest
from dora_mm.utils import partials
from tests.shared.pages import HOSTILE, data_of, entry, make_run


def shown(run: str, **settings) -> Listed:
    return run, entry(**settings)


# --- what belongs together --------------------------------------------------------------------------------------------


def test_before_is_the_same_image_without_an_adapter():
    images = [
        shown("a"),
        shown("a", adapter="x", strength=1.0, adapter_digest="d1", label="adapted"),
        shown("a", adapter="x", strength=0.5, adapter_digest="d1"),
        shown("a", adapter="x", strength=1.0, adapter_digest="d1", seed=7),
        shown("a", adapter="x", strength=1.0, adapter_digest="d1", model="another"),
        shown("b", adapter="y", strength=0.0, adapter_digest="d2", seed=1),
        shown("b", adapter="y", strength=1.0, adapter_digest="d2", seed=1),
        shown("b", adapter="y", strength=1.0, adapter_digest="d2"),
    ]
    # digests do not count, a setting that only images with an adapter have neither; the last is in the other run
    assert befores(images) == [None, 0, 0, None, None, None, 5, 0]


def test_before_is_taken_from_the_same_run_where_it_can_be():
    images = [shown("a"), shown("b"), shown("b", adapter="x", strength=1.0)]
    assert befores(images) == [None, None, 1]


def test_other_settings_tell_befores_apart_if_both_sides_have_them():
    images = [shown("a", style="3d"), shown("a", style="flat"), shown("a", style="flat", adapter="x", strength=1.0)]
    assert befores(images) == [None, None, 1]


def test_a_image_that_was_not_drawn_is_no_before():
    missing = "a", entry(status="failed", reason="black")
    assert befores([missing, shown("a", adapter="x", strength=1.0)]) == [None, None]


def test_images_of_runs_with_an_adapter_each_are_side_by_side():
    settings = [{}, {"adapter": "ADAPTER", "strength": 1.0}, {"adapter": "ADAPTER", "strength": 1.0, "seed": 1}]
    images = [
        shown(run, **{name: run if value == "ADAPTER" else value for name, value in row.items()})
        for run in ("one", "two")
        for row in settings
    ]
    assert groups(images) == [0, 1, 2, 0, 1, 2]


def test_images_of_runs_that_share_adapters_are_told_apart_by_them():
    images = [shown(run, adapter=name, strength=1.0) for run in ("one", "two") for name in ("x", "y")]
    assert groups(images) == [0, 1, 0, 1]


def test_columns_and_exact_values():
    large = 2**63 + 1
    images = [
        shown("a", seed=large, scores={"log-odds": 1.5}, sizes=[1, {"a": 2}]),
        shown("a", row=2, seed=3, scores={"log-odds": float("nan")}),
    ]
    data = gallery_data(images, [NOTHING_SHOWN, NOTHING_SHOWN])
    columns = {column["name"]: column for column in data["columns"]}
    assert [name for name, column in columns.items() if column["varies"]] == ["seed", "sizes", "log-odds"]
    assert columns["log-odds"]["kind"] == "score"
    rows = [dict(zip(columns, image["values"], strict=True)) for image in data["images"]]
    assert [row["seed"] for row in rows] == [str(large), 3]  # JavaScript would round it
    assert [row["log-odds"] for row in rows] == [1.5, "nan"]
    assert [row["sizes"] for row in rows] == [[1, {"a": 2}], None]


# --- hostile texts ----------------------------------------------------------------------------------------------------


def test_hostile_texts_stay_data(tmp_path):
    entries = [entry(number, f"{number}.png", prompt=text, **{text: text}) for number, text in enumerate(HOSTILE)]
    run = make_run(tmp_path / "run", entries)
    page = write_gallery({run: read_manifest(run)}, tmp_path / "gallery")
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 2
    assert "<!--" not in text
    data = data_of(page)
    names = [column["name"] for column in data["columns"]]
    assert [image["values"][names.index("prompt")] for image in data["images"]] == HOSTILE
    assert set(HOSTILE) <= set(names)


def test_the_policy_admits_the_script_and_the_style_of_the_page_and_nothing_else(tmp_path):
    run = make_run(tmp_path / "run", [entry()])
    text = write_gallery({run: read_manifest(run)}, tmp_path / "gallery").read_text(encoding="utf-8")
    policy = dict(part.split(" ", 1) for part in re.search(r'Policy" content="([^"]*)"', text)[1].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    for kind, tag in (("script-src", "<script>"), ("style-src", "<style>")):
        ((content),) = re.findall(f"{tag}(.*?)</{tag[1:]}", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[kind] == f"'sha256-{digest}'"
    assert not re.search(r"https?:|//cdn|@import|url\(|\son\w+=|\sstyle=", text)
    assert "innerHTML" not in text


def test_a_manifest_cannot_lead_out_of_its_run(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "run").mkdir()
    os.symlink(tmp_path / "secret.png", tmp_path / "run" / "link.png")
    for file in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        write_manifest(tmp_path / "run", [entry(file=file)])
        assert main(["gallery", str(tmp_path / "run")]) == 2
        assert f"names a file outside of the run: {file}" in capsys.readouterr().err
    assert not (tmp_path / "run" / "gallery").exists()


# --- images ---------------------------------------------------------------------------------------------------------


def test_every_entry_is_listed_and_what_cannot_be_shown_has_its_reason(tmp_path):
    names = ("1.png", "gone.png", "broken.png", "page.html", "5.png", "6.png")
    entries = [entry(number, name, prompt=name) for number, name in enumerate(names, 1)]
    entries[4] = entry(5, "5.png", "failed", "out of memory at 4096 x 4096")
    entries[5] = entry(6, "6.png", "missing")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("1.png", "page.html"):
        Image.new("RGB", (8, 8)).save(run / name, "PNG")
    (run / "broken.png").write_bytes((run / "1.png").read_bytes()[:40])
    write_manifest(run, entries)
    data = data_of(write_gallery({run: read_manifest(run)}, tmp_path / "gallery"))
    status = [column["kind"] for column in data["columns"]].index("status")
    found = [(image["values"][status], image["reason"], image["file"]) for image in data["images"]]
    assert found[0] == ("done", None, "pictures/1/1.png")
    assert found[1] == ("missing", "its file is not there any more", None)
    assert found[2] == found[3] == ("failed", "its file is not a whole PNG, WebP or JPEG image", None)
    assert found[4] == ("failed", "out of memory at 4096 x 4096", None)
    assert found[5] == ("missing", None, None)
    assert [path.name for path in (tmp_path / "gallery" / "pictures").rglob("*.*")] == ["1.png"]


def test_large_images_have_thumbnails_and_the_originals_stay_whole(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    Image.new("RGB", (1024, 640), "red").save(run / "1.png")
    Image.new("RGBA", (300, 200), (0, 0, 255, 120)).save(run / "a b%20#?.png")
    write_manifest(run, [entry(), entry(2, "a b%20#?.png")])
    folder = write_gallery({run: read_manifest(run)}, tmp_path / "gallery").parent
    large, small = data_of(folder / "index.html")["images"]
    assert (large["file"], large["size"]) == ("pictures/1/1.png", [1024, 640])
    assert (folder / large["file"]).read_bytes() == (run / "1.png").read_bytes()
    with Image.open(folder / large["thumbnail"]) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("WEBP", (512, 320))
    assert small["file"] == small["thumbnail"] == "pictures/1/a%20b%2520%23%3F.png"
    assert (folder / "pictures" / "1" / "a b%20#?.png").is_file()


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_gallery_of_one_run_lies_in_it_and_is_replaced(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(Path("runs/mine/001"), [entry(), entry(2, "2.png", seed=1)])
    assert main(["gallery", "runs/mine/001"]) == 0
    page = run / "gallery" / "index.html"
    first, after = capsys.readouterr().out.splitlines()
    assert first.split() == ["gallery", str(page)]
    assert after.endswith(": dora-mm sample favourites.jsonl")
    (run / "gallery" / ".DS_Store").touch()  # macOS leaves it in folders that were looked at
    make_run(run, [entry()])
    for name in ("gallery", "gallery.old"):  # of a command that was killed
        left = run / f".{name}.{partials.machine()}-0{partials.PARTIAL}"
        left.mkdir()
        (left / "index.html").touch()
    partials.remove_dead.cache_clear()  # as in another process
    assert main(["gallery", "runs/mine/001"]) == 0
    assert len(data_of(page)["images"]) == 1
    assert sorted(path.name for path in page.parent.iterdir()) == ["index.html", "pictures"]
    assert not list(run.glob(".*"))


def test_a_folder_of_runs_is_all_that_have_images(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine/001", "mine/002", "other/001"):
        make_run(Path("runs") / name, [entry()])
    (tmp_path / "runs" / "vlm" / "001").mkdir(parents=True)  # a training of questions has none
    for given, count in (("runs", 3), ("runs/mine", 2)):
        assert main(["gallery", given, "--output", "page"]) == 0
        assert len(data_of(tmp_path / "page" / "index.html")["images"]) == count
    assert main(["gallery", "runs/vlm"]) == 2
    assert "runs/vlm" in capsys.readouterr().err


def test_a_gallery_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError("No space left on device")

    run = make_run(tmp_path / "run", [entry()])
    assert main(["gallery", str(run)]) == 0
    before = data_of(run / "gallery" / "index.html")
    monkeypatch.setattr("dora_mm.sampling.gallery.folder.link_or_copy", full)
    assert main(["gallery", str(run)]) == 2
    assert data_of(run / "gallery" / "index.html") == before
    assert sorted(path.name for path in run.iterdir()) == ["1.png", "gallery", "manifest.jsonl"]


def test_the_gallery_of_several_runs_is_numbered(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [str(make_run(Path("runs", name), [entry()])) for name in ("a", "b")]
    for number in ("001", "002"):
        assert main(["gallery", *runs, runs[0]]) == 0
        page = Path("runs/gallery", number, "index.html")
        assert str(page) in capsys.readouterr().out
        assert [image["values"][0] for image in data_of(page)["images"]] == runs
    assert main(["gallery", *runs, "--output", "here/there"]) == 0
    assert Path("here/there/index.html").is_file()


def test_a_folder_that_holds_something_else_is_refused(tmp_path, capsys):
    run = make_run(tmp_path / "run", [entry()])
    (tmp_path / "file").touch()
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("<title>mine</title>")
    assert main(["gallery", str(run), "--output", str(tmp_path / "added")]) == 0
    (tmp_path / "added" / "notes.txt").touch()
    for name in ("run", "file", "file/inside", "page", "added"):
        before = sorted(tmp_path.rglob("*"))
        assert main(["gallery", str(run), "--output", str(tmp_path / name)]) == 2
        assert f"output {tmp_path / name}" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before


def test_a_run_without_images_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"), [entry()])
    Path("other").mkdir()
    for name, problem in (("other", "is not a run that generated images"), ("nowhere", "does not exist")):
        assert main(["gallery", "run", name]) == 2
        assert f"{name} {problem}" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_it_loads_neither_torch_nor_diffusers(tmp_path):
    run = make_run(tmp_path / "run", [entry()])
    code = f"""
import sys
from dora_mm.cli import main
assert main(["gallery", {str(run)!r}]) == 0
print(*sorted({{"torch", "diffusers", "transformers", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_references_are_shown_beside_their_image_and_only_as_they_were(tmp_path):
    """A manifest of somebody else's must not put another file of this machine into the page."""
    files = [tmp_path / name for name in ("a.png", "b.jpg", "private.png", "key.txt")]
    for number, file in enumerate(files[:3]):
        Image.new("RGB", (20, 30), (number, 0, 0)).save(file)
    files[3].write_text("secret")
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    digests[2] = digests[0]
    paths = [*map(str, files), str(tmp_path / "gone.png"), "\0.png", 3]
    run = make_run(
        tmp_path / "run",
        [
            entry(1, "1.png", images=paths, image_digests=[*digests, digests[0], digests[0], digests[0]]),
            entry(2, "2.png", images="a.png", image_digests=None),
        ],
    )
    page = write_gallery({run: read_manifest(run)}, tmp_path / "page")
    shown = [image["references"] for image in data_of(page)["images"]]
    assert [len(references) for references in shown] == [2, 0]
    assert [Image.open(page.parent / address).size for address in shown[0]] == [(20, 30), (20, 30)]


def test_an_image_of_other_references_is_no_before():
    images = [shown("a", images=["x.png"]), shown("a", images=["y.png"], adapter="z", strength=1.0)]
    assert befores(images) == [None, None]
