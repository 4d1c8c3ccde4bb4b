"""The limits of images of a training, in the files of a model's folder."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoProcessor

from dora_mm.config.models import VLMModelConfig
from dora_mm.data.vl.example import Example
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.models.vl.vlm.saved_limits import write_limits
from tests.shared.data.vlm_rows import write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("pictures"))


def copied(base: Path, folder: Path) -> Path:
    return shutil.copytree(base, folder)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("qwen2_vl", {"max_pixels": 784}),
        ("smolvlm", {"image_size": 28}),
        ("internvl", {"max_tiles": 1}),
        ("llava_onevision", {"max_tiles": 1}),
    ],
)
def test_a_folder_reads_images_as_the_training_did(name, limit, tiny_vlm, images, tmp_path):
    folder = copied(tiny_vlm(name), tmp_path / "merged")
    trained = VLMModelConfig.model_validate({"path": str(tiny_vlm(name)), **limit})
    before = VLM(VLMModelConfig(path=str(folder)))
    assert write_limits(folder, trained) == limit
    after = VLM(VLMModelConfig(path=str(folder)))
    row = Example("1", ("tall.png",), "What is this?")
    counts = [
        vlm.rows.row(vlm.question_task, row, str(images), "").num_image_tokens for vlm in (before, VLM(trained), after)
    ]
    assert counts[2] == counts[1] < counts[0]


def test_a_grid_is_that_of_the_models_config_too(tiny_vlm, tmp_path):
    """Else features and tokens disagree in programs that count by the config, as vLLM does."""
    folder = copied(tiny_vlm("llava_onevision"), tmp_path / "merged")
    write_limits(folder, VLMModelConfig(path="base", max_tiles=1))
    grid = AutoConfig.from_pretrained(folder).image_grid_pinpoints
    assert grid == [list(sizes) for sizes in AutoProcessor.from_pretrained(folder).image_processor.image_grid_pinpoints]
    assert len(grid) < len(AutoConfig.from_pretrained(tiny_vlm("llava_onevision")).image_grid_pinpoints)


def test_a_published_preprocessor_keeps_the_keys_that_outrank_its_size(tiny_vlm, tmp_path):
    """Qwen2.5-VL's: an own file, with `max_pixels` beside the rest."""
    folder = copied(tiny_vlm("qwen2_5_vl"), tmp_path / "merged")
    saved = json.loads((folder / "processor_config.json").read_text())
    images = saved.pop("image_processor") | {"min_pixels": 784, "max_pixels": 3136}
    del images["size"]
    (folder / "processor_config.json").write_text(json.dumps(saved))
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    write_limits(folder, VLMModelConfig(path="base", max_pixels=1568))
    found = json.loads((folder / "preprocessor_config.json").read_text())
    assert (found["min_pixels"], found["max_pixels"]) == (784, 1568)
    assert dict(AutoProcessor.from_pretrained(folder).image_processor.size)["longest_edge"] == 1568


def test_nothing_is_written_without_a_limit(tiny_vlm, tmp_path):
    folder = copied(tiny_vlm("qwen2_vl"), tmp_path / "merged")
    files = {file: file.read_bytes() for file in folder.iterdir()}
    assert write_limits(folder, VLMModelConfig(path="base")) == {}
    assert {file: file.read_bytes() for file in folder.iterdir()} == files
