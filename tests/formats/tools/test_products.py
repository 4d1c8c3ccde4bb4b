"""LoHa, LoKr and GLoRA: what their files mean is what LyCORIS computes in its forward pass."""

import pytest
import torch
from lycoris.wrapper import LycorisNetwork, create_lycoris
from safetensors.torch import load_file, save_file
from torch.nn import functional

from dora_mm import DoRASpec, load_adapter, merge
from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.algebra.exact import fitted, new_weight
from dora_mm.formats.commands.convert import convert
from dora_mm.formats.commands.inspection import inspect_file
from dora_mm.formats.commands.verify import RIGHT, verify
from dora_mm.formats.naming.spellings import Names
from dora_mm.formats.state import LayerState
from tests.shared import toy

BASE = {name: W0 for name, W0 in toy.base().items() if name.component == "unet"}
KINDS = {
    "LoHa": {"algo": "loha"},
    "LoHa with a magnitude": {"algo": "loha", "dora_wd": True},
    "LoHa of Tucker": {"algo": "loha", "use_tucker": True},
    "LoKr": {"algo": "lokr", "factor": 4},
    "LoKr with both factored": {"algo": "lokr", "factor": 4, "decompose_both": True, "linear_dim": 1, "conv_dim": 1},
    "LoKr with a factor of one number": {"algo": "lokr", "factor": 1, "full_matrix": True},
    "LoKr with both whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "LoKr with a magnitude": {"algo": "lokr", "factor": 4, "dora_wd": True},
    "LoKr with a magnitude of columns": {"algo": "lokr", "factor": 4, "dora_wd": True, "wd_on_output": False},
    "GLoRA": {"algo": "glora"},
}


@pytest.fixture(params=KINDS)
def trained(request, tmp_path, monkeypatch):
    """A file that LyCORIS wrote, and what its modules compute, by the name of the module."""
    monkeypatch.setattr(LycorisNetwork, "LORA_PREFIX", "lora_unet")
    settings = {"linear_dim": 2, "linear_alpha": 1, "conv_dim": 2, "conv_alpha": 1, **KINDS[request.param]}
    network = create_lycoris(toy.model(), 1.0, preset="full", **settings)
    network.apply_to()
    for seed, (name, parameter) in enumerate(sorted(network.named_parameters())):
        values = toy.wave(parameter.shape, 300 + seed).float()
        parameter.data = parameter.data * (1 + 0.08 * values) if "dora_scale" in name else 0.5 * values
    path = tmp_path / "a.safetensors"
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, path)
    return path, {module.lora_name: module.eval() for module in network.loras}


def computed(W, x):
    return functional.conv2d(x, W, padding=1) if W.dim() > 2 else functional.linear(x, W)


def input_of(W0):
    return toy.wave((2, W0.shape[1], 5, 5) if W0.dim() > 2 else (3, W0.shape[1]), 7).float()


@torch.no_grad()
def check(weights, modules):
    assert len(weights) == len(modules) == len(BASE)
    for name, W in weights.items():
        x, module = input_of(W), modules["lora_unet_" + name.path.replace(".", "_")]
        torch.testing.assert_close(computed(W.float(), x), module(x), rtol=2e-5, atol=2e-5)


def test_a_file_means_what_lycoris_computes(trained):
    path, modules = trained
    file, names = AdapterFile(path), Names(BASE)
    found = {names.read(module).names[0]: module for module in file.modules}
    check({name: new_weight(fitted(file.layer(m), BASE[name]), BASE[name]) for name, m in found.items()}, modules)


def test_it_loads_as_it_is(trained):
    path, modules = trained
    model = toy.model()
    load_adapter({"unet": model}, path)
    merge(model, keep_base=False)
    check({name: model.get_submodule(name.path).weight.detach() for name in BASE}, modules)


@pytest.mark.parametrize("to", ["diff", "lora"])
def test_it_is_converted(to, trained, tmp_path):
    path, modules = trained
    settings = {"dtype": "float32"} if to == "diff" else {"energy": 1.0}
    (file,) = convert(path, tmp_path / "new.safetensors", to=to, base=BASE, **settings).files
    assert not {key.rpartition(".")[2] for key in load_file(file)} & {"hada_w1_a", "lokr_w1"}
    model = toy.model()
    load_adapter({"unet": model}, file)
    merge(model, keep_base=False)
    check({name: model.get_submodule(name.path).weight.detach() for name in BASE}, modules)


def test_it_is_named_and_judged(trained, request):
    path, _ = trained
    method = next(name for name in ("LoHa", "LoKr", "GLoRA") if name in request.node.name)
    assert {module.method for module in inspect_file(path).modules} == {method}
    verdicts = {verdict.tool: verdict for verdict in verify(path, "all", BASE)}
    assert set(verdicts["kohya"].findings) == {RIGHT}
    assert (set(verdicts["comfy"].findings) == {RIGHT}) == (not request.node.name.endswith("with a magnitude]"))
    right = {tool for tool, verdict in verdicts.items() if set(verdict.findings) == {RIGHT}}
    assert set(inspect_file(path).works_in) == right
    with pytest.raises(ValueError, match="format cannot hold"):
        convert(path, path.with_name("b.safetensors"), to="diffusers", base=BASE)
    assert "has no low rank" in str(AdapterFile(path).why_not_trainable())


def test_factors_that_do_not_fit_are_refused(tmp_path):
    module = "lora_unet_" + next(iter(BASE)).path.replace(".", "_")
    shapes = {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 8)}
    save_file({f"{module}.{end}": torch.ones(shape) for end, shape in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="shapes of its factors do not fit each other"):
        verify(tmp_path / "a.safetensors", "kohya", BASE)
    shapes = {"lokr_w1": (4, 4), "lokr_w2": (5, 4)}
    save_file({f"{module}.{end}": torch.ones(shape) for end, shape in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="another model"):
        verify(tmp_path / "a.safetensors", "kohya", BASE)


def test_a_large_weight(tmp_path):
    """It has no rows of its own, and is computed as a whole."""
    name, size = toy.UNET[0], 600
    shapes = {"hada_w1_a": (size, 2), "hada_w1_b": (2, size), "hada_w2_a": (size, 2), "hada_w2_b": (2, size)}
    module = "lora_unet_" + name.path.replace(".", "_")
    tensors = {f"{module}.{end}": toy.wave(shape, seed).float() for seed, (end, shape) in enumerate(shapes.items())}
    save_file(tensors, tmp_path / "a.safetensors")
    base = {name: toy.wave((size, size), 9).float()}
    for verdict in verify(tmp_path / "a.safetensors", "all", base):
        assert set(verdict.findings) in ({RIGHT}, {"not known to this tool"}, {"refused"}), verdict.tool
    (file,) = convert(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diff", base=base, dtype="float32"
    ).files
    one, two, three, four = tensors.values()
    torch.testing.assert_close(next(iter(load_file(file).values())), (one @ two) * (three @ four))


def test_a_base_in_half_precision_is_computed_in_fp32():
    """Merging gives W0 as the file stores it: what the factors make of it must not be rounded in between."""
    W0 = toy.wave((16, 12), 3).half()
    layer = LayerState(DoRASpec(method="full"), {"diff": toy.wave((16, 12), 4).float(), "magnitude": torch.ones(16)})
    torch.testing.assert_close(fitted(layer, W0).tensors["diff"], fitted(layer, W0.float()).tensors["diff"])
    assert fitted(layer, W0).tensors["diff"].dtype == torch.float32
