"""One reader and one writer: what a file means depends on what it holds, and not on its name or the way it is read."""

import shutil

import numpy as np
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dora_mm import DoRASpec, convert, inject, load_adapter, merge, save_adapter, verify
from dora_mm.adapting.initial import load_initial_file
from dora_mm.adapting.networks import TrainedNetworks
from dora_mm.config.adapter import ImageAdapterConfig
from dora_mm.core import adapted_layers
from dora_mm.formats.files import tensor_file
from dora_mm.formats.naming.names import Name, canonical
from tests.formats.tools.test_diffusers import adapt, build, components, image
from tests.shared import reference

SPECS = {
    "dora": DoRASpec(rank=3, alpha=5, norm_grad="exact", dropout=0.25),
    "lora": DoRASpec(rank=2, method="lora", dropout=0.5),
    "magnitude": DoRASpec(rank=4, alpha=2, method="magnitude", norm_grad="exact"),
    "full": DoRASpec(method="full"),
}


def net(spec=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(5, 4, 1))
    if spec is not None:
        inject(model, ["0", "1"], spec)
        for seed, layer in enumerate(adapted_layers(model).values()):
            reference.randomize(layer, seed=seed)
    return model


def loaded(path):
    model = net()
    load_adapter({"unet": model}, path)
    return {path: (layer.adaptation.spec, layer.adapter_tensors()) for path, layer in adapted_layers(model).items()}


@pytest.mark.parametrize(
    ("method", "format"),
    [*((method, "native") for method in SPECS), *((method, "diffusers") for method in list(SPECS)[:3])],
)
def test_a_file_of_ours_under_another_name_is_the_same_adapter(method, format, tmp_path):
    file = save_adapter({"unet": net(SPECS[method])}, tmp_path, format=format)
    shutil.copy(file, tmp_path / "style.safetensors")
    before, after = loaded(file), loaded(tmp_path / "style.safetensors")
    assert before.keys() == after.keys() == {"0", "1"}
    for path, (spec, tensors) in after.items():
        assert spec == before[path][0]
        assert (spec.norm_grad, spec.dropout) == (SPECS[method].norm_grad, SPECS[method].dropout)
        assert all(torch.equal(tensor, before[path][1][name]) for name, tensor in tensors.items())
    assert format == "diffusers" or after["0"][0].rank == SPECS[method].rank


@pytest.mark.parametrize("to", ["peft", "diffusers"])
def test_a_converted_file_keeps_the_settings_of_the_training(to, tmp_path):
    file = save_adapter({"unet": net(SPECS["dora"])}, tmp_path / "native", format="native")
    (converted,) = convert(file, tmp_path / "converted", to=to).files
    for spec, _ in loaded(converted).values():
        assert (spec.norm_grad, spec.dropout, spec.rank) == ("exact", 0.25, 3)


def test_every_tool_is_judged_on_our_own_file(tmp_path):
    """`onetrainer` reads the key `magnitude`, too, and raised a KeyError on a module without A."""
    model = net(SPECS["magnitude"])
    file = save_adapter({"unet": model}, tmp_path, format="native")
    base = {Name("unet", path): weight for path, weight in ((p, net().get_submodule(p).weight) for p in ("0", "1"))}
    assert {verdict.tool for verdict in verify(file, base=base)} > {"onetrainer", "peft"}


def test_a_training_opens_its_initial_file_once(tmp_path, monkeypatch):
    file = save_adapter({"unet": net(SPECS["dora"])}, tmp_path)
    opened = []
    before = tensor_file.TensorFile.__init__

    def counted(self, path):
        opened.append(path)
        before(self, path)

    monkeypatch.setattr(tensor_file.TensorFile, "__init__", counted)
    model = net()
    trained = TrainedNetworks({"unet": model})
    load_initial_file(trained, ImageAdapterConfig(rank=3, alpha=5, init_from=str(file)), "torch")
    assert opened == [file]
    assert len(adapted_layers(model)) == 2


# --- text encoders in diffusers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return adapt(build(), DoRASpec(rank=3, alpha=5))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return save_adapter(components(model), tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def base():
    return {
        canonical(component, path): module.weight.detach()
        for component, part in components(build()).items()
        for path, module in part.named_modules()
        if hasattr(module, "weight")
    }


def without_ending(file, path):
    """A file as PEFT names magnitudes everywhere."""
    tensors = {key.replace("magnitude_vector.weight", "magnitude_vector"): t for key, t in load_file(file).items()}
    with safe_open(file, "pt") as opened:
        save_file(tensors, path, opened.metadata())
    return path


def test_diffusers_loads_all_components_of_a_converted_file(model, saved, base, tmp_path):
    expected = image(model.pipeline())
    (kohya,) = convert(saved, tmp_path / "a.safetensors", to="kohya", base=base).files
    (file,) = convert(kohya, tmp_path / "converted", to="diffusers", base=base).files
    assert load_file(file).keys() == load_file(saved).keys()
    pipe = build().pipeline()
    pipe.load_lora_weights(str(tmp_path / "converted"))
    assert np.abs(image(pipe) - expected).max() <= 1e-4


@pytest.mark.parametrize("ending", ["with .weight", pytest.param("without", marks=pytest.mark.slow)])
def test_verify_says_what_diffusers_does_with_either_spelling(ending, saved, base, tmp_path):
    file = saved if ending == "with .weight" else without_ending(saved, tmp_path / "a.safetensors")
    (verdict,) = verify(file, "diffusers", base)
    pipe = build().pipeline()
    pipe.load_lora_weights(str(file))
    right = meant(file)
    for layer in verdict.layers:
        component, _, path = layer.module.partition(".")
        W = in_diffusers(getattr(pipe, component), path)
        name = Name(component, path)
        error = float((W - right[name]).norm() / (right[name] - base[name]).norm())
        assert layer.error == pytest.approx(error, rel=1e-3, abs=1e-5), layer
    lost = sum(layer.finding == "loses the magnitude" for layer in verdict.layers)
    assert lost == (30 if ending == "without" else 0)


def in_diffusers(network, path):
    """The weight that PEFT computes in a network of diffusers."""
    modules = dict(network.named_modules())
    layer = modules.get(path) or modules[path.removeprefix("text_model.")]
    assert isinstance(layer, BaseTunerLayer)
    layer.merge()
    return layer.get_base_layer().weight.data


def meant(file):
    """The weight W' that the file means, by module."""
    model = build()
    load_adapter(components(model), file)
    found = {}
    for component, part in components(model).items():
        paths = list(adapted_layers(part))
        merge(part, keep_base=False)
        found |= {canonical(component, path): part.get_submodule(path).weight.detach() for path in paths}
    return found
