"""Where a file works as it is, by its header, and the conversion that cures it where it does not."""

import re
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_mm.formats.commands.convert import convert
from dora_mm.formats.commands.inspection import inspect_file
from dora_mm.formats.commands.verify import RIGHT, verify
from dora_mm.formats.tools.parts import kohya_tensors
from dora_mm.registries.tools import other_tools
from tests.formats import toy
from tests.formats.tools.test_tools import FILES, path_of

BASE = toy.base()
BASES = {True: {name: W0 for name, W0 in BASE.items() if name.component == "unet"}, False: BASE}
CURABLE = {"comfy", "forge", "lycoris", "a1111", "sdnext", "invokeai", "onetrainer"}


def kohya(path, *, axis="out", method="dora", alpha=True, flat=False):
    tensors = {}
    for name in toy.UNET:
        found = kohya_tensors(toy.layer(name, axis=axis, method=method))
        if not alpha:
            del found["alpha"]
        if flat:
            found["dora_scale"] = found["dora_scale"].flatten()
        module = f"lora_unet_{name.path.replace('.', '_')}"
        tensors |= {f"{module}.{end}": tensor.contiguous() for end, tensor in found.items()}
    save_file(tensors, path)
    return path


@pytest.fixture(params=["out", "in", "lora", "no alpha", "mixed", "converted", *FILES], ids=str)
def file(request, tmp_path):
    path = tmp_path / "a.safetensors"
    if isinstance(request.param, tuple):
        return path_of(request.param[1])
    if request.param == "converted":
        return convert(kohya(path), tmp_path / "b.safetensors", to="comfy", base=BASES[True]).files[0]
    if request.param == "mixed":
        return toy.write_source(path, {name: toy.state_of(name, number) for number, name in enumerate(toy.SHAPES)})
    settings = {"in": {"axis": "in"}, "lora": {"method": "lora"}, "no alpha": {"alpha": False}}
    return kohya(path, **settings.get(request.param, {}))


def base_of(file):
    return BASES[len(inspect_file(file).modules) <= 5]


def test_the_header_tells_where_a_file_works(file):
    right = {verdict.tool for verdict in verify(file, "all", base_of(file)) if set(verdict.findings) == {RIGHT}}
    assert set(inspect_file(file).works_in) == right


def test_every_cure_cures(file, tmp_path):
    verdicts = verify(file, "all", base_of(file))
    for verdict in verdicts:
        assert not verdict.cure or set(verdict.findings) != {RIGHT}
        if set(verdict.findings) != {RIGHT} and verdict.tool in CURABLE:
            assert verdict.cure, verdict.tool
    for verdict in verdicts:
        if verdict.cure:
            option, to, *more = shlex.split(verdict.cure)
            assert option == "--to"
            settings = {"rank": 6, "allow_lossy": True} if more else {}  # the toy's weights are small
            convert(file, tmp_path / verdict.tool, to=to, base=base_of(file), **settings)
            (new,) = verify(tmp_path / verdict.tool, verdict.tool, base_of(file))
            assert new.error < (1 if more else 5e-4), (verdict.tool, verdict.cure)
            if not more:
                assert set(new.findings) == {RIGHT} or to == "diff"  # in fp16


def test_a_file_of_an_unclear_axis_works_nowhere(tmp_path):
    assert inspect_file(kohya(tmp_path / "flat.safetensors", flat=True)).works_in == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: {k: t * 0 if k.endswith("alpha") else t for k, t in tensors.items()}, "alpha of .* is 0"),
        (lambda tensors: {k: t for k, t in tensors.items() if not k.endswith("up.weight")}, "A or B of .* is missing"),
    ],
)
def test_damage_that_the_header_shows(change, words, tmp_path):
    path = kohya(tmp_path / "a.safetensors")
    save_file(change(load_file(path)), path)
    found = inspect_file(path)
    (damage,) = found.damage
    assert re.search(words, damage)
    assert "and 4 other modules" in damage
    assert found.works_in == ()


def test_a_file_of_a_language_model_works_in_peft(tmp_path):
    tensors = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{end}.weight": torch.ones(2, 2) for end in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    assert "peft" in inspect_file(tmp_path).works_in
    assert set(inspect_file(tmp_path).works_in) <= set(other_tools())
