"""The full-size SDXL UNet on this machine: random weights, two DoRA training steps at 256 px.

In float32: a processor without bf16 products takes half a minute for a single convolution in bf16.
"""

import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dora_mm import DoRASpec, adapter_parameters, inject
from tests.shared.full_size import full_size_unet

STEPS, SIDE = 2, 256 // 8
LIMIT_GB = 16  # the weights take 10.3


@pytest.mark.slow
def test_two_training_steps_of_the_full_size_unet():
    """Runs in a separate process, so that its peak memory is that of this model."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_full_size"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print("\n".join(f"{name}: {value}" for name, value in result.items()))
    assert (result["num_modules"], result["num_parameters"]) == (560, 12_277_760)
    assert all(math.isfinite(loss) for loss in result["losses"])
    assert result["changed"] == 3 * 560
    assert result["peak_gb"] < LIMIT_GB


def main() -> None:
    torch.manual_seed(0)
    unet = full_size_unet().to_empty(device="cpu").requires_grad_(False)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                bound = parameter[0].numel() ** -0.5
                parameter.uniform_(-bound, bound)
    report = inject(unet, "sdxl-unet", DoRASpec(rank=8))
    print(report)
    unet.train()
    unet.enable_gradient_checkpointing()
    parameters = adapter_parameters(unet)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4)
    losses, seconds = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        losses.append(training_step(unet, optimizer))
        seconds.append(round(time.perf_counter() - start, 1))
    result = {
        "num_modules": report.num_modules,
        "num_parameters": report.num_parameters,
        "losses": losses,
        "changed": sum(not torch.equal(p, before[name]) for name, p in parameters.items()),
        "seconds": seconds,
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(result))


def training_step(unet, optimizer) -> float:
    latents, noise = torch.randn(1, 4, SIDE, SIDE), torch.randn(1, 4, SIDE, SIDE)
    conditions = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.tensor([[256.0, 256, 0, 0, 256, 256]])}
    predicted = unet(latents, torch.tensor([500]), torch.randn(1, 77, 2048), added_cond_kwargs=conditions).sample
    loss = (predicted - noise).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


if __name__ == "__main__":
    main()
