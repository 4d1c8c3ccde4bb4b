"""Tables, links and metadata that somebody else wrote name no file outside of the folder that a person named.

Each test has a picture beside the folder, `private.png`, and asks for it.
"""

import json
import os

import pytest
from PIL import Image

from dora_mm.config.images import DataConfig
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.features.sources import open_features
from dora_mm.data.images.folder import read_captioned_images, read_training_images, uncaptioned_images
from dora_mm.data.images.frames import stills
from dora_mm.data.images.listing import image_files
from dora_mm.data.vl.image_folder import MOST_BEHIND_LINKS, ImageFolder
from dora_mm.data.vl.tables import open_table
from dora_mm.utils.folders import Links, inside

KEY = "set data.follow_links=true"


@pytest.fixture
def private(tmp_path):
    """A picture that nobody named, beside the folder `given`, which has a.png."""
    (tmp_path / "given").mkdir()
    for name in ("private.png", "given/a.png"):
        Image.new("RGB", (8, 6), (len(name), 0, 0)).save(tmp_path / name)
    return tmp_path / "private.png"


@pytest.fixture
def given(private):
    return private.parent / "given"


def snapshot(tmp_path):
    """A repository as the hub's cache has it: a.png and sub/b.png are links to blobs; c.png leads elsewhere."""
    folder = tmp_path / "models--a--b" / "snapshots" / "0a1b"
    (folder / "sub").mkdir(parents=True)
    (folder.parents[1] / "blobs").mkdir()
    for name, colour in (("a.png", 1), ("sub/b.png", 2)):
        blob = folder.parents[1] / "blobs" / f"hash{colour}"
        Image.new("RGB", (8, 6), (colour, 0, 0)).save(blob, "PNG")
        (folder / name).symlink_to(os.path.relpath(blob, (folder / name).parent))
    return folder


# --- the function ---------------------------------------------------------------------------------------------------


def test_names_that_stay_inside(given, monkeypatch):
    (given / "x").mkdir()
    (given / "link.png").symlink_to("a.png")
    for name in ("a.png", "x/../a.png", "./a.png", "link.png", str(given / "a.png"), "not there.png"):
        assert inside(given, name).resolve().is_relative_to(given)
    monkeypatch.chdir(given.parent)
    assert inside(given.relative_to(given.parent), "a.png").is_file()
    (given.parent / "named").symlink_to(given)
    assert inside(given.parent / "named", "a.png").is_file()  # the folder itself was named


def test_names_that_lead_out(given, private):
    (given / "link.png").symlink_to(private)
    (given / "up").symlink_to("..")
    (given / "loop").symlink_to("loop")
    cases = {
        "../private.png": "is outside of the folder",
        str(private): "is outside of the folder",
        "x/../../private.png": "is outside of the folder",
        "link.png": "is a link to",
        "up/private.png": "is a link to",
        "a\0": "is not a valid path",
        "loop": "is not a valid path",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            inside(given, name)
    follow = Links(follow=True)
    assert inside(given, "link.png", follow) == given / "link.png"
    assert inside(given, "up/private.png", follow) == given / "up/private.png"
    for name in ("../private.png", str(private)):  # links alone are followed
        with pytest.raises(ValueError, match="is outside of the folder"):
            inside(given, name, follow)


def test_a_snapshot_of_the_hub_leads_to_its_blobs_alone(tmp_path, private):
    folder = snapshot(tmp_path)
    (folder / "c.png").symlink_to(private)
    assert inside(folder, "a.png").is_file()
    assert inside(folder / "sub", "b.png").is_file()
    with pytest.raises(ValueError, match="is a link to"):
        inside(folder, "c.png")
    blobs = folder.parents[1] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")  # no folder of its own: it may be anybody's
    with pytest.raises(ValueError, match="is a link to"):
        inside(folder, "a.png")


# --- folders of images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["b.png", "a.txt", "a.caption", "metadata.jsonl", "a.mask.png", "sub/b.png"])
def test_links_in_folders_of_images(given, private, name):
    target = private
    if not name.endswith("png"):
        target = private.with_name("notes.txt")
        target.write_text('{"file_name": "a.png", "text": "a"}')
    (given / "sub").mkdir()
    (given / name).symlink_to(target)
    data = {"folder": str(given), "resolution": 64, "instance_prompt": "x", "subfolders": True, "mask": {}}
    data = data if "mask" in name else data | {"mask": None}
    for read in (read_training_images, image_files):
        with pytest.raises(ValueError, match=rf"data\.folder: .*{name} is a link to {target}.*, or {KEY}"):
            read(DataConfig.model_validate(data))
        assert read(DataConfig.model_validate(data | {"follow_links": True}))


@pytest.mark.parametrize("key", ["references", "mask_folder"])
def test_links_in_folders_beside_those_of_images(given, private, key):
    (folder := given.parent / "others").mkdir()
    (folder / "a.png").symlink_to(private)
    settings = {key: str(folder) if key == "mask_folder" else [str(folder)], "instance_prompt": "x"}
    with pytest.raises(ValueError, match=r"others/a\.png is a link to"):
        read_captioned_images(given, **settings)
    assert read_captioned_images(given, **settings, links=Links(follow=True))


@pytest.mark.parametrize("key", ["file_name", "references"])
def test_rows_of_metadata(given, private, key):
    (given / "link.png").symlink_to(private)
    (given / "sub").mkdir()
    for name in (str(private), "../private.png", "sub/../../private.png", "link.png"):
        row = {"file_name": "a.png", "text": "x"} | {key: name}
        (given / "metadata.jsonl").write_text(json.dumps(row))
        with pytest.raises(ValueError, match=rf"is a link to {private}|which is outside of"):
            read_captioned_images(given)
        with pytest.raises(ValueError, match=rf"is a link to {private}|which is outside of"):
            uncaptioned_images(given)


def test_a_snapshot_is_a_folder_of_images(tmp_path):
    folder = snapshot(tmp_path)
    rows = [{"file_name": name, "text": "x"} for name in ("a.png", "sub/b.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [image.path for image in read_captioned_images(folder)] == [folder / "a.png", folder / "sub/b.png"]


# --- tables of questions ----------------------------------------------------------------------------------------------


def opened(folder, names, *, images=None, file="rows.json", **settings):
    """The images of chats about files with these names."""
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    path = folder.parent / file
    if file == "rows.json":
        path.write_text(json.dumps([{"image": name, "conversations": turns} for name in names]))
    source = SourceConfig(format="chat", file=str(path), images=images and str(images))
    table = open_table(source, folder.parent / "tables", on_bad_data="stop", **settings)
    return [row.images[0] for row in table]


@pytest.mark.parametrize(
    "shape", ["absolute", "file://", "up", "absolute and up", "link", "linked folder", "bare name"]
)
def test_a_table_finds_no_image_outside_of_the_named_folder(given, private, shape):
    (given / "link.png").symlink_to(private)
    (private.parent / "more").mkdir()
    (private.parent / "more" / "c.png").write_bytes(private.read_bytes())
    (given / "out").symlink_to(private.parent / "more")
    name, follow = {
        "absolute": (str(private), None),
        "file://": (f"file://{private}", None),
        "up": ("../private.png", None),
        "absolute and up": (f"{given}/../private.png", None),
        "link": ("link.png", "link.png"),
        "linked folder": ("out/c.png", "out/c.png"),
        "bare name": ("c.png", "out/c.png"),
    }[shape]
    for names in ([name], ["a.png", name]):
        with pytest.raises(ValueError, match=r"private\.png|link\.png|c\.png") as refusal:
            opened(given, names, images=given, links=Links(setting=KEY))
        if follow:
            assert f"put a copy in its place, or {KEY}" in str(refusal.value)
        links = Links(follow=True)
        if follow is None:
            with pytest.raises(ValueError, match=r"private\.png"):
                opened(given, names, images=given, links=links)
        else:
            assert opened(given, names, images=given, links=links)[-1] == follow


def test_without_a_folder_a_table_finds_nothing_without_the_key(given, private):
    for name in (str(private), f"file://{private}", str(given / "a.png")):
        with pytest.raises(
            ValueError, match=r"is an absolute path: name .* with `images`, or set data\.absolute_paths=true"
        ):
            opened(given, [name])
        assert opened(given, [name], absolute_paths=True)
    assert opened(given, [str(given / "a.png")], images=given) == [str(given / "a.png")]


def test_metadata_names_what_is_beside_it_and_nothing_else(given, private):
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    (given / "link.png").symlink_to(private)
    for name, found in (("a.png", True), ("link.png", False), ("../private.png", False), (str(private), False)):
        (given / "metadata.jsonl").write_text(json.dumps(row | {"file_name": name}))
        if found:
            assert opened(given, [], file="given/metadata.jsonl") == [str(given / name)]
        else:
            with pytest.raises(ValueError, match=r"link that leads out|not the name of a file beside"):
                opened(given, [], file="given/metadata.jsonl")
    (given / "metadata.jsonl").write_text(json.dumps(row | {"image": str(private)}))
    with pytest.raises(ValueError, match="is an absolute path"):
        opened(given, [], file="given/metadata.jsonl")


def test_a_snapshot_is_a_folder_of_questions(tmp_path, private):
    folder = snapshot(tmp_path)
    assert opened(folder, ["a.png", "sub/b.png"], images=folder) == ["a.png", "sub/b.png"]
    (folder / "c.png").symlink_to(private)
    with pytest.raises(ValueError, match="leads out of its folder"):
        opened(folder, ["c.png"], images=folder)


def test_data_files_behind_links_are_not_read(given, private):
    (secret := private.with_name("mine.json")).write_text('[{"messages": [{"role": "user", "content": "mine"}]}]')
    (given / "train.json").symlink_to(secret)
    for file in ("given", "given/*.json"):
        with pytest.raises(ValueError, match=rf"train\.json is a link to {secret}"):
            opened(given, [], file=file)
    source = SourceConfig(format="chat", file=str(given))
    settings = {"on_bad_data": "stop", "links": Links(follow=True)}
    assert len(open_table(source, given.parent / "tables", **settings)) == 1


def test_official_files_with_features_name_no_absolute_path(given, private):
    """Without a folder of images their names are those of features, and pages would show what has that name."""
    (given / "q.json").write_text(
        json.dumps({"7": {"question": "Q", "answer": "A", "imageId": str(private.with_suffix(""))}})
    )
    source = SourceConfig(format="gqa", file=str(given / "q.json"))
    with pytest.raises(ValueError, match="is an absolute path"):
        open_table(source, given / "tables", on_bad_data="stop")


def test_folders_that_link_to_each_other_are_listed_in_time(given, monkeypatch):
    monkeypatch.setattr("dora_mm.data.vl.image_folder.MOST_BEHIND_LINKS", 1000)
    for name in ("x", "y"):
        (given / name).symlink_to(".")
    assert ImageFolder(given).find("a.png") == "a.png"
    for number in range(12):
        (given / f"d{number}").mkdir()
        for name in ("l", "r"):
            (given / f"d{number}" / name).symlink_to(f"../d{number + 1}")
    (given / "d12").mkdir()
    with pytest.raises(ValueError, match="links to folders show more than 1,000 files"):
        ImageFolder(given).find("a.png")
    assert MOST_BEHIND_LINKS > 1000


# --- features --------------------------------------------------------------------------------------------------------


def test_features_behind_links_are_not_read(tmp_path):
    import numpy as np

    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "a.npz", features=np.zeros((2, 4), np.float32))
    np.savez(tmp_path / "b.npz", features=np.zeros((2, 4), np.float32))
    (tmp_path / "npz" / "b.npz").symlink_to(tmp_path / "b.npz")
    store = open_features([tmp_path / "npz"])
    assert store["a"].shape == (2, 4)
    with pytest.raises(ValueError, match=r"b\.npz is a link to"):
        store["b"]


# --- videos ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hls", "concat", "concat beside", "dash"])
def test_a_video_that_is_a_playlist_opens_nothing(given, kind):
    """FFmpeg tells the format by the content: a playlist under the name of a video would show another one."""
    av = pytest.importorskip("av")
    private = given.parent / "private.mpg"
    with av.open(str(private), "w") as container:
        stream = container.add_stream("mpeg1video", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(stream.encode(None))
    assert len(stills(private)) > 0
    (given / "other.mpg").write_bytes(private.read_bytes())
    texts = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{private}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{private}'\n",
        "dash": f'<?xml version="1.0"?><MPD><Period><BaseURL>{private}</BaseURL></Period></MPD>',
        "concat beside": "ffconcat version 1.0\nfile 'other.mpg'\n",
    }
    (video := given / "video.mp4").write_text(texts[kind])
    with pytest.raises(ValueError, match=r"video\.mp4"):
        stills(video)


def test_a_video_in_a_rare_codec_is_not_decoded(given):
    """Of FFmpeg's decoders only those of usual videos run."""
    av = pytest.importorskip("av")
    with av.open(str(given / "video.avi"), "w") as container:
        stream = container.add_stream("zmbv", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "bgr0"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame(64, 64, "bgr0")))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"video\.avi has images in the codec zmbv, which is not read"):
        stills(given / "video.avi")
