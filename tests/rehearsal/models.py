"""Full-size models with random weights on disk, in the layouts, names and dtypes of the published ones."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor

from dora_mm.formats.files.model_folder import ModelFolder
from dora_mm.models.images.components import empty_network
from tests.rehearsal.weights import specs_of, write_file, write_weights
from tests.shared import full_size_folders as full_size
from tests.shared.single_files import ENCODERS, single_tensors
from tests.shared.vl import qwen_models, templates, vocabularies

EMBEDDER, PLACES = "conditioner.embedders.0.transformer", "text_model.embeddings.position_ids"
ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
IDEFICS = ["<fake_token_around_image>", "<image>", "<global-img>", *ROWS, "<end_of_utterance>"]
QWEN_WORDS = 151_643  # before the special ones
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"]
QWEN += ["<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
QWEN += ["<|image_pad|>", "<|video_pad|>"]


def sdxl(folder: Path) -> None:
    """SDXL base 1.0 as a folder of diffusers, in float16."""
    full_size.sdxl(folder)
    _fill(folder, _sdxl_tensors(folder), torch.float16)


def single(folder: Path) -> None:
    """SDXL base 1.0 as a single file, in float16."""
    folder.mkdir(parents=True)
    with TemporaryDirectory() as described:
        tensors = single_tensors(_sdxl_tensors(full_size.sdxl(Path(described) / "configs")))
    tensors[f"{EMBEDDER}.{PLACES}"] = _places()
    write_file(folder / "sd_xl_base_1.0.safetensors", specs_of(dict(sorted(tensors.items())), torch.float16))


def _sdxl_tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each network by the names on the hub."""
    found = _tensors(folder, ("unet", "vae", *ENCODERS))
    for name in ENCODERS:
        found[name] = {key if key.startswith("text_") else f"text_model.{key}": t for key, t in found[name].items()}
    return found


def _places() -> Tensor:
    """Of tokens, which are in the published files, and are not read."""
    return torch.empty(1, 77, dtype=torch.int64, device="meta")


def z_image(folder: Path) -> None:
    """Z-Image as a folder of diffusers, in bfloat16."""
    full_size.z_image(folder)
    _fill(folder, _tensors(folder, ("transformer", "vae", "text_encoder")), torch.bfloat16)


def klein(folder: Path) -> None:
    """FLUX.2 klein base 4B as a folder of diffusers, in bfloat16."""
    full_size.flux2_klein(folder)
    _fill(folder, _tensors(folder, ("transformer", "vae", "text_encoder")), torch.bfloat16)


def qwen_image(folder: Path) -> None:
    """Qwen-Image in bfloat16, of which 6 of 60 blocks and 6 of 28 layers of the text encoder are left."""
    full_size.qwen_image(folder)
    _cut(folder / "transformer", num_layers=6)
    _cut(folder / "text_encoder", text_config={"num_hidden_layers": 6}, vision_config={"depth": 8})
    _fill(folder, _tensors(folder, ("transformer", "vae", "text_encoder")), torch.bfloat16)


def krea2(folder: Path) -> None:
    """Krea 2 in bfloat16, of which 8 of 28 blocks are left; the text encoder has all of its layers."""
    full_size.krea2(folder)
    _cut(folder / "transformer", num_layers=8)
    _fill(folder, _tensors(folder, ("transformer", "vae", "text_encoder")), torch.bfloat16)


def _cut(folder: Path, **changes: Any) -> None:
    """Changes the config of a network, in sections too."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(values))


def _tensors(folder: Path, names: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """Those of networks, on the meta device."""
    files = ModelFolder(folder)
    return {name: empty_network(files, name).state_dict(keep_vars=True) for name in names}


def _fill(folder: Path, networks: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype) -> None:
    for name, tensors in networks.items():
        is_text = name.startswith("text_encoder")
        tensors = {**tensors, PLACES: _places()} if is_text and "text_encoder_2" in networks else tensors
        stem = "model" if is_text else "diffusion_pytorch_model"
        write_weights(folder / name, stem, specs_of(tensors, dtype), most=10**10)


def smolvlm(folder: Path) -> None:
    """SmolVLM-256M-Instruct in bfloat16: published with 49,280 rows for tokens, tied to nothing."""
    pieces, merges = vocabularies._byte_level_pieces()
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *pieces]
    words += [f"unused{number}" for number in range(49_152 - len(words))]
    names = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    tokenizer = transformers.GPT2Tokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=list(merges),
        unk_token="<|endoftext|>",
        extra_special_tokens=IDEFICS,
        model_max_length=8192,
        **names,
    )
    processor = transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessor(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}),
        tokenizer,
        image_seq_len=64,
        chat_template=templates.idefics("<|im_start|>"),
    )
    text = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    text |= {"num_key_value_heads": 3, "vocab_size": 49_280, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
    text |= {"model_type": "llama", "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "tie_word_embeddings": False}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = transformers.Idefics3Config(
        text_config=text,
        vision_config=vision | {"model_type": "idefics3_vision", "image_size": 512, "patch_size": 16},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=4,
        tie_word_embeddings=False,
        pad_token_id=2,
    )
    _save_vlm(folder, transformers.Idefics3ForConditionalGeneration, config, processor, lambda name: name)


def qwen(folder: Path) -> None:
    """Qwen2.5-VL-3B-Instruct in bfloat16."""
    pieces, merges = vocabularies._byte_level_pieces()
    words = [*pieces, *(f"unused{number}" for number in range(QWEN_WORDS - len(pieces)))]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=list(merges),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.add_tokens([transformers.AddedToken(word, special=True) for word in QWEN], special_tokens=True)
    tokenizer.model_max_length = 32_768
    pixels: Any = {"size": {"shortest_edge": 56 * 56, "longest_edge": 12_845_056}, "patch_size": 14}
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(**pixels),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**pixels),
        chat_template=templates.chatml(qwen_models.IMAGE, qwen_models.SYSTEM),
    )
    text = {"hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16}
    text |= {"num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
    text |= {"model_type": "qwen2_5_vl_text", "bos_token_id": QWEN_WORDS, "eos_token_id": QWEN_WORDS + 2}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 2048, "num_heads": 16}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text | {"pad_token_id": QWEN_WORDS, "tie_word_embeddings": True},
        vision_config=vision | {"fullatt_block_indexes": [7, 15, 23, 31]},
        tie_word_embeddings=True,
        **qwen_models.ids(tokenizer),
    )

    def published(name: str) -> str:
        return name.replace("model.visual", "visual").replace("language_model.", "")

    _save_vlm(folder, transformers.Qwen2_5_VLForConditionalGeneration, config, processor, published)


def _save_vlm(folder: Path, kind: Any, config: Any, processor: Any, published: Callable[[str], str]) -> None:
    processor.save_pretrained(folder)
    config.architectures, config.dtype = [kind.__name__], torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = kind(config)
    model.tie_weights()
    tensors = {published(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    write_weights(folder, "model", specs_of(tensors, torch.bfloat16))
    of_text, tokenizer = config.get_text_config(), processor.tokenizer
    ids = {"bos_token_id": of_text.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    transformers.GenerationConfig(**ids, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
