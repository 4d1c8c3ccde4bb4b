"""Two processes: transformers' Trainer with DDP, and FSDP2, with the line and without."""

import copy
import json

import peft
import pytest
import torch
import torch.distributed as dist

import dora_mm
from dora_mm.peft import FusePeft, fixed_norms, fuse, layers
from tests.peft.test_steps import rows, tiny_llama, trained
from tests.shared.reference import relative_error
from tests.shared.two_processes import needs_fsdp, run_in_two

pytestmark = pytest.mark.slow


def train_in_trainer(rank, folder):
    layers.crossing = lambda *_: 0
    for name, callbacks in (("peft", []), ("fused", [FusePeft()])):
        model = tiny_llama()
        losses = trained(folder, model, callbacks, max_steps=20, ddp_backend="gloo")
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(losses))
            model.save_pretrained(folder / name)


def test_the_trainer(tmp_path):
    run_in_two(tmp_path, train_in_trainer, tmp_path)
    expected, found = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("peft", "fused"))
    assert len(found) == 20
    assert found == pytest.approx(expected, rel=2e-3)
    assert found[-1] < found[0]
    ids = rows(2)[0]["input_ids"][None]
    plain = [peft.PeftModel.from_pretrained(tiny_llama().unload(), tmp_path / name) for name in ("peft", "fused")]
    assert relative_error(*(model(ids).logits for model in plain)) < 2e-2


def train_sharded(rank, folder):
    from torch.distributed.fsdp import fully_shard

    layers.crossing = lambda *_: 0
    passes = []
    apply = layers.Scaled.apply
    layers.Scaled.apply = lambda *given: (passes.append(given), apply(*given))[1]
    theirs = tiny_llama()
    ours, found = copy.deepcopy(theirs), []
    dora_mm.fuse_peft(ours)
    ids = torch.stack([row["input_ids"] for row in rows(4)])[2 * rank : 2 * rank + 2]
    for model in (theirs, ours):
        for block in model.base_model.model.model.layers:
            fully_shard(block)
        fully_shard(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            with fixed_norms(model):
                loss = model(ids, labels=ids).loss
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert len(passes) == 3 * 14
    dist.barrier()


@needs_fsdp
def test_fsdp2(tmp_path):
    run_in_two(tmp_path, train_sharded, tmp_path)


def train_each_layer_sharded(rank, folder):
    """A and B are sharded on their own, as PEFT's policy for FSDP has it: B is not whole where a pass would read it."""
    from torch.distributed.fsdp import fully_shard

    layers.crossing = lambda *_: 0
    ours = tiny_llama()
    twin = copy.deepcopy(ours)
    for _, layer, name in fuse.adapters_of(ours):
        fully_shard(layer.lora_B[name])
    (layers_with_hooks,) = dora_mm.fuse_peft(ours).at_times.values()
    assert len(layers_with_hooks) == 14
    ids = rows(2)[0]["input_ids"][None]
    assert relative_error(ours(ids).logits, twin(ids).logits) < 1e-5


@needs_fsdp
def test_what_is_sharded_apart_is_pefts(tmp_path):
    run_in_two(tmp_path, train_each_layer_sharded, tmp_path)
