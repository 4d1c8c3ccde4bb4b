"""Memory of vision-language models without a step."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import LlavaConfig, LlavaForConditionalGeneration

from dora_mm.adapting.networks import TrainedNetworks, adapt
from dora_mm.config.adapter import VLAdapterConfig
from dora_mm.config.models import VisionConfig
from dora_mm.config.vl import PreferenceConfig
from dora_mm.core import fixed_parameters
from dora_mm.core.targets import match_modules, parts_in
from dora_mm.data.vl.example import IMAGE, Example, Turn
from dora_mm.models.folders import empty_model
from dora_mm.models.vl.vlm.encoding import IGNORED
from dora_mm.models.vl.vlm.forms import Continuation
from dora_mm.models.vl.vlm.head import TargetLosses
from dora_mm.preview.simulation import Machine, simulated_peak
from dora_mm.preview.vl_memory import network_parts, quantized_bytes, simulated_loss, tower_work
from dora_mm.targets import map_of
from dora_mm.tasks.preferences import Preferences, pairs_of
from dora_mm.train.setup import checkpoint_activations
from dora_mm.utils.losses import LossSum
from tests.shared.data.vlm_rows import write_images
from tests.shared.peaks import peak_bytes
from tests.shared.small_training import mean_of
from tests.shared.vl import tiny_vlm as tiny
from tests.shared.vl.equalities import EXAMPLES, batch_of, opened
from tests.shared.vl.full_models import WHOLE


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_parts_of_a_network_hold_all_of_it_once(name, tiny_vlm):
    network = empty_model(str(tiny_vlm(name)))
    parts = network_parts({"model": network})
    assert len(parts) >= 4
    assert list(parts)[-1] == "model"
    held = {id(parameter) for part in list(parts.values())[:-1] for parameter in part.parameters()}
    rest = [name for name, parameter in network.named_parameters() if id(parameter) not in held]
    assert len(rest) <= 1  # a single parameter beside the parts, such as an embedding of queries


def llava(hidden: int, depth: int, vocabulary: int, tower: int, size: int = 28) -> LlavaForConditionalGeneration:
    text = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 11 * hidden // 4,
    }
    text |= {"num_hidden_layers": depth, "num_attention_heads": 4}
    vision = {"model_type": "clip_vision_model", "hidden_size": tower, "intermediate_size": 2 * tower}
    vision |= {"num_attention_heads": 2, "image_size": size, "patch_size": 14, "projection_dim": 32}
    vision |= {"num_hidden_layers": 3}
    places = (size // 14) ** 2
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=5, image_seq_length=places)
    return LlavaForConditionalGeneration(config).requires_grad_(False)


TEXT, VISION = ["text.attn", "text.mlp"], ["vision.attn", "vision.mlp", "connector"]
SHAPES = {  # the model, tokens of a row, and what is trained
    "tiny": ((64, 2, 300, 32), 64, TEXT),
    "middle": ((256, 3, 300, 64), 256, TEXT),
    "attention": ((256, 3, 300, 64), 256, ["text.attn"]),
    "vision": ((128, 2, 300, 256, 112), 128, VISION),
    "all": ((128, 2, 300, 256, 112), 128, TEXT + VISION),
    "connector": ((128, 2, 300, 64), 128, {"connector": {"method": "full"}}),
    "logits": ((64, 2, 152_000, 32), 100, TEXT),
}


FAST = (("middle", True), ("all", False), ("logits", False))
CASES = [
    pytest.param(name, checkpointing, marks=() if (name, checkpointing) in FAST else pytest.mark.slow)
    for name in SHAPES
    for checkpointing in (False, True)
]


@pytest.mark.parametrize(("name", "checkpointing"), CASES)
def test_the_estimate_is_near_to_the_measured_peak_of_a_step(name, checkpointing):
    sizes, length, parts = SHAPES[name]
    batch = batch_for(length, sizes[4:] or (28,))
    measured, estimated = (peak_of(sizes, parts, batch, device, checkpointing) for device in ("cpu", "meta"))
    assert measured * 0.85 < estimated < measured * 1.15


def batch_for(length: int, size: tuple[int, ...]):
    """Two rows whose second half is learned, each with an image."""
    ids = torch.full((2, length), 7)
    ids[:, : (size[0] // 14) ** 2] = 5
    labels = ids.clone()
    labels[:, : length // 2] = IGNORED
    pixels = torch.zeros(2, 3, *2 * size)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}, labels


@pytest.mark.parametrize("weights", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_half_precision_is_in_the_estimate(weights):
    """Of autocast, over frozen weights of both kinds."""
    sizes, length, parts = SHAPES["middle"]
    batch, half = batch_for(length, (28,)), Machine(dtype=torch.bfloat16)
    measured, estimated = (peak_of(sizes, parts, batch, device, True, weights, half) for device in ("cpu", "meta"))
    assert measured * 0.85 < estimated < measured * 1.15


def peak_of(sizes, parts, batch, device: str, checkpointing=False, weights=torch.float32, machine=None) -> int:
    """The bytes of a step: measured on the processor, estimated on the meta device."""
    with torch.device(device):
        network = llava(*sizes).to(weights)
    config = VLAdapterConfig.model_validate({"rank": 4, "parts": parts})
    trained = adapt({"model": network}, {"model": map_of(network)}, config, seed=0, backend="torch")
    if checkpointing:
        checkpoint_activations(network)
    network.train()
    loss = partial(loss_of, TargetLosses(Continuation(), network))
    if device == "meta":
        return simulated_peak(trained.networks, loss, batch, machine=machine)
    return measured_peak(trained, loss, batch, dtype=machine and machine.dtype)


def measured_peak(trained: TrainedNetworks, loss, batch, dtype: torch.dtype | None = None) -> int:
    for name, parameter in trained.parameters.items():
        parameter.data += 0.01 * name.endswith("lora_B")  # fresh adapters take less

    def step() -> None:
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            total = loss(batch).total
        total.backward()

    with fixed_parameters(trained.networks["model"], num_passes=1):
        return peak_bytes(step)


def loss_of(losses: TargetLosses, batch: tuple[dict, torch.Tensor]) -> LossSum:
    return mean_of(losses(*batch)[0])


UNLIKE = {
    **dict.fromkeys(("aria", "apertus1p5", "chameleon", "emu3"), (0.65, 0.8)),  # kernels of convolutions take the rest
    "cosmos3_edge": (0.84, 0.85),
    **dict.fromkeys(("llama4", "glm4v_moe"), (0.8, 0.85)),  # how many tokens an expert has decides its form
    "inkling_mm_model": (6, 7.5),  # the norms of a layer with 90 % of the weights take all of it, as on a GPU
}
OTHERS = (name for name in (*tiny.NAMES, *tiny.NEWER, *tiny.OTHERS, *WHOLE) if name != "qwen3_vl_moe")


@pytest.mark.parametrize("name", ["qwen3_vl_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_step_without_numbers_takes_what_one_of_the_class_does(name, tiny_vlm, tmp_path):
    """Also what a class decides by its inputs: places of images, groups of patches, masks, experts."""
    vlm = opened(tiny_vlm(name))
    batch = batch_of(vlm, write_images(tmp_path), EXAMPLES)
    low, high = UNLIKE.get(name, (0.85, 1.15))
    assert low < estimated_of_measured(vlm, batch, partial(vlm.loss, generator=torch.Generator())) < high


@pytest.mark.parametrize("name", ["qwen2_5_vl", "idefics3", "llava"])
def test_the_patches_of_a_tower_count(name, tiny_vlm, tmp_path):
    """Of the tower's own layers, by the patches that they see: a hook counts these."""
    vlm = opened(tiny_vlm(name))
    batch = batch_of(vlm, write_images(tmp_path), EXAMPLES)
    targets, network = vlm.target_maps["model"], vlm.networks["model"]
    paths = match_modules(network, targets.select([p for p in parts_in(network, targets) if p == "vision.attn"]))
    seen = 0

    def count(module, given, output):
        nonlocal seen
        seen += given[0].numel() // given[0].shape[-1]

    with torch.no_grad():
        handle = network.get_submodule(next(iter(paths))).register_forward_hook(count)
        vlm.row_losses(batch)
        handle.remove()
    layers = match_modules(network, targets.select([p for p in parts_in(network, targets) if p.startswith("vision.")]))
    size = sum(p.numel() for path in layers for p in network.get_submodule(path).parameters(recurse=False))
    assert seen * 0.75 < tower_work(network, targets, batch) / size < seen * 1.1  # LLaVA's has a class token, too


def test_a_step_of_pairs_takes_both_answers(tiny_vlm, tmp_path):
    vlm, images = opened(tiny_vlm("qwen2_5_vl")), str(write_images(tmp_path))
    asked = [Turn("user", f"{IMAGE}What is it?", False)]
    chosen, rejected = ((*asked, Turn("assistant", text, True)) for text in ("red", "blue, or another colour"))
    example = Example("r0", ("wide.png",), "", ("red",), (1.0,), turns=chosen, rejected=rejected)
    pairs = Preferences(vlm, PreferenceConfig(), lambda batch: torch.zeros(()))
    batch = pairs_of(vlm, "preference", [example] * 2, images, "stop")
    assert 0.85 < estimated_of_measured(vlm, batch, partial(pairs.loss, generator=torch.Generator())) < 1.15


def estimated_of_measured(vlm, batch, loss) -> float:
    """The estimated bytes of a step by the measured ones."""
    structure = vlm.structure(vlm.config, VisionConfig())
    assert structure.row_losses is not None
    structure.networks["model"].requires_grad_(False)
    experts = [part for part in vlm.target_maps["model"].parts if part.endswith(".experts")]
    config = VLAdapterConfig.model_validate({"rank": 4, "parts": ["all-linear", *experts]})
    both = [
        adapt(networks, structure.target_maps, config, seed=0, backend="torch")
        for networks in (vlm.networks, structure.networks)
    ]
    for trained in both:
        trained.networks["model"].train()
    simulated = partial(simulated_loss, PreferenceConfig(), structure.row_losses)
    inputs = [t.nbytes for given, *_ in batch.groups for t in tree_leaves(given) if isinstance(t, torch.Tensor)]
    return simulated_peak(both[1].networks, simulated, batch) / (measured_peak(both[0], loss, batch) + sum(inputs))


def test_trained_vision_parts_are_in_the_estimate():
    """They were left out: all linear layers told what those of the text do alone."""
    sizes, batch = (128, 2, 300, 256, 112), batch_for(128, (112,))
    text, both = (peak_of(sizes, parts, batch, "meta") for parts in (TEXT, TEXT + VISION))
    kept = 2 * 64 * 3 * (4 * 256 + 256 + 512) * 4  # x and y of the tower's layers, at least
    assert both - text > kept


def test_quantised_weights_are_those_of_the_linear_layers_but_the_logits(tiny_vlm):
    network = empty_model(str(tiny_vlm("llava")))
    assert quantized_bytes(network, None) == {}
    stored = quantized_bytes(network, "int8")
    layers = {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert stored == {id(layer.weight): layer.weight.numel() for layer in layers.values()}
    four = quantized_bytes(network, "nf4")
    assert all(0.5 < four[key] / stored[key] < 0.56 for key in stored)
