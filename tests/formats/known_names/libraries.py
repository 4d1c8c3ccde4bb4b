"""What diffusers, PEFT and LyCORIS do: their own loaders on the tiny networks."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Collection, Mapping
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from lycoris.wrapper import LycorisNetwork, create_lycoris_from_weights
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from dora_mm.formats.naming.names import underscored
from tests.formats.known_names.cases import ALPHA, RANK, Case, file_of, paths_of, put, times_ones
from tests.formats.known_names.networks import TINY, build, component_of, layers_of, network_of, pipeline_of, wide


@contextmanager
def silent():
    """Without the warnings of the libraries."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        diffusers.utils.logging.set_verbosity(before)


def by_diffusers(architecture: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The changes of the weights, by path, that `load_lora_weights` of the pipeline makes, but for loading the file.

    Raises:
        Exception: What diffusers raises.
    """
    pipeline, network, component = pipeline_of(architecture), build(architecture), component_of(architecture)
    named = {"unet_config": network.config} if "XL" in TINY[architecture].pipeline else {}
    with silent():
        found = pipeline.lora_state_dict(dict(tensors), **named)
        state, alphas = found[:2] if isinstance(found, tuple) else (found, None)
        if not all("lora" in key or "lokr" in key for key in state):  # what `load_lora_weights` looks for first
            raise ValueError("Invalid LoRA checkpoint")
        load = getattr(pipeline, f"load_lora_into_{component}")
        named = {"network_alphas": alphas} if "network_alphas" in inspect.signature(load).parameters else {}
        load(state, **{component: network}, adapter_name="default", **named)
        return _changes(network, build(architecture))


def converted(architecture: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The changes times a vector of ones, by path, from what `lora_state_dict` of the pipeline makes of a file."""
    with silent():
        found = pipeline_of(architecture).lora_state_dict(dict(tensors))
    start, end = f"{component_of(architecture)}.", ".lora_A.weight"
    paths = [key.removeprefix(start).removesuffix(end) for key in found if key.startswith(start) and key.endswith(end)]
    layers = layers_of(network_of(architecture))
    names = {path: f"{start}{path}.lora_" for path in paths if path in layers}
    return {path: times_ones(found[f"{name}A.weight"], found[f"{name}B.weight"]) for path, name in names.items()}


class Diffusers:
    """Its loader; what it makes of the weights is held to float64."""

    layers_alone = True
    forms = ("A", "A alpha", "A magnitude", "down alpha", "old", "lokr alpha")

    def __init__(self, checkout: Path | None = None):
        self.lost, self.raises = "", False

    def __call__(self, case: Case, paths: Collection[str], form: str) -> set[str]:
        """The paths of a case that it computes right, alpha apart: `lost` says whether it reads that."""
        self.lost, self.raises = "", False
        if not _is_written(case, form):
            return set()
        by_width = case.architecture in ("flux", "chroma") and form.startswith("down")  # kohya's Flux.1 has one
        tensors, meant = file_of(case, form, paths, wide(case.architecture) if by_width else None)
        try:
            found = (converted if by_width else by_diffusers)(case.architecture, tensors)
        except Exception:  # whatever it raises, it loads nothing
            self.raises = True
            return set()
        right = {path for path in meant if path in found and is_close(found[path], meant[path][1])}
        if not right and form.endswith(" alpha"):
            right = {path for path in meant if path in found and is_close(found[path], RANK / ALPHA * meant[path][1])}
            self.lost = "alpha" if right else ""
        groups = paths_of(case)
        return {path for path in paths if {name.path for name in groups[path].names} <= right}


def _is_written(case: Case, form: str) -> bool:
    """Whether there are files of a case in a form: what nobody writes is not tried."""
    unet = component_of(case.architecture) == "unet"
    others = ("", "base_model.model.", "diffusion_model.", "transformer.")
    if case.names not in ("own", "diffusers") or case.prefix not in ("lora_unet_", *(("unet.",) if unet else others)):
        return False
    if form == "lokr alpha":
        return case.architecture in ("flux2", "z-image")  # of which diffusers reads LoKr
    return not (form[0] == "A" and case.prefix.endswith("_")) and (
        form != "old" or case.prefix in ("unet.", "transformer.")
    )


def is_close(found: Tensor, meant: Tensor) -> bool:
    """Whether a change of a weight is that which is meant, up to the rounding of fp32."""
    return found.shape == meant.shape and bool((found - meant).norm() <= 1e-5 * meant.norm().clamp(min=1e-3))


def by_peft(architecture: str, folder: Path) -> dict[str, Tensor]:
    """The changes that `PeftModel.from_pretrained` makes."""
    with silent():
        network = PeftModel.from_pretrained(build(architecture), str(folder))
        return _changes(network.base_model.model, build(architecture))


def _changes(adapted: nn.Module, before: nn.Module) -> dict[str, Tensor]:
    """W' - W0 of the layers that were adapted."""
    weights = {path: layer.weight for path, layer in layers_of(before).items()}
    layers = {path: layer for path, layer in adapted.named_modules() if hasattr(layer, "base_layer")}
    for layer in layers.values():
        layer.merge()  # type: ignore
    return {path: (layer.base_layer.weight.double() - weights[path]).detach() for path, layer in layers.items()}  # type: ignore


def by_lycoris(case: Case, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The changes that `create_lycoris_from_weights` makes of a network whose names are those of the case."""
    network = network_of(case.architecture)
    if case.names == "own":
        network = nn.Module()
        for path, group in paths_of(case).items():
            weights = [network_of(case.architecture).get_submodule(name.path).weight for name in group.names]
            if weights[0].dim() > 1:  # type: ignore
                put(network, path, _layer(torch.cat(weights)))  # type: ignore
    before = LycorisNetwork.LORA_PREFIX
    LycorisNetwork.LORA_PREFIX = case.prefix.removesuffix("_")
    try:
        with silent():
            found, _ = create_lycoris_from_weights(1.0, "", network, weights_sd=dict(tensors))
    finally:
        LycorisNetwork.LORA_PREFIX = before
    weights = {underscored(path): layer.weight for path, layer in layers_of(network).items()}
    changes = {}
    for module in found.loras:
        W0 = weights[module.lora_name.removeprefix(case.prefix)]
        changes[module.lora_name] = (module.get_merged_weight(1.0, shape=W0.shape)[0] - W0).double().detach()
    return changes


def _layer(W: Tensor) -> nn.Module:
    out, inner, *kernel = W.shape
    kind = {0: nn.Linear, 2: nn.Conv2d, 3: nn.Conv3d}[len(kernel)]
    layer = kind(inner, out, *([tuple(kernel)] if kernel else []), bias=False)
    layer.weight.data.copy_(W)
    return layer


def peft_folder(folder: Path, tensors: Mapping[str, Tensor], rank: int) -> Path:
    """Writes a folder of PEFT's of plain LoRA whose alpha is the rank."""
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    modules = sorted({key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
