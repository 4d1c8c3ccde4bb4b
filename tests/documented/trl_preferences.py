"""tests/models/vl/vlm/encoding/trl_preferences.json: what TRL's DPOTrainer computes of pairs of answers.

`python -m tests.documented.trl_preferences` writes it where `trl` is installed. TRL is given PEFT's DoRA, with values
that both sides can set, and rows as its documentation has them; of each it writes losses, rewards and gradients.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from dora_mm.data.images.pixels import load_rgb
from tests.documented.trl_labels import processor_of
from tests.shared.data.vlm_rows import write_images

PAGE = Path(__file__).parents[1] / "models" / "vl" / "vlm" / "encoding" / "trl_preferences.json"
# Tiny models, and the token that ends their turns: on both sides no white space is behind it, which TRL would learn
MODELS = {"qwen2_5_vl": "<|im_end|>", "gemma3": "<end_of_turn>", "llava_next": "<|im_end|>"}
TARGETS = r".*(language_model|text).*\.(q_proj|v_proj)"
SETTINGS: dict[str, dict[str, Any]] = {  # ours, by a name
    "sigmoid": {},
    "beta": {"beta": 0.5},
    "robust": {"loss": "robust", "label_smoothing": 0.1},
    "ipo": {"loss": "ipo", "beta": 0.2},
    "smoothed": {"label_smoothing": 0.2},
}
WITH_GRADIENTS = ("sigmoid", "ipo")


def without_white_space(processor: Any, end: str) -> Any:
    """Gives a processor its template without the line break behind a turn."""
    processor.chat_template = processor.chat_template.replace(f"{end}\\n", end)
    return processor


def _said(role: str, text: str, images: int = 0) -> list[dict[str, Any]]:
    return [{"role": role, "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}]


def _row(asked: list[dict[str, Any]], chosen: str, rejected: str, images: list[str]) -> dict[str, Any]:
    answers = {"chosen": _said("assistant", chosen), "rejected": _said("assistant", rejected)}
    return {"prompt": asked, **answers, "images": images}


PAIRS = [
    _row(_said("user", "What colour is it?", 1), "It is red.", "blue, or so I think", ["wide.png"]),
    _row(_said("user", "Which is larger?", 1), "No.", "The 2nd: 12,345 px", ["square.png"]),
    _row(
        _said("user", "Is it red?", 1) + _said("assistant", "Yes.") + _said("user", "Is red warm?"),
        "It is warm.",
        "red is cold",
        ["tall.png"],
    ),
]


def set_values(parameters: Mapping[str, Tensor]) -> None:
    """Gives an adapter values that depend on the order of its parameters alone: A, B and m of every module in turn."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(parameters.items()):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + number).view(parameter.shape)
            is_magnitude = "magnitude" in name
            parameter.copy_(parameter * (1 + 0.1 * wave) if is_magnitude else 0.6 * wave)


def theirs(model: Any) -> dict[str, Tensor]:
    """The parameters of PEFT's adapter by our names, in the order of modules."""
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_magnitude_vector") and "default" in module.lora_magnitude_vector:
            own = path.removeprefix("base_model.model.")
            found[f"{own}.lora_A"] = module.lora_A["default"].weight
            found[f"{own}.lora_B"] = module.lora_B["default"].weight
            found[f"{own}.magnitude"] = module.lora_magnitude_vector["default"].weight
    return found


def trainer_of(model: Any, processor: Any, rows: list[dict[str, Any]], folder: Path, settings: dict[str, Any]) -> Any:
    """TRL's trainer of a model with these settings."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]

    kind = settings.get("loss", "sigmoid")
    if kind == "sigmoid" and settings.get("label_smoothing"):
        kind = "aot"  # which is the smoothed loss of a single pair; TRL's own sigmoid has no smoothing any more
    arguments = DPOConfig(
        output_dir=str(folder / "out"),
        loss_type=[kind],
        beta=settings.get("beta", 0.1),
        label_smoothing=settings.get("label_smoothing", 0.0),
        max_length=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        remove_unused_columns=False,
    )
    adapter = LoraConfig(r=2, lora_alpha=2, use_dora=True, target_modules=TARGETS)
    data = Dataset.from_list([{**row, "images": []} for row in rows])
    return DPOTrainer(model, args=arguments, train_dataset=data, processing_class=processor, peft_config=adapter)


def computed(trainer: Any, rows: list[dict[str, Any]], *, gradients: bool) -> dict[str, Any]:
    """The loss of a batch, its rewards, and the gradients of the adapter."""
    parameters = theirs(trainer.model)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(copy.deepcopy(rows)))
    found: dict[str, Any] = {"loss": loss.item()}
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        found[name] = trainer._metrics["train"][name][-1]
    if gradients:
        loss.backward()
        found["gradients"] = {
            name: [float(f"{value:.7g}") for value in parameter.grad.flatten().tolist()]
            for name, parameter in parameters.items()
        }
    return found


def page(folder: Path) -> dict[str, Any]:
    """The content of the file; it takes half a minute."""
    import trl  # pyright: ignore[reportMissingImports]

    rows = [{**row, "images": [load_rgb(folder / name) for name in row["images"]]} for row in PAIRS]
    models: dict[str, Any] = {}
    for name, end in MODELS.items():
        processor = without_white_space(processor_of(name, folder), end)
        found = models[name] = {}
        for label, settings in SETTINGS.items():
            model = AutoModelForImageTextToText.from_pretrained(folder / name, dtype=torch.float32)
            trainer = trainer_of(model, processor, rows, folder, settings)
            set_values(theirs(trainer.model))
            if trainer.loss_types == ["aot"]:
                losses = [computed(trainer, [row], gradients=False)["loss"] for row in rows]
                found[label] = {"loss": math.fsum(losses) / len(losses)}
            else:
                found[label] = computed(trainer, rows, gradients=label in WITH_GRADIENTS)
    return {"trl": trl.__version__, "models": models}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        content = page(write_images(Path(place)))
    PAGE.write_text(json.dumps(content) + "\n", encoding="utf-8")
