"""SDXL in one file: what such a file lacks (configs, tokenizers), and what its marker tensors say of the model."""

import gzip
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "configs"  # of stabilityai/stable-diffusion-xl-base-1.0, where they matter
START, END = "<|startoftext|>", "<|endoftext|>"
NUM_MERGES = 48_894  # of the 262,144 in open_clip's file: with 256 bytes, at both places in a word, 49,408 tokens
# What tensors without content say of the scheduler, as ComfyUI reads them (comfy/supported_models.py)
MARKERS = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}
OF_EDM = ("edm_mean", "edm_vpred.sigma_max")  # Playground 2.5 and CosXL: other noise, and another scale of the input


def tokenizers(num_merges: int = NUM_MERGES, max_tokens: int = 77) -> dict[str, Any]:
    """Both tokenizers, by component, from CLIP's vocabulary in open_clip; one pads with its end, the other with "!".

    Args:
        num_merges: The merges of byte pairs, the most frequent ones first; small models have few.
        max_tokens: The tokens of a chunk, with those before and after it.
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    text = gzip.decompress((files("open_clip") / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = [tuple(line.split()) for line in text.split("\n")[1 : num_merges + 1]]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    settings: dict[str, Any] = {
        "vocab": {word: index for index, word in enumerate(words)},
        "merges": merges,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "model_max_length": max_tokens,
    }
    pads = {"tokenizer": END, "tokenizer_2": "!"}
    return {name: CLIPTokenizer(pad_token=pad, **settings) for name, pad in pads.items()}


def scheduler_settings(names: Collection[str]) -> dict[str, Any]:
    """The scheduler settings that the tensor names of a file imply; empty if the model predicts noise, like SDXL.

    Raises:
        ValueError: It is a model of EDM.
    """
    if found := [name for name in OF_EDM if name in names]:
        raise ValueError(
            f"it is a model of EDM ({found[0]} is in it), which is neither trained nor generated with here"
        )
    return {
        key: value
        for marker, names_prediction in MARKERS.items()
        if marker in names
        for key, value in names_prediction.items()
    }
