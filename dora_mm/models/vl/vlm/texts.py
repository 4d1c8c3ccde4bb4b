"""The tokenizer of a language model in the place of a processor: a model whose rows are texts, without images."""

from __future__ import annotations

from typing import Any


class TextProcessor:
    """What the processors of vision-language models are, without an image processor.

    Args:
        tokenizer: The tokenizer.
    """

    image_processor = None

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @property
    def chat_template(self) -> str | None:
        """The template of conversations; None: there is none."""
        return self.tokenizer.get_chat_template() if self.tokenizer.chat_template else None

    def apply_chat_template(self, messages: Any, **settings: Any) -> Any:
        """See the method of this name of transformers' processors."""
        return self.tokenizer.apply_chat_template(messages, **settings)

    def __call__(
        self, text: list[str], images: None = None, *, return_text_replacement_offsets: bool = False, **settings: Any
    ) -> Any:
        """The inputs of texts. No text is replaced by the tokens of an image, so there are no offsets of that."""
        return self.tokenizer(text, **settings)
