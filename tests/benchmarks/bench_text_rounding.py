"""What rounding a text encoder changes: `python -m tests.benchmarks.bench_text_rounding`.

Embeddings of one encoder of full width with random weights (Qwen3 of 4 billion parameters, as Z-Image and FLUX.2 klein
have it, cut to its first layers), in bfloat16 and rounded; and images of the embedded FLUX.2 klein, whose text encoder
is small. Kinds of packages that are not installed are left out. Writes results/text_rounding/differences.csv.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3Model

from dora_mm.config.models import Flux2KleinConfig, ModelConfig
from dora_mm.models.images.families import load_image_model
from dora_mm.models.quantization import QUANTIZATIONS, quantize_layers
from dora_mm.preview.rounding import relative_difference
from dora_mm.sampling.image_sampler import sample
from tests.benchmarks.gpu import is_there
from tests.shared.full_size_folders import Z_IMAGE

LAYERS, CAPTIONS, TOKENS = 12, 4, 32
KINDS = [name for name in ("float8", "int8", "nf4") if not QUANTIZATIONS[name].package or is_there("bitsandbytes")]
RESULTS = Path(__file__).parent / "results" / "text_rounding" / "differences.csv"
PROMPTS = ["a lion", "a tractor", "a mushroom", "a helicopter"]


def main() -> None:
    rows = [*of_full_width(), *of_trained(), *of_images()]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(RESULTS.read_text())


def of_full_width() -> Iterator[dict[str, str]]:
    """The difference of hidden states by their length, mean over tokens, after each third of the layers."""
    ids = torch.randint(0, 150_000, (CAPTIONS, TOKENS), generator=torch.Generator().manual_seed(1))
    right = hidden_states(None, ids)
    for kind in KINDS:
        rounded = hidden_states(kind, ids)
        for layer in range(LAYERS // 3, LAYERS + 1, LAYERS // 3):
            off = (rounded[layer] - right[layer]).norm(dim=-1) / right[layer].norm(dim=-1)
            name = f"Qwen3 4B, random weights, layer {layer} of 36"
            yield {"what": name, "kind": kind, "measure": "relative difference", "value": f"{off.mean():.4f}"}


@torch.no_grad()
def hidden_states(kind: str | None, ids: torch.Tensor) -> list[torch.Tensor]:
    """The hidden states in float32, without those of the first token, which are large."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen3Model(Qwen3Config(**Z_IMAGE["text_encoder"] | {"num_hidden_layers": LAYERS}))  # type: ignore[arg-type]
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    model.init_weights()
    model.rotary_emb = type(model.rotary_emb)(model.config)
    if kind:
        quantize_layers(model, None, kind)
    found = model(ids, output_hidden_states=True).hidden_states
    return [state[:, 1:].float() for state in found]


@torch.no_grad()
def of_trained() -> Iterator[dict[str, str]]:
    """The same of what the embedded SDXL encodes, whose text encoders are small and trained."""
    encoded = {}
    for kind in (None, *KINDS):
        model = load_image_model(ModelConfig(path="samples/tiny-sdxl", text_quantization=kind))
        encoded[kind] = model.encode_prompts([f"{prompt}, a 3d icon in the style of TOK" for prompt in PROMPTS])
    for kind in KINDS:
        pairs = zip(encoded[kind], encoded[None], strict=True)
        off = mean(relative_difference([found], [right]) for found, right in pairs)
        yield {"what": "embedded SDXL, trained", "kind": kind, "measure": "relative difference", "value": f"{off:.4f}"}


def of_images() -> Iterator[dict[str, str]]:
    """The mean difference of 8-bit pixels at equal seeds."""
    images = {}
    for kind in (None, *KINDS):
        settings = Flux2KleinConfig(max_tokens=40, shift_steps=20)
        path = {"path": "samples/tiny-klein", "vae": "samples/tiny-sdxl/vae"}
        model = load_image_model(ModelConfig(**path, text_quantization=kind, flux2_klein=settings))  # type: ignore[call-arg]
        found = sample(model, PROMPTS, range(len(PROMPTS)), steps=20, guidance=1.0)
        images[kind] = np.stack([np.asarray(image, np.float32) for image in found])
    for kind in KINDS:
        off = np.abs(images[kind] - images[None]).mean()
        yield {"what": "embedded klein", "kind": kind, "measure": "8-bit levels of a pixel", "value": f"{off:.3f}"}


if __name__ == "__main__":
    main()
