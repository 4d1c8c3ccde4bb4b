"""What the small flow models share: a chat tokenizer, and how they are saved."""

import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from dora_mm.models.images.flow_model import FlowModel

END, START_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# For text it writes what the template of the published model writes.
TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], num_merges: int, marks: Sequence[str] = ()) -> Qwen2Tokenizer:
    """Trains Qwen's tokenizer on these texts: a byte-level BPE, which can encode any text, and the marks of a chat.

    Args:
        texts: The texts.
        num_merges: Byte-pair merges.
        marks: Texts that are a token each, beside the marks of a turn.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    untrained = Qwen2Tokenizer(vocab={token: index for index, token in enumerate(alphabet)}).backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = untrained.normalizer, untrained.pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + num_merges, initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    bpe.train_from_iterator([*texts, "user\n", "assistant\n"] * 2, trainer)
    found = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(pair) for pair in found["merges"]]  # annotated as texts
    tokenizer = Qwen2Tokenizer(
        vocab=found["vocab"],
        merges=merges,
        eos_token=END_TURN,
        pad_token=END,
        additional_special_tokens=[START_TURN, END_TURN, *marks],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save(model: FlowModel, folder: Path) -> None:
    """Saves a folder of diffusers with fp16 weights that is loaded in float32; of the VAE only the config, no weights.

    It is used with `model.vae`, the folder with the VAE's weights.
    """
    halved = {name: copy.deepcopy(network).half() for name, network in model.networks.items() if name != "vae"}
    components = {name: model.components[name] for name in model.components.names}
    model.pipeline_class()(**{**components, **halved}).save_pretrained(folder)  # with its own scheduler
    for weights in (folder / "vae").glob("*.safetensors"):
        weights.unlink()
    # diffusers loads in float32 by default, transformers in the dtype of the config: both must be the same.
    file = folder / "text_encoder" / "config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text(encoding="utf-8")), "dtype": "float32"}, indent=2) + "\n",
        encoding="utf-8",
    )
