"""What VL-BART reads and writes: prompts, lengths and token ids of every task.

The figures are those of the paper's runs; the only departure is `gqa: `, which they spelled `gpa: `.
"""

# pyright: reportArgumentType=false, reportReturnType=false
# transformers annotates numbers and tokens of a config as None or anything.

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import BartTokenizer

from dora_mm.models.vl_bart.model import SENTINELS

MAX_TEXT = 1024  # tokens: BART's positions


@dataclass(frozen=True)
class TaskText:
    """How a task speaks to the model. Lengths are in tokens, <s> and </s> included."""

    prompt: str
    max_input: int
    max_target: int
    beams: bool = False  # sentences are decoded by beams, answers greedily
    prompt_last: bool = False  # video: what is read comes first, and its beginning is cut where it is too long
    max_answer: int = 20  # of what is decoded


TEXTS = {
    "vqa": TaskText("vqa: ", 20, 10),
    "gqa": TaskText("gqa: ", 20, 10),
    "nlvr2": TaskText("nlvr: ", MAX_TEXT, 10),
    "caption": TaskText("caption: ", 40, 40, beams=True),
    "tvqa": TaskText("tvqa: ", 600, 20, prompt_last=True),
    "how2qa": TaskText("how2qa: ", 600, 20, prompt_last=True),
    "tvc": TaskText("tvc: ", 600, 20, beams=True, prompt_last=True),
    "yc2c": TaskText("yc2c: ", 600, 20, beams=True, prompt_last=True),
}


def encode_inputs(
    tokenizer: BartTokenizer,
    task: str,
    texts: Sequence[str],
    before: Sequence[str] | None = None,
    *,
    max_positions: int,
) -> tuple[Tensor, Tensor]:
    """(ids, mask), (B, L) each, right-padded.

    texts: questions or sentences. What is over the task's length is cut off at its end; of a video task the beginning
        of `before` (subtitles) is kept as far as there is room, so that a question is never cut away.
    max_positions: how many tokens the model has positions for, which may be fewer than the task takes.
    """
    form = TEXTS[task]
    before = before or [""] * len(texts)
    room = _room(form.max_input, max_positions)
    rows = [_row(tokenizer, form, text, first, room) for text, first in zip(texts, before, strict=True)]
    ids = pad(rows, tokenizer.pad_token_id)
    return ids, (torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])).long()


def _room(length: int, max_positions: int) -> int:
    """How many tokens fit between <s> and </s>."""
    assert max_positions > 2
    return min(length, max_positions) - 2


def _row(tokenizer: BartTokenizer, form: TaskText, text: str, before: str, room: int) -> list[int]:
    if not form.prompt_last:
        ids = plain_ids(tokenizer, form.prompt + text)[:room]
    else:
        # The space between two pieces belongs to the second, as byte-level BPE has it.
        asked = plain_ids(tokenizer, (" " if before else "") + f"{text} {form.prompt}".strip())[-room:]
        ids = plain_ids(tokenizer, before)[: room - len(asked)] + asked
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]


def encode_targets(tokenizer: BartTokenizer, task: str, answers: Sequence[str], *, max_positions: int) -> Tensor:
    """(B, T) ids, right-padded: <s> answer </s>, cut to the task's length with </s> kept.

    max_positions: how many tokens the model has positions for.
    """
    room = _room(TEXTS[task].max_target, max_positions)
    rows = [
        [tokenizer.bos_token_id, *plain_ids(tokenizer, answer)[:room], tokenizer.eos_token_id] for answer in answers
    ]
    return pad(rows, tokenizer.pad_token_id)


def decode(tokenizer: BartTokenizer, ids: Tensor) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def plain_ids(tokenizer: BartTokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


# --- tokenizers ------------------------------------------------------------------------------------------------------


def load_tokenizer(path: str) -> BartTokenizer:
    """BART's tokenizer of a folder or hub name, with VL-BART's 200 sentinels as its last tokens.

    Raises:
        ValueError: there is none, or its sentinels stand elsewhere.
    """
    try:
        tokenizer = BartTokenizer.from_pretrained(path)
    except Exception as error:  # the class itself is what tokenizers raises for a damaged file
        reason = " ".join(str(error).split())
        raise ValueError(f"model.path: {path} has no tokenizer of BART's kind: {reason}") from error
    if Path(path).is_dir() and len(tokenizer) <= len(SENTINELS):
        raise ValueError(
            f"model.path: {path} has no tokenizer of BART's kind (vocab.json and merges.txt, or tokenizer.json)"
        )
    return with_sentinels(tokenizer)


def with_sentinels(tokenizer: BartTokenizer) -> BartTokenizer:
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in SENTINELS])
    first = len(tokenizer) - len(SENTINELS)
    if tokenizer.convert_tokens_to_ids(list(SENTINELS)) != list(range(first, len(tokenizer))):
        raise ValueError(f"the tokenizer's {SENTINELS[0]} to {SENTINELS[-1]} are not its last tokens, in this order")
    return tokenizer
