"""Generators as functions of the seed and the step."""

import torch

from dora_mm.utils.randomness import generator


def test_generators_depend_on_each_argument():
    base = torch.rand(4, generator=generator(1, 2, "a"))
    assert torch.equal(base, torch.rand(4, generator=generator(1, 2, "a")))
    for other in (generator(2, 2, "a"), generator(1, 3, "a"), generator(1, 2, "b")):
        assert not torch.equal(base, torch.rand(4, generator=other))
