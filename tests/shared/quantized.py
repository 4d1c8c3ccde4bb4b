"""Layers of 64 x 48 that packages have quantised."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts, FP8Linear, Fp8Quantize
from transformers.integrations.moe import use_experts_implementation


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


def fp8_tensors(name, weight, scales="float"):
    """A weight and its scales in blocks of 16 x 16, by name, as transformers quantises it."""
    config = SimpleNamespace(weight_block_size=(16, 16), scale_fmt=scales)
    return Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({name: weight.detach()})


def fp8(base, scales="float"):
    layer = FP8Linear(64, 48, block_size=(16, 16), scale_fmt=scales, has_bias=True)
    stored = fp8_tensors("weight", base.weight, scales)
    layer.weight.data, layer.weight_scale_inv.data = stored["weight"], stored["weight_scale_inv"]
    layer.bias.data = base.bias.data.clone()
    return layer.requires_grad_(False)


def fp8_experts(experts):
    """transformers' quantised experts in place of others, without biases."""
    kind = use_experts_implementation(FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    quantized = kind(config=experts.config, block_size=(16, 16))
    for name in ("gate_up_proj", "down_proj"):
        for key, tensor in fp8_tensors(name, getattr(experts, name)).items():
            getattr(quantized, key).data = tensor
    return quantized
