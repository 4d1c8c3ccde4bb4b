"""Riemannian preconditioning against matrices inverted by hand, and what it is for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dora_mm import DoRASpec, adapter_parameters, inject
from dora_mm.config.training import OptimizerConfig
from dora_mm.train.optim import build_optimizer
from dora_mm.train.preconditioning import EPS, precondition


def pair(rank, inner, out, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    A, B = (nn.Parameter(torch.randn(*size, generator=g, dtype=dtype)) for size in ((rank, *inner), (out, rank)))
    A.grad, B.grad = torch.randn(A.shape, generator=g, dtype=dtype), torch.randn(B.shape, generator=g, dtype=dtype)
    return A, B


@given(rank=st.integers(1, 5), inner=st.sampled_from([(7,), (3, 2, 2)]), out=st.integers(1, 9))
def test_gradients_are_multiplied_by_the_inverses(rank, inner, out):
    A, B = pair(rank, inner, out)
    gA, gB, eye = A.grad.flatten(1).clone(), B.grad.clone(), torch.eye(rank, dtype=torch.float64)
    of_B, of_A = B.T @ B + EPS * eye, A.flatten(1) @ A.flatten(1).T + EPS * eye
    precondition(A, B)
    torch.testing.assert_close(A.grad.flatten(1), torch.linalg.inv(of_B) @ gA, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(B.grad, gB @ torch.linalg.inv(of_A), rtol=1e-6, atol=1e-6)


def test_the_step_of_the_product_does_not_depend_on_its_factors():
    """To first order in the step: B M and M^-1 A are the same update, and get the same one."""
    A, B = pair(3, (11,), 8)
    dW, M = torch.randn(8, 11, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    steps = []
    for own_A, own_B in ((A, B), (nn.Parameter(torch.linalg.inv(M) @ A.detach()), nn.Parameter(B.detach() @ M))):
        own_A.grad, own_B.grad = own_B.detach().T @ dW, dW @ own_A.detach().T
        precondition(own_A, own_B)
        steps.append(own_B.grad @ own_A + own_B @ own_A.grad)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_it_comes_before_the_optimizers_step_and_a_fresh_adapter_trains(method):
    """Adam divides by what it gets: with B = 0 the first step is that without; the second is not."""
    ends = []
    for name in ("riemannian", None):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(2, 4, 3))
        inject(network, ["0", "1"], DoRASpec(rank=2, method=method), backend="torch")
        parameters = adapter_parameters(network)
        optimizer = build_optimizer(parameters, OptimizerConfig(lr=0.1, weight_decay=0.0, preconditioner=name))
        x, image = torch.randn(3, 6), torch.randn(2, 2, 4, 4)
        seen = []
        for _ in range(2):
            (network[0](x).square().sum() + network[1](image).square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append({key: p.detach().clone() for key, p in parameters.items()})
        ends.append(seen)
    with_it, without = ends
    assert all(value.isfinite().all() for value in with_it[1].values())
    assert torch.equal(with_it[0]["0.lora_A"], without[0]["0.lora_A"])
    assert not torch.allclose(with_it[1]["0.lora_A"], without[1]["0.lora_A"], rtol=1e-3)
    assert not torch.allclose(with_it[1]["1.lora_B"], without[1]["1.lora_B"], rtol=1e-3)
