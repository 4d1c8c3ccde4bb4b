"""`python -m tests.documented.llama_cpp LLAMA_CPP TOKENIZER FOLDER`: what its converter makes of a merged folder.

LLAMA_CPP is a checkout of llama.cpp, TOKENIZER a folder with the tokenizer of a published model (build/tiny-vlm has
SmolLM2's: `python -m samples.build tiny-vlm`), since the converter knows tokenizers by what they make of a text, and
FOLDER a new one. A tiny model of random weights gets a DoRA in all its parts, is merged by `dora-mm merge` and
converted twice, as docs/serving.md has it; each tensor of the merged folder is then compared with its own in the files.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

import dora_mm
from dora_mm import DoRASpec
from dora_mm.cli import main as dora_mm_main
from dora_mm.config.models import VLMModelConfig
from dora_mm.models.vl.vlm.family import VLM
from tests.shared.vl import templates
from tests.shared.vl.chat_models import IDEFICS_PIXELS, IDEFICS_TOKENS
from tests.shared.vl.sizes import text_config, tower

LAYERS = 2


def main(llama_cpp: str, tokenizer: str, folder: str) -> None:
    """Merges, converts and compares; raises AssertionError where a tensor is missing or differs."""
    where = Path(folder)
    base, adapter, merged = (where / name for name in ("base", "adapter", "merged"))
    write_model(base, tokenizer)
    write_adapter(base, adapter)
    assert dora_mm_main(["merge", str(base), str(adapter), str(merged)]) == 0
    sys.path.insert(0, f"{llama_cpp}/gguf-py")
    gguf: Any = import_module("gguf")
    files = {"model.gguf": (), "mmproj.gguf": ("--mmproj",)}
    found: dict[str, Tensor] = {}
    for name, options in files.items():
        script = f"{llama_cpp}/convert_hf_to_gguf.py"
        command = [sys.executable, script, str(merged), "--outtype", "f32", "--outfile", str(where / name), *options]
        subprocess.run(command, check=True)
        tensors = {each.name: torch.tensor(each.data) for each in gguf.GGUFReader(where / name).tensors}
        found |= tensors
        print(f"{name}: {(where / name).stat().st_size:,} bytes, {len(tensors)} tensors")
    compare(gguf, load_file(merged / "model.safetensors"), load_file(base / "model.safetensors"), found)


def write_model(folder: Path, tokenizer_folder: str) -> None:
    """A SmolVLM with a published tokenizer, and `architectures` of its text as published ones have it."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_special_tokens({"extra_special_tokens": [*IDEFICS_TOKENS, "<end_of_utterance>"]})
    size = {"longest_edge": 28}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**IDEFICS_PIXELS),
        tokenizer,
        SmolVLMVideoProcessor(size=size, max_image_size=size),
        image_seq_len=4,
        chat_template=templates.idefics("<|im_start|>"),
    )
    torch.manual_seed(0)
    config = SmolVLMConfig(
        text_config=text_config(tokenizer, "llama"),
        vision_config=tower("smolvlm_vision", patch_size=7),
        image_token_id=processor.image_token_id,
    )
    SmolVLMForConditionalGeneration(config).eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    file = folder / "config.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    saved["text_config"]["architectures"] = ["VLlama3ForCausalLM"]
    file.write_text(json.dumps(saved), encoding="utf-8")


def write_adapter(base: Path, folder: Path) -> None:
    """A DoRA of all linear layers of all parts, as if trained."""
    vlm = VLM(VLMModelConfig(path=str(base)))
    linear = r"re:.*(layers\.\d+\..*(proj|fc\d)|modality_projection\.proj)"
    print(f"adapted: {dora_mm.inject(vlm.model, [linear], DoRASpec(rank=4)).num_modules} modules")
    for parameter in dora_mm.adapter_parameters(vlm.model).values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    dora_mm.save_adapter({"model": vlm.model}, folder, format="peft", metadata=vlm.identity.weights)


def compare(gguf: Any, merged: dict[str, Tensor], base: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Compares each tensor of the folder with the one that llama.cpp names for it."""
    maps = [gguf.get_tensor_name_map(arch, LAYERS) for arch in (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.MMPROJ)]
    changed, left = 0, set(found)
    for name, weight in merged.items():
        plain = name.replace("model.text_model.", "model.")  # as of a model of text alone
        keys = [table.get_name(plain, try_suffixes=(".weight", ".bias")) for table in maps]
        key = next((key for key in keys if key in found), None)
        assert key is not None, f"{name} is in neither file"
        left.discard(key)
        wanted = rotated(weight, 2 if "q_proj" in name else 1) if "text_model" in name and is_rotated(name) else weight
        assert torch.equal(found[key].view_as(wanted), wanted), f"{name} is not {key}"
        changed += not torch.equal(weight, base[name])
    print(f"equal: {len(merged)} tensors, {changed} of them changed by the adapter; in no folder: {sorted(left)}")


def is_rotated(name: str) -> bool:
    """Whether llama.cpp reorders the rows of a weight, for its form of rotary embeddings."""
    return name.endswith(("q_proj.weight", "k_proj.weight"))


def rotated(weight: Tensor, heads: int) -> Tensor:
    """The rows of each head, first halves and second halves taking turns."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


if __name__ == "__main__":
    main(*sys.argv[1:])
