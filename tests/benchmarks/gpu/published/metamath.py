"""MetaMathQA as PEFT's method comparison trains it, scored on GSM8K."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.benchmarks.gpu.published.inputs import Inputs
from tests.benchmarks.gpu.published.record import lora_config

BUCKET = 20  # batches whose rows are sorted by length, so that little is filled up
ANSWERS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")
Tokens = list[int]


class MetaMath:
    """A language model that learns to answer questions, with its rows."""

    scores_apart = False
    frees_every = 10

    def __init__(self, inputs: Inputs, device: torch.device, settings: dict[str, Any], adapter: dict[str, Any]):
        self.inputs, self.device, self.settings = inputs, device, settings
        folder = inputs.model(settings["model_id"])
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.pad_token = self.tokenizer.eos_token
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, settings["dtype"])).to(device)
        self.config = lora_config(adapter)
        self.model: Any = get_peft_model(base, self.config, autocast_adapter_dtype=settings["autocast_adapter_dtype"])
        self.num_samples, self.num_tokens = 0, []

    def prepare(self) -> None:
        rows, template = self.inputs.rows, self.settings["query_template"]
        self.validation = [(template.format(query=q), a) for q, a in rows("gsm8k_valid")]
        self.tests = [(template.format(query=q), a) for q, a in rows("gsm8k_test")]
        texts = [template.format(query=query) + answer for query, answer in rows("metamathqa")]
        longest = self.settings["max_seq_length"]
        self.batches = batches(
            [ids[:longest] for ids in self.tokenizer(texts)["input_ids"]], self.settings["batch_size"]
        )
        self.model.eval()
        with self.model.disable_adapter(), torch.inference_mode():
            self.base_loss = self.text_loss()

    def loss(self, step: int) -> Tensor:
        rows = next(self.batches)
        self.num_samples += len(rows)
        self.num_tokens.append(sum(len(row) + 1 for row in rows))
        batch = self.padded(rows, "right")
        labels = batch["input_ids"].clone()
        for row, ids in enumerate(rows):
            labels[row, len(ids) + 1 :] = -100  # the first of what fills up is the end of the answer
        count = int(batch["attention_mask"].sum())
        return self.model(**batch, labels=labels, num_items_in_batch=count).loss

    def validate(self) -> dict[str, float]:
        return {"accuracy": self.accuracy(self.validation)}

    def test(self) -> dict[str, float]:
        return {"accuracy": self.accuracy(self.tests), "forgetting": self.text_loss() - self.base_loss}

    def padded(self, rows: Sequence[Tokens], side: str) -> Any:
        return self.tokenizer.pad({"input_ids": list(rows)}, return_tensors="pt", padding_side=side).to(self.device)

    def accuracy(self, rows: Sequence[tuple[str, str]]) -> float:
        """The share of answers that end in the number of the row."""
        answers, size = [], self.settings["batch_size_eval"]
        for start in range(0, len(rows), size):
            prompts = self.tokenizer([prompt for prompt, _ in rows[start : start + size]])["input_ids"]
            batch = self.padded(prompts, "left")
            limits = self.settings["generation_kwargs"]
            longest = min(batch["input_ids"].shape[1] + limits["max_new_tokens"], limits["max_length"])
            config = GenerationConfig(max_length=longest, pad_token_id=self.tokenizer.pad_token_id)
            answers += self.tokenizer.batch_decode(
                self.model.generate(**batch, generation_config=config), skip_special_tokens=True
            )
        return sum(is_right(answer, row) for answer, (_, row) in zip(answers, rows, strict=True)) / len(rows)

    def text_loss(self) -> float:
        """The mean loss of a token of the texts of Wikipedia."""
        losses: list[Tensor] = []
        texts, size = self.inputs.texts("wiki"), self.settings["batch_size"]
        for start in range(0, len(texts), size):
            ids = self.tokenizer(
                texts[start : start + size], truncation=True, max_length=self.settings["max_seq_length"]
            )
            batch = self.padded(ids["input_ids"], "left")
            logits = self.model(**batch).logits
            for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
                target = batch["input_ids"][row, -length:][1:]
                losses.append(F.cross_entropy(logits[row, -length:][:-1], target, reduction="none").float())
        return torch.cat(losses).mean().item()


def batches(rows: Sequence[Tokens], size: int) -> Iterator[list[Tokens]]:
    """Batches in the order of the rows, but that those of a bucket are sorted, the longest first."""
    for start in range(0, len(rows), size * BUCKET):
        bucket = sorted(rows[start : start + size * BUCKET], key=len, reverse=True)
        yield from (bucket[at : at + size] for at in range(0, len(bucket), size))


def is_right(text: str, row: str) -> bool:
    """Whether a text ends in the answer of a row."""
    found = answer_of(text)
    return found is not None and number(found) == number(answer_of(row) or "")


def answer_of(text: str) -> str | None:
    """What follows the words that begin an answer, to the end of the line; None without such words."""
    text = text.strip().rstrip(".!?")
    words = next((words for words in ANSWERS if words in text), None)
    return text.rpartition(words)[2].strip().split("\n")[0].strip(" .!?$%") if words else None


def number(text: str) -> Fraction | str:
    """The number of an answer; the text itself where it is none."""
    try:
        upper, _, lower = text.partition("/")
        return Fraction(upper.strip()) / Fraction(lower.strip() if "/" in text else 1)
    except (ValueError, ZeroDivisionError):
        return text
