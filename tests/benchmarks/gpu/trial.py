"""Whether our layer computes here what it should, against float64 and without pytest: the first entry of `make gpu`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dora_mm.core import Adapter
from tests.benchmarks.contenders import Case, our_layer
from tests.benchmarks.gpu.run import Row, Run, name_of, show
from tests.shared import reference

CASES = (  # an odd one, one for the single kernel, one for the vendor's product
    Case("odd sizes", 43, 86, 70, 5),
    Case("SDXL 640", 640, 640, 1024, 8),
    Case("8B LLM, q", 4096, 4096, 512, 16),
)
TINY = (Case("tiny", 48, 32, 24, 4),)
TENSORS = ("y", "dx", "dA", "dB", "dm")


def run(run: Run) -> None:
    """Saves the error of the output and of each gradient, and counts those that are too large as faults."""
    if run.device.type == "cuda":
        print(torch.cuda.get_device_properties(run.device), f"\ntorch {torch.__version__}", flush=True)
    for case in (TINY if run.dry else CASES) if run.backend else ():
        rows = errors(run, case)
        run.save(rows)
        show(rows)
        for row in rows:
            if not float(row["error"]) < float(row["bound"]):  # NaN included
                run.fail(f"{case.name}: the error of {row['tensor']} is {row['error']} of it, above {row['bound']}")


def errors(run: Run, case: Case) -> list[Row]:
    """A row per tensor: the norm of its error as a share of its own, by our backend and by plain torch.

    The bound is that of tests/kernels: in half precision A, s B and g dY are rounded to it once more.
    """
    torch.manual_seed(0)
    base = nn.Linear(case.num_in, case.num_out, device=run.device, dtype=run.dtype).requires_grad_(False)
    x = torch.randn(case.num_tokens, case.num_in, device=run.device, dtype=run.dtype, requires_grad=True)
    dY = torch.randn(case.num_tokens, case.num_out, device=run.device, dtype=run.dtype)
    layers = [
        reference.randomize(our_layer(base, case.rank, "dora", kind).to(run.device)) for kind in (run.backend, "torch")
    ]
    found, plain = (results(layer(x), [x, layer.lora_A, layer.lora_B, layer.magnitude], dY) for layer in layers)
    right = exact(layers[0], base, x, dY)
    bound = f"{2 * torch.finfo(run.dtype).eps:.1e}"
    return [
        {"case": case.name, "dtype": name_of(run.dtype), "tensor": name}
        | {
            "error": f"{reference.relative_error(a, c):.1e}",
            "plain torch": f"{reference.relative_error(b, c):.1e}",
            "bound": bound,
        }
        for name, a, b, c in zip(TENSORS, found, plain, right, strict=True)
    ]


def results(y: Tensor, of: list[Tensor], dY: Tensor) -> list[Tensor]:
    return [y, *torch.autograd.grad(y, of, dY)]


def exact(layer: nn.Module, base: nn.Linear, x: Tensor, dY: Tensor) -> list[Tensor]:
    """The same from the textbook formula in float64."""
    A, B, m, x = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B, layer.magnitude, x))
    y = F.linear(x, reference.merged_weight(base.weight, Adapter(A, B, m)), base.bias.double())
    return results(y, [x, A, B, m], dY.double())
