"""Adapter files for other tools, written only where the tool computes the same weights from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dora_mm.core.spec import DoRASpec
from dora_mm.formats.adapter_file import located
from dora_mm.formats.algebra import exact
from dora_mm.formats.algebra.fit import Truncation, fitted_adapter, low_rank, resized
from dora_mm.formats.commands import extras
from dora_mm.formats.commands.export_check import DTYPES, ExportCheck, ToolErrors, check_peft_takes
from dora_mm.formats.commands.loading import readers_of
from dora_mm.formats.commands.merged import write_with_adapter
from dora_mm.formats.commands.verify import open_base
from dora_mm.formats.files.tensor_file import PICKLES
from dora_mm.formats.naming.names import ModuleGroup, Name, architecture_of
from dora_mm.formats.naming.spellings import Names
from dora_mm.formats.reader import LayerReader
from dora_mm.formats.state import LayerState
from dora_mm.formats.tokens import token_file, write_token_file
from dora_mm.formats.tools import export_of, tool_of
from dora_mm.formats.tools.peft import FILE_NAME as PEFT_FILE
from dora_mm.formats.tools.tool import Contents, Export, Written, write_file
from dora_mm.registries.tools import EXPORT_FORMATS, no_entry
from dora_mm.utils.atomic import already_there
from dora_mm.utils.folders import written_together
from dora_mm.utils.progress import tracked


@dataclass(frozen=True)
class Conversion:
    """The result of `convert`.

    Attributes:
        files: The files that were written.
        modules: The paths of the adapted modules, of all networks.
        errors: The errors of the weights that the tools compute from them.
        on_base: Whether the errors are those over the base model; else they are those over random weights.
        usage: Instructions for loading the files; empty where there are none.
        left_out: The names in the old file of what the new one cannot hold, with `allow_lossy`.
        ranks: The ranks of the modules, in order; none where they are those of the old file.
    """

    files: tuple[Path, ...]
    modules: tuple[str, ...]
    errors: tuple[ToolErrors, ...] = ()
    on_base: bool = True
    usage: str = ""
    left_out: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()

    @property
    def num_modules(self) -> int:
        return len(self.modules)


@dataclass(frozen=True)
class Settings:
    """The settings of a conversion: the arguments of `convert`."""

    to: str
    allow_lossy: bool = False
    strength: float = 1.0
    rank: int | None = None
    energy: float | None = None
    spectral: float | None = None
    dtype: str | None = None

    @property
    def keep(self) -> Truncation | None:
        """The singular values that are kept; None: all."""
        given = any(setting is not None for setting in (self.rank, self.energy, self.spectral))
        return Truncation(self.rank, self.energy, self.spectral) if given else None

    def check(self) -> None:
        """Checks what needs no file. Raises ValueError where a setting cannot be used."""
        if self.to not in EXPORT_FORMATS:
            raise ValueError(no_entry("export format", self.to, f"one of {', '.join(EXPORT_FORMATS)}"))
        fits = {"--rank": self.rank, "--energy": self.energy, "--spectral": self.spectral}
        given = {**fits, "--dtype": self.dtype, "--allow-lossy": self.allow_lossy or None}
        unused = {"merged": (*fits, "--dtype"), "diff": (*fits,), "lora": ("--allow-lossy",)}.get(self.to, ())
        if useless := [option for option in unused if given[option] is not None]:
            raise ValueError(f"{useless[0]} has no effect on --to {self.to}: leave it out")
        if self.to == "lora" and self.keep is None:
            raise ValueError("--to lora needs a rank: give --rank, or what to keep with --energy or --spectral")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"the rank must be at least 1, not {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"--energy is the share of the update to keep, above 0 and at most 1, not {self.energy}")
        if self.spectral is not None and not 0 <= self.spectral < 1:
            raise ValueError(f"--spectral is the share that may be lost, at least 0 and below 1, not {self.spectral}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"--dtype is one of {', '.join(DTYPES)}, not {self.dtype}")
        if not math.isfinite(self.strength):
            raise ValueError(f"the strength must be a finite number, not {self.strength}")


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
    spectral: float | None = None,
    dtype: str | None = None,
) -> Conversion:
    """Writes an adapter file in the form of another tool.

    What is written is given to the tool's own formula, and compared with the weight that the adapter means. Modules are
    read, converted and written one at a time.

    Args:
        source: The adapter file of any tool, or its folder.
        target_path: A file where it ends in `.safetensors`, else a folder; for `merged` whatever the base is.
        to: A name in `registries.tools.EXPORT_FORMATS`.
        base: The model: a folder, a single-file checkpoint, a hub name, or weights by name. The formats comfy,
            diff and merged need it, and all others for some adapters; the errors are then those on this
            model.
        axis: The axis of the magnitudes, `out` or `in`, where their shape does not say it.
        allow_lossy: Whether to write a file from which the tool computes something else at strength 1.
        strength: The strength of the adapter that becomes strength 1.
        rank: The largest rank. Modules of a higher one, and those that the format cannot hold, become the closest
            adapter of this rank: plain LoRA stays plain LoRA and needs no base, all else becomes DoRA, or plain LoRA
            for lora.
        energy: Of plain LoRA and for lora, the share of ||W' - W0||^2 to keep in each module.
        spectral: The same by the spectral norm: the share of it that what is left out may have.
        dtype: float32, float16 or bfloat16; None: float16 for diff, else float32.

    Returns:
        The files, and what the tools compute from them.

    Raises:
        ValueError: The adapter, the model or a setting cannot be used, or the format cannot hold the adapter. Nothing
            is written then.
    """
    settings = Settings(to, allow_lossy, strength, rank, energy, spectral, dtype)
    settings.check()
    check_base(to, base is not None)
    layers = LayerReader(source, None if base is None else open_base(base), axis)
    return written(layers, Path(target_path), settings)


def check_base(to: str, given: bool) -> None:
    """Raises ValueError where an export format needs the base model, and none is given."""
    if not given and (to == "merged" or (to != "lora" and export_of(to).needs_base)):
        raise ValueError(f"--to {to} needs the base model: give it with --base")


@torch.no_grad()
def written(layers: LayerReader, target: Path, settings: Settings) -> Conversion:
    """Writes an adapter, or the sum of several, with settings that have been checked; see `convert`."""
    to, keep = settings.to, settings.keep
    if to == "lora" and layers.weights is None and not layers.has_no_magnitude():
        raise ValueError("--to lora needs the base model for what is no plain LoRA: give it with --base")
    if to == "merged":
        left_out = extras.leave_out(layers, to, None, allow_lossy=settings.allow_lossy)
        errors = write_with_adapter(layers, target, settings.strength)
        return Conversion((target,), tuple(name.path for name in layers.names()), (errors,), left_out=left_out)
    export = _export(to, layers)
    if export.file_name == PEFT_FILE:
        with located(str(layers.path)):
            method = "lora" if to == "lora" or not layers.any_magnitude() else "dora"
            names = [name for name in layers.names() if not layers.transposed(name)]  # those are refused for that
            check_peft_takes(layers.weights, names, method)
    left_out = extras.leave_out(layers, to, export, allow_lossy=settings.allow_lossy)
    writer = _Writer(layers, export, settings)
    words = layers.extras().tokens if export.holds.tokens == "separate" else ()
    files = _new_files(target, export, words)
    with written_together(files[0].parent, last=files[0].name) as folder:
        check = _check(writer, layers, strict=not settings.allow_lossy and keep is None)
        writer.write(folder / files[0].name, check)
    usage = "; ".join(filter(None, (tool_of(name).usage(writer.axes) for name in export.read_by)))
    on_base = layers.weights is not None
    return Conversion(
        tuple(files),
        tuple(name.path for name in layers.names()),
        check.result(),
        on_base,
        usage,
        left_out,
        tuple(sorted(writer.ranks)),
    )


def _export(to: str, layers: LayerReader) -> Export:
    """The form of the file; that of lora is PEFT's for a single model and kohya's for a pipeline.

    Raises:
        ValueError: The form holds one network, and the adapter has several.
    """
    networks = list(dict.fromkeys(name.component for name in layers.names()))
    if to == "lora":
        form = export_of("peft" if networks == ["model"] else "kohya")
        return replace(form, holds=replace(form.holds, both_methods=True), read_by=form.read_by[:1])
    if to != "peft" and "model" in networks and layers.weights is None:
        raise ValueError(
            f"{layers.path} does not say which network it adapts, and the names of {to} begin with that: give the "
            "pipeline or the network with --base"
        )
    if to == "peft" and len(networks) > 1:
        found = ", ".join(networks)
        raise ValueError(f"{layers.path} adapts {found}, and a folder of PEFT's holds one: use another format")
    return export_of(to)


def _check(writer: _Writer, layers: LayerReader, *, strict: bool) -> ExportCheck:
    """The check by the tools that know the names."""
    export, as_lora = writer.export, writer.settings.to == "lora" or not layers.any_magnitude()
    architecture = architecture_of(layers.weights or layers.names())
    export = replace(export, read_by=readers_of(export.read_by, export, writer.groups, architecture, is_lora=as_lora))
    advice = "use --to merged" if export.difference else "use --to merged or --to diff, or --allow-lossy"
    return ExportCheck(export, len(layers.names()), writer.dtype, strict=strict, advice=advice)


def _new_files(target: Path, export: Export, words: Iterable[str]) -> list[Path]:
    """The files to write, those of new tokens behind that of the adapter. Raises ValueError where one exists."""
    if target.suffix in (*PICKLES, ".gguf"):
        raise ValueError(f"OUT {target} is not a .safetensors file, and nothing else is written")
    folder, stem = (target.parent, target.stem) if target.suffix == ".safetensors" else (target, target.name)
    own = export.file_name if folder == target else ""
    files = [folder / (own or f"{stem}.safetensors")]
    if export.file_name == PEFT_FILE and files[0].name != PEFT_FILE:
        raise ValueError(f"OUT {target} is a file, and PEFT's adapters are folders: leave .safetensors out")
    files += [token_file(files[0].parent, word) for word in words]
    if files[0].exists():  # the last to appear; the others may be there after a kill
        raise already_there(files[0], "OUT")
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir():
        raise ValueError(f"OUT {target} cannot be made, since {above} is a file")
    return files


class _Writer:
    """Writes the files of a conversion, module by module."""

    def __init__(self, layers: LayerReader, export: Export, settings: Settings):
        self.layers, self.export, self.settings, self.keep = layers, export, settings, settings.keep
        self.axes: set[str] = set()  # of the magnitudes that were written
        self.ranks: list[int] = []
        self.dtype = getattr(torch, settings.dtype or ("float16" if export.difference else "float32"))
        self.memory = torch.empty(0, dtype=self.dtype)  # of differences
        self.groups = Names(layers.weights or ()).write(layers.names(), export.spelling)
        self.one_method = not export.holds.both_methods and layers.any_magnitude()

    def write(self, file: Path, check: ExportCheck) -> None:
        """Writes the file."""
        found, storage = self.layers.extras(), self.export.holds.tokens
        more = list(found.embeddings.items()) if storage == "inside" else []
        if self.export.holds.extras:
            more += extras.bias_tensors(self.layers, self.export.spelling, self.settings.strength, self.dtype)
        header = write_token_file(file.parent, found.tokens) if storage == "separate" else {}
        written = Written(self.export, file, more, header)
        write_file(written, self._modules(file.name, check), self.layers.header, room=self.room(more))

    def _modules(
        self, file_name: str, check: ExportCheck
    ) -> Iterator[tuple[str, tuple[Name, ...], DoRASpec, dict[str, Tensor]]]:
        """The modules of the file, as `write_file` takes them; then the rounding of all is checked."""
        source = self.layers.path
        for module, group in tracked(self.groups.items(), f"writing {file_name}", "modules"):
            with located(f"{source}: {module}"):
                tensors, spec = self.tensors(module, group, check)
            yield module, group.names, spec, tensors
        with located(str(source)):
            check.check_rounding()

    def tensors(self, module: str, group: ModuleGroup, check: ExportCheck) -> tuple[dict[str, Tensor], DoRASpec]:
        """The tensors of a module in the file, by the end of their keys, and its settings."""
        if any(self.layers.transposed(name) for name in group.names):
            raise ValueError("its base stores the weight transposed, as embeddings do: only --to merged can hold it")
        original, W0 = self.layers.fused(group, as_stored=self.export.difference)
        layer = self.prepared(original, W0)
        self.axes |= {layer.axis} if "magnitude" in layer.tensors else set()
        self.ranks += [layer.spec.rank] if self.keep and "lora_A" in layer.tensors else []
        tensors = self.export.tensors(module, layer, W0)
        header = self.export.header(Contents(dict.fromkeys(group.names, layer.spec), {}))
        return check.check(module, tensors, header, W0, (original, self.settings.strength)), layer.spec

    def room(self, more: Iterable[tuple[str, Tensor]]) -> int:
        """More than the header can need: at most four tensors of a module, and the settings."""
        keys = [*self.groups, *(key for key, _ in more)]
        entries = [json.dumps(key) for key in keys]  # longer than in UTF-8
        return 4096 + sum(4 * (len(entry) + 130) for entry in entries) + 2 * len(json.dumps(dict(self.layers.header)))

    def prepared(self, layer: LayerState, W0: Tensor) -> LayerState:
        """The adapter in the form that `Export.write` takes."""
        export, strength = self.export, self.settings.strength
        if export.difference:
            return LayerState(DoRASpec(method="full"), {"diff": self.unfilled(W0.shape)})
        if self.keep and exact.has_no_magnitude(layer):
            layer, strength = self.shortened(exact.summed([(layer, strength)], None), self.keep), 1.0
        elif self.settings.to == "lora":
            return self.as_lora(layer, W0)
        problem = self.problem(layer)
        if problem is not None:
            return self.fitted(problem, layer, W0)
        if self.layers.weights is None and exact.depends_on_base(layer, strength, magnitude=self.one_method):
            raise ValueError("what it becomes depends on the weights of the base model: give it with --base")
        layer = exact.paper_form(layer, W0, strength, magnitude=self.one_method)
        return layer if export.holds.alpha else exact.folded(layer)

    def shortened(self, layer: LayerState, keep: Truncation) -> LayerState:
        """Plain LoRA with fewer singular values, where it has more than are kept."""
        return layer if keep.is_rank and layer.spec.rank <= (keep.rank or 0) else resized(layer, keep)

    def as_lora(self, layer: LayerState, W0: Tensor) -> LayerState:
        """The closest plain LoRA of what is none."""
        assert self.keep is not None
        if W0.dim() == 1:  # of a norm
            return exact.summed([(layer, self.settings.strength)], W0)
        D = exact.difference(layer, W0, self.settings.strength)
        if D.norm() <= torch.finfo(D.dtype).eps * W0.norm():
            D = torch.zeros_like(D)  # rounding has full rank
        return low_rank(D, self.keep)

    def fitted(self, problem: str, layer: LayerState, W0: Tensor) -> LayerState:
        """The closest DoRA of a rank, for an adapter that the form cannot hold."""
        if self.keep is None:
            raise ValueError(
                f"{problem}, which this format cannot hold: use --to merged or --to diff, or fit it anew with --rank"
            )
        if self.keep.rank is None or not self.keep.is_rank:
            raise ValueError(
                f"{problem}, and --energy and --spectral choose the rank of plain LoRA: give --rank, or use --to lora"
            )
        if self.layers.weights is None:
            raise ValueError(f"{problem}, and a new fit depends on the base model: give it with --base")
        return fitted_adapter(exact.new_weight(layer, W0, self.settings.strength), W0, self.keep.rank)

    def unfilled(self, shape: torch.Size) -> Tensor:
        """Room for a difference, that of the last one where it is enough: new memory comes page by page, zeroed."""
        if len(self.memory) < shape.numel():
            self.memory = torch.empty(shape.numel(), dtype=self.dtype)
        return self.memory[: shape.numel()].view(shape)

    def problem(self, layer: LayerState) -> str | None:
        """The reason why the form cannot hold an adapter, or why it must not be written as it is; None where it can."""
        holds, keep = self.export.holds, self.keep
        if layer.spec.method == "full":
            is_norm = next(iter(layer.tensors.values())).dim() == 1
            return "it is a difference of weights" if not holds.diffs or (keep and not is_norm) else None
        if layer.axis == "in" and not holds.columns:
            return "its magnitude scales input columns"
        too_high = keep and layer.spec.method == "dora" and layer.spec.rank > (keep.rank or 0)
        return f"it is a DoRA of rank {layer.spec.rank}" if too_high else None
