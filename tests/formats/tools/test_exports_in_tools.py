"""Converted files in the tools themselves: PEFT, diffusers and LyCORIS."""

import copy
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders import PeftAdapterMixin
from lycoris.wrapper import LycorisNetwork, create_lycoris_from_weights
from peft import PeftModel

from dora_mm.formats.commands.convert import convert
from tests.formats import toy
from tests.formats.commands.test_convert import BASE, textbook

ROOT = Path(__file__).parents[3]
STATES = {name: toy.state_of(name, number) for number, name in enumerate(toy.UNET)}


@pytest.fixture
def source(tmp_path):
    return toy.write_source(tmp_path / "source.safetensors", STATES)


def check(weights):
    assert len(weights) == len(STATES)
    for name, W in weights.items():
        wanted = textbook(name, STATES[name])
        assert (W - wanted).norm() < 1e-6 * wanted.norm(), name


def test_peft(source, tmp_path):
    convert(source, tmp_path / "new", to="peft", base=BASE)
    merged = PeftModel.from_pretrained(toy.model(), str(tmp_path / "new")).merge_and_unload()
    check({name: merged.get_submodule(name.path).weight.data for name in toy.UNET})


@pytest.mark.parametrize("header", [True, False])
def test_diffusers(header, source, tmp_path):
    """Its own loader of LoRA files on the toy model; that of a model alone does not read the header."""

    class Model(torch.nn.Module, PeftAdapterMixin):
        config = None
        _hf_peft_config_loaded = False

    model = Model()
    for name, child in toy.model().named_children():
        model.add_module(name, child)
    (file,) = convert(source, tmp_path / "new", to="diffusers", base=BASE).files
    state, _, metadata = StableDiffusionXLPipeline.lora_state_dict(str(file), return_lora_metadata=True)
    model.load_lora_adapter(state, prefix="unet", metadata=metadata if header else None, adapter_name="default")
    model.fuse_lora()
    check({name: model.get_submodule(name.path).base_layer.weight.data for name in toy.UNET})


def test_diffusers_drops_the_magnitude_of_kohyas_files(source, tmp_path):
    (file,) = convert(source, tmp_path / "new.safetensors", to="kohya", base=BASE).files
    state, _ = StableDiffusionXLPipeline.lora_state_dict(str(file))
    assert state
    assert not any("magnitude" in key or "dora" in key for key in state)


def test_lycoris(source, tmp_path, monkeypatch):
    (file,) = convert(source, tmp_path / "new.safetensors", to="onetrainer", base=BASE).files  # diffusers' names
    monkeypatch.setattr(LycorisNetwork, "LORA_PREFIX", "lora_unet")
    network, _ = create_lycoris_from_weights(1.0, str(file), copy.deepcopy(toy.model()))
    names = {name.path.replace(".", "_"): name for name in toy.UNET}
    merged = {names[m.lora_name.removeprefix("lora_unet_")]: m for m in network.loras}
    check({name: m.get_merged_weight(1.0, shape=toy.SHAPES[name])[0].detach() for name, m in merged.items()})


def test_the_tests_in_the_table_of_the_docs_exist():
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    defined = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "formats").rglob("test_*.py"))
    named = set(re.findall(r"\b(test_\w+)\b(?!\.py)", text))
    assert len(named) >= 8
    assert not [name for name in named if f"def {name}(" not in defined]
