"""The tokenizer of a language model in the place of a processor: a model whose rows are texts, without images."""

from __future__ import annotations

from typing import Any


class TextProcessor:
    """A tokenizer with the interface of a vision-language model's processor, without an image processor.

    Args:
        tokenizer: The tokenizer.
    """

    image_processor = chat_template = None  # the template is the tokenizer's

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def apply_chat_template(self, messages: Any, **settings: Any) -> Any:
        """See the method of this name of transformers' processors."""
        return self.tokenizer.apply_chat_template(messages, **settings)

    def __call__(
        self, text: list[str], images: None = None, *, return_text_replacement_offsets: bool = False, **settings: Any
    ) -> Any:
        """The inputs of texts. No text is replaced by the tokens of an image, so there are no offsets of that."""
        return self.tokenizer(text, **settings)
