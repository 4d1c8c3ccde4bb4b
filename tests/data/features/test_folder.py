"""The project's own feature folders: reading and writing, interruptions, and mistakes."""

import json
import pickle

import pytest
import torch

from dora_mm.data.features.folder import FeatureFolder, FeatureWriter, image_digest, read_index

SHAPE = (4, 6)
ROW_BYTES = 4 * 6 * 4


def features(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def writer(folder, identity="one", shape=SHAPE, dtype=torch.float32, rows=2):
    return FeatureWriter(folder, identity, shape, dtype, "a tower", shard_bytes=rows * ROW_BYTES)


def write(folder, names, **options):
    with writer(folder, **options) as open_writer:
        for name in names:
            open_writer.add(name, f"digest of {name}", features(hash_of(name)))


def hash_of(name):
    return int.from_bytes(name.encode(), "big") % 2**31


def test_written_features_are_read_back(tmp_path):
    names = ["a", "b", "c", "COCO_val2014_000000000042", "ü {} / x"]
    write(tmp_path, names)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"features-0000{number}.safetensors" for number in (1, 2, 3)),
        "index.json",
    ]
    folder = FeatureFolder(tmp_path)
    assert (folder.dim, list(folder)) == (6, names)
    for name in names:
        assert name in folder
        assert torch.equal(folder.read(name), features(hash_of(name)))
    assert "d" not in folder
    assert folder.where("c").name == "features-00002.safetensors"


def test_half_precision(tmp_path):
    write(tmp_path, ["a"], dtype=torch.float16)
    stored = FeatureFolder(tmp_path).read("a")
    assert stored.dtype == torch.float16
    assert torch.equal(stored, features(hash_of("a")).half())


def test_folders_are_pickled_without_their_files(tmp_path):
    write(tmp_path, ["a", "b", "c"])
    folder = FeatureFolder(tmp_path)
    copy = pickle.loads(pickle.dumps(folder))
    assert torch.equal(copy.read("c"), folder.read("c"))


def test_a_second_run_adds_features_and_replaces_those_of_a_changed_image(tmp_path):
    write(tmp_path, ["a", "b", "c"])
    with writer(tmp_path) as again:
        assert len(again) == 3
        assert again.digests == {name: f"digest of {name}" for name in "abc"}
        again.add("b", "another digest", features(1))
        again.add("d", "digest of d", features(2))
    assert writer(tmp_path).digests["b"] == "another digest"
    folder = FeatureFolder(tmp_path)
    assert torch.equal(folder.read("b"), features(1))
    assert torch.equal(folder.read("a"), features(hash_of("a")))
    assert list(folder) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_keeps_everything_that_was_computed(tmp_path, error):
    with pytest.raises(error), writer(tmp_path) as interrupted:  # noqa: PT012
        for name in "abc":
            interrupted.add(name, "digest", features(0))
        raise error
    assert list(FeatureFolder(tmp_path)) == ["a", "b", "c"]


def test_a_killed_process_loses_one_shard_at_most(tmp_path):
    killed = writer(tmp_path)
    for name in "abcde":
        killed.add(name, "digest", features(0))
    (tmp_path / "features-00003.safetensors").write_bytes(b"incomp")  # not in the index yet
    assert list(FeatureFolder(tmp_path)) == ["a", "b", "c", "d"]
    write(tmp_path, ["e"])
    assert torch.equal(FeatureFolder(tmp_path).read("e"), features(hash_of("e")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"identity": "other"}, r"contains features of another tower.* \(a tower\)"),
        ({"shape": (4, 7)}, "contains features of dim 6, not 7"),
        ({"shape": (9, 6)}, "contains features of num_tokens 4, not 9"),
        ({"dtype": torch.float16}, "contains features of dtype float32, not float16"),
    ],
)
def test_a_folder_of_other_features_is_refused(tmp_path, options, message):
    write(tmp_path, ["a"])
    before = (tmp_path / "index.json").read_text()
    with pytest.raises(ValueError, match=f"^output: {tmp_path} {message}"):
        writer(tmp_path, **options)
    assert (tmp_path / "index.json").read_text() == before


def test_shards_without_an_index_are_not_overwritten(tmp_path):
    write(tmp_path, ["a"])
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match=r"output: .*features-00001\.safetensors but no index\.json"):
        writer(tmp_path)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_damaged_shard_is_named_and_its_features_are_written_again(tmp_path, damage, caplog):
    write(tmp_path, ["a", "b", "c"])
    damage(tmp_path / "features-00001.safetensors")
    with pytest.raises(ValueError, match=r"features-00001\.safetensors is missing or damaged .* dora-mm features"):
        FeatureFolder(tmp_path)
    again = writer(tmp_path)
    assert "features-00001.safetensors" in caplog.text
    assert list(again.digests) == ["c"]
    again.add("a", "digest", features(3))
    again.flush()
    folder = FeatureFolder(tmp_path)
    assert list(folder) == ["c", "a"]
    assert torch.equal(folder.read("a"), features(3))


def test_a_shard_of_another_folder_is_refused(tmp_path):
    write(tmp_path / "one", ["a", "b"])
    write(tmp_path / "two", ["a", "b"], identity="two")
    write(tmp_path / "three", ["a"])
    shard = "features-00001.safetensors"
    for other, message in (
        ("two", "was computed by another tower .*index.json"),
        ("three", r"has 1 names .*\(2, 4, 6\)"),
    ):
        (tmp_path / "one" / shard).write_bytes((tmp_path / other / shard).read_bytes())
        with pytest.raises(ValueError, match=f"one/{shard} {message}"):
            FeatureFolder(tmp_path / "one")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index | {"format": "dora-mm features 9"}, "has format 'dora-mm features 9'"),
        (lambda index: index | {"shards": {"../features-00001.safetensors": 1}}, "names a file outside its folder"),
        (lambda index: {"shards": {}}, "cannot be read as the index"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, change, message):
    write(tmp_path, ["a"])
    path = tmp_path / "index.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=f"^{path} {message}"):
        read_index(tmp_path)


@pytest.mark.parametrize(("dtype", "hint"), [(torch.float16, ": set dtype to float32"), (torch.float32, "")])
def test_values_that_are_not_finite_are_refused(tmp_path, dtype, hint):
    row = features(0)
    row[1, 2] = 1e5 if hint else float("nan")
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"^the features of a are not finite in {name}{hint}$"):
        writer(tmp_path, dtype=dtype).add("a", "digest", row)
    assert list(FeatureFolder(tmp_path)) == []


def test_digests_are_of_the_content(tmp_path):
    for name, content in (("a", b"1" * 3_000_000), ("b", b"1" * 3_000_000), ("c", b"1" * 2_999_999 + b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (image_digest(tmp_path / name) for name in "abc")
    assert a == b != c
    with pytest.raises(FileNotFoundError):
        image_digest(tmp_path / "d")
