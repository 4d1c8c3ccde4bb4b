"""The tokenizer of the small VL-BART: byte-pair merges learned from its training texts."""

# pyright: reportArgumentType=false, reportReturnType=false
# transformers annotates numbers and tokens of a config as optional or untyped.

import json
from collections.abc import Iterable

from tokenizers import ByteLevelBPETokenizer
from transformers import BartTokenizer

from dora_mm.models.vl.vl_bart.text import with_sentinels

MAX_TEXT = 1024  # tokens: the number of BART's positions


def train_tokenizer(texts: Iterable[str], num_merges: int) -> BartTokenizer:
    """Trains a byte-level BPE on these texts, with BART's special tokens; it can encode any text."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe = ByteLevelBPETokenizer()
    vocab_size = len(special) + 256 + num_merges
    bpe.train_from_iterator(texts, vocab_size=vocab_size, min_frequency=2, special_tokens=special, show_progress=False)
    vocab = bpe.get_vocab()
    merges = [tuple(line.split(" ")) for line in _merges(bpe)]
    vocab["<mask>"] = len(vocab)
    return with_sentinels(BartTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TEXT))


def _merges(bpe: ByteLevelBPETokenizer) -> list[str]:
    found = json.loads(bpe._tokenizer.to_str())["model"]["merges"]
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in found]
