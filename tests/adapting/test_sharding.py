"""Which modules are gathered one at a time, and what a process then holds. Trainings are in tests/pipelines."""

from types import SimpleNamespace

import pytest
import torch

from dora_mm.adapting.networks import adapt
from dora_mm.adapting.sharding import division
from dora_mm.config.adapter import ImageAdapterConfig, VLAdapterConfig
from dora_mm.config.models import VisionConfig, VLMModelConfig
from dora_mm.models.vl.families import structure_of
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.preview.memory import sharded_table
from dora_mm.train.processes import check_can_shard


@pytest.fixture
def llava(tiny_vlm):
    """The networks of a tiny LLaVA without weights, with these parts adapted."""

    def adapted(**parts):
        structure = structure_of(VLMModelConfig(path=str(tiny_vlm("llava"))), VisionConfig())
        config = VLAdapterConfig.model_validate({"rank": 2, "parts": parts})
        return adapt(structure.networks, structure.target_maps, config, seed=0, backend="torch"), structure.target_maps

    return adapted


def names(found):
    return [type(block).__name__ for block in found.blocks]


def test_blocks_that_each_batch_reaches_are_gathered_one_at_a_time(llava):
    trained = llava(**{"text.attn": {}, "vision.attn": {}, "connector": {}})
    assert names(division(*trained)) == ["LlamaDecoderLayer"] * 2 + ["CLIPEncoderLayer"] * 2
    assert names(division(*trained, reaches_all=False)) == ["LlamaDecoderLayer"] * 2


def test_blocks_without_trained_parameters_are_not(llava):
    with pytest.raises(ValueError, match=r"train\.shard: no block of the network has frozen weights beside trained"):
        division(*llava(connector={}), reaches_all=False)


def test_the_main_network_of_images_is_divided(tiny):
    config = ImageAdapterConfig.model_validate({"rank": 2, "parts": ["unet.attn", "text_encoder.attn"]})
    trained = adapt(tiny.adaptable, tiny.target_maps, config, seed=0, backend="torch")
    found = division(trained, tiny.target_maps)
    assert found.network is tiny.unet
    assert set(names(found)) == {"BasicTransformerBlock"}


def test_each_process_holds_its_part_and_what_it_has_gathered(llava):
    trained = llava(**{"text.attn": {}})
    found = division(*trained, reaches_all=False)
    frozen = [p for p in found.network.parameters() if p not in found.trained]
    block = sum(p.numel() for p in found.blocks[0].parameters() if p not in found.trained)
    divided, gathered = found.sizes({})
    assert divided == 4 * sum(p.numel() for p in frozen)
    assert gathered == divided  # two blocks, and all else
    halved = {id(p): 2 * p.numel() for p in found.blocks[0].parameters()}
    assert found.sizes(halved) == (divided - 2 * block, gathered - 2 * block)
    lines = sharded_table(10_000_000, 8_000_000, 1_000_000).splitlines()
    assert lines[1].split() == ["2", "processes", "7.0", "1.0"]
    assert lines[3].split() == ["8", "processes", "4.0", "1.0"]


@pytest.mark.parametrize(("name", "differ"), [("llava", False), ("git", True), ("mllama", True)])
def test_classes_that_compute_in_groups_do_not_keep_step(tiny_vlm, name, differ):
    why = VLM(VLMModelConfig(path=str(tiny_vlm(name)))).nonuniform_reason
    assert (why is not None) == differ
    assert why is None or "computes the rows of a batch in groups" in why


def test_a_single_process_cannot_shard():
    alone = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"train\.shard divides the model among processes, and this is the only one"):
        check_can_shard(alone, SimpleNamespace(shard=True))
    check_can_shard(alone, SimpleNamespace(shard=False))
