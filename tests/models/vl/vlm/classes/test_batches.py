"""Gradients of rows in a batch, and of micro-batches of a step, beside those of each row alone, of every class."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from dora_mm.config.training import TrainConfig
from dora_mm.data.vl.example import Example
from dora_mm.models.vl.vlm.loading import completed
from dora_mm.train.loop import LossModule, accumulate
from tests.documented.vlm_classes import TRAINED, built, named
from tests.shared.data.vlm_rows import write_images
from tests.shared.vl.equalities import EXAMPLES, adapted, batch_of, opened, randomize_all

IN_FLOAT = ("inkling2", "inkling2_loop", "kosmos-2", "nemotron_h_omni")  # classes that do not run in float64
PARTLY_IN_FLOAT = ("gemma3n", "gemma4", "kimi_k25")  # classes that cast parts of their passes to float32
THIRD = Example("3", ("square.png",), "How many dogs are there in this picture?", ("two or three",), (1.0,))
FAST = ("hunyuan_vl",)  # whose class takes another number for an image that is not the first of a batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("classes")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("pictures"))


def opened_in_double(kind, folder):
    """A tiny model with random adapters in all parts, in float64 where its class runs in that, and their parameters."""
    vlm = opened(built(named(kind), folder))
    trained = adapted(vlm, list(vlm.target_maps["model"].parts))
    randomize_all(vlm)
    if kind not in IN_FLOAT:
        vlm.network.config = vlm.config.model_copy(update={"dtype": "float64"})
        vlm.model.double()
    return vlm, trained.parameters


def gradients(vlm, parameters, images, examples):
    """The gradients of the sum of the losses of rows, and what a mean divides it by."""
    loss = vlm.loss(batch_of(vlm, images, examples), torch.Generator())
    return torch.autograd.grad(loss.total, list(parameters.values()), materialize_grads=True), loss.count


def check_close(parameters, found, expected, tolerance):
    largest = max(float(gradient.norm()) for gradient in expected)
    assert largest > 0
    for name, one, other in zip(parameters, found, expected, strict=True):
        assert (one - other).norm() <= tolerance * (other.norm() + 1e-4 * largest), name


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in TRAINED]
)
def test_gradients_of_a_batch_and_of_a_step_are_the_sums_of_those_of_its_rows(kind, folder, images):
    vlm, parameters = opened_in_double(kind, folder)
    tolerance = 1e-4 if kind in IN_FLOAT else 1e-6 if kind in PARTLY_IN_FLOAT else 1e-9
    alone, counts = zip(*(gradients(vlm, parameters, images, [row]) for row in (*EXAMPLES, THIRD)), strict=True)
    both, _ = gradients(vlm, parameters, images, EXAMPLES)
    check_close(parameters, both, [a + b for a, b in zip(*alone[:2], strict=True)], tolerance)

    batches = [batch_of(vlm, images, rows) for rows in (EXAMPLES, [THIRD])]
    config = TrainConfig(steps=1, batch_size=2, gradient_accumulation_steps=2)
    accumulate(Accelerator(cpu=True), LossModule(vlm.networks, vlm.loss), config, 0, 0, batches.__getitem__)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
    step = [sum(of_rows) / sum(counts) for of_rows in zip(*alone, strict=True)]
    check_close(parameters, found, step, max(tolerance, 1e-6))  # the loop divides by a count in float32


def test_a_batch_normalisation_reads_a_gradient_in_any_layout():
    """PyTorch 2.13 reads that of one image whose channels lie last in the wrong order, on a CPU."""
    model = nn.Sequential(nn.BatchNorm2d(8)).eval()
    model.config = SimpleNamespace(model_type="fast_vlm")
    nn.init.uniform_(completed(model)[0].weight)
    pixels = torch.randn(1, 8, 2, 3, requires_grad=True)
    gradient = torch.randn(1, 6, 8).permute(0, 2, 1).unflatten(2, (2, 3))
    output = model(pixels)
    (found,) = torch.autograd.grad(output, pixels, gradient, retain_graph=True)
    (expected,) = torch.autograd.grad(output, pixels, gradient.contiguous())
    torch.testing.assert_close(found, expected)
