"""Layers of 64 x 48 that packages have quantised."""

import copy

import pytest
import torch
from torch import nn


def nf4(base, compute_dtype=torch.float32):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 48, quant_type="nf4", compute_dtype=compute_dtype)
    layer.weight.data = base.weight.data.clone()
    layer.bias.data = base.bias.data.clone()
    return layer.to("cpu")


def int8(base):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    layer.weight.data, layer.bias.data = base.weight.data.clone(), base.bias.data.clone()
    return layer.to("cpu")


def torchao_int8(base):
    torchao = pytest.importorskip("torchao.quantization")
    net = nn.Sequential(copy.deepcopy(base))
    torchao.quantize_(net, torchao.Int8WeightOnlyConfig())
    return net[0]
