"""How models compute answers: as the continuation of a text, by a decoder of their own, or as BLIP does.

A form has the logits of target tokens and generates answers. All take the inputs that encoding.py makes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from dora_mm.models.vl.vlm.encoding import IGNORED

Inputs = Mapping[str, Tensor]


class Form(Protocol):
    """What the forms have in common."""

    @property
    def continues(self) -> bool:
        """Whether the answer is part of the text that the model reads."""
        ...

    @property
    def start(self) -> int | None:
        """The token that a decoder's target begins with, where that is not the tokenizer's own."""
        ...

    def target_logits(self, model: Any, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the target tokens.

        Args:
            model: The model.
            inputs: A batch of B rows.
            labels: Token ids (B, T), IGNORED where there is no loss.

        Returns:
            Logits (B, K, V), and the target (B, K) that each predicts. Columns without a target may be left out.
        """
        ...

    def generate(self, model: Any, inputs: Inputs, settings: GenerationConfig) -> Tensor:
        """The token ids (B, T) of the generated answers, without what was read."""
        ...


class Continuation:
    """Answers are the continuation of the text: decoder-only language models."""

    continues = True
    start = None

    def target_logits(self, model: Any, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `Form.target_logits`: only columns with a target are computed, where the class can do so."""
        targets = labels[:, 1:]
        columns = torch.nonzero((targets != IGNORED).any(0)).flatten()
        selects = "logits_to_keep" in inspect.signature(model.forward).parameters and model.config.model_type != "git"
        if selects:
            logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
        else:  # GIT has logits for its image tokens, too, in front
            logits = model(**inputs, use_cache=False).logits[:, -labels.shape[1] :][:, columns]
        return logits, targets[:, columns]

    def generate(self, model: Any, inputs: Inputs, settings: GenerationConfig) -> Tensor:
        ids = model.generate(**inputs, generation_config=settings)
        return ids[:, inputs["input_ids"].shape[1] :]


class BlipCaptions:
    """BlipForConditionalGeneration: a continuation that begins with another token, and whose prompt generation cuts.

    Args:
        start: The token that it generates after, which is not the first one of its tokenizer.
    """

    continues = True
    start = None

    def __init__(self, start: int):
        self._first, self._plain = start, Continuation()

    def target_logits(self, model: Any, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `Form.target_logits`."""
        return self._plain.target_logits(model, self._begun(inputs), labels)

    def generate(self, model: Any, inputs: Inputs, settings: GenerationConfig) -> Tensor:
        """See `Form.generate`: the class takes the last token of a prompt for its end, and drops it."""
        begun = self._begun(inputs)
        ended = {name: torch.cat([begun[name], begun[name][:, -1:]], 1) for name in ("input_ids", "attention_mask")}
        ids = model.generate(**begun | ended, generation_config=settings)
        return ids[:, begun["input_ids"].shape[1] :]

    def _begun(self, inputs: Inputs) -> dict[str, Tensor]:
        ids = inputs["input_ids"].clone()
        ids[:, 0] = self._first
        return {**inputs, "input_ids": ids}


class OwnDecoder:
    """The text is read by an encoder, and a decoder answers: Florence-2, BLIP-2 with a T5."""

    continues = False
    start = None

    def target_logits(self, model: Any, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `Form.target_logits`: the model shifts the labels itself."""
        return model(**inputs, labels=labels, use_cache=False).logits, labels

    def generate(self, model: Any, inputs: Inputs, settings: GenerationConfig) -> Tensor:
        return model.generate(**inputs, generation_config=settings)


class BlipQuestions:
    """BlipForQuestionAnswering, whose own output has neither logits nor losses by row.

    Args:
        start: Its decoder's start token, which is not the first one of its tokenizer.
    """

    continues = False

    def __init__(self, start: int):
        self.start = start

    def target_logits(self, model: Any, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `Form.target_logits`: the first label, the decoder's start token, is no target."""
        ids = labels.masked_fill(labels == IGNORED, model.decoder_pad_token_id)
        output = model.text_decoder(
            input_ids=ids,
            encoder_hidden_states=self._read(model, inputs),
            encoder_attention_mask=inputs["attention_mask"],
            use_cache=False,
        )
        return output.logits[:, :-1], labels[:, 1:]

    def generate(self, model: Any, inputs: Inputs, settings: GenerationConfig) -> Tensor:
        hidden = self._read(model, inputs)
        start = torch.full((len(hidden), 1), self.start, device=hidden.device)
        ids = model.text_decoder.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=hidden,
            encoder_attention_mask=inputs["attention_mask"],
            generation_config=settings,
        )
        return ids[:, 1:]

    def _read(self, model: Any, inputs: Inputs) -> Tensor:
        images: Any = model.vision_model(pixel_values=inputs["pixel_values"])
        hidden = images.last_hidden_state
        return model.text_encoder(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            encoder_hidden_states=hidden,
            encoder_attention_mask=torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device),
        ).last_hidden_state


def form_of(name: str, config: Any) -> Form:
    """The form of a model, by the name of its class and its config."""
    if name == "BlipForQuestionAnswering":
        return BlipQuestions(config.text_config.bos_token_id)
    if name == "BlipForConditionalGeneration":
        return BlipCaptions(config.text_config.bos_token_id)
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        return OwnDecoder()
    return Continuation()


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """The cross-entropy of each target (B, T), float32; 0 where the target is IGNORED."""
    losses = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(targets_BT.shape)
