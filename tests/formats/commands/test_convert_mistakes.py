"""What `convert` refuses: each mistake is one sentence, and nothing is written."""

import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_mm
from dora_mm import load_adapter, verify
from dora_mm.formats.commands.convert import Settings, convert, written
from dora_mm.formats.naming.names import Name
from dora_mm.formats.reader import LayerReader
from tests.formats.commands.test_convert import BASE, peft_base
from tests.formats.commands.test_extract import save_model
from tests.formats.tools.test_tools import FIXTURES
from tests.shared import toy

MISTAKES = [
    ({"to": "nosuch"}, "there is no export format 'nosuch': use one of peft"),
    ({"to": "comfyui"}, "there is no export format 'comfyui': what it reads is written with --to comfy"),
    ({"to": "diff"}, "--to diff needs the base model: give it with --base"),
    ({"to": "lora", "base": BASE}, "--to lora needs a rank: give --rank, or what to keep"),
    ({"to": "lora", "rank": 4}, "--to lora needs the base model for what is no plain LoRA"),
    ({"to": "lora", "base": BASE, "rank": 0}, "the rank must be at least 1"),
    ({"to": "lora", "base": BASE, "energy": 1.5}, "--energy is the share of the update to keep"),
    ({"to": "lora", "base": BASE, "spectral": 1.0}, "--spectral is the share that may be lost"),
    ({"to": "diff", "base": BASE, "rank": 4}, "--rank has no effect on --to diff"),
    ({"to": "kohya", "base": BASE, "energy": 0.9}, "give --rank, or use --to lora"),
    ({"to": "kohya", "rank": 2}, "a new fit depends on the base model: give it with --base"),
    ({"to": "lora", "base": BASE, "rank": 2, "allow_lossy": True}, "--allow-lossy has no effect on --to lora"),
    ({"to": "merged", "base": BASE, "dtype": "float16"}, "--dtype has no effect on --to merged"),
    ({"to": "kohya", "axis": "in"}, "no magnitude whose axis is unclear: leave --axis out"),
    ({"to": "kohya", "dtype": "float8"}, "--dtype is one of float32"),
    ({"to": "kohya", "strength": float("nan")}, "the strength must be a finite number"),
    ({"to": "merged", "base": BASE}, "--to merged needs the base model as a folder"),
]


@pytest.mark.parametrize(("settings", "message"), MISTAKES, ids=[message[:30] for _, message in MISTAKES])
def test_mistakes(settings, message, source, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(source, tmp_path / "new", **settings)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 0.0, -1.0])
def test_an_alpha_that_is_no_positive_number(alpha, source, tmp_path):
    tensors = load_file(source)
    key = next(key for key in tensors if key.endswith(".alpha"))
    tensors[key] = torch.tensor(alpha)
    save_file(tensors, source)
    with pytest.raises(ValueError, match=f"{key.removesuffix('.alpha')}: its alpha is not a positive number"):
        convert(source, tmp_path / "new", to="kohya", base=BASE)


@pytest.mark.parametrize("target", ["kohya", "diff"])
def test_alphas_with_which_float32_ends(target, source, tmp_path):
    tensors = load_file(source)
    for alpha, message in (
        (1e308, r"alpha must be above 0 and at most 3e\+38, not 1e\+308"),
        (1e38, "NaN or infinite"),
    ):
        changed = {key: torch.tensor(alpha, dtype=torch.float64) for key in tensors if key.endswith(".alpha")}
        save_file({**tensors, **changed}, source)
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "new", to=target, base=BASE)
        if alpha == 1e308:
            with pytest.raises(ValueError, match=message):
                verify(source, "all", BASE)
            with pytest.raises(ValueError, match=message):
                load_adapter({name: toy.model(name) for name in ("unet", "text_encoder", "text_encoder_2")}, source)


@pytest.mark.parametrize("exists", [False, True])
def test_a_conversion_that_is_stopped_between_two_files_can_be_repeated(exists, tmp_path, monkeypatch):
    source = toy.write_source(tmp_path / "unet.safetensors", {name: toy.layer(name) for name in toy.UNET})
    out, replace = tmp_path / "out", os.replace
    if exists:
        out.mkdir()

    def replace_and_stop(*paths):
        replace(*paths)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_and_stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, to="peft")
    assert out.exists() == exists
    assert not (out / "adapter_model.safetensors").exists()
    convert(source, out, to="peft")
    assert {path.name for path in out.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"unet.safetensors", "out"}


def test_what_exists_is_not_overwritten(source, tmp_path):
    before = source.read_bytes()
    with pytest.raises(ValueError, match=r"OUT .*source\.safetensors exists already: name a new file"):
        convert(source, source, to="kohya")
    assert source.read_bytes() == before


@pytest.mark.parametrize("out", ["out.safetensors", "new/out.safetensors"])
def test_one_of_two_conversions_at_once_is_refused(source, tmp_path, out):
    """The other has finished while this one computes."""
    target, reader = tmp_path / out, LayerReader(source)
    original = reader.fused

    def fused(*arguments, **options):
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(b"theirs")
        return original(*arguments, **options)

    reader.fused = fused
    with pytest.raises(ValueError, match=r"exists already: name a new file or folder"):
        written(reader, target, Settings("kohya"))
    assert target.read_bytes() == b"theirs"
    assert not list(tmp_path.rglob("*.partial"))


def test_several_networks_in_pefts_folder(source, tmp_path):
    with pytest.raises(ValueError, match="source.safetensors"):
        convert(source, tmp_path / "new", to="peft", base=BASE)
    assert not (tmp_path / "new").exists()


def test_an_unknown_key_is_named(source, tmp_path):
    save_file({**load_file(source), "unet.bias": torch.zeros(3)}, source)
    with pytest.raises(ValueError, match=r"source.safetensors also holds unet.bias"):
        convert(source, tmp_path / "new", to="kohya", base=BASE)


def test_values_beyond_the_dtype_are_refused_by_name(tmp_path):
    huge = {name: toy.layer(name, size=1e7) for name in toy.UNET}
    source = toy.write_source(tmp_path / "huge.safetensors", huge)
    with pytest.raises(ValueError, match=r"lora_unet_\w+: its \S+ would have values that are NaN or infinite"):
        convert(source, tmp_path / "half.safetensors", to="kohya", dtype="float16", base=BASE, allow_lossy=True)
    assert not (tmp_path / "half.safetensors").exists()


def test_a_merged_weight_beyond_the_dtype_is_refused_by_name(tmp_path):
    huge = {name: toy.layer(name, method="lora", size=1e7) for name in toy.UNET}
    source = toy.write_source(tmp_path / "huge.safetensors", huge)
    base = save_model(tmp_path / "base", toy.base(), torch.float16)
    with pytest.raises(ValueError, match=r"the new weight of unet\.\S+ is not finite in torch\.float16"):
        convert(source, tmp_path / "new", to="merged", base=base)
    assert not (tmp_path / "new").exists()


def test_a_merged_weight_that_is_not_a_number_is_refused_by_name(source, tmp_path):
    weights = {name: weight.clone() for name, weight in toy.base().items()}
    for weight in weights.values():
        weight.view(-1)[0] = float("nan")
    base = save_model(tmp_path / "base", weights, torch.float32)
    with pytest.raises(ValueError, match=r"the new weight of \S+ is not finite in torch\.float32"):
        convert(source, tmp_path / "new", to="merged", base=base)
    assert not (tmp_path / "new").exists()


def test_out_cannot_be_inside_a_file(source):
    with pytest.raises(ValueError, match=r"cannot be made, since .*source\.safetensors is a file"):
        convert(source, source / "new.safetensors", to="kohya")


def test_pefts_form_is_a_folder(tmp_path):
    source = toy.write_source(tmp_path / "source.safetensors", {name: toy.layer(name) for name in toy.UNET})
    (tmp_path / "adapter_config.json").write_text("mine")
    with pytest.raises(ValueError, match=r"is a file, and PEFT's adapters are folders"):
        convert(source, tmp_path / "new.safetensors", to="peft", base=BASE)
    assert (tmp_path / "adapter_config.json").read_text() == "mine"


def test_out_with_the_end_of_a_pickle(source, tmp_path):
    with pytest.raises(ValueError, match=r"OUT .*new\.pt is not a \.safetensors file"):
        convert(source, tmp_path / "new.pt", to="kohya")


def test_modules_that_the_base_lacks_are_counted(source, tmp_path):
    base = dict(list(BASE.items())[2:])
    with pytest.raises(
        ValueError, match=r"source\.safetensors: 2 of its 7 modules were not found: lora_unet_\w+ is not"
    ):
        convert(source, tmp_path / "new", to="kohya", base=base)
    base = {Name("unet", "mid_block.attentions.0.proj_in"): torch.zeros(4, 4)}
    with pytest.raises(ValueError, match=r"7 of its 7 modules were not found \(it is an adapter of another model\)"):
        convert(source, tmp_path / "new", to="kohya", base=base)


def test_an_adapter_is_no_base(source, tmp_path):
    with pytest.raises(ValueError, match=r"source\.safetensors is not a model but an adapter: it has lora_te1_"):
        convert(source, tmp_path / "new", to="kohya", base=source)


def test_a_difference_and_an_empty_file_are_no_base(source, tmp_path):
    (diff,) = convert(source, tmp_path / "d.safetensors", to="diff", base=BASE).files
    save_file({}, tmp_path / "empty.safetensors")
    for path, message in ((diff, "not a model but an adapter"), (tmp_path / "empty.safetensors", "has no weights")):
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "new", to="kohya", base=path)


def test_a_network_without_a_name(tmp_path):
    """PEFT's folder does not say which component it is for; the base does."""
    with pytest.raises(ValueError, match="does not say which network it adapts.*with --base"):
        convert(FIXTURES / "peft_dora", tmp_path / "new", to="kohya")
    done = convert(FIXTURES / "peft_dora", tmp_path / "new", to="kohya", base=peft_base())
    assert all(key.startswith("lora_unet_") for key in load_file(done.files[0]))


@pytest.mark.parametrize("to", ["peft", "diffusers", "ai-toolkit", "onetrainer"])
def test_differences_of_weights(to, tmp_path):
    """These have no place for them, and hold a new fit."""
    base = {name: W0 for name, W0 in peft_base().items() if W0.dim() == 2}
    source = toy.write_source(tmp_path / "source.safetensors", {name: toy.layer(name) for name in base})
    (diff,) = convert(source, tmp_path / "diff.safetensors", to="diff", base=base, dtype="float32").files
    with pytest.raises(ValueError, match="it is a difference of weights.*--to merged"):
        convert(diff, tmp_path / "new", to=to, base=base)
    done = convert(diff, tmp_path / "new", to=to, base=base, rank=4, allow_lossy=True)
    assert all(errors.overall < 1e-3 for errors in done.errors)  # a DoRA of rank 4 is found again


def mixed():
    """DoRA, and one module of plain LoRA, which PEFT's and diffusers' files hold as DoRA with the norms of W0 + B A."""
    return {name: toy.layer(name, method="lora" if number == 1 else "dora") for number, name in enumerate(toy.UNET)}


def columns():
    return {name: toy.layer(name, axis="in") for name in toy.UNET}


DEPEND = [  # what is converted, how, and that it is done with the base
    (mixed, {"to": "peft"}),
    (mixed, {"to": "diffusers"}),
    (columns, {"to": "diffusers", "rank": 8, "allow_lossy": True}),
    (mixed, {"to": "kohya", "strength": 0.0}),
    (mixed, {"to": "kohya", "strength": 1.5}),
    ("comfy", {"to": "kohya"}),
    ("comfy", {"to": "onetrainer"}),
]


@pytest.mark.parametrize(("given", "settings"), DEPEND, ids=lambda value: str(getattr(value, "__name__", value)))
def test_tensors_that_depend_on_the_base_need_it(given, settings, tmp_path):
    """Otherwise they would be those over random weights."""
    base = peft_base()
    states = given() if callable(given) else mixed()
    source = toy.write_source(tmp_path / "source.safetensors", states)
    if not callable(given):
        (source,) = convert(source, tmp_path / "other.safetensors", to=given, base=base).files
    with pytest.raises(ValueError, match="the base model: give it with --base"):
        convert(source, tmp_path / "new", **settings)
    assert not list((tmp_path / "new").glob("*"))
    assert convert(source, tmp_path / "new", base=base, **settings).on_base


@pytest.mark.parametrize("header", [{"ot_x": "1"}, {"dora_mm_format": "native-1"}], ids=["tool", "ours"])
def test_a_file_without_adapters(header, tmp_path):
    save_file({"bundle_emb.TOK.string_to_param.*": torch.ones(1, 12)}, tmp_path / "a.safetensors", header)
    for action in (
        lambda path: convert(path, tmp_path / "new", to="kohya"),
        lambda path: dora_mm.verify(path, base=BASE),
    ):
        with pytest.raises(ValueError, match=r"a\.safetensors holds no adapter"):
            action(tmp_path / "a.safetensors")


def test_a_difference_beside_a_low_rank_adapter(source, tmp_path):
    tensors = load_file(source)
    key = next(key for key in tensors if key.endswith(".alpha"))
    tensors[key.replace(".alpha", ".diff")] = torch.zeros(12, 12)
    save_file(tensors, source)
    with pytest.raises(ValueError, match="a difference of weights and a low-rank adapter"):
        convert(source, tmp_path / "new", to="kohya", base=BASE)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int32], ids=str)
def test_dtypes(dtype, source, tmp_path):
    tensors = load_file(source)
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[key] = tensors[key].to(dtype)
    save_file(tensors, source)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"source\.safetensors: \S+ has values of type {name}: save it in float32"):
        convert(source, tmp_path / "new", to="kohya", base=BASE)
