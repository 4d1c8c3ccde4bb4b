"""Converted files in the tools themselves: PEFT, diffusers and LyCORIS."""

import copy
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders import PeftAdapterMixin
from lycoris.wrapper import LycorisNetwork, create_lycoris_from_weights
from peft import PeftModel
from safetensors.torch import load_file

from dora_mm.formats.commands.convert import convert
from tests.formats.commands.test_convert import BASE, textbook
from tests.shared import toy

ROOT = Path(__file__).parents[3]
STATES = {name: toy.state_of(name, number) for number, name in enumerate(toy.UNET)}


SMALL = {name: toy.layer(name, size=0.02, noise=0.02) for name in toy.UNET}


def in_peft(states, folder, monkeypatch, **settings):
    """The weights that PEFT merges from a file of these adapters, by name."""
    source = toy.write_source(folder / "source.safetensors", states)
    convert(source, folder / "new", to="peft", base=BASE, **settings)
    merged = PeftModel.from_pretrained(toy.model(), str(folder / "new")).merge_and_unload()
    return {name: merged.get_submodule(name.path).weight.data for name in toy.UNET}


def in_diffusers(states, folder, monkeypatch, *, header=True, **settings):
    """Its own loader of LoRA files on the toy model; that of a model alone does not read the header."""

    class Model(torch.nn.Module, PeftAdapterMixin):
        config = None
        _hf_peft_config_loaded = False

    model = Model()
    for name, child in toy.model().named_children():
        model.add_module(name, child)
    source = toy.write_source(folder / "source.safetensors", states)
    (file,) = convert(source, folder / "new", to="diffusers", base=BASE, **settings).files
    state, _, metadata = StableDiffusionXLPipeline.lora_state_dict(str(file), return_lora_metadata=True)
    model.load_lora_adapter(state, prefix="unet", metadata=metadata if header else None, adapter_name="default")
    model.fuse_lora()
    return {name: model.get_submodule(name.path).base_layer.weight.data for name in toy.UNET}


def in_lycoris(states, folder, monkeypatch, **settings):
    """The same of LyCORIS."""
    source = toy.write_source(folder / "source.safetensors", states)
    (file,) = convert(source, folder / "new.safetensors", to="onetrainer", base=BASE, **settings).files
    monkeypatch.setattr(LycorisNetwork, "LORA_PREFIX", "lora_unet")  # the names are diffusers'
    network, _ = create_lycoris_from_weights(1.0, str(file), copy.deepcopy(toy.model()))
    names = {name.path.replace(".", "_"): name for name in toy.UNET}
    merged = {names[m.lora_name.removeprefix("lora_unet_")]: m for m in network.loras}
    return {name: m.get_merged_weight(1.0, shape=toy.SHAPES[name])[0].detach() for name, m in merged.items()}


@pytest.mark.parametrize("loaded", [in_peft, in_diffusers, partial(in_diffusers, header=False), in_lycoris])
def test_they_compute_what_was_meant(loaded, tmp_path, monkeypatch):
    weights = loaded(STATES, tmp_path, monkeypatch)
    assert len(weights) == len(STATES)
    for name, W in weights.items():
        wanted = textbook(name, STATES[name])
        assert (W - wanted).norm() < 1e-6 * wanted.norm(), name


@pytest.mark.parametrize("loaded", [in_peft, in_diffusers, in_lycoris])
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 5e-3), ("float16", 1e-3)])
def test_magnitudes_in_a_file_of_half_precision_stay_in_fp32(loaded, dtype, bound, tmp_path, monkeypatch):
    """An update of 2 % of W0 would be off by 10 % in bfloat16: the tools read tensors of two dtypes."""
    weights = loaded(SMALL, tmp_path, monkeypatch, dtype=dtype)
    (file,) = {*tmp_path.rglob("*.safetensors")} - {tmp_path / "source.safetensors"}
    tensors = {key: tensor.dtype for key, tensor in load_file(file).items() if not key.endswith(".alpha")}
    magnitudes = {key for key in tensors if "magnitude" in key or "dora_scale" in key}
    assert len(magnitudes) == len(SMALL)
    assert tensors == {key: torch.float32 if key in magnitudes else getattr(torch, dtype) for key in tensors}
    off, size = 0.0, 0.0
    for name, W in weights.items():
        wanted = textbook(name, SMALL[name])
        off += float((W - wanted).square().sum())
        size += float((wanted - BASE[name].double()).square().sum())
    assert (off / size) ** 0.5 < bound


def test_diffusers_drops_the_magnitude_of_kohyas_files(tmp_path):
    source = toy.write_source(tmp_path / "source.safetensors", STATES)
    (file,) = convert(source, tmp_path / "new.safetensors", to="kohya", base=BASE).files
    state, _ = StableDiffusionXLPipeline.lora_state_dict(str(file))
    assert state
    assert not any("magnitude" in key or "dora" in key for key in state)


def test_the_tests_in_the_tables_of_the_docs_exist():
    text = (ROOT / "docs" / "checked_vl.md").read_text(encoding="utf-8")
    defined = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"\b(test_\w+)\b(?!\.py)", text))
    assert len(named) >= 8
    assert not [name for name in named if f"def {name}(" not in defined]
