"""What is equal of every class that trains, tried on a tiny model with adapters in all parts.

A fresh adapter changes no bit; loss and gradients are those of autograd through the textbook formula; rows of a batch
have the losses and answers that they have alone; the merged model and PEFT compute what the adapter does.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import dora_mm
from dora_mm import formats
from dora_mm.adapting.networks import TrainedNetworks, adapt
from dora_mm.config.adapter import VLAdapterConfig
from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import DecodeConfig
from dora_mm.core import AdaptedLayer, adapted_layers
from dora_mm.core.functional import Adapter
from dora_mm.core.wrappers.attention import PROJECTIONS, PackedProjection
from dora_mm.core.wrappers.experts import DoRAExperts
from dora_mm.data.vl.example import Example
from dora_mm.models.vl.vlm.family import VLM
from tests.shared.reference import merged_weight, randomize

EXAMPLES = (
    Example("1", ("wide.png",), "What colour is it?", ("red",), (1.0,)),
    Example("2", ("tall.png",), "Is there a dog in the picture?", ("no",), (1.0,)),
)
# PEFT takes layers of these names for experts of transformers 4, also those of dense blocks and shared experts.
TAKEN_FOR_EXPERTS = ("glm4v_moe",)
EXPERTS = ("text.experts", "vision.experts")
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def learned_parts(base: Path, images: Path, scratch: Path) -> list[str]:
    """Checks the equalities of a class.

    Args:
        base: The folder of a tiny model.
        images: The folder of the pictures of EXAMPLES.
        scratch: An empty folder.

    Returns:
        The parts of its target map that have gradients.
    """
    vlm = opened(base)
    batch = batch_of(vlm, images, EXAMPLES)
    bare = losses(vlm, batch)
    parts = list(vlm.target_maps["model"].parts)
    trained = adapted(vlm, parts)
    assert torch.equal(losses(vlm, batch), bare)

    randomize_all(vlm)
    gradients = check_gradients(vlm, opened(base), batch, trained)
    ours = losses(vlm, batch)
    assert (ours - bare).abs().max() > 1e-3
    alone = [losses(vlm, batch_of(vlm, images, [example])) for example in EXAMPLES]
    torch.testing.assert_close(torch.cat(alone), ours, **CLOSE)
    answer = vlm.answerer("vqa", DecodeConfig(max_new_tokens=3), ())
    assert answer(EXAMPLES, str(images)) == [answer([example], str(images))[0] for example in EXAMPLES]
    others = [part for part in parts if part not in EXPERTS]
    if others == parts:
        check_peft(vlm, opened(base), batch, scratch)
    else:  # PEFT has no DoRA of experts
        without = opened(base)
        adapted(without, others)
        randomize_all(without)
        check_peft(without, opened(base), batch, scratch)
    dora_mm.merge(vlm.model)
    torch.testing.assert_close(losses(vlm, batch), ours, **CLOSE)
    paths = {name.removeprefix("model.").rpartition(".")[0] for name, found in gradients.items() if found.any()}
    learned = {module.part for module in trained.reports["model"].modules if module.path in paths}
    return [part for part in parts if part in learned]


def opened(base: Path) -> VLM:
    return VLM(VLMModelConfig(path=str(base)))


def adapted(vlm: VLM, parts: list[str], **settings: Any) -> TrainedNetworks:
    """Adapts parts of a model with fresh adapters of rank 2."""
    config = VLAdapterConfig.model_validate({"rank": 2, "parts": parts, **settings})
    return adapt(vlm.networks, vlm.target_maps, config, seed=0, backend="torch")


def randomize_all(vlm: VLM) -> None:
    for seed, layer in enumerate(adapted_layers(vlm.model).values()):
        randomize(layer, seed=seed)


def batch_of(vlm: VLM, images: Path, examples) -> Any:
    return vlm.batch("vqa", examples, str(images), [(example.answers[0], 1.0) for example in examples])


@torch.no_grad()
def losses(vlm: VLM, batch) -> Tensor:
    return torch.cat([vlm.network.row_losses(inputs, labels)[0] for inputs, labels, _ in batch.groups])


def check_gradients(vlm: VLM, plain: VLM, batch, trained: TrainedNetworks) -> dict[str, Tensor]:
    """Compares loss and gradients with those of a plain model that has the textbook's weights, and returns them."""
    names, values = trained.parameters.keys(), list(trained.parameters.values())
    loss = vlm.loss(batch, torch.Generator()).mean
    found = torch.autograd.grad(loss, values, allow_unused=True)
    set_textbook_weights(plain.model, adapted_layers(vlm.model))
    expected_loss = plain.loss(batch, torch.Generator()).mean
    expected = torch.autograd.grad(expected_loss, values, allow_unused=True)
    torch.testing.assert_close(loss, expected_loss, **CLOSE)
    largest = max(float(gradient.norm()) for gradient in expected if gradient is not None)
    for name, ours, theirs in zip(names, found, expected, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-5 * largest, name
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def set_textbook_weights(model: nn.Module, layers: dict[str, AdaptedLayer]) -> None:
    """Gives the layers of a plain model weights that are computed from the adapters of another one."""
    modules = dict(model.named_modules())
    packed: dict[str, dict[str, Tensor]] = {}
    for path, layer in layers.items():
        spec, (above, _, last) = layer.adaptation.spec, path.rpartition(".")
        adapter = Adapter(layer.lora_A, layer.lora_B, layer.magnitude, spec.alpha / spec.rank, 1.0, "detached")
        if isinstance(layer, DoRAExperts):
            set_textbook_experts(modules[above], layer, adapter)
            continue
        base = layer.matrix if isinstance(layer, PackedProjection) else layer.weight
        weight = merged_weight(base, adapter).to(base.dtype)
        if path in modules:
            del modules[path].weight
            modules[path].weight = weight
        else:
            packed.setdefault(above, {})[last] = weight
    for path, rows in packed.items():  # of an nn.MultiheadAttention
        attention: Any = modules[path]
        thirds = attention.in_proj_weight.chunk(3)
        weight = torch.cat([rows.get(name, third) for name, third in zip(PROJECTIONS, thirds, strict=True)])
        del attention.in_proj_weight
        attention.in_proj_weight = weight


def set_textbook_experts(experts: Any, layer: DoRAExperts, adapter: Adapter) -> None:
    """Gives experts of a plain model, which loops over them from now on, the textbook's weights."""
    matrices = layer.matrix.detach()
    pairs = zip(matrices, adapter.of_matrices(len(matrices)), strict=True)
    weight = torch.stack([merged_weight(matrix, own).to(matrix.dtype) for matrix, own in pairs])
    delattr(experts, layer.parameter)
    setattr(experts, layer.parameter, weight.mT if layer.transposed else weight)
    if hasattr(experts, "config"):
        experts.config._experts_implementation = "eager"


def check_peft(vlm: VLM, theirs: VLM, batch, folder: Path) -> None:
    """Compares with what PEFT computes, where its format can hold the adapter, or checks that it is refused."""
    if formats.about_format(vlm.networks, "peft"):
        return
    dora_mm.save_adapter(vlm.networks, folder, format="peft")
    if vlm.model_config.model_type in TAKEN_FOR_EXPERTS:
        with pytest.raises(ValueError, match="ParamWrapper does not work with use_dora"):
            PeftModel.from_pretrained(theirs.model, folder)
        return
    PeftModel.from_pretrained(theirs.model, folder)
    torch.testing.assert_close(losses(theirs, batch), losses(vlm, batch), **CLOSE)
