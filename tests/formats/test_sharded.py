"""Models that FSDP2 has sharded: every process calls save_adapter, and the file has whole tensors."""

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

from dora_mm import DoRASpec, inject, load_adapter, save_adapter
from dora_mm.core import adapted_layers
from tests.shared import reference
from tests.shared.two_processes import needs_fsdp

pytestmark = needs_fsdp
PROCESSES = 2


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    inject(model, ["0", "1"], DoRASpec(rank=3, alpha=5))
    for seed, layer in enumerate(adapted_layers(model).values()):
        reference.randomize(layer, seed=seed)
    return model


def save_sharded(rank: int, folder: str):
    """What each process runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    model = trained()
    fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
    assert adapted_layers(model)["0"].lora_A.to_local().shape[0] < 3
    model(torch.ones(2, 6))  # after which FSDP keeps the parameters of the root gathered
    path = save_adapter(model, Path(folder) / "peft", format="peft", extra_parameters=["0.bias"])
    assert path.is_file()  # for every process, once save_adapter has returned
    save_adapter(model, Path(folder) / "native", format="native")
    with pytest.raises(ValueError, match="pass"):
        save_adapter(model, Path(folder) / "refused", format="diffusers")
    load_adapter(model, Path(folder) / "native")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_the_file_of_a_sharded_model_is_that_of_a_whole_one(tmp_path):
    multiprocessing.spawn(save_sharded, (str(tmp_path),), nprocs=PROCESSES)
    expected, x = trained(), torch.randn(2, 6)
    for format in ("peft", "native"):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        load_adapter(base, tmp_path / format)
        assert torch.equal(base(x), expected(x))
    assert not (tmp_path / "refused").exists()
