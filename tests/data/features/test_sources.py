"""Features from every kind of file through one interface."""

import multiprocessing
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dora_mm.data.features.folder import FeatureWriter
from dora_mm.data.features.sources import H5Features, NpzFeatures, as_tokens, open_features
from dora_mm.data.seen import SeenFiles
from dora_mm.utils.messages import ChangedFileError

RNG = np.random.default_rng(0)
VALUES = {name: RNG.normal(size=(4, 6)).astype(np.float32) for name in ("a", "b", "c")}


def feature_folder(path, values=VALUES):
    with FeatureWriter(path, "identity", (4, 6), torch.float32, "tower") as writer:
        for name, array in values.items():
            writer.add(name, "digest", torch.from_numpy(array))
    return path


def h5_file(path, values=VALUES):
    with h5py.File(path, "w") as file:
        for name, array in values.items():
            group = file.create_group(name)
            group["features"] = array
            group["boxes"] = np.zeros((4, 4), np.float32)
    return path


def npz_folder(path, values=VALUES):
    path.mkdir()
    for name, array in values.items():
        np.savez(path / f"{name}.npz", features=array)
    return path


MAKERS = {"own": feature_folder, "h5": h5_file, "npz": npz_folder}


@pytest.fixture(params=MAKERS)
def source(request, tmp_path):
    return MAKERS[request.param](tmp_path / ("features.h5" if request.param == "h5" else "features"))


def test_one_interface(source):
    features = open_features([str(source)])
    assert features.dim == 6
    for name, array in VALUES.items():
        assert name in features
        assert features[name].dtype == torch.float32
        assert torch.equal(features[name], torch.from_numpy(array))
    assert "d" not in features
    with pytest.raises(ValueError, match=f"^vision.features: {source} has no features of d: .*dora-mm features"):
        features["d"]


def test_features_are_compared_when_they_are_read_again(source):
    """Their files may be others: only what is read counts."""
    files = SeenFiles()
    before = open_features([source], files)["a"]
    assert torch.equal(open_features([source], files)["a"], before)
    (shutil.rmtree if source.is_dir() else Path.unlink)(source)
    maker = next(make for kind, make in MAKERS.items() if (kind == "h5") == (source.suffix == ".h5"))
    maker(source, {**VALUES, "b": VALUES["b"] + 1})
    assert torch.equal(open_features([source], files)["a"], before)
    open_features([source], files)["b"]
    (shutil.rmtree if source.is_dir() else Path.unlink)(source)
    maker(source, {name: values + 1 for name, values in VALUES.items()})
    with pytest.raises(ChangedFileError, match=f"{source}, the features of a, is not as it was"):
        open_features([source], files)["a"]


def read_one(features, name):
    return features[name].sum().item()


def test_features_are_read_in_other_processes(tmp_path):
    sources = [make(tmp_path / f"{kind}.h5") for kind, make in MAKERS.items()]
    features = [open_features([path]) for path in sources]
    expected = VALUES["b"].sum()
    assert [read_one(each, "b") for each in features] == pytest.approx([expected] * 3)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.starmap(read_one, [(each, "b") for each in features])
    assert found == pytest.approx([expected] * 3)
    assert [read_one(pickle.loads(pickle.dumps(each)), "b") for each in features] == pytest.approx([expected] * 3)


def test_of_several_sources_the_first_is_read(tmp_path):
    one = feature_folder(tmp_path / "one", {"a": VALUES["a"]})
    two = h5_file(tmp_path / "two.h5", {"a": VALUES["b"], "c": VALUES["c"]})
    features = open_features([one, two])
    assert torch.equal(features["a"], torch.from_numpy(VALUES["a"]))
    assert torch.equal(features["c"], torch.from_numpy(VALUES["c"]))
    assert "b" not in features
    with pytest.raises(ValueError, match=f"{one}, {two} has no features of b"):
        features["b"]


@pytest.mark.parametrize("make", [h5_file, npz_folder])
@pytest.mark.parametrize("order", ["(C, h, w)", "(h, w, C)"])
def test_maps_in_either_order(tmp_path, make, order):
    """Cells row by row: (y, x) is token 3 y + x."""
    map_hwC = RNG.normal(size=(2, 3, 7)).astype(np.float16)
    array = map_hwC if order == "(h, w, C)" else map_hwC.transpose(2, 0, 1)
    features = open_features([make(tmp_path / "a.h5", {"a": array})])
    assert features.dim == 7
    assert features["a"].shape == (6, 7)
    assert torch.equal(features["a"][3 * 1 + 2], torch.from_numpy(map_hwC[1, 2]).float())


def test_a_map_has_more_channels_than_cells_per_side(tmp_path):
    array = RNG.normal(size=(4, 2, 9)).astype(np.float32)
    path = h5_file(tmp_path / "a.h5", {"a": array})
    assert open_features([path]).dim == 9
    cube = h5_file(tmp_path / "cube.h5", {"a": np.zeros((5, 2, 5), np.float32)})
    with pytest.raises(ValueError, match=r"cube.h5: the features of a .*\(5, 2, 5\), which is neither"):
        open_features([cube])


@given(h=st.integers(1, 5), w=st.integers(1, 5), extra=st.integers(1, 9), first=st.booleans())
def test_a_map_with_more_channels_than_cells_per_side_keeps_every_value(tmp_path_factory, h, w, extra, first):
    C = max(h, w) + extra
    map_hwC = np.arange(h * w * C, dtype=np.float32).reshape(h, w, C)
    tokens = as_tokens(map_hwC.transpose(2, 0, 1) if first else map_hwC, C, tmp_path_factory.getbasetemp(), "a")
    assert torch.equal(tokens, torch.from_numpy(map_hwC.reshape(h * w, C)))


def test_clips_may_have_different_lengths(tmp_path):
    clips = {"s01e01": RNG.normal(size=(70, 6)).astype(np.float32), "s01e02": np.zeros((1, 6), np.float32)}
    features = open_features([npz_folder(tmp_path / "clips", clips)])
    assert {name: tuple(features[name].shape) for name in clips} == {"s01e01": (70, 6), "s01e02": (1, 6)}


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [h5_file, npz_folder])
@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 5), np.float32), r"b has shape \(4, 5\), others 6 channels"),
        (np.zeros((0, 6), np.float32), r"b has shape \(0, 6\), others 6 channels"),
        (np.zeros((9, 2, 2), np.float32), r"b, \(9, 2, 2\), do not have 6 channels"),
        (np.zeros(6, np.float32), r"the features of b are float32 \(6,\)"),
        (np.zeros((4, 6), np.int64), r"the features of b are int64 \(4, 6\)"),
        (np.full((4, 6), np.nan, np.float32), "the features of b are not finite: compute them again"),
        (np.full((4, 6), -np.inf, np.float16), "the features of b are not finite"),
    ],
)
def test_wrong_features_are_named(tmp_path, make, array, message):
    path = make(tmp_path / "a.h5", {"a": VALUES["a"], "b": array})
    where = path / "b.npz" if make is npz_folder else path
    with pytest.raises(ValueError, match=rf"^{where}: .*{message}"):
        open_features([path])["b"]


@pytest.mark.parametrize("source", ["h5"], indirect=True)
def test_sources_must_agree(source, tmp_path):
    other = h5_file(tmp_path / "other.h5", {"x": np.zeros((4, 8), np.float32)})
    with pytest.raises(ValueError, match=f"{other} has 8 channels, but {source} has 6"):
        open_features([source, other])


def test_other_files_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    for name, verb in (("empty", "is not"), ("notes.txt", "is not"), ("missing.h5", "does not exist; it should be")):
        with pytest.raises(
            ValueError, match=f"^vision.features: {tmp_path / name} {verb} a folder with index.json, a fo"
        ):
            open_features([tmp_path / name])


def test_broken_h5_files(tmp_path):
    path = h5_file(tmp_path / "a.h5")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=f"^{path} is not a complete HDF5 file"):
        open_features([path])
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["features"] = np.zeros((3, 4), np.float32)
    with pytest.raises(ValueError, match=r"b.h5 has no groups .*`features`"):
        open_features([tmp_path / "b.h5"])


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_broken_npz_files(tmp_path):
    folder = npz_folder(tmp_path / "clips")
    features = open_features([folder])
    (folder / "truncated.npz").write_bytes((folder / "a.npz").read_bytes()[:90])
    np.savez(folder / "other.npz", feats=np.zeros((2, 6)))
    np.savez(folder / "trap.npz", features=np.array([Trap(tmp_path / "sprung")], dtype=object))
    (tmp_path / "sprung").unlink(missing_ok=True)
    for name in ("truncated", "other", "trap"):
        with pytest.raises(ValueError, match=f"^{folder / name}.npz has no readable array `features`"):
            features[name]
    assert not (tmp_path / "sprung").exists()


def other_file(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("secret", data=np.ones((2, 4), dtype=np.float32))
    return path


def external_link(file, other):
    file["a"] = h5py.ExternalLink(other.name, "/")


def soft_link(file, other):
    file["elsewhere"] = h5py.ExternalLink(other.name, "/")
    file["a"] = h5py.SoftLink("/elsewhere")


def external_storage(file, other):
    other.write_bytes(b"\0" * 32)
    file.create_dataset("a/features", (2, 4), dtype=np.float32, external=[(other.name, 0, 32)])


def virtual(file, other):
    layout = h5py.VirtualLayout((2, 4), dtype=np.float32)
    layout[:] = h5py.VirtualSource(str(other_file(other)), "secret", (2, 4))
    file.create_virtual_dataset("a/features", layout)


@pytest.mark.parametrize("make", [external_link, soft_link, external_storage, virtual], ids=lambda make: make.__name__)
def test_parts_in_other_files_are_not_read(make, tmp_path):
    other = tmp_path / "other.h5"
    if "link" in make.__name__:
        with h5py.File(other, "w") as file:
            file.create_dataset("features", data=np.ones((2, 4), dtype=np.float32))
    with h5py.File(h5_file(tmp_path / "a.h5", {"b": VALUES["b"]}), "a") as file:
        make(file, other)
    with pytest.raises(ValueError, match="in another file, which is not opened"):
        H5Features(tmp_path / "a.h5").read("a")


def test_features_that_unpack_to_gigabytes_are_refused(tmp_path):
    with h5py.File(h5_file(tmp_path / "a.h5", {"b": VALUES["b"]}), "a") as file:
        file.create_dataset("a/features", (1_000_000, 4000), dtype=np.float32, compression="gzip", chunks=(100, 4000))
    with pytest.raises(ValueError, match="take 16,000,000,000 bytes"):
        H5Features(tmp_path / "a.h5").read("a")
    np.savez_compressed(npz_folder(tmp_path / "n") / "a.npz", features=np.zeros((17_000, 1000), dtype=np.float32))
    with pytest.raises(ValueError, match="68,000,128 bytes"):
        NpzFeatures(tmp_path / "n").read("a")


@given(st.sampled_from([h5_file, npz_folder]), st.randoms(use_true_random=False))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_flipped_bytes_give_features_or_a_sentence(tmp_path_factory, make, random):
    path = make(tmp_path_factory.mktemp("flipped") / "features.h5")
    file = path if path.is_file() else min(path.iterdir())
    content = bytearray(file.read_bytes())
    for _ in range(3):
        content[random.randrange(len(content))] = random.randrange(256)
    file.write_bytes(bytes(content))
    problem = None
    try:
        source = (H5Features if path.is_file() else NpzFeatures)(path)
        if "a" in source:
            assert source.read("a").dtype.is_floating_point
    except ValueError as error:
        problem = str(error)
    assert problem is None or str(path) in problem
