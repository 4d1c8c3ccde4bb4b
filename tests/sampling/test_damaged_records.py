"""Whatever a manifest or the text of an image has become, it is read, or refused in one sentence."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from dora_mm.sampling.manifest import MANIFEST, ManifestEntry, read_manifest, write_manifest
from dora_mm.sampling.png import JSON_CHUNK, VERSION, BaseModel, GenerationMetadata, UsedAdapter, read_metadata
from dora_mm.sampling.replay import check_complete

ENTRY = ManifestEntry(1, "samples/0001.png", "done", 1, {"prompt": "a \ud800"}, "ab", None, {"likeness": 0.5})
DESCRIPTION = GenerationMetadata(
    BaseModel("model", None, None, "float32", "ab", None),
    (UsedAdapter("adapter", 1.0, "cd", "ef"),),
    {"steps": 2, "guidance": 3.0, "width": 64, "height": 64, "scheduler": None},
    (("a cup", None, 0), ("a hat", "blurred", 1)),
    1,
    {"backend": "torch", "memory": {"offload": "none"}},
    {"torch": "2.13.0"},
)
DEEP = "[" * 100_000


def line_with(**values) -> str:
    return json.dumps(asdict(ENTRY) | values)


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    write_manifest(tmp_path, [ENTRY, replace(ENTRY, row=2, status="failed", reason="no memory")])
    assert read_manifest(tmp_path)[0] == ENTRY


@pytest.mark.parametrize(
    "line",
    [
        *(line_with(file=value) for value in (5, None, [1], {"a": 1}, "\0")),
        *(line_with(settings=value) for value in (5, "x", [[1]])),
        *(line_with(scores=value) for value in (1, [], {"likeness": "high"})),
        line_with(status="drawn"),
        line_with(digest=7),
        DEEP,
        line_with()[:-1] + ', "x": ' + DEEP + "]" * 100_000 + "}",
        "[1]",
        '{"row": ' + "1" * 5000 + "}",
    ],
    ids=lambda line: line[:12],
)
def test_a_damaged_manifest_is_refused(line, tmp_path):
    (tmp_path / MANIFEST).write_text(line + "\n")
    with pytest.raises(ValueError, match=r"manifest.jsonl is damaged \(line 1") as raised:
        read_manifest(tmp_path)
    assert len(str(raised.value)) < 2000


def image(file: Path, text: str) -> Path:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(JSON_CHUNK, text)
    Image.new("RGB", (8, 8)).save(file, pnginfo=info)
    return file


def text_of(description: GenerationMetadata, **values) -> str:
    return json.dumps({"version": VERSION, **asdict(description), **values})


def test_a_description_is_read_as_it_was_written(tmp_path):
    found = read_metadata(image(tmp_path / "a.png", text_of(DESCRIPTION)))
    assert found == DESCRIPTION
    check_complete(found, tmp_path / "a.png")


def test_a_description_of_before_has_the_circumstances_that_it_named(tmp_path):
    values = asdict(DESCRIPTION)
    values["software"] = values.pop("circumstances")
    found = read_metadata(image(tmp_path / "a.png", json.dumps({"version": VERSION, **values})))
    assert found == DESCRIPTION


@pytest.mark.parametrize(
    "text",
    [
        *(text_of(DESCRIPTION, position=value) for value in (2, -1, None, "x", {"a": 1})),
        *(text_of(DESCRIPTION, batch=value) for value in ([], [[1, 2, 3]], "x", [["a", None]])),
        *(text_of(DESCRIPTION, environment=value) for value in (None, 5, [1])),
        *(text_of(DESCRIPTION, circumstances=value) for value in (None, 5, [1], {"torch": [2]})),
        *(text_of(DESCRIPTION, settings=value) for value in (None, 5, [1])),
        text_of(DESCRIPTION, model={"path": 5}),
        text_of(DESCRIPTION, adapters=[{"path": "a", "strength": "much", "digest": "", "hash": ""}]),
        text_of(DESCRIPTION, version=99),
        DEEP,
        "",
    ],
    ids=lambda text: text[-30:],
)
def test_a_damaged_description_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match="the text chunk dora_mm of .* cannot be read"):
        read_metadata(image(tmp_path / "a.png", text))


@pytest.mark.parametrize(
    "changes",
    [
        {"environment": {}},
        {"environment": {"backend": "torch", "memory": {"zz": 1}}},
        {"environment": {"backend": 5, "memory": {}}},
        {"settings": {}},
        *({"settings": {**DESCRIPTION.settings, **more}} for more in ({"zz": 1}, {"steps": "x"}, {"width": -1})),
        {"model": replace(DESCRIPTION.model, path="\0")},
        {"model": replace(DESCRIPTION.model, settings={"a": 1})},
    ],
    ids=str,
)
def test_what_cannot_be_drawn_again_is_refused_before_anything_is_loaded(changes):
    with pytest.raises(ValueError, match=r"a.png cannot be generated again \("):
        check_complete(replace(DESCRIPTION, **changes), Path("a.png"))
