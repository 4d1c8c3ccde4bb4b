"""The state of networks while their adapters are trained."""

import torch
from torch import nn

from dora_mm.adapting.files import load_trained, save_trained
from dora_mm.adapting.networks import adapt, train_mode
from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import TrainVLConfig
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.sampling.answers import answer_all


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


def test_parameters_that_were_trained_themselves_are_loaded_as_they_were_trained(tiny_vlm, tmp_path):
    """A norm's scale near 1 changes in steps of 0.4 % in bfloat16, which is more than most trainings change it by."""
    settings = {"path": str(tiny_vlm("qwen2_5_vl")), "dtype": "bfloat16"}
    config = TrainVLConfig.model_validate(
        {
            "pipeline": "train_vl",
            "name": "test",
            "model": settings,
            "adapter": {
                "rank": 2,
                "extra_trainable": ["norms"],
                "parts": {"text.attn": {}, "connector": {"method": "full"}},
            },
            "data": {"train": {"format": "chat", "file": "unread.json"}},
            "optimizer": {"lr": 0.1},
            "train": {"steps": 1, "batch_size": 1, "mixed_precision": "bf16"},
        }
    )
    model = VLM(VLMModelConfig.model_validate(settings))
    trained = adapt(model.networks, model.target_maps, config.adapter, seed=0, backend="torch")
    with torch.no_grad():
        for parameter in trained.parameters.values():
            parameter += 1e-3
    save_trained(trained, config, model, tmp_path)

    loaded = VLM(VLMModelConfig.model_validate(settings))
    load_trained(loaded, tmp_path, backend="torch")
    found = dict(loaded.model.named_parameters())
    for name in trained.extra["model"]:
        assert torch.equal(found[name], model.model.get_parameter(name)), name
