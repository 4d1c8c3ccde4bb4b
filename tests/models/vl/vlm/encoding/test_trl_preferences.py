"""Losses, margins and gradients of pairs are those of TRL's DPOTrainer, from the same file of rows."""

import json

import pytest
import torch
from packaging.version import Version

import dora_mm
from dora_mm.adapting.networks import adapt
from dora_mm.config.adapter import VLAdapterConfig
from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import PreferenceConfig
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.tables import open_table
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.tasks.preferences import Preferences, pairs_of, without_adapters
from tests.documented.trl_preferences import (
    MODELS,
    PAGE,
    PAIRS,
    SETTINGS,
    TARGETS,
    WITH_GRADIENTS,
    set_values,
    without_white_space,
)
from tests.shared.data.vlm_rows import write_images

THEIRS = json.loads(PAGE.read_text(encoding="utf-8"))["models"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("name", MODELS)
def test_losses_margins_and_gradients_are_those_of_trl(name, tiny_vlm, images, tmp_path):
    if name == "gemma3" and Version(torch.__version__) < Version("2.13"):
        pytest.skip("older releases of torch draw other weights for this model, and TRL's numbers are recorded")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    source = SourceConfig(format="preferences", file=str(tmp_path / "pairs.jsonl"), images=str(images))
    vlm = VLM(VLMModelConfig(path=str(tiny_vlm(name))))
    without_white_space(vlm.rows.processor, MODELS[name])
    config = VLAdapterConfig.model_validate({"rank": 2, "parts": [f"re:{TARGETS}"]})
    adapt(vlm.networks, vlm.target_maps, config, seed=0, backend="torch")
    ours = dora_mm.adapter_parameters(vlm.model)
    names = THEIRS[name]["sigmoid"]["gradients"]
    assert ours.keys() == names.keys()
    set_values({parameter: ours[parameter] for parameter in names})
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    batch = pairs_of(vlm, "preference", list(table), str(images), "stop")
    for label, settings in SETTINGS.items():
        theirs = THEIRS[name][label]
        preferences = Preferences(vlm, PreferenceConfig(**settings), without_adapters(vlm))
        loss = preferences.loss(batch, torch.Generator()).mean
        assert loss.item() == pytest.approx(theirs["loss"], abs=2e-6)
        if label != "smoothed":
            margins = preferences.margins(batch)
            assert margins.mean().item() == pytest.approx(theirs["rewards/margins"], abs=5e-6)
            assert (margins > 0).float().mean().item() == pytest.approx(theirs["rewards/accuracies"])
        if label in WITH_GRADIENTS:
            loss.backward()
            for parameter, values in theirs["gradients"].items():
                found = ours[parameter].grad
                assert found is not None
                torch.testing.assert_close(found.flatten(), torch.tensor(values), rtol=1e-4, atol=5e-6)
                ours[parameter].grad = None
