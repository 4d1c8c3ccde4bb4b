"""Adapted experts of every class that has some, beside its own loop over them, and beside PEFT's LoRA."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._pytree import tree_map_only

from dora_mm.core import adapted_layers
from dora_mm.core.wrappers.experts import DoRAExperts
from tests.shared.data.vlm_rows import write_images
from tests.shared.vl.equalities import EXAMPLES, adapted, batch_of, opened, randomize_all, set_textbook_weights

MIXTURES = (
    *(
        "qwen3_vl_moe",
        "qwen3_5_moe",
        "qwen3_omni_moe_thinker",
        "qwen4_exp",
        "llama4",
        "kimi_k25",
        "glm4v_moe",
        "glm5_next",
    ),
    *(
        "aria",
        "ernie4_5_vl_moe",
        "deepseek_ocr2",
        "unlimited_ocr",
        "step3p7",
        "minimax_m3_vl",
        "hy_v4_vl",
        "dots3_note",
    ),
    *("inkling_mm_model", "inkling2", "inkling2_loop", "muse_spark", "mistral_large4"),
)
IN_FLOAT = ("inkling2", "inkling2_loop")  # classes that cast to float32 in many places
OWN_FORWARD = ("llama4", "step3p7")  # classes that no `experts_implementation` reaches
CASES = [(name, "eager") for name in MIXTURES]
CASES += [(name, "batched_mm") for name in MIXTURES if name not in OWN_FORWARD]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("pictures"))


def compute_in_double(model: Any) -> None:
    """The language model and its head, from what they are given in float32: some towers compute in that alone."""
    text = model.get_decoder() or model.get_submodule("model.language_model")
    for module in (text, model.get_output_embeddings()):
        module.double()
        module.register_forward_pre_hook(cast_to_double, with_kwargs=True)


def cast_to_double(module, args, kwargs):
    return tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs))


def loss_of(vlm, batch) -> torch.Tensor:
    return sum(vlm.network.row_losses(inputs, labels)[0].sum() for inputs, labels, _ in batch.groups)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_loss_and_gradients_are_those_of_the_loop_over_experts(name, implementation, tiny_vlm, images):
    """In float64, with adapters in all parts of the text. In float32, grouped, in all parts: test_classes.py."""
    vlm, plain = opened(tiny_vlm(name)), opened(tiny_vlm(name))
    batch = batch_of(vlm, images, EXAMPLES)
    for each in (vlm, plain):
        if name not in IN_FLOAT:
            compute_in_double(each.model)
        each.model.set_experts_implementation(implementation)
    trained = adapted(vlm, [part for part in vlm.target_maps["model"].parts if part.startswith("text.")])
    randomize_all(vlm)
    layers = adapted_layers(vlm.model)
    assert any(isinstance(layer, DoRAExperts) for layer in layers.values())
    values = list(trained.parameters.values())
    loss = loss_of(vlm, batch)
    found = torch.autograd.grad(loss, values, allow_unused=True)
    set_textbook_weights(plain.model, layers)
    expected_loss = loss_of(plain, batch)
    expected = torch.autograd.grad(expected_loss, values, allow_unused=True)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6 if name in IN_FLOAT else 1e-10, atol=0)
    relative, least = (1e-3, 1e-5) if name in IN_FLOAT else (1e-8, 1e-12)
    largest = max(float(gradient.norm()) for gradient in expected if gradient is not None)
    for parameter, ours, theirs in zip(trained.parameters, found, expected, strict=True):
        assert (ours is None) == (theirs is None), parameter
        if ours is not None:
            assert (ours - theirs).norm() <= relative * theirs.norm() + least * largest, parameter


def wrapper_of(model, layer: DoRAExperts, path: str):
    """PEFT's wrapper of a layer's parameter; those of two parameters of a module are around each other."""
    found = model.base_model.model.get_submodule(path.rpartition(".")[0])
    while found.parameter_name != layer.parameter:
        found = found.base_layer
    return found


def give_adapter(layer: DoRAExperts, wrapper) -> None:
    """Gives PEFT's wrapper the same A and B, whose roles are swapped where PEFT takes inputs for outputs."""
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    if wrapper._did_swap_in_out_features == layer.transposed:
        A, B = B.mT, A.mT
    with torch.no_grad():
        wrapper.lora_A["default"].weight.copy_(A.flatten(0, 1))
        wrapper.lora_B["default"].weight.copy_(B.permute(1, 2, 0).flatten(1))


@pytest.mark.parametrize(
    "name", ["qwen3_vl_moe", *(pytest.param(n, marks=pytest.mark.slow) for n in ("aria", "llama4"))]
)
def test_peft_trains_lora_of_experts_alike(name, tiny_vlm, images):
    """Five steps of AdamW from the same A and B, by PEFT's own `target_parameters`."""
    vlm, theirs = opened(tiny_vlm(name)), opened(tiny_vlm(name))
    batch = batch_of(vlm, images, EXAMPLES)
    trained = adapted(vlm, ["text.experts"], method="lora", alpha=6)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(theirs.model, LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=parameters))
    layers = adapted_layers(vlm.model)
    wrappers = {path: wrapper_of(model, layer, path) for path, layer in layers.items()}
    for path, layer in layers.items():
        give_adapter(layer, wrappers[path])
    optimizers = [
        torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=0.02)
        for parameters in (list(trained.parameters.values()), list(model.parameters()))
    ]
    losses = []
    for _ in range(5):
        for each, optimizer in zip((vlm, theirs), optimizers, strict=True):
            loss = each.loss(batch, torch.Generator()).mean
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[0::2] == pytest.approx(losses[1::2], rel=1e-4)
    assert losses[-1] < 0.99 * losses[0]
    for path, layer in layers.items():
        change = layer.adaptation.spec.scaling * layer.lora_B @ layer.lora_A
        delta = wrappers[path].get_delta_weight("default")
        torch.testing.assert_close(change, delta.mT if layer.transposed else delta, rtol=1e-2, atol=1e-4)
