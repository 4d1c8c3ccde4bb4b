"""Random adapters in each exact format, through each other one and back; keys and formulas are written out here."""

import itertools
import json
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file

from dora_mm.formats.commands.convert import convert
from dora_mm.formats.naming.names import Name
from tests.shared import toy

TOOLS = ("peft", "diffusers", "kohya", "comfy", "onetrainer", "ai-toolkit")
OWN_NAMES = ("kohya", "comfy")
CONFIGURED = ("peft", "diffusers")  # the settings are in a JSON text, and all modules have a magnitude or none has
UNET = {  # the path in SGM's code by diffusers' path
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0": "middle_block.1.transformer_blocks.9.attn2.to_out.0",
    "up_blocks.1.attentions.2.proj_in": "output_blocks.5.1.proj_in",
    "time_embedding.linear_1": "time_embed.0",
    "down_blocks.1.resnets.0.conv1": "input_blocks.4.0.in_layers.2",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
}
KERNELS = {path: (1, 1) if path.endswith("shortcut") else (3, 3) for path in UNET if "conv" in path}
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


@dataclass(frozen=True)
class Module:
    """A weight and its adapter, all drawn from a seed; alpha None stands for the rank, and is left out of the file."""

    shape: tuple[int, ...]
    rank: int
    alpha: float | None
    dora: bool
    seed: int

    @property
    def W0(self):
        rows = toy.wave(self.shape, self.seed)
        norms = rows.flatten(1).norm(dim=1).view(-1, *(1,) * (rows.dim() - 1))
        return ((1.2 + 0.8 * toy.wave(norms.shape, self.seed + 1)) * rows / norms).float()

    def tensors(self):
        """A (R, I, *K), B (O, R), and m (O,) or None; the update is below a fifth of each row of W0."""
        out, *inner = self.shape
        A, B = toy.wave((self.rank, *inner), self.seed + 2), toy.wave((out, self.rank), self.seed + 3)
        size = (B @ A.flatten(1)).norm(dim=1).max() * ((self.alpha or self.rank) / self.rank)
        m = self.W0.flatten(1).norm(dim=1) * (1 + 0.2 * toy.wave((out,), self.seed + 4)).float()
        return A.float(), (0.08 * B / size).float(), m if self.dora else None


@st.composite
def adapters(draw, source, between):
    """Modules by name, as far as both formats hold them."""
    names = [Name("unet", path) for path in UNET if path not in KERNELS or "ai-toolkit" not in (source, between)]
    if "peft" not in (source, between):  # a folder of PEFT's is of one network
        names += [Name("text_encoder", TEXT), Name("text_encoder_2", TEXT)]
    all_dora = draw(st.booleans()) if source in CONFIGURED else None
    sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
    sizes = st.one_of(st.integers(2, 9).map(lambda n: (n, n)), sizes).filter(lambda size: size != (1, 1))
    found = {}
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True)):
        found[name] = Module(
            shape=(*draw(sizes), *KERNELS.get(name.path, ())),
            rank=draw(st.integers(1, 5)),
            alpha=None if source == "ai-toolkit" else draw(st.none() | st.floats(0.125, 64, width=32)),
            dora=draw(st.booleans()) if all_dora is None else all_dora,
            seed=draw(st.integers(0, 999)),
        )
    return found


# --- the formats -----------------------------------------------------------------------------------------------------


def key_of(tool, name):
    if tool == "peft":
        return f"base_model.model.{name.path}"
    if tool == "diffusers":
        return f"{name.component}.{name.path}"
    path = UNET[name.path] if tool in OWN_NAMES and name.component == "unet" else name.path
    return PREFIXES[name.component] + path.replace(".", "_")


def endings(tool, name):
    """Of A, B and the magnitude."""
    if tool in CONFIGURED:
        weight = ".weight" if tool == "diffusers" and name.component.startswith("text_encoder") else ""
        return "lora_A.weight", "lora_B.weight", f"lora_magnitude_vector{weight}"
    return "lora_down.weight", "lora_up.weight", "magnitude" if tool == "ai-toolkit" else "dora_scale"


def magnitude_shape(tool, shape):
    ones = (1,) * (len(shape) - 2)
    if tool == "ai-toolkit" or (tool in CONFIGURED and not ones):
        return shape[:1]
    return (1, shape[0], *ones) if tool in CONFIGURED else (shape[0], 1, *ones)


def config_of(modules):
    """PEFT's settings of one network: those of a module that is not there, and patterns for all others."""
    return {
        "peft_type": "LORA",
        "r": 7,
        "lora_alpha": 3,
        "use_dora": all(module.dora for module in modules.values()),
        "target_modules": [name.path for name in modules],
        "rank_pattern": {name.path: module.rank for name, module in modules.items()},
        "alpha_pattern": {name.path: module.alpha or module.rank for name, module in modules.items()},
    }


def write(folder, tool, modules):
    """A file as the tool writes it."""
    folder.mkdir()
    tensors = {}
    for name, module in modules.items():
        A, B, m = module.tensors()
        key, (a, b, magnitude) = key_of(tool, name), endings(tool, name)
        tensors |= {f"{key}.{a}": A, f"{key}.{b}": B.view(*B.shape, *(1,) * (A.dim() - 2))}
        if m is not None:
            tensors[f"{key}.{magnitude}"] = m.view(magnitude_shape(tool, module.shape))
        if module.alpha and tool not in CONFIGURED:
            tensors[f"{key}.alpha"] = torch.tensor(module.alpha)
    if tool == "peft":
        (folder / "adapter_config.json").write_text(json.dumps(config_of(modules)))
    save_file(tensors, folder / "adapter_model.safetensors", metadata=header_of(tool, modules))
    return folder / "adapter_model.safetensors"


def header_of(tool, modules):
    if tool.startswith("comfy"):
        return {"dora_mm_target": tool}
    found = {}
    for component in {name.component for name in modules} if tool == "diffusers" else ():
        own = {name: module for name, module in modules.items() if name.component == component}
        found |= {f"{component}.{setting}": value for setting, value in config_of(own).items()}
    return {"lora_adapter_metadata": json.dumps(found)} if found else {}


def scaling(tool, name, tensors, header, rank):
    """Alpha / rank."""
    if tool not in CONFIGURED:
        return float(tensors.pop(f"{key_of(tool, name)}.alpha", rank)) / rank
    start = f"{name.component}." if tool == "diffusers" else ""
    ranks, alphas = header[f"{start}rank_pattern"], header[f"{start}alpha_pattern"]
    assert ranks.get(get_pattern_key(ranks, name.path), header[f"{start}r"]) == rank
    return alphas.get(get_pattern_key(alphas, name.path), header[f"{start}lora_alpha"]) / rank


def read(file, tool, modules):
    """W' by name in float64, as the tool computes it; every tensor of the file is used."""
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        header = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    if tool == "peft":
        header = json.loads((file.parent / "adapter_config.json").read_text())
    found = {}
    for name, module in modules.items():
        key, (a, b, magnitude) = key_of(tool, name), endings(tool, name)
        A, B = tensors.pop(f"{key}.{a}"), tensors.pop(f"{key}.{b}")
        s, m = scaling(tool, name, tensors, header, A.shape[0]), tensors.pop(f"{key}.{magnitude}", None)
        assert m is None or tuple(m.shape) == magnitude_shape(tool, module.shape)
        divided_by = "base" if tool == "comfy" else "updated"
        found[name] = toy.textbook(module.W0, A, B, m, s, divided_by=divided_by)
    assert not tensors
    return found


# --- the test --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "between"), itertools.product(TOOLS, TOOLS))
def test_through_another_format_and_back(source, between, tmp_path_factory):
    @settings(max_examples=3)
    @given(adapters(source, between))
    def run(modules):
        folder = tmp_path_factory.mktemp("round")
        base = {name: module.W0 for name, module in modules.items()}
        file = write(folder / "0", source, modules)
        wanted = read(file, source, modules)
        for number, tool in enumerate((between, source), 1):
            (file,) = convert(file, folder / f"{number}", to=tool, base=base).files
            for name, W in read(file, tool, modules).items():
                assert (W - wanted[name]).norm() <= 1e-6 * wanted[name].norm(), (tool, name)

    run()
