"""Where a file works as it is, by its header, and the conversion that cures it where it does not."""

import re
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_mm.formats.commands.convert import convert
from dora_mm.formats.commands.inspection import inspect_file
from dora_mm.formats.commands.verify import RIGHT, verify
from dora_mm.formats.naming.names import Name
from dora_mm.formats.tools.parts import kohya_tensors
from dora_mm.registries.tools import other_tools
from tests.formats.tools.test_tools import FILES, path_of
from tests.shared import toy

BASE = toy.base()
BASES = {True: {name: W0 for name, W0 in BASE.items() if name.component == "unet"}, False: BASE}
CURABLE = {"comfy", "forge", "kohya", "a1111", "sdnext", "invokeai", "onetrainer"}


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


def run_cures(file, base, folder, axis=None):
    """Runs every cure that is printed, as it is printed, and gives the tools that have one."""
    cured = {}
    for verdict in verify(file, "all", base, axis=axis):
        right = set(verdict.findings) == {RIGHT}
        assert not (right and verdict.cure)
        if not verdict.cure:
            continue
        words = shlex.split(verdict.cure)
        options = dict(zip(words[::2], words[1::2], strict=True))
        settings = {option.removeprefix("--"): value for option, value in options.items()}
        if "rank" in settings:
            settings["rank"] = int(settings["rank"])
        new = folder / f"{verdict.tool}-cured"
        convert(file, new, base=base, **settings)
        (found,) = verify(new, verdict.tool, base)
        assert set(found.findings) == {RIGHT}, (verdict.tool, verdict.cure)
        cured[verdict.tool] = verdict.cure
    return cured


def test_every_cure_cures(file, tmp_path):
    cured = run_cures(file, base_of(file), tmp_path)
    for verdict in verify(file, "all", base_of(file)):
        if set(verdict.findings) != {RIGHT} and verdict.tool in CURABLE:
            assert verdict.tool in cured


@pytest.mark.parametrize("missing", ["text_encoder", "text_encoder_2", "both"])
def test_a_base_without_a_text_encoder_has_no_cure_and_says_so(missing, tmp_path):
    file = toy.write_source(tmp_path / "a.safetensors", {name: toy.layer(name) for name in toy.SHAPES})
    gone = ("text_encoder", "text_encoder_2") if missing == "both" else (missing,)
    base = {name: W0 for name, W0 in BASE.items() if name.component not in gone}
    assert run_cures(file, base, tmp_path) == {}
    assert "not in this base" in verify(file, "comfy", base)[0].note
    assert "not in this base" not in verify(file, "comfy", BASE)[0].note


@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_cure_names_the_axis_that_a_person_named(axis, tmp_path):
    names = [name for name in toy.UNET if toy.SHAPES[name] == (16, 16)]
    tensors = {}
    for name in names:
        found = kohya_tensors(toy.layer(name, axis=axis))
        found["dora_scale"] = found["dora_scale"].flatten()
        tensors |= {f"lora_unet_{name.path.replace('.', '_')}.{end}": t.contiguous() for end, t in found.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    cured = run_cures(tmp_path / "a.safetensors", {name: BASE[name] for name in names}, tmp_path, axis)
    assert len(cured) > 3
    assert all(f"--axis {axis}" in cure for cure in cured.values())
    assert ("--rank" in cured["peft"]) == (axis == "in")


def changed(path, change):
    """A file of kohya's form with other tensors."""
    save_file(change(load_file(kohya(path))), path)
    return path


FIRST = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
CHANGES = {
    "a norm": lambda found: {
        **found,
        f"{FIRST[:-10]}norm1.w_norm": torch.ones(16),
        f"{FIRST[:-10]}norm1.b_norm": torch.ones(16),
    },
    "a bias": lambda found: {**found, f"{FIRST}.diff_b": torch.ones(16)},
    "an embedding": lambda found: {**found, "bundle_emb.word.clip_l": torch.ones(1, 12)},
    "something else": lambda found: {**found, "something.else": torch.ones(2)},
    "too large": lambda found: {key: t * (1e25 if key.endswith("up.weight") else 1) for key, t in found.items()},
    "twice": lambda found: {
        **found,
        **{
            key.replace("lora_unet_", "unet.").replace(FIRST[10:], toy.UNET[0].path): t.clone()
            for key, t in found.items()
            if FIRST in key
        },
    },
    "a diff": lambda found: (
        {key: t for key, t in found.items() if FIRST not in key} | {f"{FIRST}.diff": toy.wave((16, 16), 5).float()}
    ),
    "a LoHa": lambda found: (
        {key: t for key, t in found.items() if FIRST not in key}
        | {
            f"{FIRST}.hada_w{i}_{end}": toy.wave((16, 2) if end == "a" else (2, 16), i).float()
            for i in (1, 2)
            for end in "ab"
        }
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_cures_of_files_with_more_than_low_ranks(change, tmp_path):
    file = changed(tmp_path / "a.safetensors", CHANGES[change])
    base = {**BASES[True], Name("unet", f"{toy.BLOCK}.norm1"): torch.ones(16)}
    cured = run_cures(file, base, tmp_path)
    assert bool(cured) == (change not in ("something else", "too large", "twice"))


def test_cures_of_a_file_of_differences(tmp_path):
    file = convert(kohya(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", to="diff", base=BASES[True]).files[0]
    cured = run_cures(file, BASES[True], tmp_path)
    assert "--rank" in cured["peft"]


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
