"""Adapter files in the form of other tools: round trips, what is refused, and what is written beside the tensors."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dora_mm
from dora_mm.core.spec import DoRASpec
from dora_mm.formats.adapter_file import AdapterFile
from dora_mm.formats.algebra.exact import new_weight
from dora_mm.formats.commands.convert import convert
from dora_mm.formats.naming.names import Name
from dora_mm.formats.reader import LayerReader
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools import all_exports, export_of
from tests.formats.tools.test_tools import FIXTURES, path_of
from tests.shared import toy

EXACT = [target for target in all_exports() if target != "diff"]
BASE = toy.base()
CONV = toy.UNET[4]


def textbook(name, state, t=1.0):
    m = state.tensors.get("magnitude")
    A, B = state.tensors["lora_A"], state.tensors["lora_B"]
    return toy.textbook(BASE[name], A, B, m, state.spec.alpha / state.spec.rank, state.axis, t=t)


def names_for(target):
    """Of the toy model: PEFT holds one network, ai-toolkit no DoRA of convolutions."""
    names = toy.UNET if target == "peft" else list(toy.SHAPES)
    return [name for name in names if target != "ai-toolkit" or name != CONV]


def weights_of(path, base=None):
    reader = LayerReader(path, base or BASE, None)
    return {name: new_weight(reader.layer(name), (base or BASE)[name]) for name in reader.names()}


def check_weights(path, states, strength=1.0, tolerance=1e-6, base=None):
    found = weights_of(path, base)
    assert found.keys() == states.keys()
    for name, W in found.items():
        wanted = textbook(name, states[name], strength)
        assert (W - wanted).norm() <= tolerance * wanted.norm(), name


@pytest.mark.parametrize("to", EXACT)
def test_a_written_file_is_recognised_as_its_tools(to, tmp_path):
    """Each form through each other one is in test_round_trips.py."""
    states = {name: toy.state_of(name, number) for number, name in enumerate(names_for(to))}
    source = toy.write_source(tmp_path / "source.safetensors", states)
    done = convert(source, tmp_path / "new", to=to, base={name: BASE[name] for name in states})
    assert done.on_base
    assert done.num_modules == len(states)
    (file,) = done.files
    assert AdapterFile(file).tool == {"onetrainer": "kohya"}.get(to, to)
    check_weights(file, states, base={name: BASE[name] for name in states})


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_a_header_of_many_bytes_a_character_has_room(to, tmp_path):
    """Tags in Chinese ended in an AssertionError when all tensors had been written."""
    states = {toy.UNET[0]: toy.layer(toy.UNET[0], alpha=3.0)}
    path = toy.write_source(tmp_path / "source.safetensors", states)
    header = {**safe_open(path, "pt").metadata(), "tags": "\u56fe" * 20_000, "note": "\x01" * 5_000}
    save_file(load_file(path), path, header)
    (file,) = convert(path, tmp_path / "new", to=to).files
    assert safe_open(file, "pt").metadata()["note"] == header["note"]


@pytest.mark.parametrize("to", [to for to in EXACT if not export_of(to).needs_base and to != "peft"])
def test_without_a_base(to, tmp_path):
    """Formulas are checked on random weights, and the result is the same."""
    states = {name: toy.layer(name, alpha=3.0) for name in names_for(to)}
    path = toy.write_source(tmp_path / "source.safetensors", states)
    done = convert(path, tmp_path / "new.safetensors", to=to)
    assert not done.on_base
    assert all(errors.overall < 1e-5 for errors in done.errors)
    check_weights(tmp_path / "new.safetensors", states)


@pytest.mark.parametrize("to", EXACT)
@pytest.mark.parametrize("strength", [0.4, 1.5])
def test_another_strength_becomes_strength_1(to, strength, tmp_path):
    names = [name for name in names_for(to) if name in names_for("peft")]
    states = {name: toy.state_of(name, number) for number, name in enumerate(names)}
    path = toy.write_source(tmp_path / "source.safetensors", states)
    base = {name: BASE[name] for name in names}
    (file,) = convert(path, tmp_path / "new", to=to, base=base, strength=strength).files
    check_weights(file, states, strength, base=base)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("float16", 3e-4), ("bfloat16", 3e-3)])
def test_a_difference_is_right_in_every_tool_that_reads_it(dtype, bound, source, tmp_path):
    done = convert(source, tmp_path / "new.safetensors", to="diff", base=BASE, dtype=dtype)
    assert len(done.errors) == 5
    assert all(max(errors.overall, errors.at[0.5] * 2, errors.at[2.0] / 2) < bound for errors in done.errors)
    assert all(errors.at[0.0] == 0 for errors in done.errors)
    assert {t.dtype for t in load_file(tmp_path / "new.safetensors").values()} == {getattr(torch, dtype)}


def test_an_input_axis(tmp_path):
    """It stays exact where a tool takes both axes, and where there is none; the others need a fit."""
    states = {name: toy.layer(name, axis="in") for name in toy.UNET}
    base = {name: BASE[name] for name in toy.UNET}
    path = toy.write_source(tmp_path / "source.safetensors", states)
    for to in ("kohya", "comfy", "onetrainer"):
        (file,) = convert(path, tmp_path / to, to=to, base=base).files
        check_weights(file, states, base=base)
    convert(path, tmp_path / "d.safetensors", to="diff", base=base, dtype="float32")
    check_weights(tmp_path / "d.safetensors", states, base=base)
    for to in ("peft", "diffusers", "ai-toolkit"):
        with pytest.raises(ValueError, match="scales input columns.*--to merged or --to diff"):
            convert(path, tmp_path / "new", to=to, base=base)
        with pytest.raises(ValueError, match="scales input columns"):
            convert(path, tmp_path / "new", to=to, base=base, allow_lossy=True)
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())
    low, high = (
        convert(path, tmp_path / f"{rank}", to="diffusers", base=base, rank=rank, allow_lossy=True).errors[0].overall
        for rank in (4, 8)
    )
    assert 0.01 < high < low < 0.5


def test_the_change_of_weights_at_a_strength_that_leaves_nothing_of_the_base(tmp_path):
    """Half of it at strength 2: no form of DoRA has a row of 0 times the base, and a difference has."""
    state = toy.layer(toy.UNET[0])
    state.tensors["lora_B"][0] = 0
    state.tensors["magnitude"][0] = torch.linalg.vector_norm(BASE[toy.UNET[0]], dim=1)[0] / 2
    states = {toy.UNET[0]: state}
    source = toy.write_source(tmp_path / "source.safetensors", states)
    (file,) = convert(source, tmp_path / "d.safetensors", to="diff", base=BASE, strength=2.0, dtype="float32").files
    check_weights(file, states, strength=2.0)


def test_low_rank_by_rank_and_by_energy(source, tmp_path):
    errors = {}
    for rank in (2, 4, 8):
        done = convert(source, tmp_path / f"{rank}.safetensors", to="lora", base=BASE, rank=rank)
        (errors[rank],) = (found.overall for found in done.errors)
        best, total = 0.0, 0.0
        for number, name in enumerate(toy.SHAPES):
            D = (textbook(name, toy.state_of(name, number)) - BASE[name]).flatten(1)
            values = torch.linalg.svdvals(D).square()
            best, total = best + float(values[rank:].sum()), total + float(values.sum())
        assert errors[rank] == pytest.approx((best / total) ** 0.5, rel=0.02, abs=1e-5)
    done = convert(source, tmp_path / "energy.safetensors", to="lora", base=BASE, energy=0.99)
    assert all(error <= 0.1 + 1e-4 for error in done.errors[0].layers.values())
    untrained = toy.write_source(tmp_path / "u.safetensors", {CONV: toy.layer(CONV, method="lora", size=0.0)})
    convert(untrained, tmp_path / "none.safetensors", to="lora", base=BASE, energy=0.9)
    assert {t.shape[0] for key, t in load_file(tmp_path / "none.safetensors").items() if "lora_down" in key} == {1}
    ranks = {t.shape[0] for key, t in load_file(tmp_path / "energy.safetensors").items() if "lora_down" in key}
    assert len(ranks) > 1


def test_low_rank_of_one_model_is_a_peft_folder(tmp_path):
    """It is what vLLM, SGLang and llama.cpp read."""
    base = {Name("model", name.path): W0 for name, W0 in peft_base().items()}
    convert(FIXTURES / "peft_dora", tmp_path / "new", to="lora", base=base, rank=30)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["r"]) == (False, 16)
    with safe_open(tmp_path / "new" / "adapter_model.safetensors", "pt") as file:
        assert not any("magnitude" in key for key in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(("given", "llama_cpp_is_right"), [({"rank": 4}, True), ({"energy": 0.9}, False)])
def test_how_vllm_and_llama_cpp_scale_a_plain_lora(given, llama_cpp_is_right, tmp_path):
    """vLLM scales all modules by lora_alpha / r, llama.cpp each by lora_alpha / its rank; none reads the patterns."""
    base = {Name("model", name.path): W0 for name, W0 in peft_base().items()}
    convert(FIXTURES / "peft_dora", tmp_path / "new", to="lora", base=base, **given)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    meant = weights_of(tmp_path / "new", base)
    tensors = load_file(tmp_path / "new" / "adapter_model.safetensors")
    right = {"vllm": True, "llama.cpp": True}
    for name, W0 in base.items():
        A, B = (tensors[f"base_model.model.{name.path}.lora_{part}.weight"].flatten(1) for part in "AB")
        for tool, scale in (("vllm", config["lora_alpha"] / config["r"]), ("llama.cpp", config["lora_alpha"] / len(A))):
            error = (W0 + scale * (B @ A).view_as(W0) - meant[name]).norm()
            right[tool] &= bool(error < 1e-6 * meant[name].norm())
    assert right == {"vllm": True, "llama.cpp": llama_cpp_is_right}


def peft_base():
    return {name: BASE[name] for name in toy.UNET}


@pytest.mark.parametrize("name", ["peft_dora", "peft_lora", "peft_rslora", "diffusers", "lycoris_tucker"])
def test_files_of_tools_become_others(name, tmp_path):
    base = peft_base() if name.startswith("peft") else BASE
    before = weights_of(path_of(name), base)
    for to in ("kohya", "comfy"):
        (file,) = convert(path_of(name), tmp_path / to, to=to, base=base).files
        after = weights_of(file, base)
        assert after.keys() == before.keys()
        for key, W in after.items():
            assert (W - before[key]).norm() < 1e-6 * W.norm()


def test_the_header(source, tmp_path):
    convert(source, tmp_path / "new.safetensors", to="diffusers", base=BASE)
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        header = file.metadata()
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    assert "sshs_model_hash" not in header
    assert json.loads(header["lora_adapter_metadata"])["text_encoder_2.use_dora"] is True


def test_embeddings_of_new_tokens_travel_along(source, tmp_path):
    tensors = load_file(source)
    tensors["bundle_emb.TOK.string_to_param.*"] = torch.ones(1, 12)
    save_file(tensors, source)
    convert(source, tmp_path / "new.safetensors", to="kohya", base=BASE)
    assert load_file(tmp_path / "new.safetensors")["bundle_emb.TOK.string_to_param.*"].sum() == 12
    with pytest.raises(ValueError, match="embeddings of new tokens, .* --to kohya"):
        convert(source, tmp_path / "new", to="diffusers", base=BASE)


def test_a_norm_without_alpha_is_imported_exactly(tmp_path):
    """ai-toolkit with alpha != rank, which the file does not say: the key is added by hand."""
    name = toy.UNET[2]
    state, W0 = toy.layer(name, alpha=2.0), BASE[name]
    A, B, m = (state.tensors[n] for n in ("lora_A", "lora_B", "magnitude"))
    module = "lora_unet_" + name.path.replace(".", "_")
    tensors = {f"{module}.lora_down.weight": A, f"{module}.lora_up.weight": B, f"{module}.magnitude": m}
    save_file({**tensors, f"{module}.alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors")
    (file,) = convert(tmp_path / "a.safetensors", tmp_path / "new", to="kohya", base={name: W0}).files
    V = W0.double() + B.double() @ A.double()
    wanted = W0 + 0.5 * B.double() @ A.double() + (m.double()[:, None] / V.norm(dim=1, keepdim=True) - 1) * V
    (W,) = weights_of(file, {name: W0}).values()
    assert (W - wanted).norm() < 1e-6 * wanted.norm()


def test_a_tool_that_computes_something_else_is_not_written_for(source, tmp_path, monkeypatch):
    wrong = replace(export_of("kohya"), read_by=("a1111",))
    monkeypatch.setattr("dora_mm.formats.commands.convert.export_of", {"kohya": wrong}.__getitem__)
    with pytest.raises(ValueError, match=r"AUTOMATIC1111 takes the norms of input columns.*--allow-lossy"):
        convert(source, tmp_path / "new.safetensors", to="kohya", base=BASE)
    assert not (tmp_path / "new.safetensors").exists()
    done = convert(source, tmp_path / "new.safetensors", to="kohya", base=BASE, allow_lossy=True)
    assert done.errors[0].overall > 0.1


# --- fused projections: Flux in its own names ------------------------------------------------------------------------

FLUX = {
    Name("transformer", path): shape
    for path, shape in {
        "transformer_blocks.0.attn.to_q": (8, 8),
        "transformer_blocks.0.attn.to_k": (8, 8),
        "transformer_blocks.0.attn.to_v": (8, 8),
        "transformer_blocks.0.norm1.linear": (48, 8),
        "single_transformer_blocks.0.attn.to_q": (8, 8),
        "single_transformer_blocks.0.attn.to_k": (8, 8),
        "single_transformer_blocks.0.attn.to_v": (8, 8),
        "single_transformer_blocks.0.proj_mlp": (32, 8),
        "norm_out.linear": (16, 8),
    }.items()
}


def test_fused_projections_need_no_base_where_nothing_depends_on_it(tmp_path):
    base = toy.base(FLUX)
    states = {name: toy.layer(name, weights=base) for name in FLUX}
    write_flux(tmp_path / "a.safetensors", states)
    (own,) = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="kohya", base=base).files
    (again,) = convert(own, tmp_path / "c.safetensors", to="kohya").files
    for name, W in weights_of(again, base).items():
        assert (W - weights_of(own, base)[name]).norm() < 1e-6 * W.norm()
    states[next(iter(FLUX))] = toy.layer(next(iter(FLUX)), method="lora", weights=base)
    write_flux(tmp_path / "mixed.safetensors", states)
    with pytest.raises(ValueError, match="with norms of the base model: give it with --base"):
        convert(tmp_path / "mixed.safetensors", tmp_path / "d.safetensors", to="kohya")


def write_flux(path, states):
    ends = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "lora_magnitude_vector": "magnitude"}
    tensors = {
        f"{name}.{end}": state.tensors[key].contiguous()
        for name, state in states.items()
        for end, key in ends.items()
        if key in state.tensors
    }
    alphas = {"transformer.alpha_pattern": {name.path: state.spec.alpha for name, state in states.items()}}
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 1, **alphas})})


def test_fused_projections_of_which_some_are_plain_lora(tmp_path):
    base = toy.base(FLUX)
    methods = ["lora" if name.path.endswith("to_v") else "dora" for name in FLUX]
    states = {name: toy.layer(name, method=m, weights=base) for name, m in zip(FLUX, methods, strict=True)}
    write_flux(tmp_path / "a.safetensors", states)
    before = weights_of(tmp_path / "a.safetensors", base)
    (own,) = convert(tmp_path / "a.safetensors", tmp_path / "own.safetensors", to="kohya", base=base).files
    for name, W in weights_of(own, base).items():
        assert (W - before[name]).norm() < 1e-6 * W.norm()
    (diff,) = convert(own, tmp_path / "diff.safetensors", to="diff", base=base, dtype="float32").files
    for name, W in weights_of(diff, base).items():
        assert (W - before[name]).norm() < 1e-6 * W.norm()


@pytest.mark.parametrize("left_out", [(), ("to_k",), ("to_k", "proj_mlp", "norm1.linear")])
def test_fused_projections(left_out, tmp_path):
    """Split in diffusers' names, stacked in Flux's own ones, with zeros for what is not adapted; and back."""
    base = toy.base(FLUX)
    names = [name for name in FLUX if not name.path.endswith(left_out)]
    states = {name: toy.layer(name, rank=2 + i % 2, alpha=1.0 + i, weights=base) for i, name in enumerate(names)}
    write_flux(tmp_path / "a.safetensors", states)
    (own,) = convert(tmp_path / "a.safetensors", tmp_path / "own.safetensors", to="comfy", base=base).files
    keys = {key.partition(".")[0] for key in load_file(own)}
    assert "lora_unet_double_blocks_0_img_attn_qkv" in keys
    assert "lora_unet_single_blocks_0_linear1" in keys
    (back,) = convert(own, tmp_path / "back", to="diffusers", base=base).files
    found = weights_of(back, base)
    assert found.keys() >= states.keys()
    for name, W in found.items():
        if name not in states:
            wanted = base[name].double()
        else:
            state = states[name]
            A, B, m = (state.tensors[key] for key in ("lora_A", "lora_B", "magnitude"))
            wanted = toy.textbook(base[name], A, B, m, state.spec.alpha / state.spec.rank)
        assert (W - wanted).norm() < 1e-6 * wanted.norm(), name
    (verdict,) = dora_mm.verify(own, "comfy", base)
    assert set(verdict.findings) == {"right"}


@pytest.mark.parametrize("to", ["kohya", "comfy", "onetrainer", "peft", "diffusers"])
def test_small_updates_in_half_precision(to, tmp_path):
    """Rounding a magnitude would move W' by a share of W0, which is much of an update that is small beside it."""
    small = {name: toy.layer(name, size=0.02, noise=0.002) for name in toy.UNET}
    source = toy.write_source(tmp_path / "small.safetensors", small)
    done = convert(source, tmp_path / "half", to=to, base=BASE, dtype="bfloat16")
    assert all(1e-5 < errors.overall < 5e-3 for errors in done.errors)
    tensors = {key: tensor for file in done.files for key, tensor in load_file(file).items()}
    assert {t.dtype for key, t in tensors.items() if "lora_up" in key or "lora_B" in key} == {torch.bfloat16}


def test_an_untrained_adapter_in_half_precision(tmp_path):
    base = {name: W0 * 100 for name, W0 in BASE.items() if name in toy.UNET}
    states = {name: toy.layer(name, size=0.0, noise=0.0, weights=base) for name in base}
    source = toy.write_source(tmp_path / "a.safetensors", states)
    convert(source, tmp_path / "b.safetensors", to="kohya", base=base, dtype="bfloat16")
    check_weights(tmp_path / "b.safetensors", states, base=base, tolerance=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("size", [0.0, 1e-6], ids=["untrained", "hardly trained"])
def test_a_module_that_hardly_changes_does_not_refuse_a_file(size, dtype, tmp_path):
    states = {name: toy.layer(name) for name in toy.UNET}
    W0 = BASE[toy.UNET[0]]
    untrained = toy.layer(toy.UNET[0], size=size)
    states[toy.UNET[0]] = replace(untrained, tensors={**untrained.tensors, "magnitude": W0.norm(dim=1) * (1 + size)})
    source = toy.write_source(tmp_path / "a.safetensors", states)
    for to in ("kohya", "comfy"):
        errors = convert(source, tmp_path / f"{to}.safetensors", to=to, base=BASE, dtype=dtype).errors
        assert all(found.overall < 0.02 for found in errors)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_differences_that_half_precision_loses(dtype, tmp_path):
    tiny = {name: toy.layer(name, size=1e-7, method="lora", weights=BASE) for name in toy.UNET}
    base = {name: W0 * 1e-3 for name, W0 in BASE.items()}  # the update is 1e-4 of it
    source = toy.write_source(tmp_path / "tiny.safetensors", tiny)
    for to in ("diff", "kohya"):
        if dtype == "float16":
            with pytest.raises(ValueError, match="float16 puts it off by .*: use --dtype float32"):
                convert(source, tmp_path / f"{to}.safetensors", to=to, base=base, dtype=dtype)
            convert(source, tmp_path / f"{to}.safetensors", to=to, base=base, dtype=dtype, allow_lossy=True)
        else:
            (errors, *_) = convert(source, tmp_path / f"{to}.safetensors", to=to, base=base, dtype=dtype).errors
            assert errors.overall < 0.05


def test_strength_0_keeps_the_sign_of_zeros():
    W0 = torch.tensor([[-0.0, 1.0], [2.0, 0.0]])
    state = LayerState(DoRASpec(1, method="lora"), {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(2, 1)})
    assert torch.equal(torch.signbit(new_weight(state, W0, 0.0)), torch.signbit(W0))


def test_a_config_beside_a_file_of_another_name_is_not_its_own(source, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"fan_in_fan_out": true}')
    convert(source, tmp_path / "new.safetensors", to="kohya", base=BASE)
