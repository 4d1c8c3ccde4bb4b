"""What gradients look like, against autograd of the formulas in float64; and that watching them changes no bit."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dora_mm.config.training import OptimizerConfig, ScheduleConfig
from dora_mm.core import DoRASpec, adapter_parameters, inject
from dora_mm.eval.gradients import (
    NUM_SAMPLES,
    GradientWatch,
    file_of,
    gradient_shape,
    measuring,
    random_units,
    read_gradients,
    spectrum,
)
from dora_mm.train.optim import build_optimizer
from dora_mm.train.schedule import Schedule
from tests.shared import reference
from tests.shared.small_training import mean_of, new_run, small_training


def weights(seed=0):
    stream = torch.Generator().manual_seed(seed)
    W0, x, dY = (torch.randn(*shape, generator=stream, dtype=torch.float64) for shape in ((6, 9), (20, 9), (20, 6)))
    return W0, x, dY


def test_it_is_autograd_of_the_formula():
    V, x, dY = weights()
    m = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    leaf, magnitude = V.clone().requires_grad_(), m.clone().requires_grad_()
    whole = magnitude[:, None] * leaf / leaf.norm(dim=1, keepdim=True)
    ((x @ whole.T) * dY).sum().backward()
    G = dY.T @ x
    found = gradient_shape(G, V, m, "a")
    assert found.norm == pytest.approx(G.norm().item())
    assert found.exact == pytest.approx((leaf.grad.norm() / G.norm()).item())
    assert found.magnitude == pytest.approx(magnitude.grad.abs().mean().item())
    assert found.detached == pytest.approx(((m / V.norm(dim=1))[:, None] * G).norm().item() / G.norm().item())
    assert spectrum(leaf.grad) == pytest.approx((found.condition_projected, found.rank_projected))
    eigenvalues = np.linalg.eigvalsh((G.T @ G).numpy())[-6:]  # G has six rows
    assert found.condition == pytest.approx(eigenvalues[-1] / eigenvalues[0])


def test_cases_by_hand():
    V = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    along = gradient_shape(V, V, None, "a")
    assert (along.along, along.exact, along.detached, along.rank_projected) == (1, 0, 1, 0)
    across = gradient_shape(V[[1, 0]], V, torch.tensor([1.0, 2.0]), "a")
    assert (across.along, across.magnitude) == (0, 0)
    assert across.exact == across.detached == pytest.approx((0.25 + 16) ** 0.5 / 5**0.5)
    assert spectrum(torch.diag(torch.tensor([2.0, 2.0, 0.0])).double()) == pytest.approx((1e12, 2))
    assert gradient_shape(torch.zeros(2, 2), V, None, "a") is None
    zeros = gradient_shape(torch.ones(2, 2), torch.zeros(2, 2), torch.zeros(2), "a")
    assert (zeros.exact, zeros.along) == (1, 0)


def test_the_control_takes_the_same_coefficients_along_random_rows():
    V, x, dY = weights()
    m, G, n = torch.linspace(0.5, 2, 6, dtype=torch.float64), dY.T @ x, V.norm(dim=1)
    found = gradient_shape(G, V, m, "a")
    draws = []
    for R in (random_units(G, "a", draw) for draw in range(NUM_SAMPLES)):
        condition, rank = spectrum((m / n)[:, None] * (G - ((G * V).sum(dim=1) / n)[:, None] * R))
        draws.append((((G * R).sum(dim=1).norm() / G.norm()).item(), np.log10(condition), rank))
    means, spreads = np.mean(draws, axis=0), np.std(draws, axis=0, ddof=1)
    assert (found.along_random, np.log10(found.condition_random), found.rank_random) == pytest.approx(means)
    assert (found.sd_along_random, found.sd_condition_random, found.sd_rank_random) == pytest.approx(spreads)
    assert min(spreads) > 0


def test_matrices_of_equal_shape_have_other_random_rows():
    rows = [random_units(torch.empty(6, 9), matrix, draw) for matrix in ("a", "b") for draw in range(NUM_SAMPLES)]
    products = torch.stack([row.flatten() for row in rows]) @ torch.stack([row.flatten() for row in rows]).T / 6
    assert (products - torch.eye(2 * NUM_SAMPLES)).abs().max() < 0.6
    assert torch.equal(rows[0], random_units(torch.ones(6, 9), "a", 0))


def test_a_gradient_of_few_directions_is_filled_by_any_rows():
    stream = torch.Generator().manual_seed(4)
    G = torch.randn(24, 2, generator=stream) @ torch.randn(2, 40, generator=stream)
    found = gradient_shape(G, torch.randn(24, 40, generator=stream), None, "a")
    assert found.condition == pytest.approx(1e12)
    assert max(found.condition_projected, found.condition_random) < 1e9
    assert min(found.rank_projected, found.rank_random) > found.rank


@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
def test_hooks_sum_the_gradient_over_passes_and_change_no_bit(method, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 4))
    inject(model, ["0", "2"], DoRASpec(rank=2, method=method))
    for layer in (model[0], model[2]):
        reference.randomize(layer)
    plain, inputs = copy.deepcopy(model), [torch.randn(3, 5, 9), torch.randn(3, 5, 9)]
    watch = GradientWatch({"model": model})
    with watch.open():
        for x in inputs:
            model(x).square().mean().backward()
    for x in inputs:
        plain(x).square().mean().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)
    whole = copy.deepcopy(plain)
    for layer in (whole[0], whole[2]):
        layer.merge(keep_base=False)
        layer.weight.requires_grad_()
    for x in inputs:
        whole(x).square().mean().backward()
    for name in ("0", "2"):
        torch.testing.assert_close(watch.sums[f"model.{name}"], whole[int(name)].weight.grad, rtol=1e-4, atol=1e-6)
    assert [row["matrix"] for row in watch.rows()] == ["model.0", "model.2"]
    assert {row["method"].split(",")[0] for row in watch.rows()} == {method}
    model(inputs[0]).sum().backward()
    assert not model[0]._forward_hooks


def test_a_file_is_that_of_a_step_and_has_finite_gradients(tmp_path, caplog):
    model = nn.Sequential(nn.Linear(4, 3))
    inject(model, ["0"], DoRASpec(rank=2))
    watch = GradientWatch({"model": model})
    with watch.open():
        model(torch.randn(5, 4)).square().sum().backward()
    watch.write(file_of(tmp_path, 7), 1.0)
    watch.write(file_of(tmp_path, 8), 2.0)
    found = read_gradients(tmp_path)
    assert list(found) == [7, 8]
    (one,), (half,) = found.values()
    assert one["matrix"] == "model.0"
    assert float(one["exact"]) < float(one["detached"])
    assert float(half["norm"]) == pytest.approx(float(one["norm"]) / 2, rel=1e-4)
    watch.sums["model.0"][0, 0] = float("inf")  # as fp16 has it until its scale has settled
    watch.write(file_of(tmp_path, 9), 1.0)
    GradientWatch({"model": nn.Sequential(nn.Linear(4, 3))}).write(file_of(tmp_path, 9), 1.0)
    assert [record.getMessage().rpartition("not ")[2] for record in caplog.records] == [
        "a gradient that is finite.",
        "an adapted linear layer of plain weights.",
    ]
    assert list(read_gradients(tmp_path)) == [7, 8]
    assert read_gradients(tmp_path / "nothing") == {}


@pytest.mark.parametrize("decades", [4, 8, 14, 40])
def test_a_worse_spectrum_has_no_smaller_condition_number(decades):
    spread = torch.logspace(0, -decades / 2, 12, dtype=torch.float64)
    Q, R = (torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q for _ in range(2))
    assert np.log10(spectrum(Q @ torch.diag(spread) @ R)[0]) == pytest.approx(min(decades, 12), abs=0.01)


def adapted_training(run, sizes):
    """A training of one step of an adapter by batches of these sizes."""
    training = small_training(run, steps=1, gradient_accumulation_steps=len(sizes))
    inject(training.network, ["0"], DoRASpec(rank=2))
    trained = dict(adapter_parameters(training.network))
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(5)).split(list(sizes))
    optimizer = training.parts["accelerator"].prepare(build_optimizer(trained, OptimizerConfig(lr=0.05)))
    schedule = Schedule(optimizer, ScheduleConfig(), 1)
    training.parts |= {"parameters": trained, "optimizer": optimizer, "schedule": schedule}
    training.parts["batch_at"] = x.__getitem__
    training.parts["loss"] = lambda x, _, net=training.network: mean_of(net(x).square().mean(dim=1))
    return training


def test_they_are_of_the_loss_of_a_whole_step_and_change_no_bit_of_it(tmp_path):
    found = []
    for sizes in ((32,), (2, 30)):
        run, plain = (new_run(tmp_path / f"{name}-{len(sizes)}") for name in ("watched", "plain"))
        training, other = adapted_training(run, sizes), adapted_training(plain, sizes)
        training.fit(wrap_gradients=measuring(training.parts["networks"], [0], run.path))
        other.fit()
        for name, parameter in training.parts["parameters"].items():
            assert torch.equal(parameter, other.parts["parameters"][name])
        assert read_gradients(plain.path) == {}
        found.append(read_gradients(run.path)[0][0])
    whole, parts = ({key: float(row[key]) for key in ("norm", "magnitude", "exact")} for row in found)
    assert parts == pytest.approx(whole, rel=1e-3)
