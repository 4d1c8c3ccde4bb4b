"""The memory of a training step by part, as a table."""

from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import nn

from dora_mm.adapting.sharding import Division
from dora_mm.config.training import OptimizerConfig
from dora_mm.core import AdaptedLayer
from dora_mm.formats.models import layers_of
from dora_mm.preview.streamed import StreamPlan, streamed_table
from dora_mm.preview.training import StepCost, num_bytes
from dora_mm.registries.optimizers import OPTIMIZERS
from dora_mm.train.optim import build_optimizer
from dora_mm.utils.tables import aligned_columns

SMALL_GPU = 7e9  # bytes of a step from which it is shown what streaming would save
PROCESS_NUMBERS = (2, 4, 8)  # for which the memory of a sharded training is shown


def memory_table(
    networks: Mapping[str, nn.Module],
    parameters: Mapping[str, nn.Parameter],
    optimizer: OptimizerConfig,
    cost: StepCost | None,
    *,
    stored: Mapping[int, int] | None = None,
    target_device: str | None = None,
    ema: bool = False,
    division: Division | None = None,
    plan: StreamPlan | None = None,
) -> str:
    """A text table of the memory of a training by part, where each part is, and the sum for the training's device.

    Args:
        networks: All networks of the model, by name; a tensor of several counts for the first.
        parameters: The trained parameters, by name.
        optimizer: The `optimizer` section of the config.
        cost: The cost of a step; None: the activations are left out.
        stored: The bytes of weights that will be quantised, by `id`.
        target_device: The device where a training of networks on the meta device would have them.
        ema: Whether an average of the trained parameters is kept.
        division: How processes divide the main network; None: they do not.
        plan: Which blocks of the main network wait in main memory; None: where a step is measured, which counts it.
    """
    rows = memory_rows(networks, parameters, optimizer, cost, stored=stored, ema=ema)
    device = next(iter(parameters.values())).device.type
    unstreamed = total = sum(size for _, where, size in rows if where == device)
    if plan and plan.waiting:
        rows.append((f"{len(plan.waiting)} of {len(plan.sizes)} blocks wait in main memory", device, -plan.freed))
        total -= plan.freed
    rows = [(name, target_device or where, size) for name, where, size in rows]
    rows.append(("together" if cost else "together, without activations", target_device or device, total))
    table = aligned_columns([("memory", "", "MB"), *((n, w, f"{s / 1e6:,.1f}") for n, w, s in rows)], num_text=2)
    if division is not None:
        return f"{table}\n\n{sharded_table(total, *division.sizes(stored or {}))}"
    if plan is None or cost is None or plan.is_measured or (unstreamed <= SMALL_GPU and not plan.waiting):
        return table
    return f"{table}\n\n{streamed_table(unstreamed, plan)}"


def memory_rows(
    networks: Mapping[str, nn.Module],
    parameters: Mapping[str, nn.Parameter],
    optimizer: OptimizerConfig,
    cost: StepCost | None,
    *,
    stored: Mapping[int, int] | None = None,
    ema: bool = False,
) -> list[tuple[str, str, int]]:
    """What a step has in memory: a description of each, its device and its bytes; see `memory_table`."""
    values, size = sum(p.numel() for p in parameters.values()), num_bytes(parameters.values())
    device = next(iter(parameters.values())).device.type
    state, width = optimizer_values(optimizer), 1 if OPTIMIZERS[optimizer.name].needs_gpu else 4
    kept = f"{state} numbers{' of 8 bits' if width == 1 else ''} each"
    rows = _frozen(networks, {id(parameter) for parameter in parameters.values()}, stored or {})
    rows.append((f"{values:,} trained", device, size))
    rows.append(("gradients", device, size))
    rows.append((f"optimizer state ({optimizer.name}, {kept})", device, state * width * values))
    rows += [("moving average", device, size)] if ema else []
    if cost is not None:
        rows.append((f"activations ({cost.source})", device, cost.activations))
    return rows


def sharded_table(total: int, divided: int, gathered: int) -> str:
    """A text table of what each process holds where several divide the frozen weights.

    Args:
        total: The bytes of a process that divides nothing.
        divided: The bytes of what is divided.
        gathered: How many of these a process has gathered at most, in addition to its own part.
    """
    rows = [("sharded over", "MB in each", "gathered")]
    for number in PROCESS_NUMBERS:
        size = total - divided + divided / number + gathered
        rows.append((f"{number} processes", f"{size / 1e6:,.1f}", f"{gathered / 1e6:,.1f}"))
    return aligned_columns(rows, num_text=1)


def _frozen(
    networks: Mapping[str, nn.Module], trained: Collection[int], stored: Mapping[int, int]
) -> list[tuple[str, str, int]]:
    """The frozen tensors of each network that has some: a description, their device and their bytes."""
    rows, seen = [], set(trained)
    for name, network in networks.items():
        stacked = [t for layer in layers_of(network).values() for t in _stacked(layer)]
        frozen = [p for p in (*network.parameters(), *network.buffers(), *stacked) if id(p) not in seen]
        seen |= {id(p) for p in frozen}
        counts = Counter[str]()
        for tensor in frozen:
            counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.is_floating_point()
        found = {dtype: count for dtype, count in sorted(counts.items()) if count}
        dtypes = ", ".join(f"{dtype} ({count:,})" if len(found) > 1 else dtype for dtype, count in found.items())
        if dtypes:
            values = sum(p.numel() for p in frozen)
            size = sum(stored.get(id(p), num_bytes([p])) for p in frozen)
            rows.append((f"{name}, {values:,} frozen in {dtypes}", frozen[0].device.type, size))
    return rows


def _stacked(layer: AdaptedLayer) -> list[torch.Tensor]:
    """The tensors of the adapters that are stacked on a layer, such as those of an assistant."""
    return [tensor for other in layer.adaptation.stacked.values() for tensor in other.tensors.values()]


def optimizer_values(config: OptimizerConfig) -> int:
    """How many numbers the optimizer keeps per trained parameter, found by one step of it on a small one."""
    if OPTIMIZERS[config.name].needs_gpu:  # those of 8 bits, which keep small parameters in float32
        return 2
    probe = nn.Parameter(torch.ones(3, 3))
    optimizer = build_optimizer({"probe": probe}, config)
    probe.grad = torch.ones(3, 3)
    optimizer.step()
    kept = optimizer.state[probe].values()
    return sum(torch.is_tensor(value) and value.numel() == probe.numel() for value in kept)
