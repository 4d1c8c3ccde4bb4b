"""The model card beside an adapter: its header as the Hub reads it, and code that runs."""

import ast
import re
from functools import partialmethod

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from huggingface_hub import ModelCard
from torch import nn

from dora_mm import DoRASpec, formats, inject, save_adapter
from dora_mm.core import adapted_layers
from dora_mm.models.images.sdxl.random_weights import build_tiny_sdxl
from tests.shared import reference

HUB = {"base_model": "stabilityai/stable-diffusion-xl-base-1.0"}


def adapted(method="dora"):
    model = nn.Sequential(nn.Linear(4, 3))
    inject(model, ["0"], DoRASpec(rank=2, alpha=3, method=method))
    return {"unet": model}


def gpu_of(folder):
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize(("method", "tags"), [("dora", ["dora", "lora"]), ("lora", ["lora"]), ("magnitude", ["dora"])])
def test_the_header_that_the_hub_indexes(tmp_path, method, tags):
    about = {**HUB, "instance_prompt": "a TOK icon", "license": "mit"}
    save_adapter(adapted(method), tmp_path, metadata=about)
    assert gpu_of(tmp_path).data.to_dict() == {
        "base_model": HUB["base_model"],
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "mit",
        "instance_prompt": "a TOK icon",
        "tags": [*tags, "text-to-image", "diffusers", "template:sd-lora"],
    }


def test_what_is_not_known_is_left_out(tmp_path):
    save_adapter(adapted(), tmp_path / "peft", format="peft", metadata={"base_model": "samples/tiny-sdxl"})
    assert gpu_of(tmp_path / "peft").data.to_dict() == {"library_name": "peft", "tags": ["dora", "lora", "peft"]}
    save_adapter(adapted("full"), tmp_path / "native", format="native")
    assert gpu_of(tmp_path / "native").data.to_dict() == {}


def test_images_scores_and_settings(tmp_path):
    save_adapter(adapted(), tmp_path, format="peft", metadata={**HUB, "config": "pipeline: train_vl\n"})
    before = gpu_of(tmp_path)
    assert "pipeline: train_vl" in before.text
    assert re.search(r"\| unet \| 1 \| dora \| 2 \| 3 \| 17 \|", before.text)
    formats.write_model_card(tmp_path, images=[("a fox", "pictures/1.png")], scores={"vqa": ("accuracy", 61.2345)})
    gpu = gpu_of(tmp_path)
    assert gpu.data.widget == [{"text": "a fox", "output": {"url": "pictures/1.png"}}]
    (result,) = gpu.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("vqa", "accuracy", 61.2345)
    assert "| vqa | accuracy | 61.23 |" in gpu.text
    assert "<Gallery />" in gpu.text


def test_a_gpu_that_a_person_has_written_or_changed_is_kept(tmp_path):
    save_adapter(adapted(), tmp_path)
    path = tmp_path / "README.md"
    ours = path.read_text()
    save_adapter(adapted(), tmp_path, metadata=HUB)
    assert path.read_text() != ours
    for text in ("My adapter.\n", path.read_text().replace("# DoRA", "# My DoRA"), path.read_text() + "More.\n", ""):
        path.write_text(text)
        save_adapter(adapted(), tmp_path)
        formats.write_model_card(tmp_path, scores={"vqa": ("accuracy", 1.0)})
        assert path.read_text() == text


def test_the_code_for_diffusers_runs(tmp_path, monkeypatch):
    def build():
        return build_tiny_sdxl(
            seed=0,
            resolution=32,
            num_merges=50,
            vae_channels=(8, 8, 16),
            unet_channels=(16, 32, 32),
            unet_heads=(1, 2, 2),
            unet_layers=1,
            text_widths=(16, 32),
            text_depths=(2, 3),
        )

    model = build()
    model.pipeline().save_pretrained(tmp_path / "base")
    inject(model.unet, "sdxl-unet", DoRASpec(rank=2))
    for seed, layer in enumerate(adapted_layers(model.unet).values()):
        reference.randomize(layer, seed=seed)
    about = {"base_model": str(tmp_path / "base"), "instance_prompt": "a TOK icon"}
    save_adapter(model.unet, tmp_path / "adapter", metadata=about)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "adapter" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path / "adapter")
    few_steps = partialmethod(StableDiffusionXLPipeline.__call__, num_inference_steps=2)
    monkeypatch.setattr(StableDiffusionXLPipeline, "__call__", few_steps)
    found = {}
    exec(code, found)
    assert found["image"].size[0] > 0
    assert any("lora" in name for name in found["pipe"].unet.state_dict())


def test_the_code_for_peft_runs(tmp_path, monkeypatch):
    save_adapter(adapted(), tmp_path, format="peft")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found = {"model": nn.Sequential(nn.Linear(4, 3))}
    exec(code, found)
    assert found["model"](torch.ones(1, 4)).shape == (1, 3)


HOSTILE = 'a\nimport os; os.system(\'touch x\')\n```\n<script>alert(1)</script>\n""" `b` \u2028c'


@pytest.mark.parametrize("format", ["diffusers", "peft", "native"])
def test_texts_of_others_stay_texts(tmp_path, format):
    """Headers of files that somebody else wrote: no line of the code to copy, and none of the page, is theirs."""
    about = {"base_model": HOSTILE, "instance_prompt": HOSTILE, "day": HOSTILE, "config": HOSTILE}
    save_adapter(adapted(), tmp_path, format=format, metadata=about)
    text = gpu_of(tmp_path).text
    block = re.compile(r"^(```+)(python|yaml)\n(.*?)\n\1$", re.DOTALL | re.MULTILINE)
    (_, _, code), (_, _, config) = block.findall(text)
    assert config == HOSTILE
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)}
    assert "os.system" not in calls
    assert not any(line.startswith(("<s", "import", "```")) for line in block.sub("", text).split("\n"))
