"""Tokenizers of transformers' own classes with some 600 tokens, trained on a few sentences within milliseconds."""

import json
import re
import string
from collections.abc import Iterable
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartTokenizer,
    BertTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    Qwen2Tokenizer,
    TokenizersBackend,
)

SENTENCES = [
    "What colour is the ball? The ball is red.",
    "How many boxes are there? There are three boxes, two blue and one green.",
    "Is there a yellow cat in the picture? yes, it sits on the left. no, on the right.",
    "What does the image show? The image shows a small house beside a large tree.",
    "Answer the question with a word or a short phrase. Describe this image in detail.",
    "user assistant system USER: ASSISTANT: User: Assistant: You are a helpful assistant.",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # what the BPE of Llama and Gemma falls back to

Merges = tuple[tuple[str, str], ...]


def _trained(
    tokenizer: Tokenizer, sentences: Iterable[str] = SENTENCES, **options: Any
) -> tuple[tuple[str, ...], Merges]:
    tokenizer.train_from_iterator(sentences, trainers.BpeTrainer(show_progress=False, **options))
    model = json.loads(tokenizer.to_str())["model"]
    return tuple(model["vocab"]), tuple((left, right) for left, right in model["merges"])


@cache
def _byte_level_pieces(whole: str = "") -> tuple[tuple[str, ...], Merges]:
    """Pieces and merges of a byte-level BPE, with the words of a text as one piece each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    sentences, size = ([whole], 10_000) if whole else (SENTENCES, 450)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, sentences, vocab_size=size, initial_alphabet=alphabet)


@cache
def _metaspace_pieces() -> tuple[tuple[str, ...], Merges]:
    """Pieces and merges of a BPE over characters in which a space is written as ▁."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    return _trained(tokenizer, vocab_size=250)


def _word_pieces() -> list[str]:
    """The words of the sentences and all characters: the trainer of WordPiece is not the same from run to run."""
    characters = [c for c in string.printable if not c.isspace() and not c.isupper()]
    words = re.findall(r"\w+", " ".join(SENTENCES).lower())
    return [*characters, *(f"##{c}" for c in characters), *words]


def _numbered(*groups: tuple[str, ...] | list[str]) -> dict[str, int]:
    return {piece: index for index, piece in enumerate(dict.fromkeys(piece for group in groups for piece in group))}


def llama(**names: Any) -> LlamaTokenizer:
    """Llama 1 and 2: BPE with byte fallback after `<s>`."""
    pieces, merges = _metaspace_pieces()
    words = _numbered(["<unk>", "<s>", "</s>"], BYTES, pieces)
    return LlamaTokenizer(vocab=words, merges=list(merges), pad_token="<pad>", add_bos_token=True, **names)


def gemma(**names: Any) -> GemmaTokenizer:
    """Gemma: BPE with byte fallback after `<bos>`."""
    pieces, merges = _metaspace_pieces()
    words = _numbered(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], BYTES, pieces)
    return GemmaTokenizer(vocab=words, merges=list(merges), add_bos_token=True, **names)


def qwen(whole: str = "", **names: Any) -> Qwen2Tokenizer:
    """Qwen 2 and 3: byte-level BPE; a turn stands between `<|im_start|>` and `<|im_end|>`.

    Args:
        whole: A text whose words are one token each, as those of English are in the published ones; then no other is.
        names: Special tokens.
    """
    pieces, merges = _byte_level_pieces(whole)
    tokenizer = Qwen2Tokenizer(vocab=_numbered(pieces), merges=list(merges), eos_token="<|im_end|>", **names)
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    return tokenizer


def gpt2(**names: Any) -> GPT2Tokenizer:
    """GPT-2, SmolLM2 and OPT: byte-level BPE."""
    pieces, merges = _byte_level_pieces()
    return GPT2Tokenizer(vocab=_numbered(pieces), merges=list(merges), **names)


def bart(**names: Any) -> BartTokenizer:
    """BART: byte-level BPE between `<s>` and `</s>`."""
    pieces, merges = _byte_level_pieces()
    words = _numbered(["<s>", "<pad>", "</s>", "<unk>"], pieces, ["<mask>"])
    return BartTokenizer(vocab=words, merges=list(merges), **names)


def bert(**names: Any) -> BertTokenizer:
    """BERT: lower-case WordPiece between `[CLS]` and `[SEP]`."""
    return BertTokenizer(vocab=_numbered(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], _word_pieces()), **names)


def llama3(**names: Any) -> TokenizersBackend:
    """Llama 3: byte-level BPE after `<|begin_of_text|>`."""
    pieces, merges = _byte_level_pieces()
    begin = "<|begin_of_text|>"
    tokenizer = Tokenizer(models.BPE(vocab=_numbered(pieces, [begin]), merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, len(pieces))]
    )
    return TokenizersBackend(tokenizer_object=tokenizer, bos_token=begin, **names)
