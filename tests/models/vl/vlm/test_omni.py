"""Models that also speak, as they are published: their thinkers train, and what speaks stays as it is."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen2_5OmniForConditionalGeneration, Qwen3OmniMoeForConditionalGeneration

import dora_mm
from dora_mm import DoRASpec
from dora_mm.cli import main
from dora_mm.core import adapted_layers
from dora_mm.models.vl.vlm.family import VLM
from tests.shared.data.vlm_rows import write_images
from tests.shared.reference import randomize
from tests.shared.vl.equalities import EXAMPLES, batch_of, losses, opened

CLASSES = {
    "whole_qwen2_5_omni": Qwen2_5OmniForConditionalGeneration,
    "whole_qwen3_omni": Qwen3OmniMoeForConditionalGeneration,
}
NAMES = ["whole_qwen2_5_omni", pytest.param("whole_qwen3_omni", marks=pytest.mark.slow)]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    return write_images(folder)


@pytest.fixture(params=NAMES)
def published(request, tiny_vlm, tmp_path) -> Path:
    """A folder as it is published: with speakers, of Qwen2.5 with the name that its class had."""
    folder = shutil.copytree(tiny_vlm(request.param), tmp_path / request.param)
    torch.save({}, folder / "spk_dict.pt")
    config = json.loads((folder / "config.json").read_text())
    if request.param == "whole_qwen2_5_omni":
        config["architectures"] = ["Qwen2_5OmniModel"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def whole_of(folder: Path):
    return CLASSES[folder.name].from_pretrained(folder).eval()


def adapted(base: Path, adapter: Path) -> VLM:
    """The thinker with an adapter that changes its answers, which is saved."""
    vlm = opened(base)
    dora_mm.inject(vlm.model, vlm.target_maps["model"], DoRASpec(rank=2))
    for seed, layer in enumerate(adapted_layers(vlm.model).values()):
        randomize(layer, seed=seed)
    dora_mm.save_adapter({"model": vlm.model}, adapter, format="peft", metadata=vlm.identity.weights)
    return vlm


def test_the_thinker_of_a_published_folder_is_what_trains(published, images):
    """What is equal of its adapters is tried with the table of classes."""
    vlm, theirs = opened(published), opened(published)
    theirs.network.model = whole_of(published).thinker
    assert type(vlm.model) is type(theirs.model)
    expected, found = theirs.model.state_dict(), vlm.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    batch = batch_of(vlm, images, EXAMPLES)
    assert torch.equal(losses(vlm, batch), losses(theirs, batch))
    assert {"text.attn", "vision.attn", "vision.mlp", "connector"} <= vlm.target_maps["model"].parts.keys()


@pytest.mark.slow
def test_peft_loads_the_adapter_onto_the_thinker_of_the_whole_model(published, images, tmp_path):
    vlm, theirs = adapted(published, tmp_path / "adapter"), opened(published)
    theirs.network.model = PeftModel.from_pretrained(whole_of(published).thinker, tmp_path / "adapter")
    batch = batch_of(vlm, images, EXAMPLES)
    torch.testing.assert_close(losses(theirs, batch), losses(vlm, batch), rtol=1e-4, atol=1e-4)


def test_the_merged_folder_is_the_whole_model(published, images, tmp_path):
    vlm, merged = adapted(published, tmp_path / "adapter"), tmp_path / "merged" / published.name
    merged.parent.mkdir()
    assert main(["merge", str(published), str(tmp_path / "adapter"), str(merged)]) == 0
    before, after = (
        {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
        for folder in (published, merged)
    )
    assert before.keys() == after.keys()
    changed = {name for name, value in after.items() if value.numpy().tobytes() != before[name].numpy().tobytes()}
    assert changed
    assert all(name.startswith("thinker.model.") for name in changed)
    assert (merged / "config.json").read_bytes() == (published / "config.json").read_bytes()
    whole, theirs = whole_of(merged), opened(published)
    theirs.network.model = whole.thinker
    batch = batch_of(vlm, images, EXAMPLES)
    torch.testing.assert_close(losses(theirs, batch), losses(vlm, batch), rtol=1e-4, atol=1e-4)


def test_inspect_says_that_it_is_the_thinker(published, capsys):
    assert main(["inspect", str(published)]) == 0
    head, *rest = capsys.readouterr().out.splitlines()
    kind = json.loads((published / "config.json").read_text())["architectures"][0]
    assert re.search(rf": Qwen\w+Thinker\w+ \(of {kind}, without what speaks\), target map derived", head)
    assert not any("talker" in line or "2wav" in line for line in rest)
