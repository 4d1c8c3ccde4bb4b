"""Several adapters as one: the sum of what they change, by the textbook in float64 and by other libraries."""

import re

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import dora_mm
from dora_mm import cli, combine, convert
from dora_mm.core import adapted_layers
from dora_mm.core.spec import DoRASpec
from dora_mm.formats.state import LayerState
from tests.formats.commands.test_convert import BASE, textbook, weights_of
from tests.formats.commands.test_extract import save_model
from tests.formats.commands.test_extras import BASE as WITH_NORMS
from tests.formats.commands.test_extras import check as check_norms
from tests.formats.commands.test_extras import trained as trained
from tests.shared import toy

WEIGHTS = (0.7, -0.4, 1.0)
A, B, C = "a.safetensors", "b.safetensors", "c.safetensors"
SQUARE, CONV = toy.UNET[0], toy.UNET[4]


def other(name, number, **settings):
    """Another trained adapter of a module than `toy.layer` makes."""
    state = toy.layer(name, **settings)
    return LayerState(state.spec, {key: t.roll(number + 1, -1) for key, t in state.tensors.items()}, state.axis)


def write(folder, *adapters):
    """Files of kohya's form; returns their paths."""
    return [toy.write_source(folder / name, states) for name, states in zip((A, B, C), adapters, strict=False)]


def wanted(adapters, weights=WEIGHTS, base=BASE):
    """W0 + sum_i w_i (W'_i - W0), in float64."""
    found = {}
    for states, weight in zip(adapters, weights, strict=False):
        for name, state in states.items():
            change = textbook(name, state) - base[name].double()
            found[name] = found.get(name, base[name].double()) + weight * change
    return found


def check(path, expected, tolerance=2e-6, base=BASE):
    found = weights_of(path, base)
    assert found.keys() == expected.keys()
    for name, W in expected.items():
        change = (W - base[name]).norm()
        assert (found[name] - W).norm() <= tolerance * W.norm() + tolerance * change, name


def ranks(path):
    return {key.partition(".")[0]: len(t) for key, t in load_file(path).items() if "lora_down" in key}


def dora_adapters():
    """Three: one with every module, one with some of a higher rank, and plain LoRA."""
    return [
        {name: toy.layer(name) for name in toy.SHAPES},
        {name: other(name, 1, rank=6, alpha=3.0) for name in toy.UNET},
        {name: other(name, 2, rank=3, alpha=1.0, method="lora") for name in list(toy.SHAPES)[2:]},
    ]


@pytest.mark.parametrize("to", ["kohya", "comfy", "diffusers", "onetrainer"])
def test_doras_are_one_dora_whose_rank_is_the_sum(to, tmp_path):
    adapters = dora_adapters()
    files = write(tmp_path, *adapters)
    done = combine(files, tmp_path / "new.safetensors", weights=WEIGHTS, to=to, base=BASE)
    assert done.num_modules == len(toy.SHAPES)
    assert all(errors.overall < 1e-5 for errors in done.errors)
    check(tmp_path / "new.safetensors", wanted(adapters))
    if to == "kohya":
        assert sorted(set(ranks(tmp_path / "new.safetensors").values())) == [7, 10, 13]


def test_magnitudes_of_columns_are_one_dora_too(tmp_path):
    adapters = [
        {name: toy.layer(name, axis="in") for name in toy.UNET},
        {name: other(name, 1, axis="in", rank=2) for name in toy.UNET},
        {name: other(name, 2, method="lora") for name in toy.UNET},
    ]
    files = write(tmp_path, *adapters)
    combine(files, tmp_path / "new.safetensors", weights=WEIGHTS, to="kohya", base=BASE)
    check(tmp_path / "new.safetensors", wanted(adapters))
    assert set(ranks(tmp_path / "new.safetensors").values()) == {10}


def test_rows_and_columns_in_one_module_have_no_low_rank(tmp_path):
    adapters = [{SQUARE: toy.layer(SQUARE, axis="in")}, {SQUARE: other(SQUARE, 1)}]
    files = write(tmp_path, *adapters)
    combine(files, tmp_path / "new.safetensors", weights=WEIGHTS[:2], to="kohya", base=BASE)
    assert [key.rpartition(".")[2] for key in load_file(tmp_path / "new.safetensors")] == ["diff"]
    check(tmp_path / "new.safetensors", wanted(adapters))
    with pytest.raises(ValueError, match=r"a\.safetensors \+ .*b\.safetensors: .*difference of weights.*--to diff"):
        combine(files, tmp_path / "peft", to="diffusers", base=BASE)
    (errors,) = combine(files, tmp_path / "fit.safetensors", to="diffusers", base=BASE, rank=4).errors
    assert 1e-3 < errors.overall < 0.7


@pytest.mark.parametrize(("to", "dtype", "tolerance"), [("diff", "float32", 2e-6), ("diff", None, 3e-4)])
def test_the_sum_of_changes(to, dtype, tolerance, tmp_path):
    adapters = dora_adapters()
    files = write(tmp_path, *adapters)
    combine(files, tmp_path / "new.safetensors", weights=WEIGHTS, to=to, base=BASE, dtype=dtype)
    check(tmp_path / "new.safetensors", wanted(adapters), tolerance)


def test_a_merged_model_has_the_sum_in_it(tmp_path):
    adapters = dora_adapters()
    save_model(tmp_path / "base", BASE)
    files = write(tmp_path, *adapters)
    combine(files, tmp_path / "merged", weights=WEIGHTS, to="merged", base=tmp_path / "base")
    found = {path: load_file(path) for path in (tmp_path / "merged").rglob("*.safetensors")}
    for name, W in wanted(adapters).items():
        (tensors,) = (tensors for path, tensors in found.items() if path.parent.name == name.component)
        assert (tensors[f"{name.path}.weight"] - W).norm() < 1e-6 * W.norm()


def write_peft(folder, states):
    """A folder that PEFT itself saved."""
    torch.manual_seed(0)
    model = nn.Module()
    for name, state in states.items():
        rows, columns = state.tensors["lora_B"].shape[0], state.tensors["lora_A"].shape[1]
        toy._insert(model, name.path, torch.zeros(rows, columns))
    spec = next(iter(states.values())).spec
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_dora=spec.method == "dora",
        target_modules=[name.path for name in states],
    )
    wrapped = get_peft_model(model, config)
    for name, state in states.items():
        layer = model.get_submodule(name.path)
        layer.lora_A["default"].weight.data.copy_(state.tensors["lora_A"])
        layer.lora_B["default"].weight.data.copy_(state.tensors["lora_B"])
        if "magnitude" in state.tensors:
            layer.lora_magnitude_vector["default"].weight.data.copy_(state.tensors["magnitude"])
    wrapped.save_pretrained(folder)
    return folder


class Small(nn.Module):
    """Two layers, and what they compute of a vector."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 8)

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_plain_loras_of_peft_are_what_its_own_combination_is(tmp_path):
    """Stacked ("cat" in PEFT), without a base; loaded by PEFT, the outputs are those of `add_weighted_adapter`."""
    folders = []
    model = PeftModel(Small(), LoraConfig(r=2, target_modules=["first", "second"]), "zero")
    for number, (rank, alpha) in enumerate(((2, 5), (3, 3))):
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["first", "second"], use_rslora=number == 1)
        model.add_adapter(f"a{number}", config)
        for name, parameter in model.named_parameters():
            if f".a{number}." in name:
                parameter.data = toy.wave(parameter.shape, len(name) + number).float()
        model.save_pretrained(tmp_path / "peft", selected_adapters=[f"a{number}"])
        folders.append(tmp_path / "peft" / f"a{number}")
    model.add_weighted_adapter(["a0", "a1"], [0.7, 0.4], "both", combination_type="cat")
    model.set_adapter("both")
    combine(folders, tmp_path / "new", weights=[0.7, 0.4], to="peft")
    loaded = PeftModel.from_pretrained(Small(), tmp_path / "new")
    x = toy.wave((5, 12), 1).float()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
    assert loaded.peft_config["default"].r == 5


def test_files_of_several_tools_are_summed_by_the_names_of_modules(tmp_path):
    """Flux: stacked projections in kohya's file, single ones in diffusers'; plain LoRA needs no base."""
    from tests.formats.commands.test_convert import FLUX, write_flux

    base = toy.base(FLUX)
    states = {name: toy.layer(name, method="lora", weights=base) for name in FLUX}
    write_flux(tmp_path / "a.safetensors", states)
    convert(tmp_path / "a.safetensors", tmp_path / "own.safetensors", to="kohya")
    done = combine([tmp_path / "a.safetensors", tmp_path / "own.safetensors"], tmp_path / "new", to="diffusers")
    assert not done.on_base
    for name, W in weights_of(done.files[0], base).items():
        t, s = states[name].tensors, states[name].spec.scaling
        expected = base[name] + 2 * s * t["lora_B"] @ t["lora_A"]
        assert (W - expected).norm() < 1e-6 * expected.norm()


def test_a_1x1_convolution_in_two_shapes(tmp_path):
    tensors = {"m.lora_up.weight": torch.ones(4, 2, 1, 1), "m.lora_down.weight": torch.ones(2, 6, 1, 1)}
    flat = {key: t.flatten(1) for key, t in tensors.items()}
    for name, found in ((A, tensors), (B, flat)):
        renamed = {f"lora_unet_{'input_blocks_4_1_proj_in'}.{key[2:]}": t for key, t in found.items()}
        save_file(renamed, tmp_path / name)
    combine([tmp_path / A, tmp_path / B], tmp_path / C, to="kohya", weights=[1, 2])
    found = load_file(tmp_path / C)
    down = next(t for key, t in found.items() if "lora_down" in key)
    assert down.shape == (4, 6, 1, 1)


# --- to a rank -------------------------------------------------------------------------------------------------------


def test_plain_loras_at_a_rank_are_the_best_there_is(tmp_path):
    adapters = [
        {name: toy.layer(name, method="lora", rank=4) for name in toy.UNET},
        {name: other(name, 1, method="lora", rank=5) for name in toy.UNET},
    ]
    files = write(tmp_path, *adapters)
    done = combine(files, tmp_path / "new.safetensors", weights=WEIGHTS[:2], to="kohya", rank=3)
    found, errors = weights_of(tmp_path / "new.safetensors"), done.errors[0].layers
    for name, W in wanted(adapters, WEIGHTS[:2]).items():
        D = (W - BASE[name]).flatten(1)
        values = torch.linalg.svdvals(D)
        best = float(values[3:].norm() / values.norm())
        assert float((found[name] - W).norm() / D.norm()) == pytest.approx(best, rel=1e-4)
        (error,) = (e for module, e in errors.items() if module in _modules(name))
        assert error == pytest.approx(best, rel=1e-3)
    assert set(ranks(tmp_path / "new.safetensors").values()) == {3}


def _modules(name):
    from dora_mm.formats.naming.spellings import KOHYA, Names

    return Names().write([name], KOHYA)


def test_doras_at_a_rank(tmp_path):
    """The error is at most that of plain LoRA of the rank, and is none at the sum of ranks."""
    adapters = [{name: states[name] for name in (SQUARE, CONV)} for states in dora_adapters()[:2]]
    files = write(tmp_path, *adapters)
    found = {}
    for rank in (2, 10):
        settings = {"weights": WEIGHTS[:2], "base": BASE, "rank": rank}
        (dora,) = combine(files, tmp_path / f"{rank}", to="diffusers", **settings).errors
        (lora,) = combine(files, tmp_path / f"{rank}l", to="lora", **settings).errors
        assert dora.overall <= lora.overall + 1e-5
        found[rank] = dora.overall
    assert found[2] > 0.01
    assert found[10] < 1e-5
    check(tmp_path / "10", wanted(adapters))


# --- what is beside, what is refused ---------------------------------------------------------------------------------


def test_norms_and_biases(trained, tmp_path):
    path, expected = trained
    combine([path, path], tmp_path / "new.safetensors", weights=[0.75, 0.25], to="kohya", base=WITH_NORMS)
    check_norms(tmp_path / "new.safetensors", expected)


def test_new_tokens_travel_and_two_of_one_word_are_refused(tmp_path):
    files = write(tmp_path, *dora_adapters()[:2])
    for file, value in zip(files, (1.0, 2.0), strict=True):
        save_file({**load_file(file), "bundle_emb.TOK.clip_l": torch.full((1, 12), value)}, file)
    with pytest.raises(ValueError, match=r"different rows for bundle_emb\.TOK\.clip_l"):
        combine(files, tmp_path / "new.safetensors", to="kohya", base=BASE)
    save_file({**load_file(files[1]), "bundle_emb.TOK.clip_l": torch.ones(1, 12)}, files[1])
    combine(files, tmp_path / "new.safetensors", to="kohya", base=BASE)
    assert load_file(tmp_path / "new.safetensors")["bundle_emb.TOK.clip_l"].sum() == 12
    combine(files, tmp_path / "new", to="diffusers", base=BASE)
    assert load_file(tmp_path / "new" / "TOK.safetensors")["clip_l"].sum() == 12


def test_the_header_has_what_all_have_in_common(tmp_path):
    files = write(tmp_path, *dora_adapters())
    for file, title in zip(files[:2], ("First", "Second"), strict=True):
        save_file(load_file(file), file, metadata={"modelspec.title": title, "base_model": "a/b", "seed": title})
    combine(files[:2], tmp_path / "new.safetensors", weights=[0.7, 0.4], to="kohya", base=BASE)
    _, header = toy.read_tensors(tmp_path / "new.safetensors")
    assert header == {
        "base_model": "a/b",
        "modelspec.merged_from": "First, Second",
        "combined_from": "0.7 First + 0.4 Second",
    }


MISTAKES = [
    ({"weights": [1.0]}, "--weights has 1 numbers for 2 adapters"),
    ({"weights": [1.0, float("inf")]}, "--weights are finite numbers, not inf"),
    ({"base": None}, "the sum depends on the weights of the base model: give it with --base"),
    ({"to": "diff", "base": None}, "--to diff needs the base model"),
    ({"to": "lora"}, "--to lora needs a rank"),
    ({"axis": "in"}, "no magnitude whose axis is unclear"),
]


@pytest.mark.parametrize(("settings", "message"), MISTAKES, ids=[message[:25] for _, message in MISTAKES])
def test_mistakes(settings, message, tmp_path):
    files = write(tmp_path, *dora_adapters()[:2])
    with pytest.raises(ValueError, match=re.escape(message)):
        combine(files, tmp_path / "new.safetensors", **{"to": "kohya", "base": BASE, **settings})
    assert sorted(tmp_path.iterdir()) == files


def test_one_adapter_and_adapters_of_several_models_are_refused(tmp_path):
    from tests.formats.commands.test_convert import FLUX, write_flux

    (file,) = write(tmp_path, {name: toy.layer(name, method="lora") for name in toy.UNET})
    with pytest.raises(ValueError, match="use dora-mm convert, with --strength T, for one"):
        combine([file], tmp_path / "new.safetensors", to="kohya")
    write_flux(tmp_path / B, {name: toy.layer(name, method="lora", weights=toy.base(FLUX)) for name in FLUX})
    with pytest.raises(ValueError, match=r"a\.safetensors and .*b\.safetensors are adapters of different models"):
        combine([file, tmp_path / B], tmp_path / "new.safetensors", to="diffusers")
    folder = write_peft(tmp_path / "peft", {SQUARE: toy.layer(SQUARE, method="lora")})
    with pytest.raises(ValueError, match="peft.* does not say which network it adapts, and others do"):
        combine([file, folder], tmp_path / "new.safetensors", to="kohya")
    wrong = LayerState(DoRASpec(2, method="lora"), {"lora_A": torch.ones(2, 20), "lora_B": torch.ones(16, 2)})
    toy.write_source(tmp_path / C, {SQUARE: wrong})
    with pytest.raises(ValueError, match=r"lora_A has shape .* it is for another model"):
        combine([file, tmp_path / C], tmp_path / "new.safetensors", to="kohya")
    assert not (tmp_path / "new.safetensors").exists()


def test_the_command(tmp_path, capsys):
    adapters = [{name: other(name, i, method="lora") for name in toy.UNET} for i in range(2)]
    files = [str(file) for file in write(tmp_path, *adapters)]
    out = tmp_path / "new.safetensors"
    assert cli.main(["combine", *files, str(out), "--weights", "0.7", "-0.4", "--to", "kohya", "--rank", "3"]) == 0
    printed = capsys.readouterr().out
    assert f"written  {out}, 5 modules\nrank     3\n" in printed
    assert "largest errors" in printed
    assert cli.main(["combine", *files, str(tmp_path / "x"), "--to", "nosuch"]) == 2
    assert "there is no export format 'nosuch'" in capsys.readouterr().err


# --- other sides -----------------------------------------------------------------------------------------------------


def test_it_is_what_several_adapters_of_a_job_compute(tmp_path):
    """Stacked in our own layers, each at its strength, as `dora-mm sample` does it."""
    adapters = [{name: states[name] for name in toy.UNET if name in states} for states in dora_adapters()]
    files = write(tmp_path, *adapters)
    combine(files, tmp_path / "new.safetensors", weights=WEIGHTS, to="kohya", base=BASE)
    stacked, combined = toy.model(), toy.model()
    for number, (file, weight) in enumerate(zip(files, WEIGHTS, strict=True)):
        dora_mm.load_adapter({"unet": stacked}, file, strength=weight, name=str(number))
    dora_mm.load_adapter({"unet": combined}, tmp_path / "new.safetensors")
    for model in (stacked, combined):
        dora_mm.merge(model)
    for name in toy.UNET:
        one, other = (model.get_submodule(name.path).weight for model in (stacked, combined))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_it_is_what_diffusers_computes_of_several_plain_loras(tmp_path):
    pipe = StableDiffusionXLPipeline.from_pretrained("samples/tiny-sdxl", torch_dtype=torch.float32)
    unet, files = pipe.unet, []
    for number, rank in enumerate((2, 3)):
        dora_mm.inject(unet, "sdxl-unet", DoRASpec(rank, alpha=4.0, method="lora"), parts=("attn", "cross"))
        for seed, layer in enumerate(adapted_layers(unet).values()):
            layer.lora_B.data = toy.wave(layer.lora_B.shape, seed + number).float()
        files.append(dora_mm.save_adapter({"unet": unet}, tmp_path / str(number)))
        dora_mm.remove(unet)
    (new,) = combine(files, tmp_path / "new", weights=[0.7, -0.4], to="diffusers").files
    pooled = unet.add_embedding.linear_1.in_features - 6 * unet.config.addition_time_embed_dim
    inputs = {
        "sample": toy.wave((1, unet.config.in_channels, 16, 16), 1).float(),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": toy.wave((1, 7, unet.config.cross_attention_dim), 2).float(),
        "added_cond_kwargs": {"text_embeds": toy.wave((1, pooled), 3).float(), "time_ids": torch.ones(1, 6)},
    }
    outputs = []
    with torch.no_grad():
        before = unet(**inputs).sample
        for files_of, weights in ((files, [0.7, -0.4]), ([new], [1.0])):
            names = [f"a{number}" for number in range(len(files_of))]
            for name, file in zip(names, files_of, strict=True):
                pipe.load_lora_weights(file.parent, adapter_name=name)
            pipe.set_adapters(names, weights)
            outputs.append(unet(**inputs).sample)
            pipe.delete_adapters(names)
    assert (outputs[0] - before).norm() > 1e-2 * before.norm()
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
