"""Plain LoRA of a lower rank: the best there is, without its product and without a base model."""

import numpy as np
import pytest
import torch

from dora_mm import convert
from dora_mm.core.spec import DoRASpec
from dora_mm.formats.algebra.fit import Truncation, low_rank, resized
from dora_mm.formats.naming.spellings import Names
from dora_mm.formats.reader import LayerReader
from dora_mm.formats.state import LayerState
from tests.shared import toy

CONV = toy.UNET[4]


def lora(shape, rank, alpha, seed=0):
    """A LoRA whose singular values fall, of a weight (O, I) or (O, I, *K)."""
    falling = torch.logspace(0, -2, rank)
    A = toy.wave((rank, *shape[1:]), seed).float() * falling.view(-1, *(1,) * (len(shape) - 1))
    tensors = {"lora_A": A, "lora_B": toy.wave((shape[0], rank), seed + 1).float()}
    return LayerState(DoRASpec(rank, alpha, method="lora"), tensors)


def product(layer):
    A, B = (layer.tensors[name].double().flatten(1).numpy() for name in ("lora_A", "lora_B"))
    return layer.spec.scaling * B @ A


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (16, 8, 3, 3), (6, 40)], ids=str)
@pytest.mark.parametrize(
    "keep", [Truncation(3), Truncation(energy=0.99), Truncation(spectral=0.1), Truncation(2, energy=0.999)], ids=str
)
def test_it_is_numpys_truncation_of_the_dense_product(shape, keep):
    """The fewest singular values that keep what is asked for, and their product; the rank is 12, above 6 rows."""
    layer = lora(shape, 12, 3.0)
    U, S, Vh = np.linalg.svd(product(layer), full_matrices=False)
    shares = np.cumsum(S**2) / np.sum(S**2)
    rank = next(
        k for k in range(1, len(S) + 1)
        if k == keep.rank
        or (keep.energy and shares[k - 1] >= keep.energy)
        or (keep.spectral and (k == len(S) or S[k] <= keep.spectral * S[0]))
    )  # fmt: skip
    found = resized(layer, keep)
    assert (found.spec.rank, found.spec.alpha) == (rank, rank)
    assert found.tensors["lora_A"].shape == (rank, *shape[1:])
    best = U[:, :rank] * S[:rank] @ Vh[:rank]
    assert np.linalg.norm(product(found) - best) < 1e-6 * np.linalg.norm(best)
    dense = low_rank(torch.from_numpy(product(layer)).view(shape), keep)
    assert dense.spec.rank == rank


def test_the_product_is_never_built():
    """Of a weight of 100,000 x 100,000, which would have 40 GB."""
    layer = LayerState(
        DoRASpec(4, 4.0, method="lora"),
        {"lora_A": toy.wave((4, 100_000), 1).float(), "lora_B": toy.wave((100_000, 4), 2).float()},
    )
    found = resized(layer, Truncation(2))
    assert found.tensors["lora_B"].shape == (100_000, 2)


def test_an_update_of_zero_has_rank_1():
    layer = lora((8, 8), 4, 4.0)
    zero = LayerState(layer.spec, {**layer.tensors, "lora_B": torch.zeros(8, 4)})
    for keep in (Truncation(3), Truncation(energy=0.9), Truncation(spectral=0.1)):
        assert resized(zero, keep).spec.rank == 1
        assert low_rank(torch.zeros(8, 8), keep).spec.rank == 1


def layers_of(path):
    reader = LayerReader(path)
    return {name: reader.layer(name) for name in reader.names()}


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
@pytest.mark.parametrize("settings", [{"rank": 3}, {"energy": 0.95}, {"spectral": 0.2, "rank": 3}], ids=str)
def test_a_file_is_resized_without_a_base(to, settings, tmp_path, monkeypatch):
    states = {name: lora(toy.SHAPES[name], 4 + i, 1.0 + i, seed=i) for i, name in enumerate(toy.SHAPES)}
    source = toy.write_source(tmp_path / "source.safetensors", states)
    monkeypatch.setattr("dora_mm.formats.commands.convert.low_rank", None)  # which takes the dense difference
    done = convert(source, tmp_path / "new.safetensors", to=to, strength=0.5, **settings)
    assert not done.on_base
    errors = {Names().read(module).names[0]: error for module, error in done.errors[0].layers.items()}
    found = layers_of(tmp_path / "new.safetensors")
    for name, state in states.items():
        D, rank = 0.5 * product(state), found[name].spec.rank
        S = np.linalg.svd(D, compute_uv=False)
        best = np.linalg.norm(S[rank:]) / np.linalg.norm(S)
        off = np.linalg.norm(product(found[name]) - D) / np.linalg.norm(D)
        assert off == pytest.approx(best, rel=1e-3, abs=1e-6), name
        assert errors[name] == pytest.approx(best, rel=1e-2, abs=1e-5)
    ranks = sorted(layer.spec.rank for layer in found.values())
    assert tuple(ranks) == done.ranks
    assert ranks[-1] <= settings.get("rank", 5)
    if "energy" in settings:
        assert all(error**2 <= 0.05 + 1e-4 for error in errors.values())
        assert len(set(ranks)) > 1


def test_what_has_a_lower_rank_stays_as_it_is(tmp_path):
    states = {CONV: lora(toy.SHAPES[CONV], 3, 3.0), toy.UNET[0]: toy.layer(toy.UNET[0], rank=2, alpha=2.0)}
    source = toy.write_source(tmp_path / "source.safetensors", states)
    convert(source, tmp_path / "new.safetensors", to="kohya", rank=3)
    for name, layer in layers_of(tmp_path / "new.safetensors").items():
        assert layer.tensors.keys() == states[name].tensors.keys()
        assert all(torch.equal(layer.tensors[key], tensor) for key, tensor in states[name].tensors.items())
