"""Text of VL-BART: token ids of every task. Prompts and lengths are those of the task's record."""

# pyright: reportArgumentType=false, reportReturnType=false
# transformers annotates numbers and tokens of a config as None or anything.

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import BartTokenizer

from dora_mm.models.opening import opening
from dora_mm.models.vl.vl_bart.model import SENTINELS
from dora_mm.registries.vl_tasks import TASKS, BartText


def bart_text(task: str) -> BartText:
    """The text format of VL-BART (prompt and lengths) in a task, which must be one of its own."""
    form = TASKS[task].bart
    assert form is not None, task
    return form


def encode_inputs(
    tokenizer: BartTokenizer,
    task: str,
    texts: Sequence[str],
    before: Sequence[str] | None = None,
    *,
    max_positions: int,
) -> tuple[Tensor, Tensor]:
    """Tokenizes the input texts of a batch, with the prompt of their task.

    Args:
        tokenizer: The model's tokenizer.
        task: Name of a task of VL-BART.
        texts: B questions or sentences. Text beyond the task's length is cut off at the end.
        before: The subtitles of video tasks, which come before the question and are cut to the room that the question
            leaves, so that no question is lost.
        max_positions: The model's number of positions, which may be less than the length of the task.

    Returns:
        Token ids and attention mask (0 for padding), (B, L) each, padded at the right.
    """
    before = before or [""] * len(texts)
    room = _room(bart_text(task).max_input, max_positions)
    rows = [_input_ids(tokenizer, task, text, first, room) for text, first in zip(texts, before, strict=True)]
    ids = pad(rows, tokenizer.pad_token_id)
    return ids, (torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])).long()


def _room(length: int, max_positions: int) -> int:
    """Number of tokens that fit between <s> and </s>."""
    assert max_positions > 2
    return min(length, max_positions) - 2


def _input_ids(tokenizer: BartTokenizer, task: str, text: str, before: str, room: int) -> list[int]:
    prompt = bart_text(task).prompt
    if not TASKS[task].clips:
        ids = unpadded_ids(tokenizer, prompt + text)[:room]
    else:
        # In byte-level BPE the space between two pieces belongs to the second.
        question = unpadded_ids(tokenizer, (" " if before else "") + f"{text} {prompt}".strip())[-room:]
        ids = unpadded_ids(tokenizer, before)[: room - len(question)] + question
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]


def encode_targets(tokenizer: BartTokenizer, task: str, answers: Sequence[str], *, max_positions: int) -> Tensor:
    """Tokenizes the answers of a batch as decoder targets: <s> answer </s>, truncated to the task's length.

    Args:
        tokenizer: The model's tokenizer.
        task: Name of a task of VL-BART.
        answers: B answers.
        max_positions: The model's number of positions, which may be less than the length of the task.

    Returns:
        Token ids (B, T), padded at the right; </s> is kept when an answer is truncated.
    """
    room = _room(bart_text(task).max_target, max_positions)
    rows = [
        [tokenizer.bos_token_id, *unpadded_ids(tokenizer, answer)[:room], tokenizer.eos_token_id] for answer in answers
    ]
    return pad(rows, tokenizer.pad_token_id)


def decode(tokenizer: BartTokenizer, ids: Tensor) -> list[str]:
    """The texts of token ids (B, T), without special tokens and surrounding spaces."""
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def unpadded_ids(tokenizer: BartTokenizer, text: str) -> list[int]:
    """Token ids without <s> and </s>, and without a warning about length."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of ids as one tensor (B, length of the longest row), padded with `value` at the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


# --- tokenizers ------------------------------------------------------------------------------------------------------


def load_tokenizer(path: str) -> BartTokenizer:
    """Loads BART's tokenizer from a folder or hub name, with VL-BART's 200 sentinels as its last tokens.

    Raises:
        ValueError: There is no such tokenizer, or the sentinels are not its last tokens.
    """
    with opening(path, f"{path} does not contain a BART tokenizer", key="model.path"):
        tokenizer = BartTokenizer.from_pretrained(path)
    if Path(path).is_dir() and len(tokenizer) <= len(SENTINELS):
        raise ValueError(
            f"model.path: {path} does not contain a BART tokenizer (vocab.json and merges.txt, or tokenizer.json)"
        )
    return with_sentinels(tokenizer)


def with_sentinels(tokenizer: BartTokenizer) -> BartTokenizer:
    """Adds the sentinels, in place, where they are missing.

    Raises:
        ValueError: The sentinels are not the last tokens, in the order of SENTINELS.
    """
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in SENTINELS])
    first = len(tokenizer) - len(SENTINELS)
    if tokenizer.convert_tokens_to_ids(list(SENTINELS)) != list(range(first, len(tokenizer))):
        raise ValueError(f"the last tokens of the tokenizer must be {SENTINELS[0]} to {SENTINELS[-1]}, in this order")
    return tokenizer
