"""One sentence when the hub cannot be reached, and what its cache holds."""

import pytest

from dora_mm.config.models import ModelConfig, VLBartModelConfig
from dora_mm.models import hub
from dora_mm.models.image_families import load_image_model
from dora_mm.models.vl_bart.loading import load_vl_bart

SENTENCE = r"owner/nothing is not on this machine, and the hub \(huggingface.co\) cannot be reached: .*local folder"


def test_an_sdxl_model(tiny_folder):
    with pytest.raises(ValueError, match=f"^{SENTENCE}"):
        load_image_model(ModelConfig(path="owner/nothing"))
    with pytest.raises(ValueError, match=f"^{SENTENCE}"):
        load_image_model(ModelConfig(path=str(tiny_folder), vae="owner/nothing"))


def test_a_bart():
    with pytest.raises(ValueError, match=f"^model.path: {SENTENCE}"):
        load_vl_bart(VLBartModelConfig(family="vl_bart", path="owner/nothing"), 8, 0)


def test_other_errors_have_other_messages(tmp_path):
    assert hub.unreachable("owner/nothing", ValueError("damaged")) is None
    error = OSError("no config")
    error.__cause__ = ConnectionError("offline")
    assert "owner/nothing" in str(hub.unreachable("owner/nothing", error))
    assert hub.unreachable(str(tmp_path), error) is None  # a local folder needs no hub


def test_local_copies(tmp_path):
    assert hub.local_copy(str(tmp_path)) == tmp_path
    assert hub.local_copy("owner/nothing") is None
