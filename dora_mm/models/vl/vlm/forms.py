"""How models compute answers: as the continuation of a text, by a decoder of their own, or as BLIP does.

A form computes logits, says which token each column of them predicts, and generates answers. All take the inputs that
encoding.py makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from dora_mm.models.vl.vlm.encoding import IGNORED

Inputs = Mapping[str, Tensor]


class Form(Protocol):
    """Interface of a form: logits, their targets and generation."""

    @property
    def continues(self) -> bool:
        """Whether the answer is part of the text that the model reads."""
        ...

    @property
    def start(self) -> int | None:
        """The token that a decoder's target begins with, where that is not the tokenizer's own."""
        ...

    def logits(self, model: Any, inputs: Inputs, labels: Tensor) -> Tensor:
        """The logits that the class of a model returns, as it does.

        Args:
            model: The model.
            inputs: A batch of B rows.
            labels: Token ids (B, T), IGNORED where there is no loss.

        Returns:
            Logits (B, T, V), or more columns, in front; of a head that is given the states of fewer, those of these.
        """
        ...

    def targets(self, labels: Tensor) -> Tensor:
        """The tokens that the logits of the last T columns predict (B, T), IGNORED where nothing is learned."""
        ...

    def generate(self, model: Any, inputs: Inputs, settings: GenerationConfig, **more: Any) -> Tensor:
        """The token ids (B, T) of the generated answers, without what was read.

        Args:
            model: The model.
            inputs: What is read.
            settings: Of generation.
            **more: Further arguments of the class's `generate`.
        """
        ...


class Continuation:
    """Answers are the continuation of the text: decoder-only language models."""

    continues = True
    start = None

    def logits(self, model: Any, inputs: Inputs, labels: Tensor) -> Tensor:
        return model(**inputs, use_cache=False).logits

    def targets(self, labels: Tensor) -> Tensor:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def generate(self, model: Any, inputs: Inputs, settings: GenerationConfig, **more: Any) -> Tensor:
        ids = model.generate(**inputs, generation_config=settings, **more)
        return ids[:, inputs["input_ids"].shape[1] :]


class BlipCaptions:
    """BlipForConditionalGeneration: a continuation that begins with another token, and whose prompt generation cuts.

    Args:
        start: The token that it generates after, which is not the first one of its tokenizer.
    """

    continues = True
    start = None

    def __init__(self, start: int):
        self._first, self._forward = start, Continuation()

    def logits(self, model: Any, inputs: Inputs, labels: Tensor) -> Tensor:
        return self._forward.logits(model, self._begun(inputs), labels)

    def targets(self, labels: Tensor) -> Tensor:
        return self._forward.targets(labels)

    def generate(self, model: Any, inputs: Inputs, settings: GenerationConfig, **more: Any) -> Tensor:
        """See `Form.generate`: the class takes the last token of a prompt for its end, and drops it."""
        begun = self._begun(inputs)
        ended = {name: torch.cat([begun[name], begun[name][:, -1:]], 1) for name in ("input_ids", "attention_mask")}
        ids = model.generate(**begun | ended, generation_config=settings, **more)
        return ids[:, begun["input_ids"].shape[1] :]

    def _begun(self, inputs: Inputs) -> dict[str, Tensor]:
        ids = inputs["input_ids"].clone()
        ids[:, 0] = self._first
        return {**inputs, "input_ids": ids}


class OwnDecoder:
    """The text is read by an encoder, and a decoder answers: Florence-2, BLIP-2 with a T5."""

    continues = False
    start = None

    def logits(self, model: Any, inputs: Inputs, labels: Tensor) -> Tensor:
        """See `Form.logits`: given labels, the class would compute a loss as well, of all logits."""
        return model(**inputs, decoder_input_ids=shifted(model, labels), use_cache=False).logits

    def targets(self, labels: Tensor) -> Tensor:
        return labels

    def generate(self, model: Any, inputs: Inputs, settings: GenerationConfig, **more: Any) -> Tensor:
        return model.generate(**inputs, generation_config=settings, **more)


class BlipVQA:
    """BlipForQuestionAnswering, whose own output has neither logits nor losses by row.

    Args:
        start: Its decoder's start token, which is not the first one of its tokenizer.
    """

    continues = False

    def __init__(self, start: int):
        self.start = start

    def logits(self, model: Any, inputs: Inputs, labels: Tensor) -> Tensor:
        ids = labels.masked_fill(labels == IGNORED, model.decoder_pad_token_id)
        return model.text_decoder(
            input_ids=ids,
            encoder_hidden_states=self._read(model, inputs),
            encoder_attention_mask=inputs["attention_mask"],
            use_cache=False,
        ).logits

    def targets(self, labels: Tensor) -> Tensor:
        """See `Form.targets`: the first label, the decoder's start token, is none."""
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def generate(self, model: Any, inputs: Inputs, settings: GenerationConfig, **more: Any) -> Tensor:
        hidden = self._read(model, inputs)
        start = torch.full((len(hidden), 1), self.start, device=hidden.device)
        ids = model.text_decoder.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=hidden,
            encoder_attention_mask=inputs["attention_mask"],
            generation_config=settings,
            **more,
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
        return BlipVQA(config.text_config.bos_token_id)
    if name == "BlipForConditionalGeneration":
        return BlipCaptions(config.text_config.bos_token_id)
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        return OwnDecoder()
    return Continuation()


def shifted(model: Any, labels: Tensor) -> Tensor:
    """The decoder's input ids (B, T) for labels (B, T): its start token, and all labels but the last.

    The class of the model, or of its language model, determines how, but for Florence-2's, whose config does.
    """
    for module in model.modules():
        if hasattr(module, "prepare_decoder_input_ids_from_labels"):
            return module.prepare_decoder_input_ids_from_labels(labels=labels)
    config = model.config.get_text_config()
    ids = F.pad(labels[:, :-1], (1, 0), value=config.decoder_start_token_id)
    return ids.masked_fill(ids == IGNORED, config.pad_token_id)
