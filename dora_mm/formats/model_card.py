"""The model card of an adapter: a README.md with the header by which the Hugging Face Hub indexes it."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_mm.config.paths import find_path
from dora_mm.formats.state import AdapterState
from dora_mm.formats.tokens import TokenRows
from dora_mm.utils.atomic import write_text
from dora_mm.utils.shell import comment, fenced, in_code
from dora_mm.utils.tables import markdown_table

FILE_NAME = "README.md"
_OURS = "<!-- written by dora_mm, which replaces this file only while it is unchanged: {} -->\n"
_METHODS = {  # how a method is called, and its tags
    "dora": ("DoRA", ["dora", "lora"]),
    "lora": ("LoRA", ["lora"]),
    "magnitude": ("magnitude-only DoRA", ["dora"]),
    "full": ("Weights", []),
}
AUTO_CLASSES = {  # of transformers, by what a base model is for
    "image-text-to-text": "AutoModelForImageTextToText",
    "text-generation": "AutoModelForCausalLM",
}

ModelCardImages = Sequence[tuple[str, str]]  # prompts, each with an image's path in the folder
ModelCardScores = Mapping[str, tuple[str, float]]  # by task: the name of the metric, and its value


def write_model_card(
    folder: Path,
    format: str,
    state: AdapterState,
    metadata: Mapping[str, str],
    images: ModelCardImages = (),
    scores: ModelCardScores | None = None,
) -> None:
    """Writes README.md, unless there is one that a person has written or changed.

    Args:
        folder: The folder of the adapter.
        format: The format of its file.
        state: The adapter.
        metadata: The header of the file. The GPU has `base_model`, `base_revision`, `instance_prompt`, `license`,
            `pipeline_tag`, `day` and `config`, each as far as it is there.
        images: What was drawn with the adapter.
        scores: What it scored.
    """
    path = folder / FILE_NAME
    if path.exists() and not _is_ours(path):
        return
    header = _header(folder, format, state, metadata, images, scores or {})
    text = f"---\n{header}\n---\n\n{_text(format, state, metadata, images, scores or {})}\n"
    write_text(path, text + _OURS.format(_digest(text)))


def _is_ours(path: Path) -> bool:
    text, _, last = path.read_text(encoding="utf-8", errors="replace").rpartition("<!--")
    return f"<!--{last}" == _OURS.format(_digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _header(
    folder: Path,
    format: str,
    state: AdapterState,
    metadata: Mapping[str, str],
    images: ModelCardImages,
    scores: ModelCardScores,
) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # here: it takes half a second to import

    kind = _pipeline_tag(format, metadata)
    library = format if format in ("diffusers", "peft") else None
    tags = [*_METHODS[_method(state)][1], *([kind] if kind else []), *([library] if library else [])]
    base = metadata.get("base_model", "")
    more: dict[str, Any] = {"base_model_relation": "adapter"} if _is_hub_name(base) else {}
    if prompt := metadata.get("instance_prompt"):
        more["instance_prompt"] = prompt
    if images:
        more["widget"] = [{"text": text, "output": {"url": url}} for text, url in images]
    results = [
        EvalResult(kind or "other", task, task, metric, round(value, 4)) for task, (metric, value) in scores.items()
    ]
    return ModelCardData(
        base_model=base if _is_hub_name(base) else None,
        library_name=library,
        license=metadata.get("license"),
        pipeline_tag=kind,
        tags=([*tags, "template:sd-lora"] if kind == "text-to-image" else tags) or None,
        eval_results=results or None,
        model_name=folder.resolve().name if results else None,
        **more,
    ).to_yaml()


def _is_hub_name(model: str) -> bool:
    """Whether it is the name of a model on the Hub, and not a path of this machine."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None and find_path(model) is None


def _pipeline_tag(format: str, metadata: Mapping[str, str]) -> str | None:
    return metadata.get("pipeline_tag", "text-to-image" if format == "diffusers" else None)


def _method(state: AdapterState) -> str:
    """The method of most layers."""
    return Counter(layer.spec.method for layers in state.layers.values() for layer in layers.values()).most_common(1)[
        0
    ][0]


def _text(
    format: str, state: AdapterState, metadata: Mapping[str, str], images: ModelCardImages, scores: ModelCardScores
) -> str:
    base, name = metadata.get("base_model"), _METHODS[_method(state)][0]
    of = f" of {f'[{base}](https://huggingface.co/{base})' if _is_hub_name(base) else in_code(base)}" if base else ""
    parts = [f"# {name} for {' and '.join(map(in_code, state.layers))}{of}"]
    if prompt := metadata.get("instance_prompt"):
        parts.append(f"Write {in_code(prompt)} in the prompt.")
    if images:
        parts.append("<Gallery />")
    parts.append(f"## Use\n\n{fenced(_code(format, metadata, state.tokens), 'python')}")
    if scores:
        rows = [[task, metric, f"{value:.2f}"] for task, (metric, value) in scores.items()]
        parts.append(f"## Scores\n\n{markdown_table(['task', 'metric', 'value'], rows)}")
    parts.append(f"## Training\n\n{_settings(state)}")
    if day := metadata.get("day"):
        parts.append(f"The day of its rows, which the chat template asks for: {in_code(day)}.")
    if config := metadata.get("config"):
        parts.append(f"The config of the training, for `dora-mm train`:\n\n{fenced(config.strip(), 'yaml')}")
    return "\n\n".join(parts)


def _in_diffusers(tokens: TokenRows) -> dict[str, list[str]]:
    """The names of each word's new tokens in diffusers, which takes no word with a capital for several tokens."""
    counts = {word: len(next(iter(rows.values()))) for word, rows in tokens.items()}
    return {word: [f"<{word.lower()}-{number}>" for number in range(count)] for word, count in counts.items()}


def _token_lines(tokens: TokenRows) -> list[str]:
    """How diffusers loads new tokens; it pools at the highest id, which is then no longer that of the end of a text."""
    if not tokens:
        return []
    lines = ["", "from safetensors.torch import load_file", ""]
    for word, names in _in_diffusers(tokens).items():
        file, in_prompts = f"{word}.safetensors", comment(f"{''.join(names)} in prompts")
        lines.append(f"rows = load_file({file!r})  {in_prompts}")
        for table, number in (("clip_l", ""), ("clip_g", "_2")):
            networks = f"text_encoder=pipe.text_encoder{number}, tokenizer=pipe.tokenizer{number}"
            lines.append(f'pipe.load_textual_inversion(rows["{table}"], token={names}, {networks})')
    lines.append("pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id  # where it pools")
    return lines


def _settings(state: AdapterState) -> str:
    rows = []
    for component, layers in state.layers.items():
        specs = [layer.spec for layer in layers.values()]
        values = sum(tensor.numel() for layer in layers.values() for tensor in layer.tensors.values())
        settings = [sorted({_number(getattr(spec, name)) for spec in specs}) for name in ("method", "rank", "alpha")]
        rows.append([component, str(len(layers)), *map(", ".join, settings), f"{values:,}"])
    return markdown_table(["component", "modules", "method", "rank", "alpha", "parameters"], rows)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _code(format: str, metadata: Mapping[str, str], tokens: TokenRows) -> str:
    base, prompt = metadata.get("base_model", "the base model"), metadata.get("instance_prompt") or "a prompt"
    given, here = comment(f"model: {base}, as it was before the training"), "  # this folder, or its name on the Hub"
    auto = AUTO_CLASSES.get(_pipeline_tag(format, metadata) or "")
    if format == "diffusers":
        for word, names in _in_diffusers(tokens).items():
            prompt = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "".join(names), prompt)
        lines = [
            "from diffusers import DiffusionPipeline",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({base!r})",
            f'pipe.load_lora_weights("."){here}',
            *_token_lines(tokens),
            f"image = pipe({prompt!r}).images[0]",
        ]
    elif format == "peft":
        lines = [
            "from peft import PeftModel",
            *([f"from transformers import {auto}"] if auto else []),
            "",
            f"model = {auto}.from_pretrained({base!r})" if auto else given,
            f'model = PeftModel.from_pretrained(model, "."){here}',
        ]
    else:
        lines = ["from dora_mm import load_adapter", "", given, 'load_adapter(model, ".")']
    return "\n".join(lines)
