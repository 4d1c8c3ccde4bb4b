"""Several adapters as one: the sum of what they change, each with a weight."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dora_mm.formats.adapter_file import AdapterFile, adapter_folder, located
from dora_mm.formats.algebra import exact
from dora_mm.formats.commands.convert import Conversion, Settings, check_base, written
from dora_mm.formats.commands.verify import open_base
from dora_mm.formats.naming.names import NETWORKS, ModuleGroup, Name
from dora_mm.formats.reader import Bias, Extras, LayerReader
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools import FORMATS
from dora_mm.formats.tools.peft import CONFIG_NAME
from dora_mm.utils.json_text import parse_json


def combine(
    sources: Sequence[str | Path],
    target_path: str | Path,
    *,
    to: str,
    weights: Sequence[float] | None = None,
    base: str | Path | Mapping[Name, Tensor] | None = None,
    axis: str | None = None,
    allow_lossy: bool = False,
    rank: int | None = None,
    energy: float | None = None,
    spectral: float | None = None,
    dtype: str | None = None,
) -> Conversion:
    """Writes several adapters as one file, which computes W0 + sum_i w_i (W'_i - W0).

    Plain LoRAs become one whose rank is the sum of theirs, and DoRAs one DoRA of such a rank: both are exact, and the
    former needs no base model. What has no low rank, or magnitudes of rows and of columns in one module, becomes a
    difference. `rank`, and what else chooses one, makes the closest adapter of that.

    Args:
        sources: The adapter files of any tool, or their folders: at least two.
        target_path: See `convert`.
        to: A name in `registries.tools.EXPORT_FORMATS`.
        weights: The weight of each adapter, any finite number; None: 1.
        base: The model, as in `convert`; modules with magnitudes need it.
        axis: The axis of the magnitudes whose shape does not say it.
        allow_lossy: See `convert`.
        rank: The largest rank of the sum, as in `convert`.
        energy: The share of the sum to keep, as in `convert`.
        spectral: The share of its spectral norm that may be lost, as in `convert`.
        dtype: See `convert`.

    Returns:
        The file, and what the tools compute from it, compared with the sum.

    Raises:
        ValueError: An adapter, the model or a setting cannot be used, the adapters are for different models, or the
            format cannot hold their sum. Nothing is written then.
    """
    settings = Settings(to, allow_lossy, 1.0, rank, energy, spectral, dtype)
    settings.check()
    strengths = [1.0] * len(sources) if weights is None else list(weights)
    _check_weights(sources, strengths)
    check_base(to, base is not None)
    opened = None if base is None else open_base(base)
    files = [AdapterFile(source) for source in sources]
    unclear = [file for file in files if any(file.axis(module) == "?" for module in file.modules)]
    if axis is not None and not unclear:
        files[0].check_axis()
    readers = [LayerReader(file, opened, axis if file in unclear else None) for file in files]
    _check_networks(readers)
    return written(Sum(readers, strengths), Path(target_path), settings)


def _check_weights(sources: Sequence[str | Path], weights: Sequence[float]) -> None:
    if len(sources) < 2:
        raise ValueError("combine takes several adapters: use dora-mm convert, with --strength T, for one")
    if len(weights) != len(sources):
        raise ValueError(f"--weights has {len(weights)} numbers for {len(sources)} adapters: give one for each")
    if wrong := [weight for weight in weights if not math.isfinite(weight)]:
        raise ValueError(f"--weights are finite numbers, not {wrong[0]}")


def _check_networks(readers: Sequence[LayerReader]) -> None:
    """Raises ValueError where the adapters are for different networks, or some do not say for which."""
    found = {reader: {name.component for name in reader.names()} for reader in readers}
    every = set().union(*found.values())
    unnamed = [reader for reader, components in found.items() if "model" in components]
    if unnamed and every != {"model"}:
        raise ValueError(
            f"{unnamed[0].file.path} does not say which network it adapts, and others do: give the model with --base"
        )
    if every >= set(NETWORKS):
        one, other = (next(r.file.path for r in readers if network in found[r]) for network in NETWORKS)
        raise ValueError(f"{one} and {other} are adapters of different models")


class Sum(LayerReader):
    """The sum of several adapters, which is read as one is.

    Args:
        readers: The adapters, all over the same base.
        strengths: That of each.
    """

    def __init__(self, readers: Sequence[LayerReader], strengths: Sequence[float]):
        self.readers = readers
        self.weights, self.axis, self.reads_extras = readers[0].weights, None, False
        self._terms: dict[Name, list[tuple[LayerReader, float]]] = defaultdict(list)
        for reader, strength in zip(readers, strengths, strict=True):
            for name in reader.names():
                self._terms[name].append((reader, strength))
        self._modules = {name: (str(name), ModuleGroup((name,))) for name in self._terms}
        self._extras = _extras(readers, strengths)
        self._header = _header([reader.file for reader in readers], strengths)

    @property
    def path(self) -> Path:
        """The files, for messages."""
        return Path(" + ".join(str(reader.path) for reader in self.readers))

    @property
    def header(self) -> Mapping[str, str]:
        """The entries that the headers share, and the list of what was combined."""
        return self._header

    def extras(self) -> Extras:
        """The contents of the files besides low-rank adapters; new tokens have no strength."""
        return self._extras

    def any_magnitude(self) -> bool:
        """Whether a module of an adapter has a magnitude."""
        return any(reader.any_magnitude() for reader in self.readers)

    def has_no_magnitude(self) -> bool:
        """See `LayerReader.has_no_magnitude`."""
        return all(reader.has_no_magnitude() for reader in self.readers)

    def transposed(self, name: Name) -> bool:
        """Whether the base stores the weight (I, O)."""
        return any(reader.transposed(name) for reader, _ in self._terms.get(name, ()))

    def layer(self, name: Name) -> LayerState:
        """The sum in one module."""
        terms = [(reader.layer(name), strength) for reader, strength in self._terms[name]]
        terms = [(layer, strength) for layer, strength in terms if strength] or terms[:1]
        if len(terms) == 1 and terms[0][1] == 1:
            return terms[0][0]
        with located(f"{self.path}: {name}"):
            if all(exact.has_no_magnitude(layer) or layer.tensors.keys() == {"diff"} for layer, _ in terms):
                return exact.summed(_of_one_shape(terms), None)
            if self.weights is None:
                raise ValueError("the sum depends on the weights of the base model: give it with --base")
            W0 = self.base(name)
            return exact.summed([(exact.fitted(layer, W0), strength) for layer, strength in terms], W0)


def _of_one_shape(terms: Sequence[tuple[LayerState, float]]) -> list[tuple[LayerState, float]]:
    """Adapters that depend on no base, in the shape of the weight: some write A of a convolution (R, I, 1, 1)."""
    shapes = [
        layer.tensors["diff"].shape
        if "diff" in layer.tensors
        else torch.Size((len(layer.tensors["lora_B"]), *layer.tensors["lora_A"].shape[1:]))
        for layer, _ in terms
    ]
    W0 = torch.empty(max(shapes, key=len), device="meta")
    return [(exact.fitted(layer, W0), strength) for layer, strength in terms]


def _extras(readers: Sequence[LayerReader], strengths: Sequence[float]) -> Extras:
    norms, biases, embeddings = {}, {}, {}
    for reader, strength in zip(readers, strengths, strict=True):
        found = reader.extras()
        norms |= {str(name): None for name in reader.names() if reader.is_norm(name)}
        for bias in found.biases.values():
            key, change = f"{bias.name}.bias", strength * bias.change
            biases[key] = Bias(bias.name, change + (biases[key].change if key in biases else 0), bias.of_norm)
        for key, rows in found.embeddings.items():
            if not torch.equal(rows, embeddings.setdefault(key, rows)):
                raise ValueError(
                    f"{reader.path} and another adapter have different rows for {key}, and a new token has one set of "
                    "them: train one with another word"
                )
    return Extras(tuple(norms), biases, embeddings)


def _header(files: Sequence[AdapterFile], strengths: Sequence[float]) -> dict[str, str]:
    """The entries that the headers of files share, and the titles and strengths of the files."""
    first, *others = (file.header for file in files)
    header = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    configs = [parse_json(file.header.get(CONFIG_NAME, "{}"), CONFIG_NAME) for file in files]
    bases = {str(config.get("base_model_name_or_path")) for config in configs}
    if len(bases) == 1 and bases != {"None"}:
        header.setdefault("base_model", *bases)
    titles = [_title(file) for file in files]
    parts = [f"{strength:g} {title}" for strength, title in zip(strengths, titles, strict=True)]
    return {**header, "modelspec.merged_from": ", ".join(titles), "combined_from": " + ".join(parts)}


def _title(file: AdapterFile) -> str:
    """The title of a file: by its header, its name, or its folder where all files of its form have one name."""
    if title := file.header.get("modelspec.title") or file.header.get("ss_output_name"):
        return title
    if file.path.name not in [form.file_name for form in FORMATS.values()]:
        return file.path.stem
    folder = adapter_folder(file.path).resolve()
    folder = folder.parent if folder.name == "adapter" else folder
    return f"{folder.parent.name}-{folder.name}" if folder.name.isdecimal() else folder.name
