"""VL-BART (Cho et al. 2021, arXiv 2102.02779): BART whose encoder reads images together with text.

    text            layernorm_embedding(tokens + positions)                   (B, L, E)
    visual tokens   LN(Linear(features)) + LN(Linear(box)) + image + object   (B, N S, E), concatenated to the text
    dropout, encoder layers, and a decoder that attends to both

B batch, L text tokens, N images (2 in NLVR2), S visual tokens per image (36; 64 frames of a video), D feature
channels, E width. Grid features have no boxes: all four corners and the area are 0, so that term is a learned constant.
The object embedding of token i is the token embedding of `<vis_extra_id_i>`.
"""

# pyright: reportArgumentType=false, reportReturnType=false
# transformers annotates numbers and tokens of a config as None or anything.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart.modeling_bart import BartEncoder, shift_tokens_right
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

NUM_SENTINELS = 100  # <extra_id_i> of the text, and as many <vis_extra_id_i>
SENTINELS = tuple(f"<{kind}_{i}>" for kind in ("extra_id", "vis_extra_id") for i in reversed(range(NUM_SENTINELS)))
BOX = 5  # x1, y1, x2, y2, area
MAX_LOGITS = 2**26  # per pass over candidates: 256 MB, and as much again for the loss


class VLInputs(NamedTuple):
    """Inputs of the encoder. The mask is 0 for padding, of text and of visual tokens (S' per image after pooling)."""

    input_ids: Tensor  # (B, L)
    attention_mask: Tensor  # (B, L + N S')
    visual_features: Tensor  # (B, N, S, D)


@strict
class VLBartConfig(BartConfig):
    """BartConfig with the settings that VL-BART adds. `vocab_size` includes the 200 sentinels, the last tokens."""

    model_type = "vl_bart"

    feature_dim: int = 2048  # channels of a visual token
    pooled_side: int | None = 6  # side that a grid is max-pooled to; None: visual tokens are not pooled (frames)
    max_images: int = 2

    def validate_visual(self) -> None:
        """Checks the added settings; `strict` calls it on construction.

        Raises:
            ValueError: A setting is not a whole number of at least 1.
        """
        for name in ("feature_dim", "pooled_side", "max_images"):
            value = getattr(self, name)
            frames = name == "pooled_side" and value is None
            if not frames and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


class VisualEmbedding(nn.Module):
    """Embeds visual features as tokens of the encoder."""

    def __init__(self, config: VLBartConfig):
        super().__init__()
        width = config.d_model
        self.pooled_side = config.pooled_side
        self.feature_embedding = nn.Sequential(nn.Linear(config.feature_dim, width), nn.LayerNorm(width))
        self.box_embedding = nn.Sequential(nn.Linear(BOX, width), nn.LayerNorm(width))
        self.image_embedding = nn.Embedding(config.max_images, width)

    def forward(self, features_BNSD: Tensor, token_embedding: Tensor) -> Tensor:
        """Embeds the features of a batch.

        Args:
            features_BNSD: Visual features (B, N, S, D).
            token_embedding: Weight of the token embedding (V, E), whose last rows are the visual sentinels.

        Returns:
            Visual tokens (B, N S', E), S' per image after pooling.

        Raises:
            ValueError: There are more images or visual tokens than the model has embeddings for.
        """
        pooled = self.pool(features_BNSD.to(token_embedding.dtype))
        count, tokens = pooled.shape[1:3]
        order = token_embedding[-tokens:].flip(0) if tokens <= NUM_SENTINELS else None
        if order is None or count > self.image_embedding.num_embeddings:
            raise ValueError(
                f"These features have {count} x {tokens} visual tokens (images x tokens per image), and VL-BART reads "
                f"at most {self.image_embedding.num_embeddings} x {NUM_SENTINELS}."
            )
        images = self.image_embedding.weight[:count, None]
        boxes = self.box_embedding(pooled.new_zeros(BOX))
        return (self.feature_embedding(pooled) + boxes + images + order).flatten(1, 2)

    def pool(self, features_BNSD: Tensor) -> Tensor:
        """Max-pools the square grid of each image.

        Args:
            features_BNSD: Visual features (B, N, S, D), S a square number unless `pooled_side` is None.

        Returns:
            (B, N, pooled_side^2, D), or the features themselves if `pooled_side` is None.

        Raises:
            ValueError: S is not a square number.
        """
        if self.pooled_side is None:
            return features_BNSD
        batch, count, tokens, _ = features_BNSD.shape
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(
                f"{tokens} visual tokens are not a square grid, so they cannot be pooled to {self.pooled_side}."
            )
        grid = features_BNSD.flatten(0, 1).mT.unflatten(2, (side, side))
        pooled = F.adaptive_max_pool2d(grid, self.pooled_side)
        return pooled.flatten(2).mT.unflatten(0, (batch, count))


class JointEncoder(BartEncoder):
    """BART's encoder over concatenated text and visual tokens. Visual tokens have no position embeddings."""

    def __init__(self, config: VLBartConfig):
        super().__init__(config)
        self.visual_embedding = VisualEmbedding(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, visual_features: Tensor, **kwargs: Any
    ) -> BaseModelOutput:
        """Encodes text and visual features.

        Args:
            input_ids: Token ids of the text (B, L).
            attention_mask: 0 for padding, 1 elsewhere (B, L + N S'), S' visual tokens per image after pooling.
            visual_features: (B, N, S, D).
            **kwargs: Passed on to the layers.

        Returns:
            `last_hidden_state` (B, L + N S', E).
        """
        embedded = self.embed_tokens(input_ids)
        text = self.layernorm_embedding(embedded + self.embed_positions(input_ids))
        visual = self.visual_embedding(visual_features, self.embed_tokens.weight)
        hidden = F.dropout(torch.cat([text, visual], dim=1), self.dropout, self.training)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden, attention_mask=attention_mask)
        for layer in self.layers:
            hidden = layer(hidden, mask, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden)


class VLBart(BartForConditionalGeneration):
    """VL-BART with a language-model head; `save_pretrained` and `from_pretrained` are those of transformers."""

    config: Any  # transformers annotates its numbers as None or anything
    config_class = VLBartConfig
    _tied_weights_keys = BartForConditionalGeneration._tied_weights_keys

    def __init__(self, config: VLBartConfig):
        super().__init__(config)
        self.model.encoder = JointEncoder(config)
        self.post_init()  # ties the token embedding of the new encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_features: Tensor | None = None,
        *,
        encoder_outputs: BaseModelOutput | None = None,
        **kwargs: Any,
    ) -> Any:
        """As BartForConditionalGeneration.forward, with visual features.

        Args:
            input_ids: Token ids of the text (B, L).
            attention_mask: 0 for padding (B, L + N S'), text and visual tokens; the decoder's cross-attention uses it
                too.
            visual_features: (B, N, S, D).
            encoder_outputs: The encoder's output, in which case ids and features are not needed.
            **kwargs: Those of BART, such as `labels` or `decoder_input_ids`.

        Returns:
            BART's output.
        """
        if encoder_outputs is None:
            assert input_ids is not None
            assert attention_mask is not None
            assert visual_features is not None
            encoder_outputs = self.model.encoder(input_ids, attention_mask, visual_features)
        return super().forward(attention_mask=attention_mask, encoder_outputs=encoder_outputs, **kwargs)

    @torch.no_grad()
    def answer_ids(
        self,
        inputs: VLInputs,
        *,
        beams: int = 1,
        max_length: int = 20,
        allowed: Callable[[int, Tensor], list[int]] | None = None,
    ) -> Tensor:
        """Decodes answers greedily or with beam search.

        Where the model's generation config has a `no_repeat_ngram_size`, that many tokens in a row occur once in an
        answer, unless only some answers are permitted.

        Args:
            inputs: A batch.
            beams: Number of beams; 1 is greedy.
            max_length: Maximum length in tokens, special tokens included.
            allowed: Maps (row, ids so far) to the permitted next ids: `prefix_allowed_tokens_fn` of transformers.

        Returns:
            Token ids (B, at most max_length).
        """
        encoded = self.model.encoder(*inputs)
        settings = GenerationConfig(
            num_beams=beams,
            max_length=min(max_length, self.config.max_position_embeddings),
            do_sample=False,
            early_stopping=beams > 1,
            no_repeat_ngram_size=0 if allowed else cast(Any, self.generation_config).no_repeat_ngram_size,
            **special_tokens(self.config),
        )
        ids = cast(Any, self).generate(  # from GenerationMixin, which the annotations hide
            generation_config=settings,
            encoder_outputs=encoded,
            attention_mask=inputs.attention_mask,
            prefix_allowed_tokens_fn=allowed,
        )
        assert isinstance(ids, Tensor)
        return ids

    @torch.no_grad()
    def next_logits(self, inputs: VLInputs, decoder_ids: Sequence[int]) -> Tensor:
        """Logits (B, V) of the token that follows `decoder_ids`, the same prefix for every row."""
        ids = inputs.input_ids.new_tensor([list(decoder_ids)]).expand(len(inputs.input_ids), -1)
        return self(*inputs, decoder_input_ids=ids, use_cache=False).logits[:, -1]

    @torch.no_grad()
    def rank_candidates(self, inputs: VLInputs, candidates: Tensor, max_logits: int = MAX_LOGITS) -> Tensor:
        """Scores candidate answers, with one pass of the encoder.

        Args:
            inputs: A batch.
            candidates: Token ids of the C candidates, padded (C, T).
            max_logits: Limits how many candidates the decoder takes at a time (at least one) by their number of logits.

        Returns:
            Log-likelihoods (B, C).
        """
        encoded = self.model.encoder(*inputs).last_hidden_state
        config = self.config
        decoder_ids = shift_tokens_right(candidates, config.pad_token_id, config.decoder_start_token_id)
        chunk = max(1, max_logits // (candidates.shape[1] * config.vocab_size))
        scores = []
        for hidden, mask in zip(encoded, inputs.attention_mask, strict=True):
            parts = []
            for start in range(0, len(candidates), chunk):
                ids, targets = decoder_ids[start : start + chunk], candidates[start : start + chunk]
                logits = self(
                    attention_mask=mask.expand(len(ids), -1),
                    encoder_outputs=BaseModelOutput(last_hidden_state=hidden.expand(len(ids), -1, -1)),
                    decoder_input_ids=ids,
                    use_cache=False,
                ).logits
                parts.append(token_log_likelihood(logits, targets, config.pad_token_id).sum(-1))
            scores.append(torch.cat(parts))
        return torch.stack(scores)


def special_tokens(config: VLBartConfig) -> dict[str, Any]:
    """The special token ids by GenerationConfig's names; the end token is forced at the maximum length."""
    names = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
    return {**{name: getattr(config, name) for name in names}, "forced_eos_token_id": config.eos_token_id}


def token_log_likelihood(logits_BTV: Tensor, targets_BT: Tensor, pad: int) -> Tensor:
    """Log-likelihood of each target token.

    Args:
        logits_BTV: (B, T, V).
        targets_BT: Token ids (B, T).
        pad: Id of the padding token.

    Returns:
        (B, T), float32; 0 where the target is padding.
    """
    losses = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=pad, reduction="none")
    return -losses.view(targets_BT.shape)
