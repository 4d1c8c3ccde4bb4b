"""The state of networks while their adapters are trained."""

import torch
from torch import nn

from dora_mm.sampling.answers import answer_all
from dora_mm.tasks.vl_adapters import train_mode


def tower() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())


def test_training_keeps_the_statistics_of_batch_normalization():
    network = tower()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    train_mode([network])
    network(torch.randn(2, 3, 4, 4))
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    assert network[2].training


def test_a_validation_leaves_every_module_in_its_mode():
    network = tower()
    train_mode([network])
    answer_all({}, [network], {}, batch_size=1)
    assert [module.training for module in network] == [True, False, True]
