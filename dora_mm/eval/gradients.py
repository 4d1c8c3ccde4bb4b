"""Gradients with respect to whole weights, and what DoRA's norm makes of them (DoRA, Eq. 8 and 12).

With W' = diag(m / n) V, n the norms of the rows of V, and G = dL/dW':

    dL/dm = rowsum(G V) / n
    dL/dV = diag(m / n) (G - diag(rowsum(G V) / n^2) V)     exact: what points along a row is projected out
    dL/dV = diag(m / n) G                                   detached: n counts as a constant

G is never needed to train; it is the sum over tokens of dY x^T, which takes a product of the size of the layer's own.

A gradient of few tokens has few directions, and any matrix of full rank that is taken from it fills the rest. So what
the projection does to the spectrum stands beside a control: the same coefficients, along random rows instead of V's,
drawn several times for each matrix.
"""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dora_mm.core import DoRALinear
from dora_mm.core.functional import as_matrix, directions
from dora_mm.core.spec import DoRASpec
from dora_mm.utils.atomic import write_text
from dora_mm.utils.losses import PassResult
from dora_mm.utils.randomness import generator
from dora_mm.utils.tables import csv_records

log = logging.getLogger(__name__)
FOLDER = "gradients"  # of a run; one file for each step
MOST = 64  # matrices that are watched, evenly spaced: G has the size of the weight, in fp32
NUM_SAMPLES = 5  # of random rows for each matrix
NEGLIGIBLE = 1e-12  # eigenvalues below this share of the largest one are rounding


def method_of(spec: DoRASpec) -> str:
    """The method of a layer, with its rank where it has one: "dora, rank 4"."""
    return f"{spec.method}, rank {spec.rank}" if spec.method in ("dora", "lora") else spec.method


class GradientShape(NamedTuple):
    """Statistics of the gradient of one matrix, with respect to W' and to V.

    Attributes:
        norm: ||dL/dW'||.
        exact: ||dL/dV|| / ||dL/dW'||.
        detached: The same with n as a constant.
        along: The root of the share of ||dL/dW'||^2 that points along the rows of V, which the projection takes away.
        along_random: The same along random rows: the control, a mean over NUM_SAMPLES of them.
        sd_along_random: Its standard deviation between samples.
        condition: The largest eigenvalue of the second moments of dL/dW' over rows, over the smallest. What is below
            10^-12 of the largest is rounding, and counts as that much: 10^12 says "at least".
        condition_projected: The same for dL/dV, exact.
        condition_random: The same, with the parts along V's rows taken away along random rows instead: the control, a
            geometric mean over samples.
        sd_condition_random: The standard deviation of its common logarithm between samples.
        rank: Their effective rank: exp of the entropy of the eigenvalues' shares (Roy and Vetterli, 2007).
        rank_projected: The same for dL/dV, exact.
        rank_random: The same of the control, a mean over samples.
        sd_rank_random: Its standard deviation between samples.
        magnitude: The mean over rows of |dL/dm|.
    """

    norm: float
    exact: float
    detached: float
    along: float
    along_random: float
    sd_along_random: float
    condition: float
    condition_projected: float
    condition_random: float
    sd_condition_random: float
    rank: float
    rank_projected: float
    rank_random: float
    sd_rank_random: float
    magnitude: float


def gradient_shape(G: Tensor, V: Tensor, m: Tensor | None, matrix: str) -> GradientShape | None:
    """Computes it in float64.

    Args:
        G: dL/dW' (O, I).
        V: The directions W0 + s B A (O, I).
        m: The magnitude (O,); None: the norms of V, as without a magnitude, where W' is V.
        matrix: Its name, for random rows of its own.

    Returns:
        The numbers; None where the gradient is 0, or not finite, as in fp16 before the scale has settled.
    """
    G, V = G.double(), V.double()
    norm = torch.linalg.vector_norm(G)
    if not 0 < norm < math.inf:
        return None
    n = torch.linalg.vector_norm(V, dim=1, keepdim=True)
    units = torch.where(n > 0, V / n, 0)
    gain = torch.ones_like(n) if m is None else torch.where(n > 0, m.double().unsqueeze(1) / n, 1)
    dots = (G * units).sum(dim=1, keepdim=True)
    projected = gain * (G - dots * units)
    condition, rank = spectrum(G)
    condition_projected, rank_projected = spectrum(projected)
    samples = torch.tensor(
        [control(G, dots, gain, random_units(G, matrix, sample)) for sample in range(NUM_SAMPLES)], dtype=torch.float64
    )
    means, spreads = samples.mean(dim=0).tolist(), samples.std(dim=0).tolist()
    return GradientShape(
        norm=float(norm),
        exact=float(torch.linalg.vector_norm(projected) / norm),
        detached=float(torch.linalg.vector_norm(gain * G) / norm),
        along=float(torch.linalg.vector_norm(dots) / norm),
        along_random=means[0],
        sd_along_random=spreads[0],
        condition=condition,
        condition_projected=condition_projected,
        condition_random=10 ** means[1],
        sd_condition_random=spreads[1],
        rank=rank,
        rank_projected=rank_projected,
        rank_random=means[2],
        sd_rank_random=spreads[2],
        magnitude=float(dots.abs().mean()),
    )


def control(G: Tensor, dots: Tensor, gain: Tensor, rows: Tensor) -> tuple[float, float, float]:
    """The share of G along other rows, and what taking `dots` along these leaves: log10 of the condition, and rank."""
    along = torch.linalg.vector_norm((G * rows).sum(dim=1)) / torch.linalg.vector_norm(G)
    condition, rank = spectrum(gain * (G - dots * rows))
    return float(along), math.log10(condition), rank


def random_units(G: Tensor, matrix: str, sample: int) -> Tensor:
    """Random rows of length 1 in the shape of G: a function of the matrix's name and the number of the draw."""
    stream = generator(0, sample, f"rows in the place of those of {matrix}")
    rows = torch.randn(G.shape, generator=stream, dtype=torch.float64).to(G)
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def spectrum(G: Tensor) -> tuple[float, float]:
    """The condition number and the effective rank of the second moments of a matrix; NaN and 0 for zeros."""
    values = torch.linalg.eigvalsh(G.T @ G if G.shape[0] > G.shape[1] else G @ G.T)
    largest = values.max()
    if not largest > 0:
        return float("nan"), 0.0
    shares = values.clamp_min(0) / values.clamp_min(0).sum()
    smallest = values.min().clamp_min(NEGLIGIBLE * largest)
    return float(largest / smallest), float(torch.exp(torch.special.entr(shares).sum()))


class GradientWatch:
    """Sums dL/dW' of adapted linear layers over the passes of a step.

    Hooks read what a pass computes anyway: no bit of a training changes. With dropout it is the gradient as the inputs
    come in; of several processes, that of this one's rows. The sums are in main memory.

    Args:
        networks: The networks, by name.
    """

    def __init__(self, networks: Mapping[str, nn.Module]):
        layers = {
            f"{component}.{path}": layer
            for component, network in networks.items()
            for path, layer in network.named_modules()
            if isinstance(layer, DoRALinear) and not layer.is_base()
        }
        every = -(-len(layers) // MOST) or 1
        self.layers = {name: layers[name] for name in list(layers)[::every]}
        self.sums: dict[str, Tensor] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """A context whose passes are summed."""
        hooks = [layer.register_forward_hook(partial(self._watch, name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _watch(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._add, name, inputs[0].detach()))

    def _add(self, name: str, x: Tensor, dY: Tensor) -> None:
        G = (dY.detach().flatten(0, -2).float().t() @ x.flatten(0, -2).float()).cpu()
        self.sums[name] = G if name not in self.sums else self.sums[name].add_(G)

    @torch.no_grad()
    def rows(self, scale: float = 1.0) -> list[dict[str, str]]:
        """A row for each matrix that a gradient has reached; `scale`: what their losses were multiplied by."""
        found = []
        for name, layer in self.layers.items():
            if name not in self.sums:
                continue
            (adapter,) = layer.adapters()
            V, m = directions(as_matrix(layer.full_matrix()), adapter).cpu(), adapter.magnitude
            shape = gradient_shape(self.sums[name] / scale, V, None if m is None else m.cpu(), name)
            if shape is not None:
                about = {"method": method_of(layer.adaptation.spec)}
                numbers = {key: f"{value:.6g}" for key, value in shape._asdict().items()}
                found.append(about | {"matrix": name} | numbers)
        return found

    def write(self, file: Path, scale: float) -> None:
        """Writes the rows into a CSV file, or says that there are none."""
        if rows := self.rows(scale):
            file.parent.mkdir(exist_ok=True)
            write_text(file, csv_records(rows))
        else:
            what = "a gradient that is finite" if self.layers else "an adapted linear layer of plain weights"
            log.warning("train.gradients_at measures nothing in this step: there is not %s.", what)


def measuring(
    networks: Mapping[str, nn.Module], steps: Collection[int], run: Path
) -> Callable[[int, Callable[[], PassResult]], PassResult]:
    """The `wrap_gradients` callback of `fit` that writes statistics of the gradients of some steps.

    Args:
        networks: As of `GradientWatch`.
        steps: The numbers of finished steps at which they are measured.
        run: The run directory.
    """

    def wrap_gradients(step: int, passes: Callable[[], PassResult]) -> PassResult:
        if step not in steps:
            return passes()
        watch = GradientWatch(networks)
        with watch.open():
            result = passes()
        watch.write(file_of(run, step), result.scale.item())
        return result

    return wrap_gradients


def read_gradients(run: Path) -> dict[int, list[dict[str, str]]]:
    """The rows that a run has written, by step; none where it has watched nothing."""
    found = {}
    for file in sorted((run / FOLDER).glob("step-*.csv")):
        with file.open(newline="", encoding="utf-8") as text:
            found[int(file.stem.removeprefix("step-"))] = list(csv.DictReader(text))
    return found


def file_of(run: Path, step: int) -> Path:
    """The file of a step in a run."""
    return run / FOLDER / f"step-{step:06d}.csv"
