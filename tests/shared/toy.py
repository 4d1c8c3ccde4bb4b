"""A small base model with SDXL's names: weights from a formula, so that fixtures and tests agree on every machine."""

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dora_mm.core.spec import DoRASpec
from dora_mm.formats.naming.names import Name
from dora_mm.formats.state import LayerState
from dora_mm.formats.tools.parts import kohya_tensors

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
SHAPES = {
    Name("unet", f"{BLOCK}.attn1.to_q"): (16, 16),  # square
    Name("unet", f"{BLOCK}.attn1.to_out.0"): (16, 16),
    Name("unet", f"{BLOCK}.attn2.to_k"): (16, 24),
    Name("unet", f"{BLOCK}.ff.net.0.proj"): (40, 16),
    Name("unet", "down_blocks.1.resnets.0.conv1"): (16, 8, 3, 3),
    Name("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj"): (12, 12),
    Name("text_encoder_2", "text_model.encoder.layers.1.mlp.fc1"): (24, 12),
}
UNET = [name for name in SHAPES if name.component == "unet"]


def wave(shape, seed):
    """Values between -1 and 1 that look random; the same everywhere to the last few bits."""
    count = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    return torch.sin(count * count * 0.7390851 + 91.7 * (seed + 1)).view(shape)


def base(shapes=None):
    """W0 by name, with rows of about norm 1."""
    shapes = shapes or SHAPES
    found = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        inner = torch.Size(shape[1:]).numel()
        found[name] = (wave(shape, seed) * (2 / inner) ** 0.5).float()
    return found


def model(component="unet"):
    """A module that holds the layers of a component at their paths."""
    root = nn.Module()
    for name, weight in base().items():
        if name.component == component:
            _insert(root, name.path, weight)
    return root


def _insert(root, path, weight):
    *parents, leaf = path.split(".")
    for part in parents:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    out, inner, *kernel = weight.shape
    layer = nn.Conv2d(inner, out, kernel, padding=1, bias=False) if kernel else nn.Linear(inner, out, bias=False)
    layer.weight.data.copy_(weight)
    root.add_module(leaf, layer)


def layer(name, *, rank=4, alpha=2.0, method="dora", size=0.4, noise=0.08, axis="out", weights=None):
    """An adapter with trained values."""
    W0 = (weights or base())[name]
    seed = 100 + list(weights or SHAPES).index(name)
    tensors = {
        "lora_A": wave((rank, *W0.shape[1:]), seed).float() / W0[0].numel() ** 0.5,
        "lora_B": size * wave((W0.shape[0], rank), seed + 50).float(),
    }
    if method == "dora":
        n0 = W0.flatten(1).norm(dim=1) if axis == "out" else W0.transpose(0, 1).flatten(1).norm(dim=1)
        tensors["magnitude"] = n0 * (1 + noise * wave(n0.shape, seed + 99).float())
    return LayerState(DoRASpec(rank, alpha, method=method), tensors, axis)


def state_of(name, number):
    """Ranks and alphas differ; every third module is plain LoRA."""
    method = "lora" if number % 3 == 2 else "dora"
    return layer(name, rank=2 + number % 3, alpha=1.0 + number, method=method)


def textbook(W0, A, B, m, s, axis="out", divided_by="updated", t=1.0):
    """W0 + t (m V / n - W0) in float64, written out by rows or columns; nothing here is shared with dora_mm."""
    W0, A, B = W0.double(), A.double(), B.double()
    BA = torch.einsum("or,r...->o...", B.flatten(1), A)
    V = W0 + s * BA
    if m is not None:
        over = {"updated": V, "base": W0}[divided_by]
        m = m.double().flatten()
        rows = range(len(m))
        if axis == "out":
            V = torch.stack([V[i] * (m[i] / over[i].square().sum().sqrt()) for i in rows])
        else:
            V = torch.stack([V[:, i] * (m[i] / over[:, i].square().sum().sqrt()) for i in rows], 1)
    return W0 + t * (V - W0)


def write_source(path, states):
    """A file of kohya's form, with names put together by hand."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    tensors = {}
    for name, state in states.items():
        module = prefixes[name.component] + name.path.replace(".", "_")
        tensors |= {f"{module}.{end}": t.contiguous() for end, t in kohya_tensors(state).items()}
    save_file(tensors, path, metadata={"ss_base_model_version": "sdxl_base_v1-0", "sshs_model_hash": "1"})
    return path


def read_tensors(path):
    """The tensors and the header of a file."""
    with safe_open(path, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118


def probe(W):
    """A weight times a fixed vector: small enough to be stored, and it depends on every entry."""
    flat = W.double().flatten(1)
    return flat @ torch.cos(torch.arange(flat.shape[1], dtype=torch.float64))
