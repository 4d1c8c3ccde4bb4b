"""A DoRA from two checkpoints: what was merged is found again, and the error is that of the best adapter."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_mm import extract, formats
from dora_mm.cli import main
from dora_mm.core.spec import DoRASpec
from dora_mm.formats.algebra.fit import Truncation, fitted_adapter, low_rank
from dora_mm.formats.commands.convert import convert
from dora_mm.formats.commands.verify import verify
from dora_mm.formats.naming.names import Name
from tests.shared import toy

FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


def save_model(folder, weights, dtype=torch.float32):
    """A pipeline folder of weights by name."""
    for component, file in FILES.items():
        (folder / component).mkdir(parents=True)
        found = {f"{n.path}.weight": w.to(dtype).clone() for n, w in weights.items() if n.component == component}
        save_file(found, folder / component / file)
    return folder


def merged(weights, names, **settings):
    """The weights with toy adapters merged, in float64, and the adapters."""
    layers = {name: toy.layer(name, **settings) for name in names}
    found = dict(weights)
    for name, layer in layers.items():
        tensors, spec = layer.tensors, layer.spec
        found[name] = toy.textbook(
            weights[name], tensors["lora_A"], tensors["lora_B"], tensors.get("magnitude"), spec.scaling
        ).float()
    return found, layers


@pytest.fixture
def models(tmp_path):
    """(the folder of a tuned model, that of its base, W' by name, W0 by name); two modules are unchanged."""
    W0 = toy.base()
    W, _ = merged(W0, list(toy.SHAPES)[:-2])
    return save_model(tmp_path / "tuned", W), save_model(tmp_path / "base", W0), W, W0


def weights_of(file, base):
    """W' by the name of each module."""
    target = file.with_name("merged")
    convert(file, target, to="merged", base=base)
    return {n: load_file(target / n.component / FILES[n.component])[f"{n.path}.weight"] for n in toy.SHAPES}


def test_a_merged_dora_is_found_again(models, tmp_path):
    tuned, base, W, _ = models
    done = extract(tuned, base, tmp_path / "out", rank=4)
    assert done.files[0] == tmp_path / "out" / "pytorch_lora_weights.safetensors"
    assert done.num_unchanged == 2
    assert done.left_out == ()
    assert set(done.errors) == set(list(toy.SHAPES)[:-2])
    assert done.overall < 1e-5
    assert max(done.errors.values()) < 1e-5
    for name, found in weights_of(done.files[0], base).items():
        torch.testing.assert_close(found, W[name], rtol=1e-5, atol=1e-6)
    (verdict,) = verify(done.files[0], "diffusers", base)
    assert verdict.error < 1e-5
    assert (tmp_path / "out" / "README.md").is_file()
    state, header = formats.read(done.files[0])
    assert (header["base_model"], header["extracted_from"]) == (base.name, tuned.name)
    assert {layer.spec for layers in state.layers.values() for layer in layers.values()} == {DoRASpec(4)}


@pytest.mark.parametrize("to", ["peft", "kohya", "comfy", "onetrainer"])
def test_other_formats(to, tmp_path):
    W0 = toy.base()
    W, _ = merged(W0, toy.UNET)
    tuned, base = save_model(tmp_path / "tuned", W), save_model(tmp_path / "base", W0)
    done = extract(tuned, base, tmp_path / "out", rank=4, to=to)
    for name, found in weights_of(done.files[0], base).items():
        torch.testing.assert_close(found, W[name], rtol=1e-5, atol=1e-5)
    assert not list(tmp_path.glob(".extract*"))


def random_pair(seed, out=24, inner=20):
    generator = torch.Generator().manual_seed(seed)
    W0 = torch.randn(out, inner, generator=generator)
    return W0 + 0.3 * torch.randn(out, inner, generator=generator), W0


def error_of(layer, W, W0):
    A, B, m = (layer.tensors[name] for name in ("lora_A", "lora_B", "magnitude"))
    found = toy.textbook(W0, A, B, m, layer.spec.scaling)
    return float((found - W.double()).norm() / (W - W0).double().norm())


@pytest.mark.parametrize("seed", range(3))
def test_the_error_falls_with_the_rank_and_is_below_that_of_lora(seed):
    W, W0 = random_pair(seed)
    singular = torch.linalg.svdvals((W - W0).double())
    errors = []
    for rank in (1, 2, 4, 8, 16, 19):
        errors.append(error_of(fitted_adapter(W, W0, rank), W, W0))
        assert errors[-1] < float(singular[rank:].norm() / singular.norm())
    assert errors == sorted(errors, reverse=True)
    assert error_of(fitted_adapter(W, W0, 50), W, W0) < 1e-5


def error_of_whole_decompositions(W, W0, rank):
    """The same alternation with all singular values in float64, to its end: written out here again."""
    W, W0 = W.double(), W0.double()
    g, errors = (W * W0).sum(1) / W0.square().sum(1), [math.inf]
    for _ in range(300):
        E = W - g[:, None] * W0
        V = torch.linalg.svd(E, full_matrices=False).Vh[:rank]
        W_rest, W0_rest = W - W @ V.T @ V, W0 - W0 @ V.T @ V
        g = (W_rest * W0_rest).sum(1) / W0_rest.square().sum(1)
        errors.append(float((W_rest - g[:, None] * W0_rest).norm() / (W - W0).norm()))
        if errors[-1] > errors[-2] * (1 - 1e-6):
            break
    return errors[-1]


SPECTRA = {
    "flat": lambda i: torch.ones_like(i),
    "slow": lambda i: 1 / i.sqrt(),
    "usual": lambda i: 1 / i,
    "fast": lambda i: 0.7**i,
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rank", [4, 16])
def test_the_randomised_method_is_within_two_percent_of_whole_decompositions(spectrum, rank):
    generator = torch.Generator().manual_seed(rank)
    for rows, columns in ((160, 96), (96, 160)):
        U, V = (torch.linalg.qr(torch.randn(n, 96, generator=generator)).Q for n in (rows, columns))
        D = 0.02 * (U * SPECTRA[spectrum](torch.arange(1.0, 97.0))) @ V.T
        W0 = torch.randn(rows, columns, generator=generator) / columns**0.5
        found = error_of(fitted_adapter(W0 + D, W0, rank), W0 + D, W0)
        assert found < 1.02 * error_of_whole_decompositions(W0 + D, W0, rank) + 1e-5


@pytest.mark.parametrize("spectrum", [*SPECTRA, "noise"])
@pytest.mark.parametrize(("rank", "rows", "columns"), [(4, 96, 200), (16, 200, 96)])
def test_low_rank_is_as_close_as_whole_decompositions(spectrum, rank, rows, columns):
    generator = torch.Generator().manual_seed(rank)
    U, V = (torch.linalg.qr(torch.randn(n, 96, generator=generator)).Q for n in (rows, columns))
    D = (U * SPECTRA.get(spectrum, torch.ones_like)(torch.arange(1.0, 97.0))) @ V.T
    if spectrum == "noise":
        D = torch.randn(rows, columns, generator=generator)
    layer = low_rank(D, Truncation(rank=rank))
    smallest = torch.linalg.svdvals(D.double())[rank:].norm()
    assert (D - layer.tensors["lora_B"] @ layer.tensors["lora_A"]).norm() < 1.005 * smallest + 1e-6 * D.norm()


def test_no_nearby_adapter_is_better():
    """The fit is a minimum: gradient descent on A, B and m from it finds nothing better."""
    W, W0 = (tensor.double() for tensor in random_pair(5))
    layer = fitted_adapter(W, W0, 3)
    tensors = [layer.tensors[name] for name in ("lora_A", "lora_B", "magnitude")]
    values = [tensor.double().contiguous().requires_grad_() for tensor in tensors]
    optimizer = torch.optim.LBFGS(values, max_iter=200, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        V = W0 + values[1] @ values[0]
        found = (values[2] / V.norm(dim=1))[:, None] * V
        value = (found - W).square().sum()
        value.backward()
        return value

    before = math.sqrt(loss().item())
    optimizer.step(loss)
    assert before <= math.sqrt(loss().item()) * 1.005


def test_a_target_that_cannot_hold_it(models, tmp_path):
    tuned, base, _, _ = models
    with pytest.raises(ValueError, match=f"^{tmp_path}/out.safetensors: .*_conv1: it is a convolution, for which"):
        extract(tuned, base, tmp_path / "out.safetensors", rank=4, to="ai-toolkit")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_rows_of_zeros_and_reversed_rows():
    W, W0 = random_pair(7)
    W[0], W0[1], W[2] = 0, 0, -W0[2]
    layer = fitted_adapter(W, W0, 8)
    assert all(tensor.isfinite().all() for tensor in layer.tensors.values())
    exact = fitted_adapter(W, W0, 20)
    assert error_of(exact, W, W0) < 1e-4


def test_half_precision_is_no_change(tmp_path):
    W0 = toy.base()
    name = toy.UNET[0]
    W = {**W0, name: W0[name] + 0.1}
    tuned, base = save_model(tmp_path / "tuned", W, torch.float16), save_model(tmp_path / "base", W0)
    done = extract(tuned, base, tmp_path / "out.safetensors", rank=2)
    assert (list(done.errors), done.num_unchanged) == ([name], len(toy.SHAPES) - 1)
    assert done.files[0] == tmp_path / "out.safetensors"


def test_norms_and_embeddings_that_differ_are_counted(tmp_path):
    W0 = {**toy.base(), Name("unet", "norm"): torch.ones(4)}
    W0[Name("text_encoder", "text_model.embeddings.token_embedding")] = torch.randn(10, 12)
    W = {name: weight + (0.1 if weight.dim() == 1 or "embedding" in name.path else 0) for name, weight in W0.items()}
    W[toy.UNET[1]] = W[toy.UNET[1]] * 1.1
    done = extract(save_model(tmp_path / "t", W), save_model(tmp_path / "b", W0), tmp_path / "out", rank=1)
    assert list(done.errors) == [toy.UNET[1]]
    assert {name.path for name in done.left_out} == {"norm", "text_model.embeddings.token_embedding"}
    assert done.num_unchanged == len(toy.SHAPES) - 1


def without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


def test_models_that_do_not_belong_together(models, tmp_path):
    tuned, base, W, W0 = models
    name = toy.UNET[0]
    other = {
        "fewer": without(W0, name),
        "more": {**W0, Name("unet", "extra"): torch.ones(2, 2)},
        "shapes": {**W0, name: torch.ones(16, 8)},
    }
    for kind, weights in other.items():
        folder = save_model(tmp_path / kind, weights)
        message = "has the shapes" if kind == "shapes" else "only one of them has unet."
        with pytest.raises(ValueError, match=f"was not fine-tuned from {folder}: .*{message}"):
            extract(tuned, folder, tmp_path / "out", rank=2)
    with pytest.raises(ValueError, match="have the same weights, so there is nothing to extract"):
        extract(base, base, tmp_path / "out", rank=2)
    broken = save_model(tmp_path / "broken", {**W, name: W[name] / 0})
    with pytest.raises(ValueError, match=f"{name} of the tuned model has values that are NaN or infinite"):
        extract(broken, base, tmp_path / "out", rank=2)
    assert not list((tmp_path / "out").glob("*"))
    extract(tuned, base, tmp_path / "out", rank=2)  # a failure does not stand in the way of the next try


def test_a_network_of_a_pipeline_alone(models, tmp_path):
    tuned, base, _, _ = models
    (tmp_path / "only").mkdir()
    (tuned / "unet").rename(tmp_path / "only" / "unet")
    assert extract(tmp_path / "only", base, tmp_path / "out", rank=4).overall < 1e-5


def test_the_command(models, tmp_path, capsys):
    tuned, base, _, _ = models
    out = tmp_path / "out"
    assert main(["extract", str(tuned), str(base), str(out), "--rank", "4"]) == 0
    shown = capsys.readouterr().out
    assert f"written    {out}/pytorch_lora_weights.safetensors, 5 modules" in shown
    assert "unchanged  2 modules, which are left out" in shown
    assert "error      0.00% of the change" in shown
    assert main(["extract", str(tuned), str(base), str(out), "--rank", "4"]) == 2
    assert f"{out} exists already: name a new file or folder" in capsys.readouterr().err
    assert main(["extract", str(tuned), str(base), f"{out}.safetensors", "--rank", "4", "--to", "comfy"]) == 0
    shown = capsys.readouterr().out
    assert f"written    {out}.safetensors" in shown
    assert main(["extract", str(tuned), str(base), f"{out}3.safetensors", "--rank", "4", "--to", "onetrainer"]) == 0
    assert "set OneTrainer's option" in capsys.readouterr().out
    assert main(["extract", str(tuned), str(base), f"{out}2", "--rank", "4", "--to", "nosuch"]) == 2
    assert "there is no export format 'nosuch': use one of peft, diffusers, kohya" in capsys.readouterr().err


def test_a_single_model_becomes_a_peft_folder(tmp_path):
    W0, W = {}, {}
    for number in range(2):
        after, before = random_pair(number)
        W0[f"layers.{number}.fc.weight"], W[f"layers.{number}.fc.weight"] = before, after
    for name, weights in (("tuned", W), ("base", W0)):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    done = extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=4)
    assert done.files[0].name == "adapter_model.safetensors"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 4, True)
    state, _ = formats.read(tmp_path / "out")
    for number in range(2):
        key = f"layers.{number}.fc"
        error = error_of(state.layers["model"][key], W[f"{key}.weight"], W0[f"{key}.weight"])
        assert error == pytest.approx(done.errors[Name("model", key)], rel=1e-4)
