"""Adapter files for other tools, written only where the tool computes the same weights from them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.linalg import vector_norm
from tqdm import tqdm

from dora_mm.core.spec import DoRASpec
from dora_mm.formats.adapter_file import located
from dora_mm.formats.algebra import exact
from dora_mm.formats.algebra.fit import fitted_adapter, low_rank
from dora_mm.formats.algebra.rows import in_rows
from dora_mm.formats.commands import beside
from dora_mm.formats.commands.export_check import DTYPES, ExportCheck, ToolErrors, check_peft_takes
from dora_mm.formats.commands.loading import readers_of
from dora_mm.formats.commands.verify import open_base
from dora_mm.formats.files.base_weights import BaseWeights, write_merged
from dora_mm.formats.files.checks import is_finite
from dora_mm.formats.files.tensor_file import PICKLES
from dora_mm.formats.naming.names import ModuleGroup, Name, architecture_of
from dora_mm.formats.naming.spellings import Names
from dora_mm.formats.reader import LayerReader
from dora_mm.formats.state import LayerState
from dora_mm.formats.tokens import file_beside, write_beside
from dora_mm.formats.tools import comfy, export_of, tool_of
from dora_mm.formats.tools.parts import NO_LOW_RANK
from dora_mm.formats.tools.peft import FILE_NAME as PEFT_FILE
from dora_mm.formats.tools.tool import Contents, Export, Written, write_files
from dora_mm.registries.tools import TARGETS, no_entry
from dora_mm.utils.folders import written_at_once


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        files: What was written.
        num_modules: The number of adapted modules.
        errors: What the tools compute from it.
        on_base: Whether the errors are those over the base model; else a random weight took its place.
        usage: What a person has to know who loads the files; empty where there is nothing special.
        left_out: The names in the old file of what has no place in the new one, with `allow_lossy`.
    """

    files: tuple[Path, ...]
    num_modules: int
    errors: tuple[ToolErrors, ...] = ()
    on_base: bool = True
    usage: str = ""
    left_out: tuple[str, ...] = ()


@torch.no_grad()
def convert(
    source: str | Path,
    target_path: str | Path,
    *,
    to: str,
    base: str | Path | Mapping[Name, Tensor] | None = None,
    axis: str | None = None,
    allow_lossy: bool = False,
    strength: float = 1.0,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
) -> Conversion:
    """Writes an adapter file in the form of another tool.

    What is written is given to the tool's own formula, and compared with the weight that the adapter means. Modules are
    read, converted and written one at a time.

    Args:
        source: The adapter file of any tool, or its folder.
        target_path: A file where it ends in `.safetensors`, else a folder; for `merged` whatever the base is.
        to: A name in `registries.tools.TARGETS`.
        base: The model: a folder, a single-file checkpoint, a hub name, or weights by name. The targets comfy,
            comfy-2025, diff, lora and merged need it, and all others for some adapters; the errors are then those on
            this model.
        axis: The axis of the magnitudes, `out` or `in`, where their shape does not say it.
        allow_lossy: Whether to write a file from which the tool computes something else at strength 1.
        strength: The strength of the adapter that becomes strength 1.
        rank: The rank of target lora; of others the rank at which magnitudes of input columns are fitted anew as
            magnitudes of output rows, with `allow_lossy`.
        energy: For target lora, the share of ||W' - W0||^2 to keep in each module, instead of a rank.
        dtype: float32, float16 or bfloat16; None: float16 for diff, else float32.

    Returns:
        The files, and what the tools compute from them.

    Raises:
        ValueError: The adapter, the model or a setting cannot be used, or the target cannot hold the adapter. Nothing
            is written then.
    """
    _check_settings(to, rank, energy, dtype, strength, base=base is not None, allow_lossy=allow_lossy)
    weights = None if base is None else open_base(base)
    layers = LayerReader(source, weights, axis)
    if half := comfy.other_half(layers.file.header):
        raise ValueError(f"{layers.file.path}: {half}: convert the file that both were made from")
    if to == "merged":
        left_out = beside.leave_out(layers, to, None, allow_lossy=allow_lossy)
        return replace(_merge(layers, Path(target_path), strength), left_out=left_out)
    exports = _exports(to, layers)
    if exports[0].file_name == PEFT_FILE:
        with located(str(layers.file.path)):
            method = "lora" if to == "lora" or not layers.any_magnitude() else "dora"
            names = [name for name in layers.names() if not layers.transposed(name)]  # those are refused for that
            check_peft_takes(layers.weights, names, method)
    left_out = beside.leave_out(layers, to, exports[0], allow_lossy=allow_lossy)
    lossy = _LowRank(rank, energy) if rank or energy else None
    if lossy and to != "lora" and not _needs_fit(layers, exports[0]):
        raise ValueError(f"target {to} holds {layers.file.path} as it is: leave --rank out")
    writer = _Writer(layers, exports, to, strength, dtype, lossy)
    if to == "comfy" and not layers.any_magnitude() and not _needs_fit(layers, exports[0]):
        raise ValueError(f"{layers.file.path} is plain LoRA, which needs no pair: use --to kohya")
    words = layers.file.tokens if exports[0].holds.tokens == "beside" else ()
    files = _new_files(Path(target_path), exports, words)
    with _filled(files[0].parent) as folder:
        check = _check(writer, layers, to, allow_lossy=allow_lossy)
        writer.write([folder / file.name for file in files[: len(exports)]], check)
    usage = _usage(exports, [file.name for file in files[: len(exports)]], writer.axes)
    return Conversion(tuple(files), len(layers.names()), check.result(), weights is not None, usage, left_out)


def _check_settings(
    to: str,
    rank: int | None,
    energy: float | None,
    dtype: str | None,
    strength: float,
    *,
    base: bool,
    allow_lossy: bool,
) -> None:
    if to not in TARGETS:
        raise ValueError(no_entry("target", to, f"one of {', '.join(TARGETS)}"))
    given = {"--rank": rank, "--energy": energy, "--dtype": dtype, "--allow-lossy": allow_lossy or None}
    unused = {"merged": ("--rank", "--energy", "--dtype"), "lora": ("--allow-lossy",)}.get(to, ())
    if useless := [option for option in unused if given[option] is not None]:
        raise ValueError(f"{useless[0]} has no effect on --to {to}: leave it out")
    if to == "lora" and (rank is None) == (energy is None):
        raise ValueError("target lora needs the rank, or the share of energy to keep: give --rank or --energy")
    if rank is not None and rank < 1:
        raise ValueError(f"the rank must be at least 1, not {rank}")
    if rank is not None and to != "lora" and not allow_lossy:
        raise ValueError("--rank belongs to --to lora; with --allow-lossy it is that of a new fit of input columns")
    if energy is not None and (to != "lora" or not 0 < energy <= 1):
        raise ValueError(f"--energy is a share between 0 and 1 for --to lora, not {energy} for {to}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype is one of {', '.join(DTYPES)}, not {dtype}")
    if not math.isfinite(strength):
        raise ValueError(f"the strength must be a finite number, not {strength}")
    if not base and (to in ("merged", "lora", "comfy") or export_of(to).needs_base):
        raise ValueError(f"target {to} needs the base model: give it with --base")


def _exports(to: str, layers: LayerReader) -> tuple[Export, ...]:
    """The forms of the files; that of target lora is PEFT's for a single model and kohya's for a pipeline.

    Raises:
        ValueError: The form holds one network, and the adapter has several.
    """
    networks = list(dict.fromkeys(name.component for name in layers.names()))
    if to == "lora":
        form = export_of("peft" if networks == ["model"] else "kohya")
        return (replace(form, holds=replace(form.holds, both_methods=True), read_by=form.read_by[:1]),)
    if to != "peft" and "model" in networks and layers.weights is None:
        raise ValueError(
            f"{layers.file.path} does not say which network it adapts, and the names of {to} begin with that: give the "
            "pipeline or the network with --base"
        )
    if to == "comfy":
        return comfy.PAIR
    if to == "peft" and len(networks) > 1:
        found = ", ".join(networks)
        raise ValueError(f"{layers.file.path} adapts {found}, and a folder of PEFT's holds one: use another target")
    return (export_of(to),)


def _usage(exports: Sequence[Export], files: Sequence[str], axes: Collection[str]) -> str:
    """What a person has to know who loads the files, from their names and the axes of their magnitudes."""
    if len(exports) > 1:
        return comfy.usage_of_pair(*files)
    return "; ".join(filter(None, (tool_of(name).usage(axes) for name in exports[0].read_by)))


def _needs_fit(layers: LayerReader, export: Export) -> bool:
    """Whether the file has magnitudes of input columns or weights as they are, for which the form has no place."""
    file, columns = layers.file, {"in", "?"} if layers.axis == "in" else {"in"}
    return any(
        (not export.holds.columns and file.axis(module) in columns)
        or (not export.holds.diffs and bool(endings.keys() & NO_LOW_RANK))
        for module, endings in file.modules.items()
    )


def _check(writer: _Writer, layers: LayerReader, to: str, *, allow_lossy: bool) -> ExportCheck:
    """The check by the tools that know the names."""
    export, plain = writer.exports[0], to == "lora" or not layers.any_magnitude()
    architecture = architecture_of(layers.weights or layers.names())
    export = replace(export, read_by=readers_of(export.read_by, export, writer.groups, architecture, plain=plain))
    advice = "use --to merged" if to == "diff" else "use --to merged or --to diff, or --allow-lossy"
    strict = not allow_lossy and to != "lora"
    return ExportCheck(export, len(layers.names()), writer.dtype, strict=strict, advice=advice)


def _new_files(target: Path, exports: tuple[Export, ...], words: Iterable[str]) -> list[Path]:
    """The files to write, those of new tokens behind the others. Raises ValueError where one exists."""
    if target.suffix in (*PICKLES, ".gguf"):
        raise ValueError(f"OUT {target} is not a .safetensors file, and nothing else is written")
    folder, stem = (target.parent, target.stem) if target.suffix == ".safetensors" else (target, target.name)
    if len(exports) == 1:
        own = exports[0].file_name if folder == target else ""
        files = [folder / (own or f"{stem}.safetensors")]
    else:
        files = [folder / f"{stem}-{number}.safetensors" for number in range(1, len(exports) + 1)]
    if exports[0].file_name == PEFT_FILE and files[0].name != PEFT_FILE:
        raise ValueError(f"OUT {target} is a file, and PEFT's adapters are folders: leave .safetensors out")
    files += [file_beside(files[0].parent, word) for word in words]
    if existing := [file for file in files if file.exists()]:
        raise ValueError(f"OUT {existing[0]} exists already: name a new file or folder")
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir():
        raise ValueError(f"OUT {target} cannot be made, since {above} is a file")
    return files


@contextmanager
def _filled(folder: Path) -> Iterator[Path]:
    """Where the files of a folder are written: a new folder appears with all of them, or not at all."""
    if folder.exists():
        yield folder
    else:
        with written_at_once(folder) as partial:
            yield partial


def _merge(layers: LayerReader, target: Path, strength: float) -> Conversion:
    if not isinstance(layers.weights, BaseWeights):
        raise ValueError("target merged needs the base model as a folder, a file or a hub name: give it with --base")
    merged = _MergedWeights(layers, layers.weights, strength)
    write_merged(layers.weights, target, merged)
    return Conversion((target,), len(merged), (merged.errors(),))


class _MergedWeights(Mapping[Name, Tensor]):
    """The merged weights by name, computed when they are asked for, in the dtype of the base."""

    def __init__(self, layers: LayerReader, weights: BaseWeights, strength: float):
        self._layers, self._weights, self._strength = layers, weights, strength
        self._norms: dict[Name, tuple[float, float]] = {}  # of the rounding error and of the update

    def __getitem__(self, name: Name) -> Tensor:
        W0, transposed = self._weights[name], self._layers.transposed(name)  # read for this call: it is written over
        W0 = W0.T if transposed else W0
        layer = exact.fitted(self._layers.layer(name), W0)
        norms = [_merge_rows(part, W0[rows], self._strength) for rows, part in in_rows(layer, W0)]
        off, size = (math.hypot(*found) for found in zip(*norms, strict=True))
        if not math.isfinite(off) and not is_finite(W0):
            raise ValueError(f"the new weight of {name} is not finite in {W0.dtype}")
        self._norms[name] = off, size
        return W0.T if transposed else W0

    def errors(self) -> ToolErrors:
        """What rounding the merged weights to the dtype of the base has changed."""
        norms = {name: self._norms[name] for name in self}
        off, size = zip(*norms.values(), strict=True)
        layers = {str(name): e / n if n else e for name, (e, n) in norms.items()}
        dtypes = sorted({str(self._weights.dtype(name)).removeprefix("torch.") for name in self._norms})
        title = f"rounding to {' and '.join(dtypes)}"
        return ToolErrors(title, layers, math.hypot(*off) / (math.hypot(*size) or 1.0), {})

    def __iter__(self) -> Iterator[Name]:
        return iter(self._layers.names())

    def __len__(self) -> int:
        return len(self._layers.names())


def _merge_rows(layer: LayerState, W0: Tensor, strength: float) -> tuple[float, float]:
    """Writes W(t) over rows of W0; ||rounding error||, which is not finite where W(t) is not, and ||W(t) - W0||."""
    old = W0.to(torch.float32, copy=True)  # also of fp32, since W0 is written over
    W = exact.new_rows(layer, old, strength)
    W0.copy_(W)
    size = vector_norm(torch.sub(W, old, out=old))  # in the same memory: the fewer temporaries, the more a cache holds
    return float(vector_norm(old.copy_(W0).sub_(W))), float(size)


@dataclass(frozen=True)
class _LowRank:
    """How much of a weight that has no exact form is kept: a rank, or a share of its energy."""

    rank: int | None
    energy: float | None


class _Writer:
    """Writes the files of a conversion, module by module."""

    def __init__(
        self,
        layers: LayerReader,
        exports: tuple[Export, ...],
        to: str,
        strength: float,
        dtype: str | None,
        lossy: _LowRank | None,
    ):
        self.layers, self.exports, self.to, self.strength, self.lossy = layers, exports, to, strength, lossy
        self.axes: set[str] = set()  # of the magnitudes that were written
        self.dtype = getattr(torch, dtype or ("float16" if exports[0].difference else "float32"))
        self.memory = torch.empty(0, dtype=self.dtype)  # of differences
        self.groups = Names(layers.weights or ()).write(layers.names(), exports[0].spelling)
        self.one_method = not exports[0].holds.both_methods and layers.any_magnitude()

    def write(self, files: Sequence[Path], check: ExportCheck) -> None:
        """Writes the files."""
        source, place = self.layers.file, self.exports[0].holds.tokens
        more = [(key, source.tensor(key)) for key in source.embeddings] if place == "inside" else []
        if self.exports[0].holds.beside:
            more += beside.bias_tensors(self.layers, self.exports[0].spelling, self.strength, self.dtype)
        rows = {word: {t: source.tensor(key) for t, key in keys.items()} for word, keys in source.tokens.items()}
        header = write_beside(files[0].parent, rows) if place == "beside" else {}
        written = [Written(export, file, more, header) for export, file in zip(self.exports, files, strict=True)]
        write_files(written, self._modules(files[0].name, check), source.header, room=self.room())

    def _modules(
        self, file_name: str, check: ExportCheck
    ) -> Iterator[tuple[str, tuple[Name, ...], DoRASpec, list[dict[str, Tensor]]]]:
        """The modules of the files, as `write_files` takes them; then the rounding of all is checked."""
        source = self.layers.file.path
        for module, group in tqdm(self.groups.items(), file_name, unit="module", delay=2, disable=None):
            with located(f"{source}: {module}"):
                tensors, spec = self.tensors(module, group, check)
            yield module, group.names, spec, tensors
        with located(str(source)):
            check.check_rounding()

    def tensors(self, module: str, group: ModuleGroup, check: ExportCheck) -> tuple[list[dict[str, Tensor]], DoRASpec]:
        """The tensors of a module in each of the files, by the end of their keys, and its settings."""
        if any(self.layers.transposed(name) for name in group.names):
            raise ValueError("its base stores the weight transposed, as embeddings do: only --to merged can hold it")
        original, W0 = self.layers.fused(group, as_stored=self.exports[0].difference)
        layer = self.prepared(original, W0)
        self.axes |= {layer.axis} if "magnitude" in layer.tensors else set()
        tensors = [export.tensors(module, layer, W0) for export in self.exports]
        header = self.exports[0].header(Contents(dict.fromkeys(group.names, layer.spec), {}))
        return check.check(module, tensors, header, W0, (original, self.strength)), layer.spec

    def room(self) -> int:
        """More than the header can need: at most four tensors of a module, and the settings."""
        keys = [*self.groups, *self.layers.file.embeddings, *self.layers.file.biases]
        return 4096 + sum(4 * (len(key) + 130) for key in keys) + 2 * sum(map(len, self.layers.file.header.values()))

    def prepared(self, layer: LayerState, W0: Tensor) -> LayerState:
        """The adapter in the form that `Export.write` takes."""
        export, lossy = self.exports[0], self.lossy
        if export.difference:
            return LayerState(DoRASpec(method="full"), {"diff": self.unfilled(W0.shape)})
        if self.to == "lora":
            assert lossy is not None
            D = exact.difference(layer, W0, self.strength)
            if D.dim() == 1:  # of a norm
                return LayerState(DoRASpec(method="full"), {"diff": D})
            if D.norm() <= torch.finfo(D.dtype).eps * W0.norm():
                D = torch.zeros_like(D)  # rounding has full rank
            return low_rank(D, rank=lossy.rank, energy=lossy.energy)
        problem = self.problem(layer)
        if problem is None:
            if self.layers.weights is None and exact.depends_on_base(layer, self.strength, magnitude=self.one_method):
                raise ValueError("what it becomes depends on the weights of the base model: give it with --base")
            layer = exact.paper_form(layer, W0, self.strength, magnitude=self.one_method)
            return export.prepare(layer if export.holds.alpha else exact.folded(layer), W0)
        if lossy is None or lossy.rank is None:
            raise ValueError(
                f"{problem}, which this target cannot hold: use --to merged or --to diff, or fit it anew with --rank "
                "and --allow-lossy"
            )
        if self.layers.weights is None:
            raise ValueError(f"{problem}, and a new fit depends on the weights of the base model: give it with --base")
        return export.prepare(fitted_adapter(exact.new_weight(layer, W0, self.strength), W0, lossy.rank), W0)

    def unfilled(self, shape: torch.Size) -> Tensor:
        """Room for a difference, that of the last one where it is enough: new memory comes page by page, zeroed."""
        if len(self.memory) < shape.numel():
            self.memory = torch.empty(shape.numel(), dtype=self.dtype)
        return self.memory[: shape.numel()].view(shape)

    def problem(self, layer: LayerState) -> str | None:
        """What the form has no place for."""
        if layer.axis == "in" and not self.exports[0].holds.columns:
            return "its magnitude scales input columns"
        if layer.spec.method == "full" and not self.exports[0].holds.diffs:
            return "it is a difference of weights"
        return None
