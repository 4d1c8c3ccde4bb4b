"""The builders of icons and scenes: errors when something is missing, and reproducible output."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dora_mm.eval.images.concepts import Concept
from samples.build import packages
from samples.build.__main__ import main
from samples.build.icons import build as icons
from samples.build.icons.sets import read_concepts
from samples.build.scenes import build as scenes


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(icons, "ICONS", tmp_path / "icons")
    monkeypatch.setattr(packages, "PACKAGES", tmp_path / "packages")
    (tmp_path / "packages").mkdir()
    return tmp_path


def test_missing_tools_are_named_with_their_install_command(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(ValueError, match=r"npm \(apt install npm\); leocad \(apt install leocad .*xvfb-run \(apt"):
        packages.check_tools(icons.TOOLS)


def test_only_tools_of_the_given_builder_are_required(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(ValueError, match=r"npm \(apt install npm\)") as caught:
        packages.check_tools(scenes.TOOLS)
    assert not any(word in str(caught.value) for word in ("leocad", "xvfb", "LDraw"))


def test_a_mistake_gives_a_message_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert main(["icons"]) == 2
    assert "npm (apt install npm)" in capsys.readouterr().err


def test_a_failed_download_leaves_no_file_and_its_error_gives_the_reason(folders, monkeypatch):
    (folders / "npm").write_text("#!/bin/sh\necho 'npm error network is unreachable' >&2\nexit 1\n")
    (folders / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folders}:/usr/bin:/bin")
    with pytest.raises(ValueError, match=r"npm pack @a/b@1\.0\.0 failed.*network is unreachable"):
        packages.fetch("@a/b@1.0.0")
    assert list((folders / "packages").iterdir()) == []


def test_a_fetched_package_has_the_name_that_npm_gives_it(folders, monkeypatch):
    (folders / "npm").write_text('#!/bin/sh\necho content > "$4/a-b-1.0.0.tgz"\n')
    (folders / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folders}:/usr/bin:/bin")
    packages.fetch("@a/b@1.0.0")
    assert [path.name for path in (folders / "packages").iterdir()] == ["a-b-1.0.0.tgz"]


def test_a_damaged_archive_is_named(folders):
    archive = folders / "packages" / "broken.tgz"
    archive.write_bytes(b"not a tar")
    with pytest.raises(ValueError, match=r"broken\.tgz is damaged .*delete it"):
        packages.read_archive(archive, ".json")


def icon_package(folder: Path, codes: list[str]) -> Path:
    body = '<circle cx="16" cy="16" r="12" fill="#c00"/>'
    files = {
        "icons": {"width": 32, "height": 32, "icons": {f"icon-{code}": {"body": body} for code in codes}},
        "chars": {code: f"icon-{code}" for code in codes},
    }
    archive = folder / "packages" / "set.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
            tar.add(folder / f"{name}.json", arcname=f"package/{name}.json")
    return archive


CONCEPTS = [Concept("1f34e", "red apple", "Food", "pretrain", "lego"), Concept("1f34a", "tangerine", "Food", "judge")]


def test_a_concept_that_a_package_lacks_is_named(folders):
    with pytest.raises(ValueError, match="lacks tangerine"):
        packages.read_icon_set(icon_package(folders, ["1f34e"]), CONCEPTS)


def test_only_missing_images_are_drawn(folders):
    pytest.importorskip("resvg_py", reason="resvg_py is not installed: pip install 'dora_mm[samples]'")
    archive = icon_package(folders, ["1f34e", "1f34a"])
    icons.draw_svgs("flat", archive, CONCEPTS)
    apple, tangerine = (folders / "icons" / "flat" / f"{concept.code}.webp" for concept in CONCEPTS)
    first = apple.read_bytes()
    tangerine.write_bytes(b"kept as it is")
    apple.unlink()
    icons.draw_svgs("flat", archive, CONCEPTS)
    assert apple.read_bytes() == first
    assert tangerine.read_bytes() == b"kept as it is"


@pytest.mark.slow
def test_vl_writes_things_sets_and_clips(folders, monkeypatch):
    """Packages to data sets, with objects from tiny icon sets."""
    pytest.importorskip("resvg_py", reason="resvg_py is not installed: pip install 'dora_mm[samples]'")
    codes = [f"{number:x}" for number in range(0x1F340, 0x1F350)]
    concepts = [Concept(code, f"thing {number}", "Food", "judge") for number, code in enumerate(codes)]
    svgs, renders = icon_package(folders, codes), folders / "packages" / "3d.tgz"
    with tarfile.open(renders, "w:gz") as tar:
        for code in codes:
            Image.new("RGBA", (64, 64), "red").save(folders / f"{code}.webp")
            tar.add(folders / f"{code}.webp", arcname=f"package/{code}.webp")
    archives = {packages.PACKAGE_3D: renders}
    monkeypatch.setattr(packages, "archive_of", lambda package: archives.get(package, svgs))
    monkeypatch.setattr(scenes, "SAMPLES", folders)
    monkeypatch.setattr(scenes, "SCENE_ICON", 24)
    sizes = scenes.Sizes({"train": (12, 20), "val": (6, 10)}, {"train": (12, 20)}, {"train": 2})
    monkeypatch.setattr(scenes, "SETS", {folders / "vl": sizes})
    rows = [{"name": f"thing{n}", "icon": c.name, "painted": True} for n, c in enumerate(concepts)]
    (folders / "things.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folders / "vl" / "images").mkdir(parents=True)
    (folders / "vl" / "images" / "old.jpg").write_bytes(b"stale")
    scenes.build_scenes(concepts)
    assert len(list((folders / "vl" / "images").iterdir())) == 18  # and not old.jpg
    assert len(list((folders / "vl" / "nlvr2" / "images").iterdir())) == 16
    assert len(list((folders / "vl" / "video" / "features").iterdir())) == 12
    first = {path: path.read_bytes() for path in (folders / "vl").rglob("*.*")}
    scenes.build_scenes(concepts)
    assert first == {path: path.read_bytes() for path in (folders / "vl").rglob("*.*")}


def test_images_that_are_not_part_of_a_sample_set_are_deleted(folders):
    (folders / "icons" / "brick").mkdir(parents=True)
    (folders / "icons" / "brick" / "1f34e.webp").write_bytes(b"picture")
    target = folders / "lego"
    target.mkdir()
    (target / "old.webp").write_bytes(b"stale")
    caption = icons.SETS["lego"][2]
    icons.write_sample_set(target, folders / "icons" / "brick", CONCEPTS[:1], caption)
    assert sorted(path.name for path in target.iterdir()) == ["metadata.jsonl", "red_apple.webp"]
    row = json.loads((target / "metadata.jsonl").read_text())
    assert row == {"file_name": "red_apple.webp", "text": "a lego set in the style of TOK, a red apple"}


def test_references_are_small_and_named_as_the_images_of_a_sample_set(folders):
    (folders / "icons" / "flat").mkdir(parents=True)
    Image.new("RGB", (256, 256), "red").save(folders / "icons" / "flat" / "1f34e.webp")
    target = folders / "lego_flat"
    target.mkdir()
    (target / "old.webp").write_bytes(b"stale")
    for _ in range(2):
        icons.write_references(target, folders / "icons" / "flat", CONCEPTS[:1])
        assert [path.name for path in target.iterdir()] == ["red_apple.webp"]
    with Image.open(target / "red_apple.webp") as image:
        assert (image.size, image.mode) == ((128, 128), "RGB")


def test_a_failed_write_leaves_no_partial_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        packages.write_changed(tmp_path / "picture.webp", b"content")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_committed_bricks_and_icons_come_out_again(folders, monkeypatch):
    """One sheet of bricks and a few 3D icons, made again, equal the committed files up to the renderer's rounding."""
    try:
        packages.check_tools(icons.TOOLS)
    except ValueError as error:
        pytest.skip(str(error))
    folder = packages.ROOT / "build" / "packages"
    archives = {p: folder / packages.archive_of(p).name for p in (packages.SVG_PACKAGES["flat"], packages.PACKAGE_3D)}
    if not all(archive.exists() for archive in archives.values()):
        pytest.skip("the icon packages have not been downloaded: python -m samples.build icons fetches them")
    concepts = read_concepts(packages.SAMPLES / "concepts.jsonl")
    sheet = next(
        concepts[k : k + 16]
        for k in range(0, len(concepts), 16)
        if sum(c.role == "lego" for c in concepts[k : k + 16]) >= 2
    )

    icons.build_bricks(archives[packages.SVG_PACKAGES["flat"]], sheet)
    rendered = [concept for concept in concepts if concept.role == "icon3d"][:3]
    icons.copy_3d(archives[packages.PACKAGE_3D], rendered)

    bricks = [concept for concept in sheet if concept.role == "lego"]
    for style, folder, drawn in (("brick", "lego", bricks), ("3d", "3d_icon", rendered)):
        for concept in drawn:
            made = Image.open(folders / "icons" / style / f"{concept.code}.webp")
            committed = Image.open(packages.SAMPLES / folder / f"{concept.name.replace(' ', '_')}.webp")
            difference = np.abs(np.asarray(made, dtype=float) - np.asarray(committed, dtype=float))
            assert difference.mean() < 1.0, concept.name  # another Mesa or libwebp may round differently
