"""Which names the tools read: the cases of the table, against the tools' own loaders where they are installed."""

import re

import pytest
import torch
from safetensors.torch import save_file

from dora_mm.formats.commands.convert import convert
from dora_mm.formats.commands.inspection import inspect_file
from dora_mm.formats.commands.verify import verify
from dora_mm.formats.naming.known import ANY, kinds_of, reading, rows
from dora_mm.formats.naming.names import LAYOUTS
from tests.formats.known_names.__main__ import rows_of
from tests.formats.known_names.cases import FORMS, RANK, Case, file_of, paths_of
from tests.formats.known_names.libraries import (
    Diffusers,
    by_diffusers,
    by_lycoris,
    by_peft,
    converted,
    is_close,
    peft_folder,
)
from tests.formats.known_names.networks import TINY, build, weights_of, wide

UNKNOWN = "not known to this tool"
LOADED = [row for row in rows() if row.tool == "diffusers" and row.names in ("own", "diffusers")]
LIKE = ("sd1", "chroma")  # SDXL and Flux.1, whose loaders they have
MAGNITUDES = ("A magnitude", "diffusion_model.")
WIDE = ("flux", "chroma")  # kohya's names of these are converted for one width alone


def findings(case, form, tool, folder, paths=None):
    """What `verify` says of a file of a case."""
    tensors, meant = file_of(case, form, paths)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "a.safetensors")
    (verdict,) = verify(folder / "a.safetensors", tool, weights_of(case.architecture, build(case.architecture)))
    return dict(verdict.findings), len({key for key, _ in meant.values()}), verdict


def layers_in(case):
    """The paths of a case that stand for layers, and not for norms; the first of those that stand for the same."""
    tensors, meant = file_of(case, "A")
    keys = {key for key, _ in meant.values() if f"{key}.lora_A.weight" in tensors}
    return [path for path in paths_of(case) if case.key(path) in keys]


def test_the_table_is_of_architectures_and_names_that_there_are():
    assert len(rows()) > 200
    assert len(set(rows())) == len(rows())
    for row in rows():
        assert row.architecture == "*" or row.architecture in LAYOUTS
        if row.names != ANY:
            listed = set(row.modules.removeprefix("all but ").split()) - {"all"}
            assert listed <= kinds_of(row.architecture, row.names), row


@pytest.mark.parametrize(
    ("tool", "architecture", "prefix", "names", "read"),
    [
        ("comfy", "z-image", "lora_unet_", "diffusers", 14),  # musubi's
        ("comfy", "wan", "lora_unet_", "diffusers", 1),
        ("comfy", "wan", "transformer.", "diffusers", 0),
        ("comfy", "qwen-image", "lora_transformer_", "diffusers", 0),
        ("comfy", "z-image", "lora_transformer_", "diffusers", 0),
        ("a1111", "z-image", "lora_unet_", "diffusers", 0),
        ("a1111", "z-image", "lora_unet_", "own", 0),
        ("comfy", "hunyuan-video", "lora_unet_", "own", 15),  # musubi's
        ("musubi", "wan", "diffusion_model.", "own", 0),
        ("musubi", "wan", "lora_unet_", "diffusers", 0),
        ("musubi", "sdxl", "lora_unet_", "own", 0),
        ("diffusers", "sd3", "lora_unet_", "own", 0),
        ("diffusers", "sd3", "lora_unet_", "diffusers", 0),
    ],
)
def test_what_a_tool_does_not_know_is_never_right(tool, architecture, prefix, names, read, tmp_path):
    case = Case(architecture, prefix, names)
    found, total, verdict = findings(case, "down alpha", tool, tmp_path, layers_in(case))
    assert found == {kind: n for kind, n in (("right", read), (UNKNOWN, total - read)) if n}
    assert tool not in inspect_file(tmp_path / "a.safetensors").works_in
    if verdict.cure:
        base = weights_of(architecture, build(architecture))
        convert(tmp_path / "a.safetensors", tmp_path / "b", to=verdict.cure.split()[1], base=base)
        (again,) = verify(tmp_path / "b", tool, base)
        assert set(again.findings) == {"right"}


@pytest.mark.parametrize(
    ("architecture", "names", "form", "said"),
    [
        ("z-image", "diffusers", "down alpha", "right"),
        ("qwen-image", "diffusers", "down", "right"),
        ("flux2", "own", "lokr alpha", "right"),
        ("hunyuan-video", "own", "down alpha", "right"),
        ("hunyuan-video", "own", "down", UNKNOWN),  # its network needs alpha
        ("hunyuan-video", "own", "lokr alpha", UNKNOWN),
    ],
)
def test_what_musubi_tuner_generates_with(architecture, names, form, said, tmp_path):
    case = Case(architecture, "lora_unet_", names)
    paths = [path for path in layers_in(case) if re.match(r"(\w+_)?(layers|blocks)\.", path)]
    found, total, _ = findings(case, form, "musubi", tmp_path, paths)
    assert found == {said: total}


def test_musubi_tuner_drops_magnitudes(tmp_path):
    case = Case("wan", "lora_unet_", "own")
    tensors, _ = file_of(case, "down alpha", ["blocks.0.self_attn.q"])
    m = torch.ones(len(tensors["lora_unet_blocks_0_self_attn_q.lora_up.weight"]), 1)
    save_file({**tensors, "lora_unet_blocks_0_self_attn_q.dora_scale": m}, tmp_path / "a.safetensors")
    (verdict,) = verify(tmp_path / "a.safetensors", "musubi-tuner", weights_of("wan", build("wan")))
    assert set(verdict.findings) == {"loses the magnitude"}
    assert verdict.error > 0.1


@pytest.mark.parametrize("architecture", ["qwen-image", "z-image", "wan", "flux2"])
def test_diffusers_reads_what_begins_with_diffusion_model(architecture, tmp_path):
    names = "own" if architecture in ("wan", "flux2") else "diffusers"
    case = Case(architecture, "diffusion_model.", names)
    paths = [path for path in layers_in(case) if "block" in path and not path.endswith("_img")]
    found, total, _ = findings(case, "A", "diffusers", tmp_path, paths or layers_in(case))
    assert found == {"right": total}


def test_diffusers_computes_a_lokr_of_z_image(tmp_path):
    case = Case("z-image", "diffusion_model.", "diffusers")
    tensors, meant = file_of(case, "lokr alpha")
    found = by_diffusers("z-image", tensors)
    assert found.keys() == meant.keys()
    assert all(is_close(found[path], change) for path, (_, change) in meant.items())
    said, total, verdict = findings(case, "lokr alpha", "diffusers", tmp_path)
    assert said == {"right": total}
    assert not verdict.cure


# --- the rows of the libraries, computed by them ---------------------------------------------------------------------


FEW = [row if row.architecture not in LIKE else pytest.param(row, marks=pytest.mark.slow) for row in LOADED]


@pytest.mark.parametrize("row", FEW, ids=lambda row: f"{row.architecture}-{row.prefix}{row.names}-{row.form}")
def test_diffusers_loads_what_its_rows_say_and_verify_says_so(row, tmp_path):
    case = Case(row.architecture, row.prefix, row.names)
    endings = [end for end in FORMS[row.form] if end]
    paths = [p for p in layers_in(case) if reading("diffusers", row.architecture, {case.key(p): endings}).lost]
    if row.architecture in WIDE and row.form.startswith("down"):
        tensors, meant = file_of(case, row.form, paths, wide(row.architecture))
        found = converted(row.architecture, tensors)
    else:
        tensors, meant = file_of(case, row.form, paths)
        found = by_diffusers(row.architecture, tensors)
    assert meant
    assert set(meant) <= set(found)
    scale = RANK if row.lost else 1.0  # without alpha
    assert all(is_close(found[path], scale * change) for path, (_, change) in meant.items())
    if (case.prefix, row.names) == ("base_model.model.", "own") or (row.form, row.prefix) == MAGNITUDES:
        return  # no tool writes these, and they are not read here
    said, total, _ = findings(case, row.form, "diffusers", tmp_path, paths)
    assert said == {"differs" if row.lost else "right": total}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TINY)
def test_the_rows_of_diffusers_are_what_it_does(architecture, monkeypatch):
    monkeypatch.setattr("tests.formats.known_names.__main__.TINY", {architecture: TINY[architecture]})
    found = set(rows_of("diffusers", LOADED[0].source, Diffusers(), Diffusers.forms))
    assert found == {row for row in LOADED if row.architecture == architecture}


@pytest.mark.parametrize("architecture", [name for name in TINY if name not in ("sd1", "sdxl")])
def test_peft_loads_the_names_of_the_class(architecture, tmp_path):
    case = Case(architecture, "base_model.model.", "diffusers")
    tensors, meant = file_of(case, "A", layers_in(case))
    folder = peft_folder(tmp_path / "peft", tensors, RANK)
    found = by_peft(architecture, folder)
    assert found.keys() == meant.keys()
    assert all(is_close(found[path], change) for path, (_, change) in meant.items())
    (verdict,) = verify(folder, "peft", weights_of(architecture, build(architecture)))
    assert dict(verdict.findings) == {"right": len(meant)}


@pytest.mark.parametrize("names", ["own", "diffusers"])
@pytest.mark.parametrize("architecture", [name for name in TINY if name not in ("sd1", "sdxl")])
def test_lycoris_loads_the_names_of_the_network(architecture, names, tmp_path):
    case = Case(architecture, "lora_unet_", names)
    tensors, meant = file_of(case, "down alpha")
    found = by_lycoris(case, tensors)
    assert set(found) == {key for key, _ in meant.values()}
    if names == "diffusers":
        assert all(is_close(found[key], change) for key, change in meant.values())
    said, total, _ = findings(case, "down alpha", "kohya", tmp_path)
    assert said == {"right": total}
