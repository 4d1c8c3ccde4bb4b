"""Everything that a training on images can be asked for, of each family and in any combination, resumed by bits."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from dora_mm.adapting import compiled
from dora_mm.cli import main
from dora_mm.models.quantization import QUANTIZATIONS
from tests.shared.data.images_made import write_images
from tests.shared.images.combinations import ALONE, EXCLUDES, OPTIONS, QUANTIZED, config_of
from tests.shared.images.tiny_flows import EACH, FLOWS, NAMES

OF_FLOWS = OPTIONS.keys() - {"text encoders", "new tokens"}  # whose text encoders are frozen
MAY_BE = st.sets(st.sampled_from(sorted(OPTIONS)))


def check_resumed(names, model, folders, section=()):
    """A run is put back to where a kill after its first checkpoint leaves it, resumed, and compared."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        file = Path(scratch) / "train.yaml"
        file.write_text(json.dumps(config_of(names, model, folders, run, section)))
        assert main(["train", str(file), "--dry-run"]) == 0
        assert main(["train", str(file)]) == 0
        whole = {path.relative_to(run): load_file(path) for path in run.glob("adapter*/*.safetensors")}
        assert len(whole) == (1 + ("average" in names)) * (1 + ("new tokens" in names))
        checkpoints = sorted((run / "checkpoints").iterdir())
        assert len(checkpoints) == 3
        for folder in (*checkpoints[1:], *run.glob("adapter*")):
            shutil.rmtree(folder)
        assert main(["train", "--resume", str(run)]) == 0
        for path, tensors in whole.items():
            resumed = load_file(run / path)
            assert tensors.keys() == resumed.keys()
            assert all((tensors[key] == resumed[key]).all() for key in tensors), (path, names)


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch):
    """Blocks are traced, forward and backward, and run by torch: that needs no C++ compiler."""
    monkeypatch.setattr(compiled, "COMPILER", {"backend": "aot_eager"})


@pytest.fixture(scope="module", params=FLOWS, ids=NAMES)
def flow(request, tmp_path_factory):
    """A tiny model of each family of flow models, and the keys of its section."""
    folder = request.param.build(tmp_path_factory.mktemp(request.param.name) / "model")
    return folder, {request.param.name: request.param.settings} if request.param.settings else {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = [tmp_path_factory.mktemp(name) for name in ("style", "plain")]
    write_images(found[0])
    write_images(found[1], count=2, captions=False)
    for folder in found:
        Image.fromarray(np.tri(64, dtype=np.uint8) * 255).save(folder / "0.mask.png")
    return found


SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


WITHOUT_CACHES = pytest.param(set(OPTIONS) - set(EXCLUDES), id="without caches", marks=pytest.mark.slow)


@pytest.mark.parametrize("names", [WITHOUT_CACHES, pytest.param(set(OPTIONS), id="with caches")])
@pytest.mark.slow
def test_all_at_once_is_resumed_bit_for_bit(tiny_folder, folders, names):
    check_resumed(names, tiny_folder, folders)


@pytest.mark.slow
@settings(max_examples=30, **SETTINGS)
@given(MAY_BE)
def test_any_combination_is_resumed_bit_for_bit(tiny_folder, folders, names):
    check_resumed(names, tiny_folder, folders)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OF_FLOWS | ALONE.keys()))
def test_each_is_resumed_bit_for_bit_over_a_flow_model(flow, folders, name):
    model, section = flow
    check_resumed({name}, model, folders, section)


WITH_QUANTIZED = {"masks", "preservation", "average", "caches"}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_bases_are_resumed_bit_for_bit(flow, folders, name):
    pytest.importorskip(QUANTIZATIONS[name].package)
    model, section = flow
    check_resumed({name, *WITH_QUANTIZED}, model, folders, section)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_bases_of_sdxl_are_resumed_bit_for_bit(tiny_folder, folders, name):
    pytest.importorskip(QUANTIZATIONS[name].package)
    check_resumed({name, *WITH_QUANTIZED}, tiny_folder, folders)


@pytest.mark.slow
@pytest.mark.parametrize("flow", [flow for flow in FLOWS if flow.name == "krea2"], indirect=True, ids=["krea2"])
def test_quantized_blocks_are_compiled(flow, folders):
    pytest.importorskip("bitsandbytes")
    model, section = flow
    check_resumed({"nf4", "compiled"}, model, folders, section)


@pytest.mark.parametrize("flow", EACH, indirect=True, ids=NAMES)
def test_all_at_once_over_a_flow_model_is_resumed_bit_for_bit(flow, folders):
    model, section = flow
    check_resumed(OF_FLOWS - {"random crop", "folders"}, model, folders, section)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float8", *QUANTIZED])
@pytest.mark.parametrize(
    "flow",
    [flow for flow in FLOWS if flow.name in ("flux2_klein", "qwen_image_21")],
    indirect=True,
    ids=lambda it: it.name,
)
def test_references_over_quantized_bases_are_resumed_bit_for_bit(flow, folders, tmp_path, name):
    """Of two sizes, for all images but one; masks, preservation, averages, caches and held-out losses beside them."""
    if name in QUANTIZED:
        pytest.importorskip(QUANTIZATIONS[name].package)
    model, section = flow
    for index, side in enumerate((64, 80, 64, 64)):
        noise = np.random.default_rng(index).integers(0, 256, (side, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{index}.png")
    names = OF_FLOWS - {"random crop", "folders", "float8"} | {"held-out losses", "references", name}
    check_resumed(names, model, [*folders, tmp_path], section)
